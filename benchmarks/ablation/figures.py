"""What a design comes to on the test runs, AUROC and costs, and on test images drawn again from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
