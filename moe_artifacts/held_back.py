"""How a calibration looks on images that took no part in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_artifacts.policy import Run, apply_rule, last_statistic

BINS = 10  # of the reliability table


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One line of the reliability table: images and steps whose posterior is in [low, high)."""

    low: float
    high: float
    count: int
    predicted: float  # mean posterior
    observed: float  # mean label


def reliability(prob: Float[np.ndarray, " sample"], label: Float[np.ndarray, " sample"], bins: int = BINS) -> list[Bin]:
    """How many of those with a posterior of about x are bad, in bins of equal width; empty bins are left out.

    Example:
        >>> [line] = reliability(np.array([0.22, 0.24]), np.array([0.0, 1.0]))
        >>> line.count, round(line.predicted, 2), line.observed
        (2, 0.23, 0.5)
    """
    which = np.minimum((prob * bins).astype(int), bins - 1)
    lines = []
    for k in np.unique(which):
        rows = which == k
        lines.append(
            Bin(
                low=float(k / bins),
                high=float((k + 1) / bins),
                count=int(rows.sum()),
                predicted=float(prob[rows].mean()),
                observed=float(label[rows].mean()),
            )
        )
    return lines


def risk_rates(
    label: Float[np.ndarray, " image"], prompt: Int[np.ndarray, " image"], aborted: Bool[np.ndarray, " image"]
) -> dict[str, float]:
    """Every risk that can be promised, as it is on these images; NaN where there is nothing to divide by."""
    clean, group = 1 - label, np.unique(prompt, return_inverse=True)[1]
    have, lost = np.bincount(group, weights=clean), np.bincount(group, weights=clean * aborted)

    def ratio(part: float, whole: float) -> float:
        return float(part / whole) if whole > 0 else float("nan")

    return {
        "per-image": ratio(lost.sum(), have.sum()),
        "per-prompt": float((lost[have > 0] / have[have > 0]).mean()),
        "miss": ratio((label * ~aborted).sum(), label.sum()),
        "wrong-aborts": ratio(lost.sum(), float(aborted.sum())),
    }


def threshold_curve(
    run: Run, statistic: Float[np.ndarray, "image check"], clear: Int[np.ndarray, " image"] | None, points: int = 60
) -> dict[str, Float[np.ndarray, " threshold"]]:
    """What other thresholds would do, from the highest statistics down to aborting half of the clean images."""
    values = last_statistic(run, statistic, clear)
    lowest = np.quantile(values[~run.bad], 0.5)
    candidates = np.unique(np.quantile(values[values >= lowest], np.linspace(0, 1, points)))
    found = [apply_rule(run, statistic, float(t), clear) for t in candidates]
    columns = ("false_abort_rate", "recall", "cost_per_clean")
    return {"threshold": candidates, **{name: np.array([getattr(o, name) for o in found]) for name in columns}}
