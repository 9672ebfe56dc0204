"""Recorded trajectories scored by a checkpoint: the common ground of the evaluation's tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_artifacts.accumulator import ExitHead, accumulate, step_mass
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.decision import path_statistic
from moe_artifacts.noise import check_steps, noise_levels, progress
from moe_artifacts.policy import Run
from moe_artifacts.schedulers import set_scheduler
from moe_artifacts.scorer import ArtifactScorer
from training.collect import Recorded, Setting, Split, collect, load_judges, load_pipeline, load_split


@dataclass(frozen=True)
class Scored:
    """Judged trajectories of one setting, scored at the checks of a scorer."""

    prob: Tensor  # [image check]
    mass: Tensor  # [image check], with the scorer's own exit head
    state: Tensor  # [image check hidden]
    at: Tensor  # [image check], progress
    before: Tensor  # [image check], progress at the check before
    calls: np.ndarray  # [check], denoiser calls spent
    data: Recorded

    @property
    def bad(self) -> np.ndarray:
        return self.data.bad.numpy().astype(bool)

    @property
    def label(self) -> np.ndarray:
        return self.data.label.numpy()

    def run(self, check_cost: float) -> Run:
        """For ``moe_artifacts.policy``."""
        return Run(self.bad, self.calls, check_cost)

    @torch.no_grad()
    def statistic(self, rule: ThresholdConfig, exit_head: ExitHead | None = None) -> np.ndarray:
        """Path statistic [image check] of a rule, with the scorer's exit head or another."""
        mass = self.mass
        if exit_head is not None:
            previous = torch.cat([torch.zeros_like(self.state[:, :1]), self.state[:, :-1]], dim=1)
            mass = step_mass(exit_head(self.state, previous), self.at, self.before)
        return path_statistic(rule, self.prob, accumulate(self.prob, mass)).numpy()


def ensure_split(split: Split) -> Recorded:
    """The split from disk; what is missing is made again from its seeds."""
    collect(split, load_pipeline(), load_judges())
    return load_split(split.name)


@torch.no_grad()
def score_recorded(scorer: ArtifactScorer, data: Recorded, setting: Setting, batch: int = 1_000) -> Scored:
    """Score the recorded x0 of a split of one setting at the steps that the guard would score."""
    columns = _columns(scorer, setting, data.step[0].tolist())
    parts: list[tuple[Tensor, ...]] = []
    for rows in torch.arange(len(data.prompts)).split(batch):
        embedding = scorer.embed(data.x0[rows][:, columns].float().flatten(0, 1)).unflatten(
            0, (len(rows), len(columns))
        )
        prompts = scorer.embed_prompts([data.prompts[i] for i in rows.tolist()], len(rows))
        parts.append(scorer.score_embedded(embedding, data.log_snr[rows][:, columns], prompts))
    prob, mass, state = (torch.cat(values) for values in zip(*parts, strict=True))
    at = progress(data.log_snr[:, columns], scorer.config.log_snr_range)
    before = torch.cat([torch.zeros_like(at[:, :1]), at[:, :-1]], dim=1)
    return Scored(prob, mass, state, at, before, (data.step[0, columns] + 1).numpy(), data)


def _columns(scorer: ArtifactScorer, setting: Setting, recorded_steps: list[int]) -> list[int]:
    pipe = load_pipeline()
    set_scheduler(pipe, setting.scheduler)
    pipe.scheduler.set_timesteps(setting.steps)
    return [recorded_steps.index(step) for step in check_steps(noise_levels(pipe.scheduler), scorer.config)]
