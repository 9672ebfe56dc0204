from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_artifacts.accumulator import accumulate
from moe_artifacts.calibration.economic import Boundary, choose_steps, fit_boundary
from moe_artifacts.config import ThresholdConfig, from_dict, to_dict
from moe_artifacts.decision import decide, path_statistic
from moe_artifacts.errors import CalibrationError, ConfigError, InputError
from moe_artifacts.policy import Run, apply_rule, outcome

# --- a world that is known exactly -----------------------------------------------------------------------------------


def signals(prior: int, accuracy: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Every path of a signal that is right ``accuracy`` times of 8, as often as it comes: no sampling error.

    Returns:
        True posteriors [image step] and labels, of 8 ** (steps + 1) images, of which prior / 8 are bad.
    """
    prob, bad, count = [], [], []
    for label, path in itertools.product((True, False), itertools.product((True, False), repeat=steps)):
        odds, times, posteriors = prior / (8 - prior), prior if label else 8 - prior, []
        for alarm in path:
            odds *= accuracy / (8 - accuracy) if alarm else (8 - accuracy) / accuracy
            times *= accuracy if alarm == label else 8 - accuracy
            posteriors.append(round(odds / (1 + odds), 12))  # equal states are equal numbers
        prob.append(posteriors)
        bad.append(label)
        count.append(times)
    return np.repeat(prob, count, axis=0), np.repeat(bad, count)


def exact_cost(prior: int, accuracy: int, calls: list[int], total: int, check: float, clear: bool) -> float:
    """Lowest cost per clean image in that world, by dynamic programming on the number of alarms, the price by halving."""
    right, wrong = accuracy / 8, 1 - accuracy / 8

    def least(price: float, t: int, odds: float) -> float:
        """Of an image after check t, before which all was spent already."""
        bad = odds / (1 + odds)
        finish = total - calls[t] - price * (1 - bad)
        if t == len(calls) - 1:
            return min(0.0, finish)
        alarm = bad * right + (1 - bad) * wrong
        later = alarm * least(price, t + 1, odds * right / wrong) + (1 - alarm) * least(
            price, t + 1, odds * wrong / right
        )
        go_on = calls[t + 1] - calls[t] + check + later
        return min(0.0, go_on, finish if clear else go_on)

    def gain(price: float) -> float:
        odds, bad = prior / (8 - prior), prior / 8
        alarm = bad * right + (1 - bad) * wrong
        first = alarm * least(price, 0, odds * right / wrong) + (1 - alarm) * least(price, 0, odds * wrong / right)
        return calls[0] + check + first

    low, high = 0.0, 100.0 * total
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return high


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize(
    ("prior", "accuracy", "check"), [(2, 6, 0.1), (2, 7, 0.5), (4, 6, 0.02), (1, 7, 0.2), (3, 5, 0.0)]
)
def test_the_boundary_is_the_one_of_exact_dynamic_programming(
    prior: int, accuracy: int, check: float, clear: bool
) -> None:
    calls, total = [3, 5, 8], 20
    prob, bad = signals(prior, accuracy, 3)
    found = fit_boundary(prob, bad, np.array(calls), total, check, clear=clear)
    expected = exact_cost(prior, accuracy, calls, total, check, clear)
    assert found.cost_per_clean == pytest.approx(expected, rel=1e-9)  # halving stops there
    assert found.price == found.cost_per_clean  # the fixed point
    assert found.multiplier == 0


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 6), st.integers(5, 7), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.7, 3.0])
)
def test_no_boundary_is_cheaper_of_all_there_are(
    prior: int, accuracy: int, first: int, stride: int, check: float
) -> None:
    prob, bad = signals(prior, accuracy, 2)
    calls, total = np.array([first, first + stride]), 20
    run = Run(bad, calls, check, total)
    values = [np.append(np.unique(column), 2.0) for column in prob.T]
    costs = []
    for abort, later, clear in itertools.product(values[0], values[1], np.append(0.0, values[0])):
        cleared = np.where((prob[:, 0] < clear) & (prob[:, 0] < abort), 0, 2)
        column = np.where(prob[:, 0] >= abort, 0, np.where((prob[:, 1] >= later) & (cleared == 2), 1, 2))
        costs.append(outcome(run, column, clear=cleared).cost_per_clean)
    found = fit_boundary(prob, bad, calls, total, check)
    assert found.cost_per_clean / (total / (~bad).mean()) - 1 == pytest.approx(min(costs), abs=1e-9)  # sums round


def noisy(seed: int, images: int, steps: int, bad_share: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Posteriors of no particular quality."""
    rng = np.random.default_rng(seed)
    bad = rng.random(images) < bad_share
    bad[:2] = True, False
    logit = (rng.normal(size=(images, steps)) + bad[:, None] - 1).cumsum(axis=1)
    return 1 / (1 + np.exp(-logit)), bad


limits = st.sampled_from([None, 0.02, 0.05, 0.2, 0.6])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(10, 300), st.integers(1, 4), limits, st.sampled_from([0.0, 0.1, 1.0]))
def test_never_dearer_than_the_best_flat_threshold_and_within_the_limit(
    seed: int, images: int, steps: int, limit: float | None, check: float
) -> None:
    prob, bad = noisy(seed, images, steps)
    calls, total = np.arange(2, 2 + 3 * steps, 3), 20
    found = fit_boundary(prob, bad, calls, total, check, max_false_aborts=limit)
    assert found.false_abort_rate <= (1 if limit is None else limit)
    run, highest = Run(bad, calls, check, total), np.maximum.accumulate(prob, axis=1)
    for threshold in [*np.unique(highest), 2.0]:
        column = (highest < threshold).sum(axis=1)
        flat = outcome(run, column)
        if flat.false_abort_rate <= (1 if limit is None else limit):
            assert found.cost_per_clean <= (1 + flat.cost_per_clean) * total / (~bad).mean() + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(30, 300), st.integers(1, 4), limits)
def test_what_it_says_of_itself_is_what_the_rule_does(seed: int, images: int, steps: int, limit: float | None) -> None:
    prob, bad = noisy(seed, images, steps)
    prob = prob.astype(np.float32).astype(float)  # as the rule compares them
    found = fit_boundary(prob, bad, np.arange(2, 2 + 3 * steps, 3), 20, 0.1, max_false_aborts=limit)
    gap = np.abs(prob - found.abort)
    assume(not ((gap > 0) & (gap < 1e-6)).any())  # float32: so close an image may fall on either side
    run = Run(bad, found.calls, 0.1, 20)
    did = apply_rule(run, found.statistic(prob), 0.5, found.clear_step(prob))
    assert did.false_abort_rate == pytest.approx(found.false_abort_rate)
    assert (1 + did.cost_per_clean) * 20 / (~bad).mean() == pytest.approx(found.cost_per_clean)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0.3, 0.8))
def test_the_same_statistic_as_the_decision_rule(seed: int, steps: int, threshold: float) -> None:
    prob, bad = noisy(seed, 200, steps)
    found = fit_boundary(prob, bad, np.arange(2, 2 + 3 * steps, 3), 20, 0.1)
    rule = from_dict(ThresholdConfig, to_dict(found.rule()))
    tensor = torch.from_numpy(prob.astype(np.float32))
    acc, progress = accumulate(tensor, torch.zeros_like(tensor)), torch.from_numpy(found.calls / 20)
    statistic = path_statistic(rule, tensor, acc, progress)
    assert found.statistic(prob) == pytest.approx(statistic.numpy(), abs=1e-6)  # a subtraction in float32
    statistic = torch.from_numpy(found.statistic(prob))
    assume((statistic - threshold).abs().min() > 1e-6)
    decided = decide(ThresholdConfig(**{**to_dict(rule), "threshold": threshold}), tensor, acc, progress)
    cleared = torch.from_numpy(found.clear_step(prob))
    aborted = (statistic < threshold).sum(dim=1)
    assert decided.abort_step.equal(torch.where(aborted <= cleared, aborted, steps))
    assert decided.clear_step.equal(torch.where(cleared < aborted, cleared, steps))


def fitted(limit: float | None = None, check: float = 0.12, clear: bool = True) -> Boundary:
    prob, bad = noisy(7, 4_000, 4, bad_share=0.2)
    return fit_boundary(prob, bad, np.array([3, 6, 9, 12]), 20, check, max_false_aborts=limit, clear=clear)


def test_a_limit_that_binds_has_a_price_and_uses_up_what_it_leaves() -> None:
    free, limited = fitted(), fitted(0.02)
    assert free.false_abort_rate > 0.02 and free.multiplier == 0
    assert limited.multiplier > 1 and limited.cost_per_clean > free.cost_per_clean
    assert 0.02 - 1 / 2_000 < limited.false_abort_rate <= 0.02  # one clean image of about 3,200
    assert (limited.abort > free.abort).all()
    loose = fitted(0.9)
    assert (loose.cost_per_clean, loose.multiplier) == (free.cost_per_clean, free.multiplier)


def test_clearing_depends_on_what_a_check_costs() -> None:
    assert (fitted(check=0.0).clear == 0).all()  # another look costs nothing
    some, most = fitted(check=0.12), fitted(check=1.0)
    assert (some.clear[:3] > 0).all() and (most.clear[:3] > some.clear[:3]).all() and some.clear[3] == 0
    assert some.cost_per_clean < fitted(clear=False).cost_per_clean
    assert (fitted(clear=False).clear == 0).all()


def test_a_posterior_off_its_scale_gives_the_same_boundary() -> None:
    prob, bad = noisy(3, 3_000, 3)
    calls = np.array([3, 6, 9])
    plain, squared = (fit_boundary(p, bad, calls, 20, 0.1, max_false_aborts=0.05) for p in (prob, prob**2))
    assert squared.cost_per_clean == pytest.approx(plain.cost_per_clean, rel=5e-3)  # bins fall a little differently
    assert np.sqrt(squared.abort[squared.abort < 1]) == pytest.approx(plain.abort[plain.abort < 1], abs=0.1)


# --- choice of steps -------------------------------------------------------------------------------------------------


def test_steps_are_chosen_by_what_they_bring_and_each_choice_is_priced_once() -> None:
    asked: list[tuple[int, ...]] = []

    def cost(steps: tuple[int, ...]) -> float:
        asked.append(steps)
        return 0.3 * len(steps) - sum({1: 1.0, 3: 0.5, 4: 0.2}.get(s, 0.0) for s in steps)

    assert choose_steps(cost, 6) == (1, 3)
    assert len(asked) == len(set(asked)) and all(list(steps) == sorted(steps) for steps in asked)
    assert choose_steps(cost, 6, most=1) == (1,)
    assert choose_steps(cost, 6, gain=0.25) == (1,)  # step 3 brings 0.2 after its price


def test_a_step_that_later_ones_make_useless_is_taken_out() -> None:
    costs = {(1,): 0.0, (0, 1): -1.0, (1, 2): -0.9, (0, 1, 2): -2.0, (0, 2): -2.5}
    assert choose_steps(lambda steps: costs.get(steps, 1.0), 3) == (0, 2)


def test_steps_on_fitted_posteriors_beat_the_best_single_one() -> None:
    prob, bad = noisy(5, 2_000, 6, bad_share=0.2)
    calls = np.arange(2, 14, 2)

    def cost(steps: tuple[int, ...]) -> float:
        return fit_boundary(prob[:, steps], bad, calls[list(steps)], 20, 0.1, max_false_aborts=0.05).cost_per_clean

    chosen = choose_steps(cost, 6)
    assert len(chosen) > 1
    assert cost(chosen) < min(cost((s,)) for s in range(6))


# --- bad input -------------------------------------------------------------------------------------------------------

PROB, BAD, CALLS = np.full((4, 2), 0.5), np.array([True, False, True, False]), np.array([3, 6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prob": np.array([[0.1, np.nan]] * 4)}, r"prob must be \[image step\] in \[0, 1\] without NaN"),
        ({"prob": np.full((4, 2), 1.1)}, "prob must be"),
        ({"prob": np.zeros((4, 0))}, "prob must be"),
        ({"bad": BAD[:3]}, r"bad must have shape \(4,\)"),
        ({"bad": BAD.astype(float)}, "bad must be bool, one per image, got float64"),
        ({"calls": np.array([6, 3])}, "calls must rise from 1"),
        ({"calls": np.array([0, 3])}, "calls must rise from 1"),
        ({"calls": np.array([3, 20])}, "below total_calls=20.*leave the last step out"),
        ({"calls": np.array([3, 6, 9])}, r"calls must have shape \(2,\)"),
        ({"check_cost": -0.1}, "check_cost must be"),
        ({"check_cost": math.nan}, "check_cost must be"),
        ({"max_false_aborts": 0.0}, "max_false_aborts must be between 0 and 1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change: dict[str, object], message: str) -> None:
    arguments = {"prob": PROB, "bad": BAD, "calls": CALLS, "total_calls": 20, "check_cost": 0.1} | change
    with pytest.raises(InputError, match=message):
        fit_boundary(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((0.5, 0.5),),
        ((0.5, 2.5, 0.0),),
        ((1.5, 0.5, 0.0),),
        ((0.5, 0.5, -0.1),),
        ((0.5, 0.5, 0.0), (0.5, 0.6, 0.0)),
    ],
)
def test_a_stored_boundary_out_of_range_is_refused(points: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="boundary must be"):
        ThresholdConfig(rule="economic", threshold=0.5, boundary=points)


def test_a_boundary_belongs_to_the_economic_rule() -> None:
    for rule, points in (("economic", None), ("posterior", ((0.5, 0.5, 0.0),))):
        with pytest.raises(ConfigError, match="boundary belongs to the economic rule"):
            ThresholdConfig(rule=rule, threshold=0.5, boundary=points)


@pytest.mark.parametrize("bad", [np.zeros(4, dtype=bool), np.ones(4, dtype=bool)])
def test_one_class_is_not_enough(bad: np.ndarray) -> None:
    with pytest.raises(CalibrationError, match=r"both classes, got [04] bad of 4 images"):
        fit_boundary(PROB, bad, CALLS, 20, 0.1)


@pytest.mark.parametrize(("num_steps", "most"), [(0, 3), (3, 0)])
def test_nothing_to_choose_is_refused(num_steps: int, most: int) -> None:
    with pytest.raises(InputError, match="num_steps and most must be at least 1"):
        choose_steps(lambda steps: 0.0, num_steps, most=most)


def test_ties_everywhere_give_a_boundary() -> None:
    found = fit_boundary(
        np.full((100, 3), 0.5), np.arange(100) < 30, np.array([2, 4, 6]), 20, 0.1, max_false_aborts=0.05
    )
    assert found.false_abort_rate == 0  # all or none
