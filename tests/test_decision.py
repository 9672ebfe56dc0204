from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from moe_artifacts.accumulator import Accumulated, accumulate
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.decision import Decider, abort_boundary, abort_step, clear_step, decide, path_statistic
from moe_artifacts.errors import InputError

RULES = {
    "cumulative": {},
    "cumulative-with-clear": {"clear_threshold": 0.3},
    "posterior": {},
    "patience-1": {"patience": 1},
    "patience-3": {"patience": 3},
    "patience-longer-than-any-run": {"patience": 10**12},
    "q-exit-0": {"q": 0.0},
    "q-exit": {"q": 0.5},
    "economic": {"boundary": ((0.0, 0.5, 0.0), (0.25, 0.25, 0.125), (1.0, 0.75, 0.25))},
    "economic-one-point": {"boundary": ((0.5, 0.5, 0.25),)},
    "economic-never-clears": {"boundary": ((0.0, 0.25, 0.0), (1.0, 1.5, 0.0))},
}
every_rule = pytest.mark.parametrize("name", RULES)
# Sixteenths: float32 and Python then agree on every comparison with a threshold, and ties are common.
probs = st.lists(st.integers(0, 16).map(lambda n: n / 16), min_size=1, max_size=12)
thresholds = st.integers(0, 16).map(lambda n: n / 16)


def make_rule(name: str, threshold: float = 0.4) -> ThresholdConfig:
    rule = next(r for r in ("cumulative", "posterior", "patience", "q-exit", "economic") if name.startswith(r))
    return ThresholdConfig(rule=rule, threshold=threshold, **RULES[name])


def make_batch(seed: int, batch: int, steps: int) -> tuple[Tensor, Accumulated]:
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(batch, steps, generator=generator)
    return prob, accumulate(prob, torch.rand(batch, steps, generator=generator))


def even(steps: int) -> Tensor:
    """Progress of steps that are evenly spaced, in sixteenths, so that a boundary over it is exact too."""
    return (torch.arange(steps) + 1) / 16


def boundary_at(rule: ThresholdConfig, progress: float) -> tuple[float, float]:
    """Where to abort and where to clear, as told: linear between points, constant outside."""
    points = rule.boundary
    if progress <= points[0][0]:
        return points[0][1:]
    for (u0, *before), (u1, *after) in pairwise(points):
        if progress <= u1:
            share = (progress - u0) / (u1 - u0)
            return tuple(a + share * (b - a) for a, b in zip(before, after, strict=True))
    return points[-1][1:]


def economic_by(rule: ThresholdConfig, threshold: float, prob: list[float]) -> tuple[int, int]:
    """The economic rule without a path statistic: the step of the abort and that of the clearing."""
    for t, a in enumerate(prob):
        abort_at, clear_below = boundary_at(rule, (t + 1) / 16)
        if a >= abort_at + 2 * threshold - 1:
            return t, len(prob)
        if a < clear_below:
            return len(prob), t
    return len(prob), len(prob)


def score_at(t: int, rows: Tensor, prob: Tensor, acc: Accumulated) -> SimpleNamespace:
    """What a scorer returns for the rows still running at one step."""
    return SimpleNamespace(
        artifact_prob=prob[rows, t],
        exit_cdf=acc.exit_cdf[rows, t],
        cumulative_artifact_prob=acc.cumulative_artifact_prob[rows, t],
        cumulative_clean_prob=acc.cumulative_clean_prob[rows, t],
    )


@every_rule
@given(prob=probs, threshold=thresholds)
def test_aborts_where_the_rule_as_it_is_told_aborts(name: str, prob: list[float], threshold: float) -> None:
    rule = make_rule(name, threshold)
    acc = accumulate(torch.tensor([prob]), torch.full((1, len(prob)), 0.25))
    statistic = path_statistic(rule, torch.tensor([prob]), acc, even(len(prob)))
    if threshold == 0:  # nothing is below 0, whatever the rule still waits for
        assert abort_step(statistic, 0.0).item() == 0
        return
    if rule.rule == "economic":
        close = [abs(a - boundary_at(rule, (t + 1) / 16)[0] - 2 * threshold + 1) for t, a in enumerate(prob)]
        assume(not any(0 < gap < 1e-6 for gap in close))  # thirds of sixteenths round
        decided = decide(rule, torch.tensor([prob]), acc, even(len(prob)))
        assert (decided.abort_step.item(), decided.clear_step.item()) == economic_by(rule, threshold, prob)
        return
    expected = reference.aborts_by(
        rule.rule,
        threshold,
        prob,
        acc.exit_cdf[0].tolist(),
        acc.cumulative_artifact_prob[0].tolist(),
        patience=rule.patience or 1,
        q=rule.q or 0.0,
    )
    assert abort_step(statistic, threshold).item() == expected


@every_rule
@given(seed=st.integers(0, 1_000), steps=st.integers(1, 12))
def test_the_path_statistic_never_falls_and_a_higher_threshold_never_aborts_earlier(
    name: str, seed: int, steps: int
) -> None:
    prob, acc = make_batch(seed, 4, steps)
    statistic = path_statistic(make_rule(name), prob, acc, even(steps))
    assert (statistic.diff(dim=-1) >= 0).all()
    assert (statistic >= 0).all() and (statistic <= 1).all()
    assert (abort_step(statistic, 0.3) <= abort_step(statistic, 0.6)).all()


@every_rule
@given(seed=st.integers(0, 1_000), batch=st.integers(1, 6), steps=st.integers(1, 12))
def test_streaming_equals_the_whole_while_rows_leave(name: str, seed: int, batch: int, steps: int) -> None:
    rule = make_rule(name, 0.25)
    prob, acc = make_batch(seed, batch, steps)
    decided, statistic = decide(rule, prob, acc, even(steps)), path_statistic(rule, prob, acc, even(steps))
    stream, alive = Decider(rule, batch), torch.arange(batch)
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        now = stream.step(score_at(t, alive, prob, acc), progress=(t + 1) / 16)
        assert now.statistic.equal(statistic[alive, t])
        assert now.abort.equal(decided.abort_step[alive] == t)  # at that step, and never again
        assert now.clear.equal(decided.clear_step[alive] == t)
        rows = (torch.rand(len(alive), generator=generator) < 0.8).nonzero().flatten().flip(0)
        stream.keep(rows)
        alive = alive[rows]


@given(seed=st.integers(0, 1_000), threshold=thresholds, clear_threshold=thresholds)
def test_an_image_is_aborted_or_cleared_and_the_first_to_come_wins(
    seed: int, threshold: float, clear_threshold: float
) -> None:
    rule = ThresholdConfig(rule="cumulative", threshold=threshold, clear_threshold=clear_threshold)
    prob, acc = make_batch(seed, 8, 10)
    decided = decide(rule, prob, acc)
    abort, clear = abort_step(path_statistic(rule, prob, acc), threshold), clear_step(rule, acc)
    for row in range(8):
        expected = (abort[row], 10) if abort[row] <= clear[row] else (10, clear[row])
        assert (decided.abort_step[row], decided.clear_step[row]) == expected


def test_both_at_one_step_is_an_abort() -> None:
    prob, mass = torch.tensor([[0.5, 0.5]]), torch.tensor([[1e-3, 10.0]])
    rule = ThresholdConfig(rule="cumulative", threshold=0.4, clear_threshold=0.4)
    decided = decide(rule, prob, accumulate(prob, mass))
    assert (decided.abort_step.item(), decided.clear_step.item()) == (1, 2)


def test_nothing_is_aborted_once_it_was_cleared() -> None:
    prob, mass = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.6931472, 5.0]])  # K = 0.5, then C nearly 0.5
    rule = ThresholdConfig(rule="cumulative", threshold=0.4, clear_threshold=0.4)
    acc = accumulate(prob, mass)
    assert path_statistic(rule, prob, acc)[0, 1] > 0.4
    decided = decide(rule, prob, acc)
    assert (decided.abort_step.item(), decided.clear_step.item()) == (2, 0)


def test_q_exit_decides_once_the_exit_cdf_is_above_q_not_at_it() -> None:
    prob, cdf = torch.tensor([[0.9, 0.2]]), torch.tensor([[0.5, 0.75]])
    acc = Accumulated(cdf, cdf, cdf, cdf, cdf)
    assert path_statistic(make_rule("q-exit"), prob, acc).tolist() == [[0.0, prob[0, 1].item()]]


def test_the_economic_statistic_is_one_half_on_the_boundary_and_stands_still_once_cleared() -> None:
    prob = torch.tensor([[0.5, 0.0, 0.9], [0.125, 0.9, 0.9]])
    rule = ThresholdConfig(rule="economic", threshold=0.5, boundary=((0.25, 0.5, 0.25),))
    acc, progress = accumulate(prob, torch.zeros(2, 3)), torch.tensor([0.2, 0.4, 0.6])
    assert path_statistic(rule, prob, acc, progress).tolist() == [[0.5] * 3, [0.3125] * 3]
    decided = decide(rule, prob, acc, progress)
    assert (decided.abort_step.tolist(), decided.clear_step.tolist()) == ([0, 3], [3, 0])


def test_progress_may_differ_from_image_to_image() -> None:
    rule = make_rule("economic")
    prob, acc = make_batch(0, 3, 4)
    progress = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).sort(dim=1).values
    whole = path_statistic(rule, prob, acc, progress)
    for row in range(3):
        alone = Accumulated(*(getattr(acc, name)[[row]] for name in acc.__dataclass_fields__))
        assert path_statistic(rule, prob[[row]], alone, progress[row]).equal(whole[[row]])


def test_the_economic_rule_aborts_where_the_posterior_reaches_its_boundary() -> None:
    rule = make_rule("economic", threshold=0.625)  # a quarter above the boundary
    progress = torch.tensor([0.0, 0.25, 0.5, 1.0])
    boundary = abort_boundary(rule, progress)
    assert boundary.tolist() == pytest.approx([0.75, 0.5, 0.5 + 1 / 6, 1.0])
    acc = accumulate(boundary[None], torch.full((1, 4), 0.25))
    for step in range(4):
        for change, reached in ((0.0, step), (-1e-3, 4)):
            prob = torch.full((1, 4), 0.3)  # never cleared, never aborted
            prob[0, step] = boundary[step] + change
            assert abort_step(path_statistic(rule, prob, acc, progress), rule.threshold).item() == reached


def test_the_economic_rule_asks_for_progress() -> None:
    rule, (prob, acc) = make_rule("economic"), make_batch(0, 2, 3)
    with pytest.raises(InputError, match="progress is missing"):
        path_statistic(rule, prob, acc)
    with pytest.raises(InputError, match="progress is missing"):
        Decider(rule, 2).step(score_at(0, torch.arange(2), prob, acc))
    with pytest.raises(InputError, match="artifact_prob is missing"):
        clear_step(rule, acc)


@pytest.mark.parametrize("rule", ["posterior", "patience", "q-exit"])
def test_only_the_cumulative_and_the_economic_rule_clear(rule: str) -> None:
    config = ThresholdConfig(rule=rule, threshold=0.9, clear_threshold=0.1, q=0.5, patience=1)
    prob = torch.zeros(1, 3)
    assert decide(config, prob, accumulate(prob, torch.ones(1, 3))).clear_step.item() == 3


def test_the_cumulative_statistic_holds_where_a_parallel_sum_falls_by_rounding() -> None:
    fallen = torch.tensor([[0.3, 0.30000001192092896 - 1e-7]])
    acc = Accumulated(fallen, fallen, fallen, fallen, fallen)
    assert path_statistic(make_rule("cumulative"), torch.zeros(1, 2), acc).tolist() == [[fallen[0, 0].item()] * 2]


@every_rule
@pytest.mark.parametrize("where", ["artifact_prob", "exit_mass"])
def test_a_nan_is_refused_in_whole_trajectories(name: str, where: str) -> None:
    prob, mass = torch.full((3, 4), 0.1), torch.full((3, 4), 0.1)
    (prob if where == "artifact_prob" else mass)[1, 0] = torch.nan
    with pytest.raises(InputError, match=r"is NaN in rows \[1\] \(1 in all\)"):
        decide(make_rule(name), prob, accumulate(prob, mass), even(4))


@every_rule
@pytest.mark.parametrize("where", ["artifact_prob", "exit_mass"])
def test_a_nan_while_running_is_shown_and_decides_nothing(name: str, where: str) -> None:
    prob, mass = torch.full((3, 4), 0.1), torch.full((3, 4), 0.1)
    (prob if where == "artifact_prob" else mass)[1, 0] = torch.nan
    stream, acc = Decider(make_rule(name, 0.9), 3), accumulate(prob, mass)
    for t in range(4):
        now = stream.step(score_at(t, torch.arange(3), prob, acc), progress=(t + 1) / 16)
        assert now.statistic.isnan().tolist() == [False, True, False]
        assert not now.abort[1] and not now.clear[1]


def test_wrong_shapes_are_refused() -> None:
    prob, acc = make_batch(0, 3, 4)
    with pytest.raises(InputError, match=r"exit_cdf must have the shape \(3, 3\) of artifact_prob, got \(3, 4\)"):
        path_statistic(make_rule("posterior"), prob[:, 1:], acc)
    with pytest.raises(InputError, match=r"artifact_prob must have shape \(2,\).*got \(3,\); call keep"):
        Decider(make_rule("posterior"), 2).step(score_at(0, torch.arange(3), prob, acc))
