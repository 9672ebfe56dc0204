"""The risks a threshold can be certified for, and the p-value of each at one threshold.

With S the path statistic of an image, c and b its weights as a clean and as a bad image (1 - label and label):

    false-aborts              sum of c over S >= threshold  /  sum of c
    false-aborts-per-prompt   the mean of that fraction over the prompts that have a clean image
    miss                      sum of b over S < threshold   /  sum of b
    wrong-aborts              sum of c over S >= threshold  /  number of images with S >= threshold

All are rates of the population that images, or prompts, are drawn from. A ratio of sums is above ``max_risk`` where the mean
over units of (numerator - max_risk * denominator) is above 0, so one bet on that mean serves each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float32, Int, Real

from moe_artifacts.calibration.bounds import betting_p_value, binomial_p_value
from moe_artifacts.calibration.checks import unit_interval
from moe_artifacts.errors import CalibrationError, InputError

RiskName = Literal["false-aborts", "false-aborts-per-prompt", "miss", "wrong-aborts"]
Unit = Literal["image", "prompt"]


@dataclass(frozen=True, slots=True)
class Risk:
    """A promise: this risk is at most ``max_risk``.

    Raises:
        InputError: If there is no such risk, or ``max_risk`` is not in (0, 1).
    """

    name: RiskName
    max_risk: float

    def __post_init__(self) -> None:
        if self.name not in get_args(RiskName):
            raise InputError(f"the name of a risk must be one of {', '.join(get_args(RiskName))}, got {self.name!r}")
        require_rate("max_risk", self.max_risk)

    def __str__(self) -> str:
        return f"{self.name} <= {self.max_risk:g}"


def require_rate(name: str, rate: float) -> None:
    """Refuse what is not in (0, 1)."""
    if not 0 < rate < 1:
        raise InputError(f"{name} must be between 0 and 1, both excluded, got {rate!r}")


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """Held-out images, and the units they were drawn in, in an order fixed by the seed."""

    statistic: Float32[np.ndarray, " image"]
    clean: Float[np.ndarray, " image"]  # weight as a clean image; 1 minus it, as a bad one
    unit: Int[np.ndarray, " image"]  # place of the image's unit in the order
    num_units: int
    cap: int  # images a unit can have
    by_prompt: bool
    hard: bool  # every label is 0 or 1

    @classmethod
    def check(
        cls,
        statistic: Real[np.ndarray, " image"],
        label: Real[np.ndarray, " image"],
        prompt: np.ndarray | None,
        unit: Unit,
        seed: int,
        images_per_prompt: int | None,
    ) -> Sample:
        """Raises InputError for arrays that do not fit together or leave their range."""
        statistic, label = unit_interval("statistic", statistic), unit_interval("label", label)
        if len(statistic) != len(label):
            raise InputError(f"statistic and label must be equally long, got {len(statistic)} and {len(label)}")
        if unit not in get_args(Unit):
            raise InputError(f'unit must be "image" or "prompt", got {unit!r}')
        if prompt is not None:
            prompt = np.asarray(prompt)
            if prompt.shape != label.shape or prompt.dtype.kind not in "iuUS":
                raise InputError(
                    f"prompt must hold one integer or string per image, {len(label)} in all, "
                    f"got {prompt.dtype} of shape {prompt.shape}"
                )
        place, cap = np.arange(len(label)), 1
        if unit == "prompt":
            if prompt is None:
                raise InputError('unit="prompt" needs prompt, the prompt of each image')
            place = np.unique(prompt, return_inverse=True)[1]
            most = int(np.bincount(place).max())
            cap = most if images_per_prompt is None else images_per_prompt
            if cap < most:
                raise InputError(f"images_per_prompt={cap} is the most a prompt may have, but one has {most}")
        order = np.random.default_rng(seed).permutation(place.max() + 1)
        return cls(
            statistic=statistic.astype(np.float32),  # as the guard compares them
            clean=1 - label,
            unit=order[place],
            num_units=len(order),
            cap=cap,
            by_prompt=unit == "prompt",
            hard=bool(np.isin(label, (0, 1)).all()),
        )


class RiskTest:
    """One risk on one sample: how likely the sample is, were the promise broken at a threshold.

    Raises:
        InputError: If the risk needs another unit.
        CalibrationError: If no image says anything about it.
    """

    def __init__(self, risk: Risk, sample: Sample, confidence: float) -> None:
        self.risk, self.sample, self.confidence = risk, sample, confidence
        weight = {"miss": 1 - sample.clean, "wrong-aborts": np.ones(len(sample.clean))}.get(risk.name, sample.clean)
        self._used = weight > 0  # the images that count below the fraction line
        if not self._used.any():
            kind = "with artifacts" if risk.name == "miss" else "that are clean"
            raise CalibrationError(f"{risk} needs images {kind} to be certified on, got none among {len(weight)}")
        self._statistic, self._unit = sample.statistic[self._used], sample.unit[self._used]
        self._weight = weight[self._used]
        self._wrong = sample.clean[self._used] if risk.name == "wrong-aborts" else self._weight  # if it goes wrong
        if risk.name == "false-aborts-per-prompt":
            if not sample.by_prompt:
                raise InputError('false-aborts-per-prompt is a mean over prompts: it needs unit="prompt"')
            # Each image weighs its share in its prompt; the prompts without a clean image are left out.
            total = np.bincount(self._unit, weights=self._weight, minlength=sample.num_units)
            self._wrong = self._weight = self._weight / total[self._unit]
            self._unit = (np.cumsum(total > 0) - 1)[self._unit]
            self.num_units = int((total > 0).sum())
        else:
            self.num_units = sample.num_units if self.bets else len(self._weight)

    @property
    def bets(self) -> bool:
        """Whether it bets on units; else it counts independent images."""
        return self.sample.by_prompt or not self.sample.hard

    @property
    def values(self) -> Float32[np.ndarray, " value"]:
        """The statistics at which the risk changes, rising."""
        return np.unique(self._statistic)

    def count(self, statistic: float) -> int:
        """Images that count, with exactly this statistic."""
        return int((self._statistic == np.float32(statistic)).sum())

    def rate(self, threshold: float) -> float:
        """The risk on the sample itself; NaN for the share of wrong aborts where nothing is aborted."""
        wrong, weight = self._sums(threshold)
        return float(wrong.sum() / weight.sum()) if weight.any() else float("nan")

    def p_value(self, threshold: float) -> float:
        """Valid for a threshold fixed beforehand."""
        wrong, weight = self._sums(threshold)
        if not self.bets:
            return binomial_p_value(round(wrong.sum()), round(weight.sum()), self.risk.max_risk)
        return self._bet(wrong, weight)

    def units_needed(self) -> int:
        """How many units like these would do if nothing went wrong on any; about, where their sizes vary."""
        clean_share = self._weight.sum() / (self.num_units * self._cap)
        lots = 1
        while self._bet_on_nothing_wrong(lots, clean_share) > 1 - self.confidence:
            lots *= 2
        low, high = lots // 2, lots
        while high - low > 1:
            middle = (low + high) // 2
            enough = self._bet_on_nothing_wrong(middle, clean_share) <= 1 - self.confidence
            low, high = (low, middle) if enough else (middle, high)
        return high

    @property
    def _cap(self) -> int:
        return 1 if self.risk.name == "false-aborts-per-prompt" else self.sample.cap

    def _bet_on_nothing_wrong(self, num_units: int, weight: float) -> float:
        excess = np.full(num_units, -self.risk.max_risk * weight)
        return betting_p_value(excess, self.risk.max_risk, self.confidence)

    def _bet(self, wrong: np.ndarray, weight: np.ndarray) -> float:
        """From sums over the images of each unit."""
        excess = (wrong - self.risk.max_risk * weight) / self._cap
        return betting_p_value(excess, self.risk.max_risk, self.confidence)

    def _sums(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Per unit, or in all where images are counted: what goes wrong, and of how much."""
        aborted = self._statistic >= np.float32(threshold)
        wrong = self._wrong * (~aborted if self.risk.name == "miss" else aborted)
        weight = self._weight * aborted if self.risk.name == "wrong-aborts" else self._weight
        if not self.bets:
            return wrong.sum(keepdims=True), weight.sum(keepdims=True)
        per_unit = (np.bincount(self._unit, weights=w, minlength=self.num_units) for w in (wrong, weight))
        return next(per_unit), next(per_unit)
