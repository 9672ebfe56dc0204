from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from training.metrics import auroc, auroc_within, bootstrap


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
