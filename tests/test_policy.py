from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.errors import InputError
from moe_artifacts.policy import (
    Run,
    abort_columns,
    apply_rule,
    by_prompt,
    cheapest_threshold,
    last_statistic,
    matched_threshold,
    outcome,
    perfect,
    spending,
)

# --- outcomes --------------------------------------------------------------------------------------------------------

RUN = Run(bad=np.array([True, True, False, False]), calls=np.array([10, 25, 50]), check_cost=0.5)
STATISTIC = np.array(
    [
        [0.9, 0.9, 0.9],  # bad, aborted at the first check
        [0.1, 0.2, 0.5],  # bad, found at the last step: rejected
        [0.1, 0.6, 0.6],  # clean, aborted at the second check
        [0.0, 0.1, 0.2],  # clean, kept
    ],
    dtype=np.float32,
)


def test_every_field_of_an_outcome_by_hand() -> None:
    found = apply_rule(RUN, STATISTIC, 0.5).row()
    calls, checks = (10 + 50 + 25 + 50) / 4, (1 + 3 + 2 + 3) / 4
    unguarded = 50 / 0.5  # calls per clean image
    assert found == pytest.approx(
        {
            "bad_rate": 0.5,
            "false_abort_rate": 0.5,
            "recall": 0.5,
            "steps_saved": 1 - calls / 50,
            "bad_left": 0.5,  # of the two that were kept, one is bad
            "cost_per_clean": (calls + checks * 0.5) / 0.25 / unguarded - 1,
            "cost_per_clean_unscored": calls / 0.25 / unguarded - 1,
            "rejected": 0.25,
        }
    )


def test_a_threshold_that_is_met_exactly_aborts() -> None:
    assert apply_rule(RUN, STATISTIC, float(STATISTIC[2, 1])).false_abort_rate == 0.5
    assert apply_rule(RUN, STATISTIC, float(np.nextafter(STATISTIC[2, 1], np.float32(1)))).false_abort_rate == 0


def test_a_rule_that_never_aborts_costs_its_checks() -> None:
    found = apply_rule(RUN, STATISTIC, 0.95)
    assert (found.false_abort_rate, found.recall, found.steps_saved, found.rejected) == (0, 0, 0, 0)
    assert (found.bad_left, found.cost_per_clean_unscored) == (0.5, 0)
    assert found.cost_per_clean == pytest.approx(3 * 0.5 / 50)


def test_a_rule_that_aborts_everything_never_gets_a_clean_image() -> None:
    found = apply_rule(RUN, STATISTIC, 0.0)
    assert (found.false_abort_rate, found.recall, found.bad_left) == (1, 1, 0)
    assert found.steps_saved == pytest.approx(0.8)
    assert found.cost_per_clean == found.cost_per_clean_unscored == math.inf


@pytest.mark.parametrize(("bad", "clean", "column"), [(1, 1, 0), (3, 1, 1), (1, 19, 0), (20, 7, 1)])
def test_perfect_knowledge_saves_what_the_bad_images_had_left(bad: int, clean: int, column: int) -> None:
    run = Run(np.arange(bad + clean) < bad, RUN.calls, check_cost=1.0)
    found = perfect(run, column)
    saved = bad / (bad + clean) * (1 - RUN.calls[column] / 50)
    assert (found.recall, found.false_abort_rate, found.bad_left) == (1, 0, 0)
    # Every clean image is kept, so the cost per clean image falls as the cost itself.
    assert found.steps_saved == pytest.approx(saved)
    assert found.cost_per_clean_unscored == pytest.approx(-saved)


@given(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=4, max_size=4))
def test_costs_agree_with_counting_over_many_rounds(columns: list[int]) -> None:
    """Cost per clean image, told as a story: draw the four images again and again until enough clean ones are kept."""
    spent = kept_clean = 0.0
    for bad, column in zip(RUN.bad, columns, strict=True):
        spent += RUN.calls[column] + (column + 1) * 0.5 if column < 3 else 50 + 3 * 0.5
        kept_clean += column == 3 and not bad
    found = outcome(RUN, np.array(columns)).cost_per_clean
    assert found == (pytest.approx(spent / kept_clean / 100 - 1) if kept_clean else math.inf)


# --- checks that end before the run does, and images that are cleared -------------------------------------------------

EARLY = Run(bad=RUN.bad, calls=np.array([10, 25, 40]), check_cost=0.5, full_calls=50)
CLEAR = np.array([3, 0, 1, 0])  # after which check each image is not looked at any more


def test_a_run_goes_on_after_its_last_check() -> None:
    assert (EARLY.total_calls, EARLY.last_saving) == (50, 2)
    found = apply_rule(EARLY, STATISTIC, 0.5)
    calls, checks = (10 + 40 + 25 + 50) / 4, (1 + 3 + 2 + 3) / 4  # the second image is now stopped in time
    assert found.recall == 1 and found.rejected == 0
    assert found.steps_saved == pytest.approx(1 - calls / 50)
    assert found.cost_per_clean == pytest.approx((calls + checks * 0.5) / 0.25 / 100 - 1)
    assert perfect(EARLY, 0).steps_saved == perfect(RUN, 0).steps_saved


def test_a_cleared_image_pays_for_no_later_check_and_is_not_aborted() -> None:
    column, rejected = abort_columns(EARLY, STATISTIC, 0.5, CLEAR)
    assert column.tolist() == [0, 3, 1, 3]  # the third at the very check that would clear it
    assert not rejected.any()
    calls, checks = spending(EARLY, column, CLEAR)
    assert calls.tolist() == [10, 50, 25, 50]
    assert checks.tolist() == [1, 1, 2, 1]
    found = apply_rule(EARLY, STATISTIC, 0.5, CLEAR)
    assert found.cost_per_clean == pytest.approx((calls + 0.5 * checks).mean() / 0.25 / 100 - 1)
    assert found.cost_per_clean_unscored == pytest.approx(calls.mean() / 0.25 / 100 - 1)


def test_a_cleared_image_is_not_rejected_at_the_last_step_either() -> None:
    assert apply_rule(RUN, STATISTIC, 0.5).rejected == 0.25
    assert apply_rule(RUN, STATISTIC, 0.5, CLEAR).rejected == 0


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1, width=32)), min_size=4, max_size=4), st.floats(0, 1, width=32)
)
def test_the_last_statistic_says_which_thresholds_abort(images: list[tuple[int, float]], threshold: float) -> None:
    clear = np.array([c for c, _ in images])
    statistic = np.maximum.accumulate(STATISTIC * np.array([v for _, v in images], dtype=np.float32)[:, None], axis=1)
    aborted = abort_columns(RUN, statistic, threshold, clear)[0] < 3
    assert (aborted == (last_statistic(RUN, statistic, clear) >= np.float32(threshold))).all()


def test_thresholds_take_no_account_of_what_a_cleared_image_would_have_reached() -> None:
    clear = np.array([3, 3, 0, 3])  # the clean image that rises to 0.6 is cleared at 0.1
    threshold = matched_threshold(EARLY, STATISTIC, 0.0, clear)
    assert threshold == pytest.approx(0.2) and threshold > np.float32(0.2)  # of the other clean image
    assert apply_rule(EARLY, STATISTIC, threshold, clear).false_abort_rate == 0
    assert cheapest_threshold(EARLY, STATISTIC, 0.4, clear=clear) == threshold


def test_by_prompt_means_over_prompts_and_counts_the_empty_ones() -> None:
    run = Run(np.array([False, True, False, False, True, True]), np.array([5]), 0.0, full_calls=10)
    column = np.array([1, 0, 0, 0, 1, 0])  # prompt 3 keeps one of two; 4 loses both; 5 has no clean image
    found = by_prompt(run, column, np.array([3, 3, 4, 4, 5, 5]))
    assert found.cost_per_clean == pytest.approx((10 + 5) / 1 / (2 * 10 / 1) - 1)
    assert found.empty == 1 / 2
    nothing = by_prompt(run, np.zeros(6, dtype=int), np.zeros(6, dtype=int))
    assert (nothing.cost_per_clean, nothing.empty) == (math.inf, 1)


def test_by_prompt_of_one_prompt_is_the_outcome() -> None:
    column = abort_columns(EARLY, STATISTIC, 0.5, CLEAR)[0]
    found = by_prompt(EARLY, column, np.zeros(4, dtype=int), CLEAR)
    assert found.cost_per_clean == pytest.approx(outcome(EARLY, column, clear=CLEAR).cost_per_clean)


def test_runs_and_prompts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="full_calls must be at least the 50 of the last check, got 40"):
        replace(RUN, full_calls=40)
    with pytest.raises(InputError, match="at which an abort saves a call"):
        Run(RUN.bad, np.array([50]), 0.0)
    with pytest.raises(InputError, match="bad holds no clean image in any of 1 prompts"):
        by_prompt(replace(RUN, bad=np.ones(4, dtype=bool)), np.zeros(4, dtype=int), np.zeros(4, dtype=int))


# --- thresholds at a given false-abort rate --------------------------------------------------------------------------


def test_a_matched_threshold_is_no_subnormal_number() -> None:
    """Where denormals are flushed such a number is 0, which every image reaches."""
    run = replace(RUN, bad=np.array([False, False, True]))
    assert matched_threshold(run, np.zeros((3, 3), dtype=np.float32), 0.0) >= np.finfo(np.float32).tiny


@given(
    st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=1, max_size=30),
    st.floats(0, 1, exclude_max=True),
)
def test_the_matched_threshold_is_the_lowest_that_keeps_the_rate(eighths: list[list[int]], rate: float) -> None:
    clean = np.maximum.accumulate(np.array(eighths, dtype=np.float32) / 8, axis=1)  # many ties
    statistic = np.concatenate([clean, np.ones((5, 3), dtype=np.float32)])  # bad images take no part
    run = replace(RUN, bad=np.arange(len(statistic)) >= len(clean))
    threshold = np.float32(matched_threshold(run, statistic, rate))
    below = clean[clean < threshold].max()  # between the two no threshold does anything else
    assert apply_rule(run, statistic, float(threshold)).false_abort_rate <= rate + 1e-9  # a rate rounds
    assert apply_rule(run, statistic, float(below)).false_abort_rate > rate - 1e-9
