"""Decision rules on trained heads: every one that is tried, what it costs, and the threshold that keeps a promise.

Free numbers (the price of a clean image, q, patience) are chosen by the lowest cost per clean image on validation; thresholds come
from calibration images, which nothing else has seen. The default is the rule that is cheapest on validation; in a tie (paired
interval across zero) the cumulative one, whose threshold serves every number of steps.

The boundary of the economic rule has two free numbers a check: where few images are there to fit it on, it is judged out of fold,
on each half of the images by the boundary of the other half (:func:`economic_out_of_fold`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from moe_artifacts.accumulator import ExitHead, accumulate
from moe_artifacts.calibration import Calibration, Certified, Risk, certify, fit_scale_bias
from moe_artifacts.calibration.economic import choose_steps, fit_boundary
from moe_artifacts.calibration.risks import Unit, require_rate
from moe_artifacts.config import ExitHeadConfig, ThresholdConfig
from moe_artifacts.decision import clear_step, path_statistic
from moe_artifacts.policy import Run, apply_rule, cheapest_threshold, last_statistic
from training.exit_head import ExitData, ExitRecipe, exit_data, exit_masses, train_exit
from training.head_data import HeadData, is_bad
from training.heads import Heads, iter_states, round_to_half, strides

PRICE_FACTORS = (1.0, 1.25, 1.5)
SMALLEST_GAIN = 0.002  # relative change of the cost per clean image that another check has to bring

NOT_JUDGED: Mapping[str, Any] = MappingProxyType({})
ExitTrainer = Callable[[ExitRecipe, ExitData], ExitHead]


@dataclass(frozen=True)
class Candidate:
    """A rule and the exit head it reads."""

    name: str
    rule: ThresholdConfig
    exit_head: ExitHead


@dataclass(frozen=True)
class Paths:
    """Path statistics of some images, and the check after which each is not looked at any more."""

    statistic: Float[np.ndarray, "image check"]
    clear: Int[np.ndarray, " image"] | None

    def rows(self, which: np.ndarray) -> Paths:
        return Paths(self.statistic[which], None if self.clear is None else self.clear[which])


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a threshold is certified for."""

    max_risk: float
    confidence: float
    unit: Unit  # "image" holds only where every image's prompt was drawn on its own

    def __post_init__(self) -> None:
        for name in ("max_risk", "confidence"):
            require_rate(name, getattr(self, name))


def fit_calibration(heads: Heads, data: HeadData) -> Calibration:
    """Scale and bias per log-SNR band, from all checks of labelled images.

    Raises:
        CalibrationError: If there are too few images of a kind, or the logits fall where the labels rise.
    """
    low, high = heads.space.log_snr_range
    calibration = Calibration(heads.space.log_snr_range)
    logits, labels, levels = [], [], []
    for batch, values, _ in iter_states(heads, data, torch.arange(data.checks)):
        present = ~batch.log_snr.isnan()
        logits.append(values[present])
        labels.append(batch.label[:, None].expand_as(values)[present])
        levels.append(batch.log_snr[present].clamp(low, high))  # pure noise has minus infinity
    logit, label, level = (torch.cat(parts).numpy() for parts in (logits, labels, levels))
    calibration.set(*fit_scale_bias(logit, label, level, heads.space.log_snr_range, len(calibration.scale)))
    return round_to_half(calibration)


def candidates(price: float, train: ExitData, train_head: ExitTrainer = train_exit, **changes: Any) -> list[Candidate]:
    """Every rule with every value of its free number that is tried.

    Args:
        price: Of a clean image, in full runs.
        changes: Of the recipes of the exit heads.
    """
    economic = [
        train_head(ExitRecipe(name=f"economic-{factor}", price=factor * price, **changes), train)
        for factor in PRICE_FACTORS
    ]
    palbert = train_head(ExitRecipe(name="palbert", loss="palbert", **changes), train)
    rules = [Candidate("cumulative", ThresholdConfig(rule="cumulative", threshold=0.5), head) for head in economic]
    rules += [Candidate("cumulative-palbert", ThresholdConfig(rule="cumulative", threshold=0.5), palbert)]
    rules += [Candidate("q-exit", ThresholdConfig(rule="q-exit", threshold=0.5, q=q), palbert) for q in (0.1, 0.3, 0.5)]
    rules += [Candidate("posterior", ThresholdConfig(rule="posterior", threshold=0.5), palbert)]
    rules += [
        Candidate("patience", ThresholdConfig(rule="patience", threshold=0.5, patience=k), palbert) for k in (2, 3)
    ]
    return rules


def economic_candidate(exit_head: ExitHead, data: ExitData, run: Run, max_risk: float) -> Candidate:
    """The boundary on the posterior with the lowest cost on these images, of one setting.

    Args:
        exit_head: Any: the rule does not look at it.
    """
    saving = slice(0, run.last_saving + 1)
    found = fit_boundary(
        data.prob[:, saving].numpy(),
        run.bad,
        run.calls[saving],
        run.total_calls,
        run.check_cost,
        max_false_aborts=max_risk,
    )
    progress = strides(data.log_snr[:1, saving], data.log_snr_range)[0][0]
    points = zip(progress.tolist(), found.abort.tolist(), found.clear.tolist(), strict=True)
    return Candidate("economic", ThresholdConfig(rule="economic", threshold=0.5, boundary=tuple(points)), exit_head)


def paths_of(candidate: Candidate, data: ExitData) -> Paths:
    """What a rule makes of each image."""
    acc = accumulate(data.prob, exit_masses(candidate.exit_head, data))
    progress, _, _ = strides(data.log_snr, data.log_snr_range)
    statistic = path_statistic(candidate.rule, data.prob, acc, progress).numpy()
    economic = candidate.rule.rule == "economic"
    return Paths(statistic, clear_step(candidate.rule, acc, data.prob, progress).numpy() if economic else None)


def floor_of(run: Run, paths: Paths, max_risk: float) -> float:
    """The cheapest threshold with at most that share of these clean images aborted."""
    return min(1.0, cheapest_threshold(run, paths.statistic, max_risk, clear=paths.clear))


def cheapest(run: Run, paths: Paths, max_risk: float) -> float:
    """Lowest cost per clean image with at most that share of these clean images aborted."""
    threshold = cheapest_threshold(run, paths.statistic, max_risk, clear=paths.clear)
    return apply_rule(run, paths.statistic, threshold, paths.clear).cost_per_clean


def economic_out_of_fold(data: ExitData, run: Run, prompt: np.ndarray, exit_head: ExitHead, max_risk: float) -> Paths:
    """What the economic rule makes of each half of the images, its boundary fitted on the other half.

    Args:
        prompt: Of each image; images of one prompt are in one half.
        exit_head: Any.
    Raises:
        CalibrationError: If a half has no image, or no prompt, of one kind.
    """
    second = halves(prompt, run.bad)
    statistic = np.zeros(data.prob.shape, dtype=np.float32)
    clear = np.zeros(len(run.bad), dtype=np.int64)
    for half in (second, ~second):
        other = dataclasses.replace(run, bad=run.bad[~half])
        candidate = economic_candidate(exit_head, data.rows(torch.from_numpy(~half)), other, max_risk)
        paths = paths_of(candidate, data.rows(torch.from_numpy(half)))
        assert paths.clear is not None  # the economic rule clears
        statistic[half], clear[half] = paths.statistic, paths.clear
    return Paths(statistic, clear)


def halves(prompt: Int[np.ndarray, " image"], bad: Bool[np.ndarray, " image"]) -> Bool[np.ndarray, " image"]:
    """Which images belong to the second half: whole prompts, the bad images shared out as evenly as that allows.

    Example:
        >>> halves(np.array([3, 3, 5, 5, 7, 8]), np.array([True, True, True, False, False, False])).tolist()
        [False, False, True, True, False, True]
    """
    place = np.unique(prompt, return_inverse=True)[1]
    counts = np.stack([np.bincount(place), np.bincount(place, weights=bad)])
    order = np.lexsort(-counts)  # most bad images first, then most images
    return np.argsort(order)[place] % 2 == 1


def best_of_each(
    found: list[Candidate], data: ExitData, run: Run, max_risk: float, judged: Mapping[str, Paths] = NOT_JUDGED
) -> dict[str, tuple[Candidate, float]]:
    """Per rule the free number with the lowest cost, and that cost.

    Args:
        judged: Of rules that were fitted on these images: what they make of them out of fold.
    """
    best: dict[str, tuple[Candidate, float]] = {}
    for candidate in found:
        cost = cheapest(run, judged.get(candidate.name) or paths_of(candidate, data), max_risk)
        if candidate.name not in best or cost < best[candidate.name][1]:
            best[candidate.name] = (candidate, cost)
    return best


def choose_default(
    best: dict[str, tuple[Candidate, float]],
    data: ExitData,
    run: Run,
    max_risk: float,
    judged: Mapping[str, Paths] = NOT_JUDGED,
    repeats: int = 100,
) -> str:
    """The cheapest rule; the cumulative one if its paired difference to it has an interval across zero.

    Args:
        judged: As of :func:`best_of_each`.
    """
    first = min(best, key=lambda name: best[name][1])
    if first == "cumulative":
        return first
    rng = np.random.default_rng(0)
    both = [judged.get(name) or paths_of(best[name][0], data) for name in ("cumulative", first)]
    differences = []
    for _ in range(repeats):
        rows = rng.integers(len(run.bad), size=len(run.bad))
        if run.bad[rows].all():
            continue  # a handful of images: no clean one among those drawn
        part = dataclasses.replace(run, bad=run.bad[rows])
        costs = [cheapest(part, paths.rows(rows), max_risk) for paths in both]
        differences.append(costs[0] - costs[1])
    return "cumulative" if np.percentile(differences, 2.5) <= 0 else first


def choose_checks(
    heads: Heads, calibration: Calibration, data: HeadData, run: Run, max_risk: float, most: int = 6
) -> tuple[int, ...]:
    """Which checks to look at: by the economic boundary, which needs no exit head; the last one is always among them.

    Args:
        data: Labelled images of one setting.
        run: With a column of calls for each check of the data.
    Raises:
        CalibrationError: As :func:`economic_out_of_fold`.
    """
    last, prompt = data.checks - 1, data.prompt_id.numpy()
    no_exit = ExitHead(ExitHeadConfig(state_dim=heads.experts.config.hidden_dim))

    def cost(columns: tuple[int, ...]) -> float:
        seen = exit_data(heads, calibration, data, torch.tensor(columns))
        part = dataclasses.replace(run, calls=run.calls[list(columns)])
        return cheapest(part, economic_out_of_fold(seen, part, prompt, no_exit, max_risk), max_risk)

    chosen = choose_steps(cost, run.last_saving + 1, most=most, gain=SMALLEST_GAIN)
    return (*chosen, last) if last not in chosen else chosen


def certify_with(promise: Promise, statistic: np.ndarray, bad: np.ndarray, prompt: np.ndarray) -> Certified:
    """The lowest threshold that keeps the promise on these images."""
    return certify(
        statistic,
        bad,
        prompt,
        risks=Risk("false-aborts", promise.max_risk),
        confidence=promise.confidence,
        unit=promise.unit,
    )


def certified(
    candidate: Candidate, floor: float, data: ExitData, prompt: np.ndarray, run: Run, promise: Promise, **setting: Any
) -> tuple[ThresholdConfig, Certified]:
    """The rule with its threshold and where it comes from.

    Args:
        floor: The threshold that was cheapest on validation. Where it is above the lowest certified one it is taken: the
            promise holds for every higher threshold that does not come from the calibration images.
        prompt: Of each image.
        setting: In which it was calibrated: the last fields of :class:`ThresholdConfig`.
    Raises:
        CalibrationError: If there are too few images, or prompts, for the promise; it says how many are needed.
    """
    paths = paths_of(candidate, data)
    found = certify_with(promise, last_statistic(run, paths.statistic, paths.clear), data.bad.numpy(), prompt)
    rule = dataclasses.replace(
        candidate.rule,
        threshold=max(found.threshold, floor),
        max_risk=found.max_risk,
        confidence=found.confidence,
        unit=found.unit,
        num_clean=found.num_units,
        scored_steps=tuple(int(calls) - 1 for calls in run.calls),
        **setting,
    )
    return rule, found


def run_of(data: HeadData, checks: tuple[int, ...], total_calls: int, check_cost: float) -> Run:
    """The labelled images of a split of one setting, seen at ``checks``."""
    spent = data.take(torch.arange(1)).spent[0, list(checks)]
    calls = (spent * total_calls).round().long().numpy()
    return Run(is_bad(data.label), calls, check_cost, total_calls)
