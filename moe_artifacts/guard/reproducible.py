"""Whether an image of a batch can be made again by itself, from its own seed."""

from __future__ import annotations

import warnings
from typing import Any

from moe_artifacts.errors import ReproducibilityWarning
from moe_artifacts.guard.request import Request

_DRAW_NOISE = (  # in every step, from the generator of the call
    *("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("LCMScheduler", "FlowMatchLCMScheduler", "SASolverScheduler", "SCMScheduler"),
)
# These draw noise where eta is above 0.
_DEFAULT_ETA = {"DDIMScheduler": 0.0, "DDIMParallelScheduler": 0.0, "TCDScheduler": 0.3}
_DRAW_FOR_THE_BATCH = (
    "DPMSolverSDEScheduler",
    "CosineDPMSolverMultistepScheduler",
)  # a seed of their own, not the call's


def warn_if_not_alone(scheduler: Any, request: Request, eta: float | None, stacklevel: int) -> None:
    """Warn where the noise of an image depends on the batch it is made in.

    Args:
        eta: Of the pipeline call; None: it has no such argument.
    """
    name = type(scheduler).__name__
    if request.batch_size == 1:
        if name != "DPMSolverSDEScheduler" or scheduler.config.noise_sampler_seed is not None:
            return
        cause = f"{name} draws a seed from torch's global generator; make it with a noise_sampler_seed"
    elif name in _DRAW_FOR_THE_BATCH:
        cause = f"{name} draws its noise for the whole batch, whatever the generators"
    elif _draws_noise(scheduler, eta) and request.generator_kind != "list":
        given = "no generator was" if request.generator_kind == "none" else "one generator for the whole batch was"
        cause = f"{name} draws noise in every step, and {given} given; give a list of them, one per image"
    else:
        return
    warnings.warn(
        f"{cause}. The images that are kept still equal those of the undisturbed run, but none can be made again alone "
        "from a seed",
        ReproducibilityWarning,
        stacklevel=stacklevel + 1,
    )


def _draws_noise(scheduler: Any, eta: float | None) -> bool:
    name, config = type(scheduler).__name__, scheduler.config
    if name in _DEFAULT_ETA:
        return (_DEFAULT_ETA[name] if eta is None else eta) > 0
    sde = str(config.get("algorithm_type")).startswith("sde-")
    return name in _DRAW_NOISE or sde or bool(config.get("stochastic_sampling"))
