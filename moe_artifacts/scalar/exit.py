"""An exit head for scalar scores: its state is the posterior itself, since there is no network behind it.

    state_t = (logit a_t, highest logit so far, progress u_t)        logits cut to [-8, 8], halved

The head is the one of moe_artifacts/accumulator.py and sees the states of this step and of the one before, hence the change
too. It is trained with a loss of moe_artifacts/exit_loss.py, the posterior given.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Real
from torch import Tensor, nn

from moe_artifacts.accumulator import FIRST_RATE, ExitHead, step_mass
from moe_artifacts.config import ExitHeadConfig
from moe_artifacts.errors import InputError
from moe_artifacts.exit_loss import economic_loss, palbert_loss

STATE_DIM = 3
HIDDEN_DIM = 16
LOGIT_LIMIT = 8.0  # beyond it nothing is left to tell apart
PRICE_FACTOR = 1.25  # of a clean image's price in the economic loss; below 1 the head gives up clean images

Probs = Real[np.ndarray, "image step"]
PerStep = Real[np.ndarray, " step"]


class ScalarExit(nn.Module):
    """Exit mass from the posteriors of the steps so far; made by :func:`fit_exit`, stored as its ``state_dict``."""

    def __init__(self) -> None:
        super().__init__()
        self.head = ExitHead(ExitHeadConfig(state_dim=STATE_DIM, hidden_dim=HIDDEN_DIM))

    def forward(
        self, prob: Float[Tensor, "image step"], progress: Float[Tensor, " step"]
    ) -> Float32[Tensor, "image step"]:
        """As :meth:`mass`, for tensors and with gradients."""
        logit = prob.float().logit(eps=1e-6).clamp(-LOGIT_LIMIT, LOGIT_LIMIT) / 2
        at = progress.float().expand_as(logit)
        state = torch.stack([logit, logit.cummax(dim=-1).values, at], dim=-1)  # image step state
        previous = torch.cat([torch.zeros_like(state[:, :1]), state[:, :-1]], dim=1)
        before = torch.cat([torch.zeros_like(at[:, :1]), at[:, :-1]], dim=1)
        return step_mass(self.head(state, previous), at, before)

    @torch.no_grad()
    def mass(self, prob: Probs, progress: PerStep) -> Float[np.ndarray, "image step"]:
        """Exit mass of each step, which depends on the steps up to it only.

        A run that is still going on is given as its steps so far; the last column is then the new one.

        Args:
            prob: Posterior at each scored step, in [0, 1].
            progress: In [0, 1], rising.
        Returns:
            Float32, >= 0.
        Raises:
            InputError: If a probability is NaN or outside [0, 1], or progress does not rise or does not fit.
        """
        prob, progress = _checked(prob, progress)
        parts = torch.from_numpy(prob).split(20_000)  # bounded memory, however many images
        return torch.cat([self(part, torch.from_numpy(progress)) for part in parts]).numpy()


def fit_exit(
    prob: Probs,
    progress: PerStep,
    spent: PerStep,
    label: Real[np.ndarray, " image"],
    *,
    loss: Literal["economic", "palbert"] = "economic",
    price: float | None = None,
    beta: float = 0.5,
    seed: int = 0,
    steps: int = 300,
    batch: int = 512,
) -> ScalarExit:
    """Train an exit head on posteriors, which should come from other images than those they were fitted on.

    Args:
        prob: Posterior at each scored step, in [0, 1].
        progress: In [0, 1], rising; ``calls / total_calls`` where the noise levels are not known.
        spent: Share of the denoiser calls of a full run spent by each step, in (0, 1].
        label: In [0, 1]: 1 has artifacts.
        loss: See moe_artifacts/exit_loss.py.
        price: Of a clean image, in full runs, economic loss only; ``PRICE_FACTOR`` over the share of clean ones by default.
        beta: Of the distance from the prior, PALBERT's loss only.
        steps: Of the optimiser, ``batch`` images each.
    Raises:
        InputError: If arrays do not fit together, are not finite or leave their range, or only one class is there.
    """
    prob, progress = _checked(prob, progress)
    label, spent = np.asarray(label, dtype=np.float32), np.asarray(spent, dtype=np.float32)
    if label.shape != (len(prob),) or not ((label >= 0) & (label <= 1)).all():
        raise InputError(f"label must be {len(prob)} numbers in [0, 1], one per image, got shape {label.shape}")
    if spent.shape != progress.shape or not ((spent > 0) & (spent <= 1)).all():
        raise InputError(f"spent must be {len(progress)} numbers in (0, 1], one per step, got {spent}")
    clean = float((1 - label).mean())
    if clean in (0.0, 1.0):
        raise InputError("label must hold both classes to train an exit head, got one")
    price = PRICE_FACTOR / clean if price is None else price
    at, strides = torch.from_numpy(progress), torch.from_numpy(np.diff(progress, prepend=np.float32(0)))
    data, bad, shares = torch.from_numpy(prob), torch.from_numpy(label), torch.from_numpy(spent)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        model = ScalarExit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        rows = torch.randint(len(data), (min(batch, len(data)),), generator=generator)
        mass = model(data[rows], at)
        if loss == "economic":
            value = economic_loss(mass, data[rows], bad[rows], shares.expand_as(mass), price)
        else:
            value = palbert_loss(mass, data[rows], bad[rows], (FIRST_RATE * strides).expand_as(mass), beta)
        if not math.isfinite(value.item()):
            raise RuntimeError(f"the loss became {value.item()} at step {step}")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def _checked(prob: np.ndarray, progress: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prob, progress = np.asarray(prob, dtype=np.float32), np.asarray(progress, dtype=np.float32)
    if prob.ndim != 2 or 0 in prob.shape or not ((prob >= 0) & (prob <= 1)).all():  # NaN fails too
        raise InputError(f"prob must be [image step] in [0, 1] without NaN, got shape {prob.shape}")
    ok = progress.shape == prob.shape[1:] and ((progress >= 0) & (progress <= 1)).all()
    if not ok or (np.diff(progress) <= 0).any():
        raise InputError(f"progress must be {prob.shape[1]} numbers rising in [0, 1], one per step, got {progress}")
    return prob, progress
