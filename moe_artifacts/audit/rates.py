"""Rates of wrong decisions, from a share of the would-be aborts that were finished, with intervals that are exact.

With F the false-abort rate and r the chance that a would-be abort is finished and labelled, every clean image is one of

    X   clean, would have been aborted, seen          chance F r
        clean, aborted, never seen                    chance F (1 - r)
    Y   clean, not aborted                            chance 1 - F

so that F / (1 - F) is estimated by (X / r) / Y. Given X + Y, X is binomial with the share q = F r / (F r + 1 - F), and
an exact interval of q (Clopper and Pearson, 1934) is one of F. Where prompts differ in their rates, X varies less than
that (Hoeffding, 1956), and the interval is wider than it had to be.

Where only a sample of the kept images is labelled, Y has an interval too, and the two share the error (Bonferroni). So
do runs with different audit rates: each has its interval, and the bounds are averaged with the weights of the runs. One
interval of a weighted sum would be narrower, but has no exact form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_artifacts.calibration.bounds import clopper_pearson
from moe_artifacts.errors import InputError

# Of the error, for what a sample says about the kept images. Small: there are many more of them than audits, so that it
# hardly widens their interval.
KEPT_SHARE = 0.2
FARTHEST = 4096  # times the audits so far: beyond that `more_audits` gives up


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What was counted in runs with one audit rate.

    Raises:
        InputError: If the audit rate is not in (0, 1], or a part is larger than what it is a part of.
    """

    audit_rate: float  # chance that a would-be abort was finished
    aborts: int  # would-be aborts, the audited ones among them
    audited: int  # of these, finished
    audited_labelled: int  # of these, labelled
    audited_clean: int  # of these, clean
    kept: int
    kept_labelled: int  # of the kept, labelled: all, none, or a random sample
    kept_clean: int  # of these, clean
    rejected: int = 0  # found bad at the last step: not aborted, not kept, and nobody knows whether they are clean

    def __post_init__(self) -> None:
        if not 0 < self.audit_rate <= 1:
            raise InputError(f"audit_rate must be in (0, 1], got {self.audit_rate}")
        for names in (
            ("aborts", "audited", "audited_labelled", "audited_clean"),
            ("kept", "kept_labelled", "kept_clean"),
            ("rejected",),
        ):
            counts = [getattr(self, name) for name in names]
            if counts != sorted(counts, reverse=True) or counts[-1] < 0:
                raise InputError(f"{', '.join(names)} must not rise and not be negative, got {counts}")

    @property
    def seen_rate(self) -> float:
        """Chance that a would-be abort was finished and labelled; audited images lack labels at random."""
        return self.audit_rate * self.audited_labelled / self.audited if self.audited else self.audit_rate

    def times(self, factor: float) -> Tally:
        """The same shares in more images; counts are rounded."""
        counts = ("aborts", "audited", "audited_labelled", "audited_clean", "kept", "kept_labelled", "kept_clean")
        return replace(self, **{name: round(getattr(self, name) * factor) for name in (*counts, "rejected")})

    def flipped(self) -> Tally:
        """Bad images in the place of the clean ones."""
        return replace(
            self,
            audited_clean=self.audited_labelled - self.audited_clean,
            kept_clean=self.kept_labelled - self.kept_clean,
        )


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate in [0, 1] and its interval; 0 and 1 are the ends of one that says nothing there."""

    value: float | None  # None: cannot be estimated
    low: float
    high: float

    def complement(self) -> Rate:
        return Rate(None if self.value is None else 1 - self.value, 1 - self.high, 1 - self.low)


Measure = Callable[[Sequence[Tally], float], Rate]


def false_abort_rate(tallies: Sequence[Tally], confidence: float) -> Rate:
    """Chance that a clean image is aborted: over the images of all runs, each run in its weight.

    Without any label of the kept images only the lower end says something: all of them may be clean.

    Args:
        tallies: One per audit rate.
        confidence: In (0, 1), of the interval.
    Raises:
        InputError: If there are no tallies, or ``confidence`` is not in (0, 1).
    Example:
        >>> tally = Tally(audit_rate=0.1, aborts=400, audited=40, audited_labelled=40, audited_clean=4,
        ...               kept=1000, kept_labelled=1000, kept_clean=960)
        >>> rate = false_abort_rate([tally], 0.95)
        >>> round(rate.value, 3), round(rate.low, 3), round(rate.high, 3)
        (0.04, 0.011, 0.097)
    """
    error = _error(tallies, confidence)
    bounds = [_odds_of_abort(tally, error) for tally in tallies]
    return Rate(
        _estimate(tallies),
        _rate(_mean(bounds, lowest=True)),
        _rate(_mean(bounds, lowest=False)),
    )


def miss_rate(tallies: Sequence[Tally], confidence: float) -> Rate:
    """Chance that a bad image is not aborted. Arguments as of :func:`false_abort_rate`."""
    return false_abort_rate([tally.flipped() for tally in tallies], confidence).complement()


def wrong_abort_share(tallies: Sequence[Tally], confidence: float) -> Rate:
    """Chance that an aborted image is clean. Needs no label of a kept image; arguments as of :func:`false_abort_rate`.

    Example:
        >>> tally = Tally(audit_rate=0.1, aborts=400, audited=40, audited_labelled=40, audited_clean=4,
        ...               kept=0, kept_labelled=0, kept_clean=0)
        >>> rate = wrong_abort_share([tally], 0.95)
        >>> rate.value, round(rate.low, 3), round(rate.high, 3)
        (0.1, 0.028, 0.237)
    """
    error = _error(tallies, confidence)
    weights = np.array([tally.aborts for tally in tallies], dtype=float)
    if not weights.sum():
        return Rate(None, 0.0, 1.0)
    weights /= weights.sum()
    bounds = [_interval(tally.audited_clean, tally.audited_labelled, error / 2) for tally in tallies]
    unknown = any(tally.aborts and not tally.audited_labelled for tally in tallies)
    shares = [tally.audited_clean / max(tally.audited_labelled, 1) for tally in tallies]
    low, high = (float(weights @ np.array(ends)) for ends in zip(*bounds, strict=True))
    return Rate(None if unknown else float(weights @ np.array(shares)), low, high)


def more_audits(tallies: Sequence[Tally], confidence: float, max_risk: float, measure: Measure) -> int | None:
    """How many more labelled audits would put the interval on one side of ``max_risk``, if all shares stayed as they are.

    None: too many to name, since the estimate is too close to ``max_risk``, or there is nothing to go by.
    """
    audits = sum(tally.audited_labelled for tally in tallies)

    def tells(factor: float) -> bool:
        rate = measure([tally.times(factor) for tally in tallies], confidence)
        return rate.low > max_risk or rate.high <= max_risk

    high = 1.0
    while not tells(high):
        high *= 2
        if high > FARTHEST or not audits:
            return None
    low = high / 2
    while (high - low) * audits > 0.5:
        middle = (low + high) / 2
        low, high = (low, middle) if tells(middle) else (middle, high)
    return max(0, math.ceil((high - 1) * audits))


@dataclass(frozen=True, slots=True)
class _Bounds:
    odds: tuple[float, float]  # of a clean image being aborted, F / (1 - F)
    clean: tuple[float, float]  # clean images that were not aborted


def _odds_of_abort(tally: Tally, error: float) -> _Bounds:
    least = most = tally.kept_clean
    tails = (error / 2, error / 2)
    if not tally.kept_labelled:
        least, most = 0, tally.kept
        tails = (error, 0.0)  # nothing is known of the upper end
    elif tally.kept_labelled < tally.kept:
        low, high = _interval(tally.kept_clean, tally.kept_labelled, KEPT_SHARE * error / 2)
        least = max(least, math.floor(low * tally.kept))
        most = min(tally.kept - (tally.kept_labelled - tally.kept_clean), math.ceil(high * tally.kept))
        tails = ((1 - KEPT_SHARE) * error / 2,) * 2
    most += tally.rejected
    low_share = _interval(tally.audited_clean, tally.audited_clean + most, tails[0])[0]
    high_share = _interval(tally.audited_clean, tally.audited_clean + least, tails[1])[1]
    if not tally.seen_rate:  # audited, but not labelled
        low_share, high_share = 0.0, 1.0
    return _Bounds((_odds(low_share, tally.seen_rate), _odds(high_share, tally.seen_rate)), (least, most))


def _odds(share: float, seen_rate: float) -> float:
    """F / (1 - F) of q."""
    if share == 0:
        return 0.0
    return math.inf if share == 1 else share / (1 - share) / seen_rate


def _rate(odds: float) -> float:
    return 1.0 if odds == math.inf else odds / (1 + odds)


def _mean(bounds: Sequence[_Bounds], lowest: bool) -> float:
    """Lowest, or highest, mean of the odds that weights within ``clean`` allow.

    It gives the groups on one side of it their least weight and those on the other their most, so it is among as many
    candidates as there are groups, plus one.
    """
    end = 0 if lowest else 1
    order = sorted(bounds, key=lambda group: group.odds[end], reverse=not lowest)  # the wanted ones first
    odds = np.array([group.odds[end] for group in order])
    if len(odds) == 1 or not np.isfinite(odds).all():
        return float(odds[0])
    weights = np.array([group.clean for group in order], dtype=float)  # group end
    means = []
    for count in range(len(order) + 1):
        chosen = np.concatenate([weights[:count, 1], weights[count:, 0]])
        if chosen.sum():
            means.append(float(chosen @ odds / chosen.sum()))
    return (min if lowest else max)(means, default=float(odds[0]))


def _estimate(tallies: Sequence[Tally]) -> float | None:
    if any((t.kept and not t.kept_labelled) or not t.seen_rate for t in tallies):
        return None
    aborted = sum(t.audited_clean / t.seen_rate for t in tallies)
    kept = sum(t.kept * t.kept_clean / t.kept_labelled for t in tallies if t.kept)
    return aborted / (aborted + kept) if aborted + kept else None


def _interval(k: int, n: int, tail: float) -> tuple[float, float]:
    """Clopper and Pearson's, with ``tail`` of the error at either end."""
    return clopper_pearson(k, n, 1 - 2 * tail) if n and tail else (0.0, 1.0)


def _error(tallies: Sequence[Tally], confidence: float) -> float:
    """Of the interval of each tally."""
    if not tallies:
        raise InputError("tallies must hold at least one, got none")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, both excluded, got {confidence!r}")
    return (1 - confidence) / len(tallies)
