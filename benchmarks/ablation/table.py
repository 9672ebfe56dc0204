"""The table of all designs and seeds, and what helps.

Intervals are 95 % ones for the mean over seeds, of more seeds and other test images of the same kind. Two things make it uncertain:

    the test images     the same for all seeds; how far the mean over seeds moves when they are drawn again (bootstrap)
    the seeds           few, and so is what they tell of their own spread: Student's t with one degree of freedom less than seeds

    half width ** 2 = (t_bootstrap * standard error over images) ** 2 + (t_seeds * standard error over seeds) ** 2

That is Howe's interval for the mean of a sum (J. Am. Stat. Assoc. 69, 1974), the simplest case of MOVER (Zou and Donner, Stat. Med.
27, 2008). A single t with Satterthwaite's degrees of freedom is too narrow where three seeds differ more than the images: 92 % in
place of 95 %. What the seeds owe to single images is in both terms, which errs to the wide side. With one seed there is the first
term alone.

A difference between two rows is taken seed by seed, and image by image, so that what both owe to the same ones is not held against
either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.ablation.figures import FIGURES, Result
from benchmarks.ablation.wishes import Variant

LEVEL = 0.95
Row = dict[str, Any]


def table(variants: Sequence[Variant], seeds: Sequence[int], results: Mapping[tuple[str, int], Result]) -> list[Row]:
    """A row for each variant and seed, and one for each variant.

    ``helps`` says whether the mean AUROC or the matched cost got better than in the row compared with, both intervals being
    asked: "yes" and "worse" if at least one excludes 0 in that direction and none in the other, else "no", or "mixed".

    Args:
        results: By the key of the design and the seed; all must be there.
    """
    rows: list[Row] = []
    for variant in variants:
        for seed in seeds:
            result = results[variant.design.key, seed]
            figures = dict(zip(FIGURES, result.point.tolist(), strict=True))
            rows.append({"table": "runs", **_names(variant), "seed": seed, **result.facts, **figures})
    by_name = {(v.wish, v.name): [results[v.design.key, seed] for seed in seeds] for v in variants}
    for variant in variants:
        found = by_name[variant.wish, variant.name]
        row: Row = {"table": "variants", **_names(variant), "seeds": len(seeds), **_mean_facts(found)}
        for name, (value, low, high) in _summary(_points(found), _draws(found)).items():
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        if (other := by_name.get((variant.wish, variant.against or ""))) is not None:
            row |= _difference(_points(found) - _points(other), _draws(found) - _draws(other))
        rows.append(row)
    return rows


def half_widths(points: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Of the interval of each figure, as the module says.

    Args:
        points: [seed figure].
        draws: On resampled images, the same for all seeds [repeat seed figure]. NaN where a figure has no value.
    Returns:
        [figure]
    """
    with np.errstate(invalid="ignore"):  # a rule that keeps no clean image has an infinite cost, and no interval
        images = _t(len(draws)) * np.nanstd(draws.mean(axis=1), axis=0, ddof=1)
        if len(points) == 1:
            return images
        return np.hypot(images, _t(len(points)) * points.std(axis=0, ddof=1) / np.sqrt(len(points)))


def _t(count: int) -> float:
    return float(student.ppf((1 + LEVEL) / 2, count - 1))


def _summary(points: np.ndarray, draws: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Mean over the seeds, low and high."""
    mean, half = points.mean(axis=0), half_widths(points, draws)
    return dict(
        zip(FIGURES, zip(mean.tolist(), (mean - half).tolist(), (mean + half).tolist(), strict=True), strict=True)
    )


def _difference(points: np.ndarray, draws: np.ndarray) -> Row:
    row: Row = {}
    better, worse = False, False
    summary = _summary(points, draws)
    for name, sign in (("auroc_within", 1), ("cost_per_clean_matched", -1)):
        value, low, high = summary[name]
        row |= {f"minus_{name}": value, f"minus_{name}_low": low, f"minus_{name}_high": high}
        better |= min(sign * low, sign * high) > 0
        worse |= max(sign * low, sign * high) < 0
    helps = {(True, False): "yes", (False, True): "worse", (True, True): "mixed"}.get((better, worse), "no")
    return row | {"helps": helps}


def _points(found: Sequence[Result]) -> np.ndarray:
    """[seed figure]"""
    return np.stack([result.point for result in found])


def _draws(found: Sequence[Result]) -> np.ndarray:
    """[repeat seed figure]"""
    return np.stack([result.draws for result in found], axis=1)


def _mean_facts(found: Sequence[Result]) -> dict[str, float]:
    return {name: float(np.mean([result.facts[name] for result in found])) for name in found[0].facts}


def _names(variant: Variant) -> Row:
    return {"wish": variant.wish, "variant": variant.name, "against": variant.against}
