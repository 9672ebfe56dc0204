"""Measures of a learned score: within prompt as well as pooled, with bootstrap intervals over images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata


def auroc(score: np.ndarray, bad: np.ndarray) -> float:
    """Area under the ROC curve by ranks, ties counted half; NaN where one of the two classes is missing."""
    bad = bad.astype(bool)
    positives, negatives = int(bad.sum()), int((~bad).sum())
    if positives == 0 or negatives == 0:
        return float("nan")
    return float((rankdata(score)[bad].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auroc_within(score: np.ndarray, bad: np.ndarray, group: np.ndarray) -> float:
    """Mean over groups (classes or prompts) of the AUROC inside the group; groups with one kind of image are left out."""
    values = [auroc(score[group == g], bad[group == g]) for g in np.unique(group)]
    return float(np.nanmean(values))


def bootstrap(
    measure: Callable[[np.ndarray], float], count: int, *, repeats: int = 200, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of ``measure(rows)`` over resampled images."""
    rng = np.random.default_rng(seed)
    values = [measure(rng.integers(count, size=count)) for _ in range(repeats)]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
