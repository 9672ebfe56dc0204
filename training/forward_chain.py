"""What is drawn for one picture: a scheduler, some of its noise levels, and noise at each of them.

    x_t = alpha_t * x0 + sigma_t * noise

A step of the forward chain from level s to a noisier level t is

    x_t = r * x_s + sqrt(sigma_t**2 - r**2 * sigma_s**2) * noise        r = alpha_t / alpha_s

Two steps one after the other are distributed like one over both, and many from x0 on like the first line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moe_artifacts.noise import NoiseLevel
from training.noise_grids import NoiseGrid

NoiseKind = Literal["trajectory", "fresh"]


def draw_levels(grids: Sequence[NoiseGrid], count: int, generator: torch.Generator) -> tuple[NoiseGrid, list[int]]:
    """One grid, each as likely, and ``count`` different places in it, each as likely; noisiest first."""
    grid = grids[int(torch.randint(len(grids), (), generator=generator))]
    return grid, torch.randperm(len(grid.levels), generator=generator)[:count].sort().values.tolist()


def add_noise(
    x0: Float[Tensor, "channel height width"],
    levels: Sequence[NoiseLevel],
    noise: NoiseKind,
    generator: torch.Generator,
) -> Float[Tensor, "level channel height width"]:
    """The latents of one picture at several noise levels; float32.

    ``trajectory`` adds one noise at all of them. ``fresh`` walks the forward chain and draws new noise at every step; it
    steps from each level to the next, since steps at levels between them, which nobody sees, would change nothing.

    Args:
        x0: Clean, as the scheduler holds it, on the CPU.
        levels: Noisiest first, each with some signal.
    """
    if noise == "trajectory":
        eps = torch.randn(x0.shape, generator=generator)
        return torch.stack([level.alpha * x0 + level.sigma * eps for level in levels])
    found, x, last = [], x0.float(), NoiseLevel(1.0, 0.0)
    for level in reversed(levels):
        ratio, spread = chain_step(last, level)
        x = ratio * x + spread * torch.randn(x0.shape, generator=generator)
        found.append(x)
        last = level
    return torch.stack(found[::-1])


def chain_step(last: NoiseLevel, level: NoiseLevel) -> tuple[float, float]:
    """What a step of the forward chain multiplies the sample by, and the standard deviation of the noise it adds.

    Example:
        >>> chain_step(NoiseLevel(0.8, 0.6), NoiseLevel(0.4, 1.0))  # 0.3**2 of the variance was there already
        (0.5, 0.9539392014169457)
    """
    ratio = level.alpha / last.alpha
    # max: of two equal levels (PNDM repeats one), where rounding may leave less than nothing.
    return ratio, math.sqrt(max(level.sigma**2 - (ratio * last.sigma) ** 2, 0.0))
