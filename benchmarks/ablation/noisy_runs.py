"""x_t at the checks, which ``training.collect`` does not keep: the same runs again, from their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.guard.tap import SchedulerTap, TappedStep
from moe_artifacts.noise import variance_preserving
from moe_artifacts.schedulers import set_scheduler
from training.collect import DEFAULT
from training.workspace import progress

BATCH = 250
# The recorded run may have been compiled, and was stored in float16; one that went another way is off by about 1.
CLOSE = 0.05


def record_noisy(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: Sequence[int], final: Tensor, folder: Path
) -> Tensor:
    """What enters these steps of runs of the default setting, scaled to variance one; float16 [image check ...].

    Each batch is kept in ``folder`` and not run again.

    Args:
        final: The finished latents of the recorded runs.
    Raises:
        InputError: If the runs do not end there.
    """
    parts = []
    with progress(len(seeds), 0, f"x_t {folder.name}") as bar:
        for start in range(0, len(seeds), BATCH):
            batch = slice(start, start + BATCH)
            path = folder / f"{start:06d}-{len(seeds[batch])}.safetensors"
            if not path.exists():
                noisy, end = _run(pipe, prompts[batch], seeds[batch], steps)
                if (off := (end - final[batch].float()).abs().median().item()) > CLOSE:
                    raise InputError(
                        f"{folder.name}: runs from {start} on end {off:.3f} off the recorded ones: is it another pipeline?"
                    )
                with atomic_path(path) as temporary:
                    save_file({"x_t": noisy}, temporary)
            parts.append(load_file(path)["x_t"])
            bar.update(len(seeds[batch]))
    return torch.cat(parts)


def _run(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    set_scheduler(pipe, DEFAULT.scheduler)
    seen: list[Tensor] = []

    def observe(step: TappedStep) -> None:
        if step.index in steps:
            seen.append(variance_preserving(step.sample, step.level).half())

    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    with SchedulerTap(pipe.scheduler, observe, LiveRows(len(prompts))), torch.no_grad():
        end = pipe(
            list(prompts),
            height=size,
            width=size,
            num_inference_steps=DEFAULT.steps,
            guidance_scale=DEFAULT.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
    return torch.stack(seen, dim=1), end
