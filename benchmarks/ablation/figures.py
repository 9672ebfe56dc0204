"""What a design comes to on the test runs: AUROC and costs, their intervals, and the table.

Intervals are over test images and seeds alike: each repeat draws images, the same for every design, and seeds, both with
replacement. A difference between two rows is taken within repeats, so what both owe to the same images is not held against either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.ablation.designs import Variant
from moe_artifacts.policy import Run, apply_rule, matched_threshold
from training.metrics import auroc, auroc_within

MAX_RISK, CONFIDENCE = 0.05, 0.95
SHOWN = {"14%": 0, "34%": 2, "100%": 4}  # share of the steps -> check
FIGURES = (
    *(f"auroc_within_{share}" for share in SHOWN),
    "auroc_within",  # mean of the three
    "auroc_pooled",  # mean over the same three checks
    "cost_per_clean_matched",  # at exactly 5 % of these clean images aborted
    "cost_per_clean_deployed",  # at the threshold from the calibration runs
)
REPEATS = 200
Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What a design said of the test runs."""

    prob: np.ndarray  # [image check], or whatever it ranks images by
    statistic: np.ndarray  # [image check], path statistic of its rule, at the checks that the rule looks at
    threshold: float  # from the calibration runs
    run: Run
    group: np.ndarray  # [image], the class asked for


@dataclass(frozen=True)
class Result:
    """A design of one seed: its figures, and those of each repeat."""

    point: np.ndarray  # [figure]
    draws: np.ndarray  # [repeat figure]
    facts: dict[str, float]  # samples, what training cost, what a check costs


def figures(seen: Measured, rows: np.ndarray) -> np.ndarray:
    """``FIGURES`` on some of the test images."""
    bad, group, statistic = seen.run.bad[rows], seen.group[rows], seen.statistic[rows]
    scores = [seen.prob[rows, check] for check in SHOWN.values()]
    within = [auroc_within(score, bad, group) for score in scores]
    run = Run(bad, seen.run.calls, seen.run.check_cost, seen.run.full_calls)
    costs = [
        apply_rule(run, statistic, threshold).cost_per_clean
        for threshold in (matched_threshold(run, statistic, MAX_RISK), seen.threshold)
    ]
    return np.array([*within, np.mean(within), np.mean([auroc(score, bad) for score in scores]), *costs])


def bootstrap_draws(seen: Measured, repeats: int = REPEATS) -> np.ndarray:
    """The figures on resampled images, [repeat figure]; the same images for every design."""
    rng, count = np.random.default_rng(0), len(seen.group)
    return np.stack([figures(seen, rng.integers(count, size=count)) for _ in range(repeats)])


def table(variants: Sequence[Variant], seeds: Sequence[int], results: Mapping[tuple[str, int], Result]) -> list[Row]:
    """A row for each variant and seed, and one for each variant; of those whose seeds are all there.

    ``helps`` says whether the mean AUROC or the matched cost got better than in the row compared with, both intervals being
    asked: "yes" and "worse" if at least one excludes 0 in that direction and none in the other, else "no", or "mixed".
    """
    complete = [v for v in variants if all((v.design.key, seed) in results for seed in seeds)]
    drawn = np.random.default_rng(1).integers(len(seeds), size=(REPEATS, len(seeds)))
    rows = []
    for variant in complete:
        for seed in seeds:
            found = results[variant.design.key, seed]
            rows.append({"table": "runs", **_names(variant), "seed": seed, **found.facts, **_named(found.point)})
    means = {(v.wish, v.name): _over_seeds(v, seeds, results, drawn) for v in complete}
    for variant in complete:
        point, draws, facts = means[variant.wish, variant.name]
        row: Row = {"table": "variants", **_names(variant), "seeds": len(seeds), **facts}
        for name, value, (low, high) in zip(FIGURES, point, _intervals(draws), strict=True):
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        other = means.get((variant.wish, variant.against or ""))
        rows.append(row | (_difference(point - other[0], draws - other[1]) if other else {}))
    return rows


def _difference(point: np.ndarray, draws: np.ndarray) -> Row:
    row: Row = {}
    better, worse = False, False
    for name, sign in (("auroc_within", 1), ("cost_per_clean_matched", -1)):
        column = FIGURES.index(name)
        low, high = _intervals(draws)[column]
        row |= {f"minus_{name}": point[column], f"minus_{name}_low": low, f"minus_{name}_high": high}
        better |= min(sign * low, sign * high) > 0
        worse |= max(sign * low, sign * high) < 0
    return row | {
        "helps": {(True, False): "yes", (False, True): "worse", (True, True): "mixed"}.get((better, worse), "no")
    }


def _over_seeds(
    variant: Variant, seeds: Sequence[int], results: Mapping[tuple[str, int], Result], drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Row]:
    found = [results[variant.design.key, seed] for seed in seeds]
    draws = np.stack([result.draws for result in found], axis=1)  # repeat seed figure
    picked = np.take_along_axis(draws, drawn[..., None], axis=1)
    facts = {name: float(np.mean([result.facts[name] for result in found])) for name in found[0].facts}
    return np.mean([result.point for result in found], axis=0), picked.mean(axis=1), facts


def _names(variant: Variant) -> Row:
    return {"wish": variant.wish, "variant": variant.name, "against": variant.against}


def _named(values: np.ndarray) -> Row:
    return dict(zip(FIGURES, values.tolist(), strict=True))


def _intervals(draws: np.ndarray) -> list[tuple[float, float]]:
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))
