"""The decision rules of one's own scorer, for one setting of a pipeline: where to look, what decides, from which threshold on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from moe_artifacts.calibration import Calibration
from moe_artifacts.config import ThresholdConfig, to_dict
from moe_artifacts.errors import CalibrationError, InputError
from moe_artifacts.noise import progress
from training import rules
from training.embedded import EmbeddedRows
from training.exit_head import ExitData, ExitRecipe, exit_data
from training.head_data import HeadData, at_most
from training.heads import Checks, Heads
from training.own.heads_folder import HeadFacts
from training.row_jobs import complete_shards
from training.rules import Candidate, Promise

CHOOSING_IMAGES = 3_000  # of validation, to choose checks on: some fifty posteriors are computed
EXIT_IMAGES = 30_000
HAIR = 1e-4  # of progress, below which rounding is not to hide a step

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The one setting of the validation and calibration trajectories."""

    scheduler: str | None
    num_inference_steps: int | None  # as asked for
    guidance_scale: float | None
    num_steps: int  # denoiser calls
    eta: float | None = None
    image_size: tuple[int, ...] | None = None  # height and width in pixels
    denoiser: str | None = None  # its fingerprint


@dataclass(frozen=True)
class Calibrated:
    """What came out for a pipeline."""

    default: str
    check_progress: tuple[float, ...]
    check_cost: float
    candidates: dict[str, Candidate]
    thresholds: dict[str, ThresholdConfig]  # of the rules that could be certified
    costs: dict[
        str, float
    ]  # per clean image, on validation, at max_risk of its clean images aborted; infinite: none is left
    price: float

    def record(self, bad_rate: float) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "default": self.default,
            "check_progress": list(self.check_progress),
            "check_cost": self.check_cost,
            "price": self.price,
            "bad_rate": bad_rate,
            "validation_cost": {name: cost if math.isfinite(cost) else None for name, cost in self.costs.items()},
            "rules": {name: to_dict(rule) for name, rule in self.thresholds.items()},
        }


def sampling_of(*splits: EmbeddedRows) -> Sampling:
    """The setting in which all images of these splits were sampled.

    Raises:
        InputError: If there are several, or they were not sampled by a pipeline.
    """
    found = set()
    for data in splits:
        for path in complete_shards(data.folder):
            table = pq.read_table(path, columns=["setting", "num_steps"])
            found |= set(zip(table["setting"].to_pylist(), table["num_steps"].to_pylist(), strict=True))
    if len(found) != 1:
        told = "; ".join(f"{text or 'unknown'} with {steps} denoiser calls" for text, steps in sorted(found)[:4])
        raise InputError(
            f"a threshold is certified for one setting, got {len(found)}: {told}. Validation and calibration must be trajectories "
            "of one setting: training.own.collect makes them so"
        )
    ((text, steps),) = found
    setting = json.loads(text) if text else {}
    names = ("scheduler", "num_inference_steps", "guidance_scale", "eta", "denoiser")
    size = setting.get("image_size")
    return Sampling(
        **{name: setting.get(name) for name in names}, image_size=None if size is None else tuple(size), num_steps=steps
    )


def require_trained_levels(data: HeadData, facts: HeadFacts, name: str) -> None:
    """Refuse checks at noise levels that the heads have never seen.

    Raises:
        InputError: Naming the levels.
    """
    low, high = facts.space.log_snr_range
    levels = data.take(torch.arange(min(len(data), 512))).log_snr.flatten()
    levels = levels[levels.isfinite()].unique()
    bands = len(facts.rows_per_band)
    place = ((levels - low) / (high - low) * bands).floor().long().clamp(0, bands - 1)
    unseen = torch.tensor(facts.rows_per_band)[place] == 0
    far = (levels < low - (high - low) / bands) | (levels > high + (high - low) / bands)
    if (unseen | far).any():
        told = ", ".join(f"{value:.2f}" for value in levels[unseen | far][:6].tolist())
        raise InputError(
            f"{name} has checks at log-SNR {told}, where the heads were trained on nothing: they know {low:.2f} to {high:.2f}, with "
            f"{list(facts.rows_per_band)} checks in bands of equal width; train on the noise levels of the pipeline"
        )


def check_progress_of(data: HeadData, checks: Sequence[int], log_snr_range: tuple[float, float]) -> tuple[float, ...]:
    """Where in progress these columns lie, a hair below so that rounding cannot skip a step; the last is left out."""
    log_snr = data.take(torch.arange(1)).log_snr[0]
    places = [progress(log_snr[c].item(), log_snr_range) for c in checks if c < data.checks - 1]
    return tuple(round(max(place - HAIR, 0.0), 6) for place in places)


def calibrate_for(
    heads: Heads,
    calibration: Calibration,
    train: HeadData,
    validation: HeadData,
    held_out: HeadData,
    sampling: Sampling,
    check_cost: float,
    promise: Promise,
    *,
    rule: str = "auto",
    prompt_mix: str | None = None,
    exit_steps: int = ExitRecipe.steps,
) -> Calibrated:
    """Checks, rules and certified thresholds for one setting of a pipeline.

    Args:
        train: Labelled; for the exit heads.
        validation: Labelled, of the setting; everything is chosen on it.
        held_out: Labelled, of the setting; thresholds come from it.
        check_cost: Of one image, in its denoiser calls.
        rule: A rule of ``ThresholdConfig``, or "auto": the cheapest on validation.
        prompt_mix: Which prompts these are, in words.
    Raises:
        InputError: If validation and calibration were recorded at different steps.
        CalibrationError: If there are too few images or prompts; it says how many are needed.
    """
    if validation.checks != held_out.checks:
        raise InputError(
            f"validation has {validation.checks} checks and calibration {held_out.checks}: record both in one run of "
            "training.own.collect"
        )
    most, every = promise.max_risk, tuple(range(validation.checks))
    require_enough(promise, held_out)
    few = at_most(validation, CHOOSING_IMAGES, seed=0)
    run = rules.run_of(few, every, sampling.num_steps, check_cost)
    checks = rules.choose_checks(heads, calibration, few, run, most)
    columns = torch.tensor(checks)
    log.info("checks after %s of the steps", _shares(validation, checks))

    price = 1 / max(1 - train.label.mean().item(), 0.01)
    tried = rules.candidates(price, exit_training_data(heads, calibration, train, columns, every), steps=exit_steps)
    tuning = exit_data(heads, calibration, validation, columns)
    run = rules.run_of(validation, checks, sampling.num_steps, check_cost)
    tried.append(rules.economic_candidate(tried[0].exit_head, tuning, run, most))
    prompts = validation.prompt_id.numpy()
    judged = {"economic": rules.economic_out_of_fold(tuning, run, prompts, tried[0].exit_head, most)}
    best = rules.best_of_each(tried, tuning, run, most, judged)
    costs = {name: cost for name, (_, cost) in best.items()}
    default = rules.choose_default(best, tuning, run, most, judged) if rule == "auto" else rule
    log.info("cost per clean image on validation: %s", "  ".join(f"{k} {v:+.2%}" for k, v in costs.items()))

    last = exit_data(heads, calibration, held_out, columns)
    final = rules.run_of(held_out, checks, sampling.num_steps, check_cost)
    prompt = held_out.prompt_id.numpy()
    setting = {
        "scheduler": sampling.scheduler,
        "num_inference_steps": sampling.num_inference_steps or sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "eta": sampling.eta,
        "image_size": sampling.image_size,
        "denoiser": sampling.denoiser,
        "prompt_mix": prompt_mix,
    }
    thresholds = {}
    for name, (candidate, _) in best.items():
        floor = rules.floor_of(run, judged.get(name) or rules.paths_of(candidate, tuning), most)
        try:
            thresholds[name], _ = rules.certified(candidate, floor, last, prompt, final, promise, **setting)
        except CalibrationError as error:
            if name == default:
                raise
            log.info("the rule %s is left out: %s", name, error)
    return Calibrated(
        default=default,
        check_progress=check_progress_of(validation, checks, heads.space.log_snr_range),
        check_cost=check_cost,
        candidates={name: candidate for name, (candidate, _) in best.items()},
        thresholds=thresholds,
        costs=costs,
        price=price,
    )


def exit_training_data(
    heads: Heads, calibration: Calibration, train: HeadData, columns: Checks, every: tuple[int, ...]
) -> ExitData:
    """What exit heads learn from: the chosen checks, or all where images were noised at levels of their own."""
    if train.checks != len(every):
        columns = torch.arange(train.checks)
    return exit_data(heads, calibration, at_most(train, EXIT_IMAGES, seed=0), columns)


def _shares(data: HeadData, checks: Sequence[int]) -> str:
    spent = data.take(torch.arange(1)).spent[0, list(checks)]
    return ", ".join(f"{share:.0%}" for share in spent.tolist())


def require_enough(promise: Promise, held_out: HeadData) -> None:
    """Refuse, before anything is trained, what not even a rule without a single false abort could certify."""
    prompt = held_out.prompt_id.numpy()
    try:
        rules.certify_with(promise, np.zeros(len(held_out), dtype=np.float32), held_out.label.numpy(), prompt)
    except CalibrationError as error:
        told = f"{error}; there are {len(held_out)} images of {len(np.unique(prompt))} prompts to calibrate on"
        if promise.unit == "prompt":
            told += (
                '. The unit "image" needs fewer, but holds only where the prompt of every image was drawn on its own'
            )
        raise CalibrationError(told) from error
