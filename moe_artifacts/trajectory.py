"""What was seen and scored on the way: the records of a batch over its steps. trajectory_files.py has their files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.shapes import PerImage, StepLatents

# Entries of ``meta`` that runs in one setting share.
SETTING = ("scheduler", "num_inference_steps", "guidance_scale", "eta", "image_size", "denoiser", "setting", "scorer")
# Names of the files' own columns and fields, which no score and no entry of ``meta`` can have.
RESERVED_COLUMNS = ("image", "prompt", "seed", "step", "log_snr", "label")
RESERVED_META = ("format_version", "num_steps", "num_images", "steps", "scores")


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """The records of a batch over its scored steps, in denoising order.

    Raises:
        InputError: If lengths and shapes differ, or a value is not finite that should be.
    """

    prompts: list[str]
    seeds: list[int | None]  # None: drawn by a generator shared by the batch
    step: list[int]  # scored steps: 0-based indices into the denoising loop, rising
    log_snr: Tensor  # [step], nats
    scores: dict[str, Tensor]  # name to [batch step]; NaN where an image had left, or was not finite
    num_steps: int  # of the whole denoising loop
    x0: StepLatents | None = None
    latents: StepLatents | None = None  # the noisy ones, x_t
    label: PerImage | None = None  # P(artifacts) of the finished image: 0, 1, or the share of raters who saw them
    meta: dict[str, Any] = field(default_factory=dict)  # plain JSON values: scheduler, guidance_scale, ...

    def __post_init__(self) -> None:
        batch, steps = len(self.prompts), len(self.step)
        if len(self.seeds) != batch:
            raise InputError(f"seeds must be one per prompt, {batch}, or None for each, got {len(self.seeds)}")
        if list(self.step) != sorted(set(self.step)) or any(not 0 <= s < self.num_steps for s in self.step):
            raise InputError(f"step must rise within 0..{self.num_steps - 1}, got {self.step}")
        if self.log_snr.shape != (steps,) or not self.log_snr.isfinite().all():
            raise InputError(f"log_snr must be {steps} finite numbers, one per scored step, got {self.log_snr}")
        for name, score in self.scores.items():
            if name in RESERVED_COLUMNS:
                raise InputError(f"a score cannot be called {name!r}: that column has another meaning")
            if score.shape != (batch, steps):
                got = tuple(score.shape)
                raise InputError(f"the score {name!r} must have the shape {(batch, steps)} (batch, step), got {got}")
            if score.isinf().any():
                raise InputError(
                    f"the score {name!r} must be finite, or NaN where an image was not scored, got infinity"
                )
        for name in ("x0", "latents"):
            value = getattr(self, name)
            if value is not None and (value.ndim != 5 or value.shape[:2] != (batch, steps)):
                shape = f"({batch}, {steps}, channel, height, width)"
                raise InputError(f"{name} must have the shape {shape}, got {tuple(value.shape)}")
        label = self.label
        if label is not None and (label.shape != (batch,) or not ((label >= 0) & (label <= 1)).all()):
            raise InputError(f"label must be {batch} numbers in [0, 1], one per image, got {label}")
        if taken := sorted(set(self.meta) & set(RESERVED_META)):
            raise InputError(f"meta must not hold {taken}: the file has them already")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder; one that is there already is replaced.

        Raises:
            InputError: If there is nothing to write, or a seed does not fit into 64 bits.
        """
        from moe_artifacts.trajectory_files import write_trajectory  # it imports this class

        write_trajectory(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Trajectory:
        """Read a whole folder; ``iter_trajectories`` reads it in parts.

        Raises:
            InputError: As ``iter_trajectories``.
        """
        from moe_artifacts.trajectory_files import read_trajectory

        return read_trajectory(folder)


def join_trajectories(parts: Sequence[Trajectory]) -> Trajectory:
    """The images of several runs in one setting, one run after the other, without latents and with the first one's meta.

    A run whose images all left early has fewer scored steps: its scores are NaN at the others.

    Raises:
        InputError: If there are no parts, or they differ in their number of steps, their noise levels, their scores, or in what
            their ``meta`` says of the setting and of the scorer.
    """
    if not parts:
        raise InputError("parts must hold at least one trajectory, got none")
    first, levels = parts[0], dict[int, float]()
    for number, part in enumerate(parts):
        same = (part.num_steps, part.scores.keys()) == (first.num_steps, first.scores.keys())
        if not same or any(levels.setdefault(s, v) != v for s, v in zip(part.step, part.log_snr.tolist(), strict=True)):
            raise InputError(
                f"parts must be runs in one setting, but part {number} differs from those before it in its number of "
                "steps, its noise levels or its scores"
            )
        for name in SETTING:
            if part.meta.get(name) != first.meta.get(name):
                raise InputError(
                    f"parts must be runs in one setting, but {name} is {part.meta.get(name)!r} in part {number} and "
                    f"{first.meta.get(name)!r} in the first; calibrate each setting by itself"
                )
    steps = sorted(levels)

    def padded(part: Trajectory, name: str) -> Tensor:
        values = torch.full((len(part.prompts), len(steps)), torch.nan)
        values[:, [steps.index(s) for s in part.step]] = part.scores[name].float()
        return values

    labels = [part.label for part in parts if part.label is not None]
    return replace(
        first,
        prompts=[prompt for part in parts for prompt in part.prompts],
        seeds=[seed for part in parts for seed in part.seeds],
        step=steps,
        log_snr=torch.tensor([levels[s] for s in steps]),
        scores={name: torch.cat([padded(part, name) for part in parts]) for name in first.scores},
        label=torch.cat(labels) if len(labels) == len(parts) else None,
        x0=None,
        latents=None,
    )
