"""The exit head on frozen states: when to decide, with the posterior detached.

The losses are those of moe_artifacts/exit_loss.py. States are held in memory: an exit head has some twenty thousand weights, and a
few ten thousand images say all that it can learn.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moe_artifacts.accumulator import ExitHead, step_mass
from moe_artifacts.calibration import Calibration
from moe_artifacts.config import ExitHeadConfig
from moe_artifacts.exit_loss import economic_loss, palbert_loss
from moe_artifacts.shapes import PerImage, RowMask, Rows, StepMass, StepProbs, StepState, StepValues
from training.head_data import HeadData
from training.heads import Checks, Heads, draw_subset, iter_states, round_to_half, strides
from training.loop import StepBatch, TrainingLoop, linear_schedule


@dataclass(frozen=True, kw_only=True)
class ExitRecipe:
    """How an exit head is trained. ``price`` is mu in units of full runs, swept by the calibration stage."""

    name: str
    loss: Literal["economic", "palbert"] = "economic"
    seed: int = 50
    price: float = 1.3
    weight: float = 3.0  # of the economic term
    beta: float = 0.5  # of the KL term in PALBERT's loss
    prior_rate: float = 2.1  # per unit of progress
    steps: int = 800
    batch: int = 1_024
    lr: float = 1e-3


@dataclass(frozen=True)
class ExitData:
    """What the exit head is trained on, frozen: states, calibrated posteriors and strides of every image and check."""

    state: StepState
    prob: StepProbs
    log_snr: StepValues  # NaN: no such check
    spent: StepValues  # share of the denoiser calls
    bad: PerImage  # label, in [0, 1]
    log_snr_range: tuple[float, float]

    def rows(self, which: Rows | RowMask) -> ExitData:
        """Some of the images."""
        columns = ("state", "prob", "log_snr", "spent", "bad")
        return dataclasses.replace(self, **{name: getattr(self, name)[which] for name in columns})

    def at(self, rows: Rows, checks: Checks) -> tuple[StepState, StepState, StepValues, StepValues]:
        """State, state before, progress and progress before, at a subset of checks."""
        state = self.state[rows][:, checks]
        previous = torch.cat([torch.zeros_like(state[:, :1]), state[:, :-1]], dim=1)
        at, before, _ = strides(self.log_snr[rows][:, checks], self.log_snr_range)
        return state, previous, at, before


def exit_data(heads: Heads, calibration: Calibration, data: HeadData, checks: Checks) -> ExitData:
    """States and calibrated posteriors of all images at ``checks``."""
    columns: list[tuple[Tensor, ...]] = []
    for batch, logit, state in iter_states(heads, data, checks):
        level = batch.log_snr[:, checks]
        known = calibration(logit, level.nan_to_num(heads.space.log_snr_range[0]))
        columns.append((state, torch.where(level.isnan(), 0.0, known), level, batch.spent[:, checks], batch.label))
    state, prob, log_snr, spent, bad = (torch.cat(parts) for parts in zip(*columns, strict=True))
    return ExitData(state, prob, log_snr, spent, bad, heads.space.log_snr_range)


def train_exit(recipe: ExitRecipe, data: ExitData, state: Path | None = None) -> ExitHead:
    """The exit head on frozen states, at all checks half of the time and at random subsets of them.

    Args:
        state: File to resume from; None: begin anew.
    """
    torch.manual_seed(recipe.seed)
    head = ExitHead(ExitHeadConfig(state_dim=data.state.shape[-1]))
    loop = TrainingLoop(
        modules={"exit_head": head},
        optimizer=torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=1e-3),
        steps=recipe.steps,
        seed=recipe.seed,
        name=f"exit head {recipe.name}",
        schedule=linear_schedule(recipe.steps, 50),
        clip_norm=None,
        state=state,
        options={"recipe": vars(recipe), "images": len(data.bad)},
    )

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(len(data.bad), (recipe.batch,), generator=generator)

    def loss_of(batch: StepBatch) -> Tensor:
        rows, checks = batch.rows, draw_subset(batch.generator, data.prob.shape[1])
        now, previous, at, before = data.at(rows, checks)
        mass = step_mass(head(now, previous), at, before)
        prob, bad, spent = data.prob[rows][:, checks], data.bad[rows], data.spent[rows][:, checks]
        if recipe.loss == "economic":
            return recipe.weight * economic_loss(mass, prob, bad, spent, recipe.price)
        return palbert_loss(mass, prob, bad, recipe.prior_rate * (at - before).clamp(min=0), recipe.beta)

    loop(loss_of, draw)
    loop.forget()
    return round_to_half(head).eval()


@torch.no_grad()
def exit_masses(head: ExitHead, data: ExitData) -> StepMass:
    """Exit mass of every image and check."""
    parts = []
    for rows in torch.arange(len(data.bad)).split(4_000):
        state, previous, at, before = data.at(rows, torch.arange(data.prob.shape[1]))
        parts.append(step_mass(head(state, previous), at, before))
    return torch.cat(parts)
