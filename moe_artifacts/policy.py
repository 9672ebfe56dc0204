"""What a decision rule does to a set of judged trajectories: false aborts, recall, steps saved, cost per clean image."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from moe_artifacts.errors import InputError

Column = Int[np.ndarray, " image"]  # of a check; the number of checks means never


@dataclass(frozen=True)
class Run:
    """Judged trajectories of one setting, seen at the same checks."""

    bad: Bool[np.ndarray, " image"]
    calls: Int[np.ndarray, " check"]  # denoiser calls spent by each check, rising
    check_cost: float  # price of one check of one image, in denoiser calls of one image
    full_calls: int | None = None  # of a run that is not stopped; None: the last check comes after all of them

    def __post_init__(self) -> None:
        if self.full_calls is not None and self.full_calls < self.calls[-1]:
            raise InputError(
                f"full_calls must be at least the {self.calls[-1]} of the last check, got {self.full_calls}"
            )
        if self.calls[0] >= self.total_calls:
            raise InputError(
                f"calls must hold a check at which an abort saves a call, got {self.calls} of {self.total_calls}"
            )

    @property
    def total_calls(self) -> int:
        return int(self.calls[-1]) if self.full_calls is None else self.full_calls

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


def abort_columns(
    run: Run, statistic: Real[np.ndarray, "image check"], threshold: float, clear: Column | None = None
) -> tuple[Column, Bool[np.ndarray, " image"]]:
    """Where each image is aborted, and whether it is rejected instead, at a check that saves nothing any more.

    Args:
        statistic: Path statistics, which never fall along ``check``.
        clear: Check after which an image is not looked at any more; an abort at that very check comes first.
    """
    never = len(run.calls)
    column = (statistic < np.float32(threshold)).sum(axis=1)  # see moe_artifacts.decision.abort_step
    if clear is not None:
        column = np.where(column <= clear, column, never)
    return np.where(column <= run.last_saving, column, never), (column > run.last_saving) & (column < never)


def apply_rule(
    run: Run, statistic: Real[np.ndarray, "image check"], threshold: float, clear: Column | None = None
) -> Outcome:
    """Abort at the first check whose path statistic reaches ``threshold``.

    An abort at the last step saves nothing: it counts as ``rejected``, outside ``recall`` and ``false_abort_rate``.
    Arguments as of :func:`abort_columns`.
    """
    column, rejected = abort_columns(run, statistic, threshold, clear)
    return outcome(run, column, rejected, clear)


def spending(run: Run, column: Column, clear: Column | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Denoiser calls and checks spent on each image that is aborted, and looked at for the last time, at these columns."""
    never = len(run.calls)
    at = np.minimum(column, never - 1)
    calls = np.where(column < never, run.calls[at], run.total_calls)
    last = at if clear is None else np.minimum(at, clear)
    return calls, last + 1


def outcome(
    run: Run, column: Column, rejected: Bool[np.ndarray, " image"] | None = None, clear: Column | None = None
) -> Outcome:
    """Outcome of aborting each image at a column of ``run.calls``; ``len(run.calls)`` means never."""
    never = len(run.calls)
    aborted = column < never
    calls, checks = spending(run, column, clear)
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


@dataclass(frozen=True)
class PromptOutcome:
    """What pooled figures hide: a rule may simply never serve the hard prompts. Of the prompts that have a clean image."""

    cost_per_clean: float  # mean over the prompts that keep one, each relative to its own unguarded run
    empty: float  # share of prompts left without a clean image


def by_prompt(
    run: Run, column: Column, prompt: Int[np.ndarray, " image"], clear: Column | None = None
) -> PromptOutcome:
    """The same outcome prompt by prompt, scoring included.

    Raises:
        InputError: If no prompt has a clean image.
    """
    calls, checks = spending(run, column, clear)
    group = np.unique(prompt, return_inverse=True)[1]
    images, clean, kept, spent = (
        np.bincount(group, weights=value)
        for value in (
            np.ones(len(group)),
            ~run.bad,
            ~run.bad & (column == len(run.calls)),
            calls + checks * run.check_cost,
        )
    )
    if not clean.any():
        raise InputError(f"bad holds no clean image in any of {len(images)} prompts: there is no cost per clean image")
    served = kept > 0
    cost = spent[served] / kept[served] / (images[served] * run.total_calls / clean[served]) - 1
    return PromptOutcome(
        cost_per_clean=float(cost.mean()) if served.any() else float("inf"),
        empty=float(1 - served.sum() / (clean > 0).sum()),
    )


def perfect(run: Run, column: int) -> Outcome:
    """Perfect knowledge at one check, free of charge, and none before it."""
    return outcome(Run(run.bad, run.calls, 0.0, run.full_calls), np.where(run.bad, column, len(run.calls)))


def last_statistic(
    run: Run, statistic: Real[np.ndarray, "image check"], clear: Column | None = None
) -> Float[np.ndarray, " image"]:
    """Path statistic at the last check that counts: it still saves a call, and the image is still looked at.

    An image is aborted by any threshold up to this, and by none above it; this is what a threshold is certified on.
    """
    last = np.full(len(statistic), run.last_saving) if clear is None else np.minimum(clear, run.last_saving)
    return statistic[np.arange(len(statistic)), last].astype(np.float32)


def matched_threshold(
    run: Run, statistic: Real[np.ndarray, "image check"], false_abort_rate: float, clear: Column | None = None
) -> float:
    """Lowest threshold at which at most that share, below 1, of these clean images is aborted."""
    values = last_statistic(run, statistic, clear)[~run.bad]
    place = len(values) - 1 - int(np.floor(false_abort_rate * len(values)))
    order_statistic = np.partition(values, place)[place]
    # Not a subnormal number above 0: with denormals flushed, as training does, it would be 0 and abort everything.
    return float(max(np.nextafter(order_statistic, np.float32(np.inf)), np.finfo(np.float32).tiny))


def cheapest_threshold(
    run: Run,
    statistic: Real[np.ndarray, "image check"],
    false_abort_rate: float,
    tried: int = 40,
    clear: Column | None = None,
) -> float:
    """Threshold with the lowest cost per clean image among those that abort at most that share of the clean images."""
    rates = np.linspace(0, false_abort_rate, tried + 1)[1:]
    thresholds = [matched_threshold(run, statistic, rate, clear) for rate in rates]
    return min(thresholds, key=lambda threshold: apply_rule(run, statistic, threshold, clear).cost_per_clean)
