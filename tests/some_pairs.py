"""Trajectories small enough to tune a CLIP model on, judged with margins.

Bad images have a bright patch, boots another colour than bags; noise hides both at first.
"""

from __future__ import annotations

from pathlib import Path

import torch

from moe_artifacts.trajectory import Trajectory

LEVELS = torch.tensor([-4.0, 0.0, 4.0])
NUM_STEPS = 10


def trajectory(prompts: list[str], seed: int = 0, labelled: bool = True) -> Trajectory:
    """An image per prompt at three steps, as 4x8x8 latents; every second one is bad."""
    generator = torch.Generator().manual_seed(seed)
    bad = torch.arange(len(prompts)) % 2
    content = 0.3 * torch.randn(len(prompts), 1, 4, 8, 8, generator=generator)
    content[bad == 1, :, :, 2:6, 2:6] += 1.5
    content[["boot" in prompt for prompt in prompts], :, 0] += 1
    noise = torch.randn(len(prompts), 3, 4, 8, 8, generator=generator)
    amount = (-LEVELS / 2).sigmoid()[None, :, None, None, None]
    return Trajectory(
        prompts=prompts,
        seeds=[None] * len(prompts),
        step=[2, 5, 9],
        log_snr=LEVELS,
        scores={},
        num_steps=NUM_STEPS,
        x0=(1 - amount) * content + 0.3 * amount * noise,
        latents=noise,
        label=bad.float() if labelled else None,
        meta={"margin": (bad - 0.5 + 0.1 * content.mean(dim=(1, 2, 3, 4))).tolist()} if labelled else {},
    )


def trajectory_folders(folder: Path, prompts: int = 16, images: int = 6, labelled: bool = True) -> Path:
    """Two trajectory folders, with the images of one prompt in both."""
    names = [f"a {kind} of kind {i}" for i in range(prompts // 2) for kind in ("bag", "boot")]
    for number in range(2):
        # Neighbours are of one prompt, so that each has images of both kinds.
        repeated = [name for name in names for _ in range(images // 2)]
        trajectory(repeated, number, labelled).save(folder / f"run-{number}")
    return folder
