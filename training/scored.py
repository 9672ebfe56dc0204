"""Recorded trajectories scored by a checkpoint: the common ground of the evaluation's tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from moe_artifacts.accumulator import ExitHead, accumulate, step_mass
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.decision import clear_step, path_statistic
from moe_artifacts.errors import InputError
from moe_artifacts.noise import check_steps, noise_levels
from moe_artifacts.policy import Run
from moe_artifacts.schedulers import set_scheduler
from moe_artifacts.scorer import ArtifactScorer
from moe_artifacts.shapes import PerImage, StepLatents, StepMass, StepProbs, StepState, StepValues
from training.collect import Recorded, Setting, Split, collect, load_judges, load_pipeline, load_split
from training.head_data import is_bad
from training.heads import strides
from training.rules import Paths


@dataclass(frozen=True, eq=False)
class Scored:
    """Judged trajectories of one setting, scored at the checks of a scorer."""

    prob: StepProbs
    mass: StepMass  # with the scorer's own exit head
    state: StepState
    at: StepValues  # progress
    before: StepValues  # progress at the check before
    calls: Int[np.ndarray, " check"]  # denoiser calls spent
    total_calls: int
    label: PerImage  # in [0, 1]: 1 has artifacts
    prompt: Int[np.ndarray, " image"]  # equal for images of one prompt, or class

    @property
    def bad(self) -> np.ndarray:
        return is_bad(self.label)

    def run(self, check_cost: float) -> Run:
        """For ``moe_artifacts.policy``."""
        return Run(self.bad, self.calls, check_cost, self.total_calls)

    @torch.no_grad()
    def paths(self, rule: ThresholdConfig, exit_head: ExitHead | None = None) -> Paths:
        """What a rule makes of each image, with the scorer's exit head or another."""
        mass = self.mass
        if exit_head is not None:
            previous = torch.cat([torch.zeros_like(self.state[:, :1]), self.state[:, :-1]], dim=1)
            mass = step_mass(exit_head(self.state, previous), self.at, self.before)
        acc = accumulate(self.prob, mass)
        statistic = path_statistic(rule, self.prob, acc, self.at).numpy()
        economic = rule.rule == "economic"
        return Paths(statistic, clear_step(rule, acc, self.prob, self.at).numpy() if economic else None)


def score_parts(
    scorer: ArtifactScorer,
    parts: Iterable[tuple[StepLatents, StepValues, list[str]]],
    calls: Int[np.ndarray, " check"],
    total_calls: int,
    label: PerImage,
    prompt: Int[np.ndarray, " image"],
) -> Scored:
    """Score recorded x0, some images at a time.

    Args:
        parts: x0 and log-SNR at the checks, and the prompts, of the next images.
        label: Of all images; as what follows it.
    Raises:
        InputError: If the scorer looks at noisy latents.
    """
    if scorer.config.uses_noisy:
        raise InputError(
            f"the scorer {scorer.config.name!r} looks at noisy latents, recorded x0 predictions are all there is"
        )
    found = []
    for x0, log_snr, prompts in parts:
        with torch.no_grad():
            embedding = scorer.embed(x0.float().flatten(0, 1)).unflatten(0, x0.shape[:2])
            text = scorer.embed_prompts(prompts, len(prompts))
            found.append((*scorer.score_embedded(embedding, log_snr, text), log_snr))
    prob, mass, state, log_snr = (torch.cat(values) for values in zip(*found, strict=True))
    at, before, _ = strides(log_snr, scorer.config.log_snr_range)
    return Scored(prob, mass, state, at, before, calls, total_calls, label, prompt)


def ensure_split(split: Split) -> Recorded:
    """The split of the bundled pipeline from disk; what is missing is made again from its seeds."""
    collect(split, load_pipeline(), load_judges())
    return load_split(split.name)


def score_recorded(scorer: ArtifactScorer, data: Recorded, setting: Setting, batch: int = 1_000) -> Scored:
    """Score the recorded x0 of such a split, of one setting, at the steps that the guard would score."""
    columns = _columns(scorer, setting, data.step[0].tolist())
    calls = (data.step[0, columns] + 1).numpy()
    return score_parts(
        scorer,
        (
            (data.x0[rows][:, columns], data.log_snr[rows][:, columns], [data.prompts[i] for i in rows.tolist()])
            for rows in torch.arange(len(data.prompts)).split(batch)
        ),
        calls,
        int(calls[-1]),
        data.bad,
        data.label.numpy(),
    )


def _columns(scorer: ArtifactScorer, setting: Setting, recorded_steps: list[int]) -> list[int]:
    pipe = load_pipeline()
    set_scheduler(pipe, setting.scheduler)
    pipe.scheduler.set_timesteps(setting.steps)
    return [recorded_steps.index(step) for step in check_steps(noise_levels(pipe.scheduler), scorer.config)]
