"""What a race costs, and its plan: which steps to score, how many candidates to start and to keep at each check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_artifacts.errors import InputError


@dataclass(frozen=True, slots=True)
class RaceCost:
    """What a race pays, in denoiser calls of one image; a check is a column of the scored steps.

    Raises:
        InputError: If calls do not rise from 1 to less than ``total_calls``, or the price of a check is negative.
    """

    calls: tuple[int, ...]  # behind a candidate at each scored step
    total_calls: int
    check_cost: float  # of one score of one candidate, that of the finished image too

    def __post_init__(self) -> None:
        calls = np.asarray(self.calls)
        if len(calls) == 0 or calls[0] < 1 or (np.diff(calls) <= 0).any() or calls[-1] >= self.total_calls:
            raise InputError(
                f"calls must rise from 1 to less than total_calls={self.total_calls}, the score of the finished image "
                f"being no check; got {self.calls}"
            )
        if not self.check_cost >= 0:
            raise InputError(f"check_cost must be at least 0 denoiser calls, got {self.check_cost}")

    def waves(self, checks: Sequence[int]) -> tuple[float, ...]:
        """Of one candidate in each wave: on to the first check, from check to check, and from the last to the end.

        Example:
            >>> RaceCost(calls=(1, 2, 3, 4), total_calls=10, check_cost=0.5).waves((1, 3))
            (2.5, 2.5, 6.5)
        """
        ends = [*(self.calls[check] for check in checks), self.total_calls]
        return tuple((np.diff([0, *ends]) + self.check_cost).tolist())


@dataclass(frozen=True, slots=True)
class RacePlan:
    """Which scored steps a race looks at, and how many candidates each wave takes.

    Raises:
        InputError: If checks do not rise, counts rise or fall below 1, or there is not one count more than checks.
    """

    checks: tuple[int, ...]  # columns of the scored steps, rising
    counts: tuple[int, ...]  # candidates started, then kept at each check; the last are finished

    def __post_init__(self) -> None:
        if (np.diff(self.checks) <= 0).any() or min(self.checks, default=0) < 0:
            raise InputError(f"checks must be rising columns of the scored steps, got {self.checks}")
        if len(self.counts) != len(self.checks) + 1 or (np.diff(self.counts) > 0).any() or self.counts[-1] < 1:
            raise InputError(
                f"counts must be {len(self.checks) + 1} numbers for {len(self.checks)} checks, never rising and at "
                f"least 1, got {self.counts}"
            )

    def cost(self, cost: RaceCost) -> float:
        """Denoiser calls of the whole race, checks included."""
        return float(np.dot(cost.waves(self.checks), self.counts))


def affordable(
    weights: Sequence[float], price: Sequence[float], budget: float, most: int | None = None
) -> tuple[int, ...]:
    """Counts near a multiple of ``weights`` that the budget pays for, and no more of any wave without going over it.

    Args:
        weights: One a wave, positive.
        price: Of one candidate in each wave, in the unit of the budget.
        most: Candidates there are; None: as many as wished.
    Returns:
        One count a wave, never rising, at least 1.
    Raises:
        InputError: If the budget does not pay for one candidate in every wave.
    Example:
        >>> affordable((4, 2), (3.0, 8.0), 40)
        (5, 3)
    """
    if sum(price) > budget + _slack(budget):
        raise InputError(f"budget={budget:g} does not pay for one finished image, which costs {sum(price):g} here")
    limit = np.inf if most is None else most

    def scaled(factor: float) -> np.ndarray:
        return np.minimum.accumulate(np.clip(np.round(np.multiply(weights, factor)), 1, limit)).astype(int)

    low, high = (
        0.0,
        budget / min(price) / min(weights),
    )  # high: more than the budget pays for, or all there are
    for _ in range(30):
        factor = (low + high) / 2
        low, high = (factor, high) if scaled(factor) @ np.asarray(price) <= budget + _slack(budget) else (low, factor)
    return topped_up(scaled(low).tolist(), price, budget, most)


def topped_up(counts: Sequence[int], price: Sequence[float], budget: float, most: int | None = None) -> tuple[int, ...]:
    """The counts, and what the budget still pays for: the last waves first, since one more finished image is worth most."""
    counts, left = list(counts), budget + _slack(budget) - float(np.dot(counts, price))
    limit = np.inf if most is None else most
    added = True
    while added:
        added = False
        for k in reversed(range(len(counts))):
            if counts[k] < (limit if k == 0 else counts[k - 1]) and price[k] <= left:
                counts[k] += 1
                left -= price[k]
                added = True
    return tuple(counts)


def _slack(budget: float) -> float:
    return 1e-9 * budget  # for sums of prices that meet the budget exactly
