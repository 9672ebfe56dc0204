"""What a decision rule does to a set of judged trajectories: false aborts, recall, steps saved, cost per clean image."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Run:
    """Judged trajectories of one setting, seen at the same checks."""

    bad: np.ndarray  # bool [image]
    calls: np.ndarray  # int [check]: denoiser calls spent by each check, rising, the last one all of them
    check_cost: float  # price of one check of one image, in denoiser calls of one image

    @property
    def total_calls(self) -> int:
        return int(self.calls[-1])

    @property
    def last_saving(self) -> int:
        """Column of the last check at which an abort still saves a call."""
        return int(np.flatnonzero(self.calls < self.total_calls)[-1])


@dataclass(frozen=True)
class Outcome:
    """Rates as fractions; costs relative to the unguarded run, negative is cheaper."""

    bad_rate: float
    false_abort_rate: float
    recall: float
    steps_saved: float
    bad_left: float
    cost_per_clean: float
    cost_per_clean_unscored: float
    rejected: float

    def row(self) -> dict[str, float]:
        return asdict(self)


def apply_rule(run: Run, statistic: np.ndarray, threshold: float) -> Outcome:
    """Abort at the first check whose path statistic [image check] reaches ``threshold``.

    An abort at the last step saves nothing: it counts as ``rejected``, outside ``recall`` and ``false_abort_rate``.
    """
    column = (statistic < np.float32(threshold)).sum(axis=1)  # it never falls, see moe_artifacts.decision.abort_step
    never = len(run.calls)
    rejected = (column > run.last_saving) & (column < never)
    return outcome(run, np.where(column <= run.last_saving, column, never), rejected)


def outcome(run: Run, column: np.ndarray, rejected: np.ndarray | None = None) -> Outcome:
    """Outcome of aborting each image at a column of ``run.calls``; ``len(run.calls)`` means never."""
    never = len(run.calls)
    aborted = column < never
    at = np.minimum(column, never - 1)
    calls = np.where(aborted, run.calls[at], run.total_calls)
    checks = np.where(aborted, at + 1, never)
    kept_clean = (~aborted & ~run.bad).mean()
    clean = (~run.bad).mean()
    before = run.total_calls / clean

    def change(spent: np.ndarray) -> float:
        return float(spent.mean() / kept_clean / before - 1) if kept_clean > 0 else float("inf")

    last = np.zeros(len(aborted), dtype=bool) if rejected is None else rejected & (column == never)
    return Outcome(
        bad_rate=float(run.bad.mean()),
        false_abort_rate=float(aborted[~run.bad].mean()),
        recall=float(aborted[run.bad].mean()),
        steps_saved=float(1 - calls.mean() / run.total_calls),
        bad_left=float(run.bad[~aborted].mean()) if (~aborted).any() else 0.0,
        cost_per_clean=change(calls + checks * run.check_cost),
        cost_per_clean_unscored=change(calls.astype(float)),
        rejected=float(last.mean()),
    )


def perfect(run: Run, column: int) -> Outcome:
    """Perfect knowledge at one check, free of charge, and none before it."""
    return outcome(Run(run.bad, run.calls, 0.0), np.where(run.bad, column, len(run.calls)))


def matched_threshold(run: Run, statistic: np.ndarray, false_abort_rate: float) -> float:
    """Lowest threshold at which at most that share, below 1, of these clean images is aborted."""
    clean = np.sort(statistic[~run.bad, run.last_saving].astype(np.float32))
    allowed = int(np.floor(false_abort_rate * len(clean)))
    order_statistic = clean[len(clean) - 1 - allowed]
    return float(np.nextafter(order_statistic, np.float32(np.inf)))


def cheapest_threshold(run: Run, statistic: np.ndarray, false_abort_rate: float, tried: int = 40) -> float:
    """Threshold with the lowest cost per clean image among those that abort at most that share of the clean images."""
    thresholds = [matched_threshold(run, statistic, rate) for rate in np.linspace(0, false_abort_rate, tried + 1)[1:]]
    return min(thresholds, key=lambda threshold: apply_rule(run, statistic, threshold).cost_per_clean)
