"""The schedulers that the demo, the training and the benchmarks can put into a pipeline, by short names."""

from __future__ import annotations

from typing import Any

from moe_artifacts.errors import InputError

SCHEDULERS = {  # diffusers class names
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler",
}


def set_scheduler(pipe: Any, name: str) -> None:
    """Put another scheduler with the same noise schedule into ``pipe``.

    Args:
        name: A key of ``SCHEDULERS``.
    Raises:
        InputError: If it is none.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise InputError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
    # PNDM's Runge-Kutta warm-up: Stable Diffusion goes without it too, and DDIM's config, which lacks the key, means with.
    changes = {"skip_prk_steps": True} if name == "pndm" else {}
    pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config, **changes)
