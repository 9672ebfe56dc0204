"""Scores to thresholds that keep a promise: P(a risk > its max_risk) <= 1 - confidence, over the draw of the held-out data.

Every decision rule is nested in one path statistic (see :mod:`moe_artifacts.decision`), so false aborts can only rise while
the threshold falls. Walk down from the safest threshold, at which nothing is aborted, and stop at the first that does not
pass. To break the promise the walk must pass the highest threshold at which it is broken: one test, fixed by the population
and not by the data, so it passes with probability 1 - confidence at most, however many thresholds were looked at. Where
images are counted this is the binomial order statistic (a tolerance limit: Wilks, 1941). The share of missed images falls
with the threshold: the same from the other end. The p-values never rise along the walk, so bisection finds where it stops.

The share of wrong aborts is not monotone. There, candidates are tested in an order fixed beforehand, each walk stopping at its
first failure (fixed-sequence Learn then Test, Angelopoulos et al., arXiv:2110.01052). Several risks: all must hold. Those
that fall together share the confidence, as does a fixed order of candidates (intersection-union test: the largest p-value
counts). Where risks pull at both ends and no order is given, each end gets half of what the confidence leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Float, Real

from moe_artifacts.calibration.bounds import allowed_aborts, fewest_units, is_small
from moe_artifacts.calibration.checks import unit_interval
from moe_artifacts.calibration.risks import Risk, RiskName, RiskTest, Sample, Unit, require_rate
from moe_artifacts.errors import CalibrationError, InputError

# Where the share of wrong aborts may be small and yet enough is aborted to see it is not known beforehand: five walks, each
# with a fifth of what the confidence leaves.
DEFAULT_WALKS = tuple(np.arange(start, 0, -5) / 100 for start in (90, 70, 50, 30, 10))


@dataclass(frozen=True, kw_only=True, slots=True)
class Certified:
    """P(any of the risks > its max_risk) <= 1 - confidence, over the draw of the images or prompts it was found on."""

    threshold: float  # in (0, 1], to be used with >=
    risks: tuple[Risk, ...]
    confidence: float
    unit: Unit
    num_units: int  # images that count for the first risk, or prompts, it rests on
    left_out: int  # prompts without an image that counts for the first risk, where they do not count
    num_clean: int  # clean images, in part or in full
    allowed_aborts: (
        int | None
    )  # so many of the clean images may lie at or above the threshold; where images are counted
    empirical: dict[str, float]  # rates at the threshold on the same data, pooled false aborts always among them

    @property
    def max_risk(self) -> float:
        """Of the first risk."""
        return self.risks[0].max_risk


def certify(
    statistic: Real[np.ndarray, " image"],
    label: Real[np.ndarray, " image"],
    prompt: np.ndarray | None = None,
    *,
    risks: Risk | Sequence[Risk],
    confidence: float,
    unit: Unit,
    seed: int = 0,
    images_per_prompt: int | None = None,
    candidates: Float[np.ndarray, " candidate"] | None = None,
) -> Certified:
    """Lowest threshold that keeps every promise; for missed images alone, the highest.

    Args:
        statistic: Path statistics of held-out images at the last step at which an abort saves a call, in [0, 1];
            compared as float32, as the guard does.
        label: In [0, 1], 1 with artifacts; in between, the share of raters who saw them.
        prompt: An integer or a string per image, equal for images of one prompt.
        risks: What is promised, all of it at once.
        confidence: In (0, 1).
        unit: What was drawn independently. "image" holds only where every image has its own independently drawn prompt.
        seed: Of the order in which the units are bet on. Fix it beforehand: trying several breaks the promise.
        images_per_prompt: The most a prompt can have, known beforehand; by default, the most that one has here.
        candidates: Thresholds in (0, 1] in the order in which they are tested, safest first, not chosen on these data.
            By default, whatever the statistics hold; for wrong-aborts, five walks down from fixed thresholds.
    Raises:
        InputError: If the arrays differ in length, hold NaN, or leave [0, 1]; or if a rate is outside (0, 1).
        CalibrationError: If there is nothing to certify on, too little for the promise, or no threshold that keeps it.
    Example:
        >>> risk = Risk("false-aborts-per-prompt", 0.1)
        >>> found = certify(
        ...     np.linspace(0, 1, 300), np.zeros(300), np.arange(300) // 3, risks=risk, confidence=0.9, unit="prompt"
        ... )
        >>> round(found.threshold, 2), found.num_units
        (0.89, 100)
    """
    require_rate("confidence", confidence)
    sample = Sample.check(statistic, label, prompt, unit, seed, images_per_prompt)
    risks = (risks,) if isinstance(risks, Risk) else tuple(risks)
    if not risks or len({risk.name for risk in risks}) < len(risks):
        raise InputError(f"risks must hold at least one risk, and each once, got {[str(risk) for risk in risks]}")
    if candidates is not None:
        candidates = _checked(candidates)
    by_candidates = candidates is not None or any(risk.name == "wrong-aborts" for risk in risks)
    if by_candidates:
        walks = DEFAULT_WALKS if candidates is None else (candidates,)
        threshold = _fixed_sequence(sample, risks, 1 - confidence, walks)
    else:
        threshold = _nested(sample, risks, 1 - confidence)
    first = RiskTest(risks[0], sample, confidence)
    num_clean = int((sample.clean > 0).sum())
    counted = not first.bets and risks[0].name == "false-aborts" and len(risks) == 1 and not by_candidates
    return Certified(
        threshold=threshold,
        risks=risks,
        confidence=confidence,
        unit=unit,
        num_units=first.num_units,
        left_out=sample.num_units - first.num_units if sample.by_prompt else 0,
        num_clean=num_clean,
        allowed_aborts=allowed_aborts(num_clean, risks[0].max_risk, confidence) if counted else None,
        empirical=_rates(sample, threshold, confidence),
    )


def certify_image_threshold(statistics: Float[np.ndarray, " image"], max_risk: float, confidence: float) -> Certified:
    """Lowest threshold whose false-abort rate stays under ``max_risk``, from clean images with a prompt of their own each.

    Raises:
        InputError, CalibrationError: As :func:`certify`.
    """
    risk = Risk("false-aborts", max_risk)
    return certify(statistics, np.zeros(len(statistics)), risks=risk, confidence=confidence, unit="image")


def _nested(sample: Sample, risks: tuple[Risk, ...], level: float) -> float:
    """Monotone risks: the ends of the interval of thresholds that keep them all."""
    rises = [risk.name == "miss" for risk in risks]  # while the threshold rises
    level /= len(set(rises))
    tests = [RiskTest(risk, sample, 1 - level) for risk in risks]
    falling = [_lowest(test, level) for test, up in zip(tests, rises, strict=True) if not up]
    rising = [_highest(test, level) for test, up in zip(tests, rises, strict=True) if up]
    if not falling:
        return min(rising)
    low, high = max(falling), min(rising, default=1.0)
    if low > high:
        raise CalibrationError(
            f"no threshold keeps {' and '.join(map(str, risks))}: false aborts need at least {low:.4g}, misses at most "
            f"{high:.4g}; allow more of one, use a rule that tells images apart better, or more data"
        )
    return low


def _lowest(test: RiskTest, level: float) -> float:
    """Walk down: the lowest threshold just above a statistic that passes."""
    values = test.values
    thresholds = np.nextafter(values, np.float32(np.inf))
    # nextafter in the scores' own float32: a float64 step up is lost when torch compares it with a float32 score. And
    # never a subnormal number, which some devices read as 0, and 0 aborts everything.
    thresholds = np.maximum(thresholds, np.finfo(np.float32).tiny)
    safest = len(values) - 1
    _require_enough(test, float(thresholds[safest]), level)
    place = first_passing(0, safest, lambda k: is_small(test.p_value(float(thresholds[k])), level))
    if values[place] == 1:
        raise CalibrationError(
            f"no threshold in [0, 1] keeps {test.risk}: {test.count(1.0)} clean images reach the statistic 1 and would be "
            f"aborted by any; use a rule that does not saturate"
        )
    return float(thresholds[place])


def _highest(test: RiskTest, level: float) -> float:
    """Walk up: the highest statistic that passes as a threshold."""
    values = test.values
    _require_enough(test, float(values[0]), level)
    down = values[::-1]
    threshold = float(down[first_passing(0, len(values) - 1, lambda k: is_small(test.p_value(float(down[k])), level))])
    if threshold < np.finfo(np.float32).tiny:
        raise CalibrationError(f"only the threshold 0, which aborts every image, keeps {test.risk}")
    return threshold


def first_passing(low: int, high: int, passes: Callable[[int], bool]) -> int:
    """Smallest place that passes, where all after it do and ``high`` is known to."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle + 1, high)
    return high


def _require_enough(test: RiskTest, safest: float, level: float) -> None:
    """Refuse a sample on which not even the safest threshold passes, at which nothing goes wrong."""
    if is_small(test.p_value(safest), level):
        return
    name, bad = test.risk.name, test.risk.name == "miss"
    exact = not test.bets or name == "false-aborts-per-prompt"
    needed = fewest_units(test.risk.max_risk, 1 - level) if exact else test.units_needed()
    if not test.sample.by_prompt:
        kind = "images with artifacts" if bad else "clean images"
    elif exact:
        kind = "prompts with a clean image"
    else:
        kind = f"prompts with as many {'images with artifacts' if bad else 'clean images'} as these have"
    raise CalibrationError(
        f"max_risk={test.risk.max_risk:g} at confidence={1 - level:g} needs at least {needed} {kind}, got {test.num_units}"
    )


def _fixed_sequence(
    sample: Sample, risks: tuple[Risk, ...], level: float, walks: Sequence[Float[np.ndarray, " _"]]
) -> float:
    """The lowest of the candidates at which every risk passes, each walk ending at its first failure."""
    level /= len(walks)
    tests = [RiskTest(risk, sample, 1 - level) for risk in risks]
    certified = []
    for walk in walks:
        for candidate in map(float, walk):
            if not all(is_small(test.p_value(candidate), level) for test in tests):
                break
            certified.append(candidate)
    if not certified:
        starts = ", ".join(f"{walk[0]:g}" for walk in walks)
        seen = "; ".join(f"{test.risk} was {test.rate(float(walks[0][0])):.4g} at {walks[0][0]:g}" for test in tests)
        raise CalibrationError(
            f"no candidate is certified to keep {' and '.join(map(str, risks))}: every walk failed at its start, {starts} "
            f"({seen}); allow more risk, bring more data, or give candidates that start where most data are"
        )
    return min(certified)


def _checked(candidates: Float[np.ndarray, " candidate"]) -> Float[np.ndarray, " candidate"]:
    candidates = unit_interval("candidates", candidates)
    if candidates.min() <= 0:
        raise InputError("candidates must be above 0: a threshold of 0 aborts every image")
    return candidates


def _rates(sample: Sample, threshold: float, confidence: float) -> dict[str, float]:
    """The rates that exist on this sample."""
    rates = {}
    for name in get_args(RiskName):
        if name == "false-aborts-per-prompt" and not sample.by_prompt:
            continue
        try:
            rates[name] = RiskTest(Risk(name, 0.5), sample, confidence).rate(threshold)
        except CalibrationError:  # no image of that class
            continue
    return rates
