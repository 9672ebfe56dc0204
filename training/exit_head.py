"""The exit head on frozen states: when to decide, with the posterior detached.

The losses are those of moe_artifacts/exit_loss.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_artifacts.accumulator import ExitHead, step_mass
from moe_artifacts.calibration import Calibration
from moe_artifacts.config import ExitHeadConfig
from moe_artifacts.exit_loss import economic_loss, palbert_loss
from moe_artifacts.noise import progress as noise_progress
from training.collect import LOG_SNR_RANGE
from training.state import step_generator
from training.train import Embedded, Heads, draw_subset, round_to_half, states_of


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

    state: Tensor  # [image check hidden]
    prob: Tensor  # [image check]
    log_snr: Tensor  # [image check], NaN: no such check
    spent: Tensor
    bad: Tensor

    def at(self, rows: Tensor, checks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """State, state before, progress and progress before, at a subset of checks."""
        state, log_snr = self.state[rows][:, checks], self.log_snr[rows][:, checks]
        previous = torch.cat([torch.zeros_like(state[:, :1]), state[:, :-1]], dim=1)
        at = noise_progress(log_snr.nan_to_num(LOG_SNR_RANGE[0]), LOG_SNR_RANGE)
        before = torch.cat([torch.zeros_like(at[:, :1]), at[:, :-1]], dim=1)
        return state, previous, at, torch.where(log_snr.isnan(), at, before)  # no stride, hence no mass, where missing


def exit_data(heads: Heads, calibration: Calibration, data: Embedded, checks: Tensor) -> ExitData:
    """States and calibrated posteriors of a split at ``checks``."""
    logit, state = states_of(heads, data, checks)
    log_snr = data.log_snr[:, checks]
    prob = calibration(logit, log_snr.nan_to_num(LOG_SNR_RANGE[0]))
    return ExitData(state, torch.where(log_snr.isnan(), 0.0, prob), log_snr, data.spent[:, checks], data.bad)


def train_exit(recipe: ExitRecipe, data: ExitData) -> ExitHead:
    """The exit head on frozen states, at all checks half of the time and at random subsets of them."""
    torch.manual_seed(recipe.seed)
    head = ExitHead(ExitHeadConfig(state_dim=data.state.shape[-1]))
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=1e-3)
    for step in range(recipe.steps):
        generator = step_generator(recipe.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / 50) * (1 - step / recipe.steps)
        rows = torch.randint(len(data.bad), (recipe.batch,), generator=generator)
        checks = draw_subset(generator, data.prob.shape[1])
        state, previous, at, before = data.at(rows, checks)
        mass = step_mass(head(state, previous), at, before)
        prob, bad, spent = data.prob[rows][:, checks], data.bad[rows], data.spent[rows][:, checks]
        if recipe.loss == "economic":
            loss = recipe.weight * economic_loss(mass, prob, bad, spent, recipe.price)
        else:
            loss = palbert_loss(mass, prob, bad, recipe.prior_rate * (at - before).clamp(min=0), recipe.beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return round_to_half(head).eval()


@torch.no_grad()
def exit_masses(head: ExitHead, data: ExitData) -> Tensor:
    """Exit mass of every image and check."""
    parts = []
    for rows in torch.arange(len(data.bad)).split(4_000):
        state, previous, at, before = data.at(rows, torch.arange(data.prob.shape[1]))
        parts.append(step_mass(head(state, previous), at, before))
    return torch.cat(parts)
