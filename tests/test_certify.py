from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference
import reference_bounds
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_artifacts.accumulator import accumulate
from moe_artifacts.calibration import Risk, certify, certify_image_threshold
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.decision import abort_step, path_statistic
from moe_artifacts.errors import CalibrationError, InputError

FALSE, PER_PROMPT, MISS, WRONG = "false-aborts", "false-aborts-per-prompt", "miss", "wrong-aborts"

# --- certified threshold ---------------------------------------------------------------------------------------------


def test_false_abort_rate_is_kept_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    # Clean statistics uniform on [0, 1]: the true false-abort rate of threshold q is 1 - q, so it needs no estimate.
    draws = rng.random((5_000, 200), dtype=np.float32)
    rates = np.array([1 - certify_image_threshold(s, max_risk=0.05, confidence=0.9).threshold for s in draws])
    three_errors = 3 * np.sqrt(0.1 * 0.9 / 5_000)
    assert (rates > 0.05).mean() <= 0.1 + three_errors  # sees an off-by-one
    # And not cautious beyond need: with one allowed abort more, the promise is broken more often than allowed.
    allowed = certify_image_threshold(draws[0], max_risk=0.05, confidence=0.9).allowed_aborts
    one_more = 1 - np.sort(draws, axis=1)[:, 200 - 1 - (allowed + 1)]
    assert (one_more > 0.05).mean() > 0.1 + three_errors


@given(st.integers(1, 120), st.floats(0.02, 0.5), st.floats(0.5, 0.99))
def test_the_allowed_aborts_are_the_most_whose_binomial_tail_keeps_the_promise(
    num_clean: int, max_risk: float, confidence: float
) -> None:
    statistics = np.linspace(0, 0.9, num_clean)
    tails = [reference.binomial_tail(k, num_clean, max_risk) for k in range(num_clean)]
    assume(min(abs(tail - (1 - confidence)) for tail in tails) > 1e-9)  # an exact tie is left to rounding
    allowed = sum(tail <= 1 - confidence for tail in tails) - 1
    if allowed < 0:
        with pytest.raises(CalibrationError):
            certify_image_threshold(statistics, max_risk, confidence)
        return
    certified = certify_image_threshold(statistics, max_risk, confidence)
    assert certified.allowed_aborts == allowed
    assert (statistics.astype(np.float32) >= np.float32(certified.threshold)).sum() == allowed


@given(st.lists(st.integers(0, 15).map(lambda n: n / 16), min_size=60, max_size=100))
def test_ties_never_abort_more_than_allowed_and_torch_agrees(statistics: list[float]) -> None:
    certified = certify_image_threshold(np.array(statistics), max_risk=0.1, confidence=0.9)
    aborted = abort_step(torch.tensor(statistics)[:, None], certified.threshold) == 0
    assert aborted.sum() <= certified.allowed_aborts
    below = np.nextafter(np.float32(certified.threshold), np.float32(0))  # one float32 lower would be too many
    if below >= np.finfo(np.float32).tiny:
        assert (abort_step(torch.tensor(statistics)[:, None], float(below)) == 0).sum() > certified.allowed_aborts


def test_a_statistic_of_zero_gives_a_threshold_that_is_not_subnormal() -> None:
    threshold = certify_image_threshold(np.zeros(59), max_risk=0.05, confidence=0.95).threshold
    assert threshold == np.finfo(np.float32).tiny


@pytest.mark.parametrize(
    ("max_risk", "confidence", "needed"), [(0.05, 0.95, 59), (0.1, 0.9, 22), (0.05, 0.9, 45), (0.01, 0.95, 299)]
)
def test_too_few_images_are_told_how_many_are_needed(max_risk: float, confidence: float, needed: int) -> None:
    statistics = np.linspace(0, 0.5, needed)
    assert certify_image_threshold(statistics, max_risk, confidence).allowed_aborts == 0
    with pytest.raises(CalibrationError, match=f"needs at least {needed} clean images, got {needed - 1}"):
        certify_image_threshold(statistics[1:], max_risk, confidence)


def test_images_at_one_may_be_aborted_only_if_so_many_are_allowed() -> None:
    largest_below_one = np.nextafter(np.float32(1), np.float32(0))
    statistics = np.full(200, largest_below_one)
    allowed = certify_image_threshold(statistics, max_risk=0.05, confidence=0.9).allowed_aborts
    statistics[:allowed] = 1
    certified = certify_image_threshold(statistics, max_risk=0.05, confidence=0.9)
    assert certified.threshold == 1.0
    ThresholdConfig(rule="posterior", threshold=certified.threshold)  # and a config takes it
    statistics[allowed] = 1
    with pytest.raises(CalibrationError, match=f"{allowed + 1} clean images reach the statistic 1"):
        certify_image_threshold(statistics, max_risk=0.05, confidence=0.9)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ([], "at least one number"),
        ([0.1, math.nan], "statistic must hold finite numbers, got 1 that are not, of 2"),
        ([0.1, math.inf], "finite"),
        ([0.1, 1.5], r"statistic must be in \[0, 1\], got values from 0.1 to 1.5"),
        ([-0.1, 0.5], r"in \[0, 1\]"),
    ],
)
def test_bad_statistics_are_refused(statistics: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        certify_image_threshold(np.array(statistics), max_risk=0.05, confidence=0.95)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 5.0, math.nan])
def test_rates_outside_zero_and_one_are_refused(rate: float) -> None:
    for name, other in (("max_risk", "confidence"), ("confidence", "max_risk")):
        with pytest.raises(InputError, match=f"{name} must be between 0 and 1"):
            certify_image_threshold(np.zeros(100), **{name: rate, other: 0.5})


def test_a_certified_threshold_holds_for_the_rule_it_was_found_with() -> None:
    generator = torch.Generator().manual_seed(0)
    rule = ThresholdConfig(rule="cumulative", threshold=1.0)
    prob = torch.rand(40_300, 6, generator=generator)
    acc = accumulate(prob, torch.rand(40_300, 6, generator=generator))
    last = path_statistic(rule, prob, acc)[:, -1]
    certified = certify_image_threshold(last[:300].numpy(), max_risk=0.05, confidence=0.99)
    aborted = abort_step(path_statistic(rule, prob, acc), certified.threshold)[300:] < 6
    assert aborted.float().mean() < 0.05  # broken for one draw in a hundred


# --- all risks and units: against the walk, step by step ----------------------------------------------------------------

LEVELS = [k / 8 for k in range(9)]
image_lists = st.lists(
    st.tuples(st.sampled_from(LEVELS), st.sampled_from([0.0, 0.0, 1.0]), st.integers(0, 30)), min_size=4, max_size=60
)


def arrays(images: list[tuple[float, float, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    statistic, label, prompt = zip(*images, strict=True)
    return np.array(statistic), np.array(label), np.array(prompt)


@given(
    image_lists, st.sampled_from([FALSE, PER_PROMPT, MISS]), st.booleans(), st.booleans(), st.sampled_from([0.2, 0.4])
)
def test_finds_where_a_walk_over_every_threshold_stops(
    images: list[tuple[float, float, int]], name: Any, by_prompt: bool, soft: bool, max_risk: float
) -> None:
    assume(by_prompt or name != PER_PROMPT)
    statistic, label, prompt = arrays(images)
    if soft:
        label = 0.2 + 0.5 * label
    assume((label if name == MISS else 1 - label).any())
    place = np.unique(prompt, return_inverse=True)[1] if by_prompt else np.arange(len(images))
    order = np.random.default_rng(3).permutation(place.max() + 1)
    listed = list(zip(statistic.tolist(), label.tolist(), order[place].tolist(), strict=True))
    cap = int(np.bincount(place).max()) if by_prompt else 1
    counted = not by_prompt and not soft
    expected = reference_bounds.walk(name, listed, max_risk, 0.8, cap=cap, counted=counted)
    if expected is None or expected > 1 or expected == 0:  # too little data, or a rule that saturates
        with pytest.raises(CalibrationError):
            certify(
                *(statistic, label, prompt),
                risks=Risk(name, max_risk),
                confidence=0.8,
                unit="prompt" if by_prompt else "image",
                seed=3,
            )
        return
    found = certify(
        statistic,
        label,
        prompt,
        risks=Risk(name, max_risk),
        confidence=0.8,
        unit="prompt" if by_prompt else "image",
        seed=3,
    )
    assert found.threshold == expected


# --- the promise, counted -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Easy and hard prompts in equal numbers; statistics k / 10, so that every true rate is a finite sum.

    Clean images of hard prompts are fewer and score higher: images of one prompt are far from independent.
    """

    images: int
    soft: bool = False

    @property
    def grid(self) -> np.ndarray:
        return ((np.arange(10) + 0.5) / 10).astype(np.float32)  # as they are compared

    def mass(self, hard: int, bad: int) -> np.ndarray:
        """P(statistic) on the grid."""
        weight = np.exp(-((self.grid - (0.2 + 0.2 * hard + 0.3 * bad)) ** 2) / (2 * 0.2**2))
        return weight / weight.sum()

    def bad_share(self, hard: int) -> float:
        return (0.2, 0.6)[hard]

    def draw(self, rng: np.random.Generator, num_prompts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        prompt = np.repeat(np.arange(num_prompts), self.images)
        hard = rng.integers(0, 2, num_prompts)[prompt]
        bad = (rng.random(len(prompt)) < np.where(hard, self.bad_share(1), self.bad_share(0))).astype(int)
        tables = np.array([[self.mass(h, b) for b in (0, 1)] for h in (0, 1)]).cumsum(axis=-1)
        statistic = self.grid[(rng.random(len(prompt))[:, None] > tables[hard, bad]).sum(axis=1).clip(max=9)]
        # As raters would: a bad image is called bad by 0.9 of them, a clean one by 0.2.
        return statistic, 0.2 + 0.7 * bad if self.soft else bad.astype(float), prompt

    def rate(self, name: str, threshold: float) -> float:
        hit = self.grid >= np.float32(threshold)
        share = np.array([[1 - self.bad_share(h), self.bad_share(h)] for h in (0, 1)])  # hard bad
        aborted = np.array([[self.mass(h, b)[hit].sum() for b in (0, 1)] for h in (0, 1)])
        clean = np.array([0.8, 0.1]) if self.soft else np.array([1.0, 0.0])  # weight as a clean image
        if name == PER_PROMPT:
            assert not self.soft
            some = 1 - share[:, 1] ** self.images  # P(the prompt has a clean image)
            return float((some * aborted[:, 0]).sum() / some.sum())
        if name == MISS:
            return float((share * (1 - aborted) * (1 - clean)).sum() / (share * (1 - clean)).sum())
        wrong = (share * aborted * clean).sum()
        return float(wrong / ((share * clean).sum() if name == FALSE else (share * aborted).sum()))


def broken(
    world: World, num_prompts: int, name: Any, unit: Any, max_risk: float, draws: int = 400, **more: Any
) -> float:
    """Share of draws in which the promise is broken, at a confidence of 0.8; at least half must be certified at all."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(draws):
        try:
            found = certify(
                *world.draw(rng, num_prompts), risks=Risk(name, max_risk), confidence=0.8, unit=unit, **more
            )
        except CalibrationError:
            continue
        rates.append(world.rate(name, found.threshold))
    assert len(rates) > draws / 2
    return float((np.array(rates) > max_risk).sum() / draws)


LIMIT = 0.2 + 3 * np.sqrt(0.2 * 0.8 / 400)


def worst_promise(world: World, name: str) -> dict[str, Any]:
    """Just under the rate of a threshold, so that one threshold too far breaks it."""
    at = {MISS: 0.45, WRONG: 0.35}.get(name, 0.65)
    candidates = np.array([0.6, 0.5, 0.4, 0.3, 0.2]) if name == WRONG else None  # between the statistics
    return {"name": name, "max_risk": world.rate(name, np.float32(at)) - 1e-9, "candidates": candidates}


@pytest.mark.parametrize("images", [1, 6])
@pytest.mark.parametrize("name", [FALSE, PER_PROMPT, MISS, WRONG])
def test_the_promise_over_prompts_is_kept(name: str, images: int) -> None:
    world = World(images)
    assert broken(world, 200 if images == 1 else 60, unit="prompt", **worst_promise(world, name)) <= LIMIT


@pytest.mark.parametrize("name", [FALSE, MISS, WRONG])
@pytest.mark.parametrize("soft", [False, True])
def test_the_promise_over_independent_images_is_kept(name: str, soft: bool) -> None:
    world = World(1, soft)
    share = broken(world, 200, unit="image", **worst_promise(world, name))
    assert share <= LIMIT
    if not soft:  # exact, and one threshold decides: not cautious beyond need
        assert share > 0.1


def test_wrong_aborts_keep_their_promise_over_five_walks() -> None:
    world = World(6)
    assert broken(world, 200, WRONG, "prompt", world.rate(WRONG, 0.35) - 1e-9) <= LIMIT


def test_images_taken_for_independent_break_the_promise_where_prompts_differ() -> None:
    world = World(100)
    promise = worst_promise(world, FALSE)
    assert broken(world, 20, unit="image", draws=200, **promise) > 0.35
    assert broken(world, 60, unit="prompt", draws=200, **promise) <= LIMIT  # which is looser for 400 draws


def test_soft_labels_weigh_images_over_prompts_too() -> None:
    world = World(6, soft=True)
    assert broken(world, 80, unit="prompt", **worst_promise(world, FALSE)) <= LIMIT


def test_both_of_two_promises_are_kept_together() -> None:
    world, draws = World(4), 400
    false, miss = Risk(FALSE, world.rate(FALSE, 0.45) - 1e-9), Risk(MISS, world.rate(MISS, 0.65) - 1e-9)
    for candidates in (None, np.array([0.55, 0.45, 0.6])):
        rng, failures = np.random.default_rng(0), 0
        certified = 0
        for _ in range(draws):
            try:
                found = certify(
                    *world.draw(rng, 300), risks=[false, miss], confidence=0.8, unit="prompt", candidates=candidates
                )
            except CalibrationError:
                continue
            certified += 1
            failures += any(world.rate(risk.name, found.threshold) > risk.max_risk for risk in (false, miss))
        assert certified > draws / 2
        assert failures / draws <= LIMIT


# --- power ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FALSE, PER_PROMPT])
def test_400_prompts_reach_a_true_rate_of_at_least_three_percent_of_an_allowed_five(name: Any) -> None:
    rng = np.random.default_rng(0)
    reached = []
    for _ in range(60):
        shift = rng.normal(0, 0.7, 400)[np.repeat(np.arange(400), 20)]  # of the clean images of a prompt
        score = torch.special.ndtr(torch.tensor((shift + rng.normal(size=8_000)) / math.hypot(1, 0.7))).numpy()
        prompt = np.repeat(np.arange(400), 20)
        found = certify(score, np.zeros(8_000), prompt, risks=Risk(name, 0.05), confidence=0.95, unit="prompt")
        reached.append(1 - found.threshold)  # scores are uniform over prompts: both true rates are this
    assert 0.03 <= np.median(reached) < 0.05


@pytest.mark.parametrize(("max_risk", "confidence", "fewest"), [(0.05, 0.95, 59), (0.1, 0.9, 22)])
def test_the_fewest_prompts_certify_what_aborts_none_and_one_fewer_is_an_error(
    max_risk: float, confidence: float, fewest: int
) -> None:
    promise = {"risks": Risk(PER_PROMPT, max_risk), "confidence": confidence, "unit": "prompt"}
    prompt = np.repeat(np.arange(fewest + 20), 4)
    statistic, label = np.tile([0.1, 0.2, 0.3, 0.9], fewest + 20), np.tile([0, 0, 0, 1], fewest + 20)
    label[-80:] = 1  # the last 20 prompts have no clean image
    found = certify(statistic, label, prompt, **promise)
    assert found.threshold == np.nextafter(np.float32(0.3), np.float32(1))
    assert (found.num_units, found.left_out, found.empirical[PER_PROMPT]) == (fewest, 20, 0)
    message = f"needs at least {fewest} prompts with a clean image, got {fewest - 1}"
    with pytest.raises(CalibrationError, match=message):
        certify(statistic[4:], label[4:], prompt[4:], **promise)


def test_the_number_of_prompts_named_for_the_pooled_rate_is_enough() -> None:
    def promise(num_prompts: int) -> float:
        statistic, label = np.tile([0.1, 0.3, 0.9], num_prompts), np.tile([0, 0, 1], num_prompts)
        prompt = np.repeat(np.arange(num_prompts), 3)
        return certify(statistic, label, prompt, risks=Risk(FALSE, 0.05), confidence=0.95, unit="prompt").threshold

    with pytest.raises(CalibrationError, match="needs at least 91 prompts with as many clean images as these have"):
        promise(59)
    with pytest.raises(CalibrationError, match="got 90"):
        promise(90)
    assert promise(91) > 0.3


# --- several promises ----------------------------------------------------------------------------------------------------


def separable(num_prompts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = (rng.random(num_prompts * 5) < 0.5).astype(float)
    return np.clip(rng.normal(0.3 + 0.4 * label, 0.1), 0, 1), label, np.repeat(np.arange(num_prompts), 5)


def test_promises_that_fall_together_cost_no_confidence() -> None:
    data, more = separable(150), {"confidence": 0.9, "unit": "prompt"}
    pooled, per_prompt = Risk(FALSE, 0.1), Risk(PER_PROMPT, 0.05)
    alone = [certify(*data, risks=risk, **more).threshold for risk in (pooled, per_prompt)]
    assert certify(*data, risks=[pooled, per_prompt], **more).threshold == max(alone)


def test_promises_that_pull_apart_leave_the_lowest_threshold_between() -> None:
    data, more = separable(150), {"confidence": 0.9, "unit": "prompt"}
    found = certify(*data, risks=[Risk(FALSE, 0.1), Risk(MISS, 0.1)], **more)
    half = {"confidence": 0.95, "unit": "prompt"}  # each end gets half of what the confidence leaves
    assert found.threshold == certify(*data, risks=Risk(FALSE, 0.1), **half).threshold
    assert found.threshold < certify(*data, risks=Risk(MISS, 0.1), **half).threshold
    assert max(found.empirical[FALSE], found.empirical[MISS]) < 0.1
    assert found.max_risk == 0.1


def test_promises_that_contradict_each_other_say_so() -> None:
    statistic, label, prompt = separable(150)
    with pytest.raises(
        CalibrationError, match=r"no threshold keeps false-aborts <= 0.1 and miss <= 0.1: false aborts need at least 0"
    ):
        certify(
            *(1 - statistic, label, prompt), risks=[Risk(FALSE, 0.1), Risk(MISS, 0.1)], confidence=0.9, unit="prompt"
        )


def test_misses_alone_give_the_highest_threshold() -> None:
    statistic = np.linspace(0.01, 1, 100)
    found = certify(statistic, np.ones(100), risks=Risk(MISS, 0.1), confidence=0.9, unit="image")
    allowed = certify_image_threshold(statistic, 0.1, 0.9).allowed_aborts
    assert (statistic.astype(np.float32) < found.threshold).sum() == allowed  # the same count from the other end
    assert found.empirical[MISS] == allowed / 100


# --- candidates in a fixed order -------------------------------------------------------------------------------------------


def test_a_walk_ends_at_its_first_failure_even_where_a_later_candidate_would_pass() -> None:
    data = separable(150)
    promise = {"risks": Risk(FALSE, 0.1), "confidence": 0.9, "unit": "prompt"}
    assert certify(*data, candidates=np.array([0.8, 0.6, 0.7]), **promise).threshold == 0.6
    assert certify(*data, candidates=np.array([0.8, 0.2, 0.6]), **promise).threshold == 0.8
    with pytest.raises(CalibrationError, match=r"no candidate is certified .* every walk failed at its start, 0.2"):
        certify(*data, candidates=np.array([0.2, 0.8]), **promise)


@pytest.mark.parametrize("unit", ["image", "prompt"])
def test_wrong_aborts_are_certified_down_to_where_they_become_many(unit: Any) -> None:
    data = separable(400)
    found = certify(*data, risks=Risk(WRONG, 0.2), confidence=0.9, unit=unit)
    assert 0.35 < found.threshold < 0.5 and found.empirical[WRONG] < 0.2
    own = certify(*data, risks=Risk(WRONG, 0.2), confidence=0.9, unit=unit, candidates=np.arange(70, 0, -1) / 100)
    assert own.threshold <= found.threshold  # one walk instead of five


def test_five_walks_share_what_the_confidence_leaves() -> None:
    def lowest(confidence: float, start: int) -> float:
        walk = np.arange(start, 0, -5) / 100
        promise = {"risks": Risk(WRONG, 0.1), "unit": "image", "confidence": confidence}
        try:
            return certify(*separable(40), candidates=walk, **promise).threshold
        except CalibrationError:
            return 1.0

    starts = (90, 70, 50, 30, 10)
    found = certify(*separable(40), risks=Risk(WRONG, 0.1), unit="image", confidence=0.9).threshold
    assert found == min(lowest(1 - 0.1 / 5, start) for start in starts)
    assert found > min(lowest(0.9, start) for start in starts)  # five full confidences would be too good


def test_an_order_of_candidates_is_shared_by_promises_at_no_cost() -> None:
    data, more = separable(150), {"confidence": 0.9, "unit": "prompt", "candidates": np.array([0.55, 0.5, 0.45])}
    alone = certify(*data, risks=Risk(FALSE, 0.1), **more)
    assert certify(*data, risks=[Risk(FALSE, 0.1), Risk(MISS, 0.3)], **more).threshold == alone.threshold


# --- what is refused -----------------------------------------------------------------------------------------------------

GOOD = {
    "statistic": np.linspace(0, 0.9, 60),
    "label": np.arange(60) % 2,
    "prompt": np.arange(60) // 2,
    "risks": Risk(FALSE, 0.1),
    "confidence": 0.9,
    "unit": "prompt",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistic": np.full(60, np.nan)}, "statistic must hold finite numbers, got 60 that are not"),
        ({"statistic": np.full(60, 1.5)}, r"statistic must be in \[0, 1\]"),
        ({"label": np.full(60, 2.0)}, r"label must be in \[0, 1\], got values from 2 to 2"),
        ({"label": np.full(60, np.nan)}, "label must hold finite numbers"),
        ({"label": np.zeros(59)}, "statistic and label must be equally long, got 60 and 59"),
        ({"prompt": np.zeros(59, dtype=int)}, "prompt must hold one integer or string per image, 60 in all"),
        ({"prompt": np.full(60, np.nan)}, "prompt must hold one integer or string per image"),
        ({"prompt": None}, 'unit="prompt" needs prompt'),
        ({"unit": "batch"}, 'unit must be "image" or "prompt"'),
        ({"unit": "image", "risks": Risk(PER_PROMPT, 0.1)}, 'false-aborts-per-prompt .* needs unit="prompt"'),
        ({"confidence": 1.0}, "confidence must be between 0 and 1"),
        ({"risks": []}, "risks must hold at least one risk"),
        ({"risks": [Risk(FALSE, 0.1), Risk(FALSE, 0.2)]}, "risks must hold at least one risk, and each once"),
        ({"images_per_prompt": 1}, "images_per_prompt=1 is the most a prompt may have, but one has 2"),
        ({"candidates": np.array([0.5, 0.0])}, "candidates must be above 0"),
        ({"candidates": np.array([np.nan])}, "candidates must hold finite numbers"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        certify(**(GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"label": np.ones(60)},
            "false-aborts <= 0.1 needs images that are clean to be certified on, got none among 60",
        ),
        ({"label": np.zeros(60), "risks": Risk(MISS, 0.1)}, "miss <= 0.1 needs images with artifacts"),
        ({"statistic": np.zeros(60), "risks": Risk(MISS, 0.6), "confidence": 0.5}, "only the threshold 0"),
    ],
)
def test_data_that_cannot_carry_the_promise_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        certify(**(GOOD | change))


@pytest.mark.parametrize(("name", "rate"), [("recall", 0.1), (FALSE, 0.0), (FALSE, 1.0), (MISS, math.nan)])
def test_what_is_no_risk_is_refused(name: Any, rate: float) -> None:
    with pytest.raises(InputError):
        Risk(name, rate)


def test_prompts_may_be_named_and_the_seed_repeats() -> None:
    statistic, label, prompt = separable(100)
    promise = {"risks": Risk(FALSE, 0.1), "confidence": 0.9, "unit": "prompt"}
    names = np.array([f"prompt {k:03}" for k in prompt])
    assert certify(statistic, label, names, **promise) == certify(statistic, label, prompt, **promise)
    shuffled = np.random.default_rng(1).permutation(len(label))  # the order of the images does not matter
    assert certify(statistic[shuffled], label[shuffled], prompt[shuffled], **promise) == certify(
        statistic, label, prompt, **promise
    )
