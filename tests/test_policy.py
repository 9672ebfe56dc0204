from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from training.metrics import auroc, auroc_within, bootstrap
from moe_artifacts.policy import Run, apply_rule, matched_threshold, outcome, perfect

# --- measures --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_that_of_sklearn_ties_included(rows: list[tuple[int, bool]]) -> None:
    score, bad = (np.array(column) for column in zip(*rows, strict=True))
    assume(0 < bad.sum() < len(bad))
    assert auroc(score, bad) == pytest.approx(roc_auc_score(bad, score), abs=1e-12)


def test_auroc_by_hand_and_without_one_of_the_classes() -> None:
    score = np.array([0.1, 0.4, 0.4, 0.8])
    # Pairs of a bad and a clean image: (0.4, 0.1) right, (0.4, 0.4) tied, (0.8, 0.1) and (0.8, 0.4) right.
    assert auroc(score, np.array([0.0, 1.0, 0.0, 1.0])) == 3.5 / 4
    assert math.isnan(auroc(score, np.ones(4)))
    assert math.isnan(auroc(score, np.zeros(4)))


def test_auroc_within_is_the_mean_over_groups_that_have_both_kinds() -> None:
    score = np.array([1.0, 2.0, 9.0, 8.0, 7.0, 100.0])
    bad = np.array([0, 1, 0, 1, 0, 1])
    group = np.array([0, 0, 1, 1, 1, 2])
    assert auroc_within(score, bad, group) == (1.0 + 0.5) / 2  # group 2 has bad images alone
    # What separates the groups does not help.
    assert auroc_within(score + 1000 * group, bad, group) == (1.0 + 0.5) / 2


def test_the_bootstrap_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(lambda rows: float(values[rows].mean()), len(values), repeats=400)
    assert low < values.mean() < high
    # 400 repeats place a 2.5 % quantile to about 7 % of its distance from the middle.
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.2)
    assert (low, high) == bootstrap(lambda rows: float(values[rows].mean()), len(values), repeats=400)


def test_the_bootstrap_leaves_out_resamples_without_a_value() -> None:
    bad, score = np.array([1, 0, 0]), np.array([2.0, 1.0, 3.0])  # a third of the resamples has no bad image
    low, high = bootstrap(lambda rows: auroc(score[rows], bad[rows]), 3)
    assert 0 <= low <= auroc(score, bad) <= high <= 1


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


# --- thresholds at a given false-abort rate --------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=1, max_size=30),
    st.floats(0, 1, exclude_max=True),
)
def test_the_matched_threshold_is_the_lowest_that_keeps_the_rate(eighths: list[list[int]], rate: float) -> None:
    clean = np.maximum.accumulate(np.array(eighths, dtype=np.float32) / 8, axis=1)  # many ties
    statistic = np.concatenate([clean, np.ones((5, 3), dtype=np.float32)])  # bad images take no part
    run = replace(RUN, bad=np.arange(len(statistic)) >= len(clean))
    threshold = np.float32(matched_threshold(run, statistic, rate))
    below = np.nextafter(threshold, np.float32(-1))
    assert apply_rule(run, statistic, float(threshold)).false_abort_rate <= rate + 1e-9  # a rate rounds
    assert apply_rule(run, statistic, float(below)).false_abort_rate > rate - 1e-9
