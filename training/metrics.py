"""Measures of a learned score: within prompt as well as pooled, with bootstrap intervals over images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jaxtyping import Int, Real, Shaped
from scipy.stats import rankdata


def auroc(score: Real[np.ndarray, " image"], bad: Shaped[np.ndarray, " image"]) -> float:
    """Area under the ROC curve by ranks, ties counted half; NaN where one of the two classes is missing."""
    bad = bad.astype(bool)
    positives, negatives = int(bad.sum()), int((~bad).sum())
    if positives == 0 or negatives == 0:
        return float("nan")
    return float((rankdata(score)[bad].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auroc_within(
    score: Real[np.ndarray, " image"], bad: Shaped[np.ndarray, " image"], group: Shaped[np.ndarray, " image"]
) -> float:
    """Mean over groups (classes or prompts) of the AUROC inside the group; NaN where no group has both kinds.

    Groups with one kind of image are left out.
    """
    place = np.unique(group, return_inverse=True)[1]
    bad = bad.astype(bool)
    positives, negatives = np.bincount(place, weights=bad), np.bincount(place, weights=~bad)
    mixed = (positives > 0) & (negatives > 0)
    if not mixed.any():
        return float("nan")
    used = mixed[place]
    ranks = np.bincount(place[used], weights=_ranks_within(score[used], place[used]) * bad[used], minlength=len(mixed))
    above = ranks[mixed] - positives[mixed] * (positives[mixed] + 1) / 2
    return float((above / (positives[mixed] * negatives[mixed])).mean())


def rarer_in_mixed_groups(bad: Shaped[np.ndarray, " image"], group: Shaped[np.ndarray, " image"]) -> int:
    """Images of the rarer kind, bad or clean, in the groups that have images of both.

    Example:
        >>> rarer_in_mixed_groups(np.array([1, 0, 0, 1, 1, 1]), np.array([0, 0, 0, 1, 1, 1]))
        1
    """
    place = np.unique(group, return_inverse=True)[1]
    bad = bad.astype(bool)
    positives, negatives = np.bincount(place, weights=bad), np.bincount(place, weights=~bad)
    mixed = (positives > 0) & (negatives > 0)
    return int(min(positives[mixed].sum(), negatives[mixed].sum()))


def bootstrap(
    measure: Callable[[np.ndarray], float], count: int, *, repeats: int = 200, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of ``measure(rows)`` over resampled images; NaN where it never has a value."""
    rng = np.random.default_rng(seed)
    return _interval([measure(rng.integers(count, size=count)) for _ in range(repeats)])


Measure: TypeAlias = Callable[[np.ndarray, np.ndarray], float]  # of some rows, and the group of each
Resample: TypeAlias = Callable[[Measure, np.ndarray], tuple[float, float]]  # interval of a measure, given all groups


def over_images(measure: Measure, group: Shaped[np.ndarray, " image"]) -> tuple[float, float]:
    """The same over images that were drawn independently, whatever their group."""
    return bootstrap(lambda rows: measure(rows, group[rows]), len(group))


def over_groups(
    measure: Measure, group: Shaped[np.ndarray, " image"], *, repeats: int = 200, seed: int = 0
) -> tuple[float, float]:
    """The same over groups, each with all of its images: those of one prompt are alike.

    A group drawn twice is two groups for the measure.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(group, kind="stable")
    _, counts = np.unique(group, return_counts=True)
    members = np.split(order, np.cumsum(counts)[:-1])
    values = []
    for _ in range(repeats):
        drawn = rng.integers(len(members), size=len(members))
        rows = np.concatenate([members[place] for place in drawn])
        values.append(measure(rows, np.repeat(np.arange(len(drawn)), counts[drawn])))
    return _interval(values)


def _interval(values: list[float]) -> tuple[float, float]:
    found = [value for value in values if not np.isnan(value)]
    if not found:
        return float("nan"), float("nan")
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _ranks_within(score: np.ndarray, place: Int[np.ndarray, " image"]) -> np.ndarray:
    """Rank of each score within its group, from 1, ties shared: one sort for all groups, however many there are."""
    order = np.lexsort((score, place))
    sorted_score, sorted_place = score[order], place[order]
    number = np.arange(len(order))
    new_group = np.r_[True, np.diff(sorted_place) != 0]
    new_value = new_group | np.r_[True, np.diff(sorted_score) != 0]
    group_start = np.maximum.accumulate(np.where(new_group, number, 0))
    first = np.flatnonzero(new_value)
    last = np.r_[first[1:], len(order)] - 1
    tie = np.cumsum(new_value) - 1
    ranks = np.empty(len(order))
    ranks[order] = (first[tie] + last[tie]) / 2 - group_start + 1
    return ranks
