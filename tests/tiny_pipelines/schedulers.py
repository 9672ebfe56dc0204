"""Schedulers that the tiny pipelines take, by a short name each, in every form that changes their state or their grid."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import diffusers

Build = Callable[[], Any]

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_OFFSET = {"steps_offset": 1}


def _made(name: str, **config: Any) -> Build:
    return functools.partial(getattr(diffusers, name), **config)


def _dpm_sde(**config: Any) -> Any:
    from tests.scheduler_cases import CASES  # which knows how to do without torchsde

    kind = next(case.kind for case in CASES if case.kind.__name__ == "DPMSolverSDEScheduler")
    return kind(**config)


def discrete(prediction_type: str = "epsilon") -> dict[str, Build]:
    """Of the models that were trained on a thousand steps of noise (Stable Diffusion, SDXL, PixArt, ...)."""
    given = _BETAS | {"prediction_type": prediction_type}
    made = functools.partial(_made, **given)
    both = functools.partial(_made, **given, **_OFFSET)
    solver = functools.partial(both, "DPMSolverMultistepScheduler")
    return {
        "ddim": both("DDIMScheduler", clip_sample=False),
        "euler-a": both("EulerAncestralDiscreteScheduler"),
        "dpm": solver(),
        "ddim-parallel": both("DDIMParallelScheduler", clip_sample=False),
        "ddpm": both("DDPMScheduler", clip_sample=False),
        "ddpm-parallel": made("DDPMParallelScheduler", clip_sample=False),
        "pndm": both("PNDMScheduler", skip_prk_steps=True),
        "pndm-prk": both("PNDMScheduler"),
        "lms": both("LMSDiscreteScheduler"),
        "lms-karras": both("LMSDiscreteScheduler", use_karras_sigmas=True),
        "euler": both("EulerDiscreteScheduler"),
        "euler-karras": both("EulerDiscreteScheduler", use_karras_sigmas=True),
        "euler-exponential": both("EulerDiscreteScheduler", use_exponential_sigmas=True),
        "euler-beta": both("EulerDiscreteScheduler", use_beta_sigmas=True),
        "heun": both("HeunDiscreteScheduler"),
        "kdpm2": both("KDPM2DiscreteScheduler"),
        "kdpm2-a": both("KDPM2AncestralDiscreteScheduler"),
        "dpm-karras": solver(use_karras_sigmas=True),
        "dpm-lu": solver(use_lu_lambdas=True),
        "dpm-3": solver(solver_order=3),
        "dpm-heun": solver(solver_type="heun"),
        "sde-dpm": solver(algorithm_type="sde-dpmsolver++"),
        "dpm-single": made("DPMSolverSinglestepScheduler", lower_order_final=True),
        "dpm-single-3": made("DPMSolverSinglestepScheduler", solver_order=3, lower_order_final=True),
        "dpm-sde": functools.partial(_dpm_sde, **given, **_OFFSET, noise_sampler_seed=0),
        "unipc": both("UniPCMultistepScheduler"),
        "unipc-3": both("UniPCMultistepScheduler", solver_order=3),
        "deis": both("DEISMultistepScheduler"),
        "sa": both("SASolverScheduler"),
        "ipndm": _made("IPNDMScheduler"),
        "lcm": both("LCMScheduler"),
        "tcd": both("TCDScheduler"),
        "edm-euler": _made("EDMEulerScheduler", prediction_type=prediction_type),
        "edm-dpm": _made("EDMDPMSolverMultistepScheduler", prediction_type=prediction_type),
    }


# Pipelines that hand the noise levels to the scheduler need one whose `set_timesteps` takes `sigmas`.
WITH_SIGMAS = ("flow-euler", "flow-euler-sde", "flow-euler-karras", "flow-lcm", "flow-unipc")
WITH_TIMESTEPS = WITH_SIGMAS[:-1]  # and `timesteps` beside them, or `scale_noise` for img2img
WITH_SCALE_NOISE = (*WITH_TIMESTEPS, "flow-heun")
WITH_MU = (*WITH_SIGMAS, "flow-dpm", "flow-dpm-single", "flow-deis")  # Flux leaves the sigmas to these


def flow(*, dynamic: bool = False, only: Collection[str] | None = None, **config: Any) -> dict[str, Build]:
    """Of the models that predict a flow.

    Args:
        dynamic: For pipelines that shift the noise levels with the size of the image (``mu``).
        only: Those that the pipeline takes; None: all.
        config: Of the Euler scheduler.
    """
    shift = {"use_dynamic_shifting": True} if dynamic else {}
    solver = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    euler = functools.partial(_made, "FlowMatchEulerDiscreteScheduler", **shift, **config)
    made = {
        "flow-euler": euler(),
        "flow-euler-sde": euler(stochastic_sampling=True),
        "flow-dpm": _made("DPMSolverMultistepScheduler", **solver, **shift),
        "flow-euler-karras": euler(use_karras_sigmas=True),
        "flow-heun": _made("FlowMatchHeunDiscreteScheduler"),
        "flow-lcm": _made("FlowMatchLCMScheduler", **shift),
        "flow-unipc": _made("UniPCMultistepScheduler", **solver, **shift),
        "flow-dpm-single": _made("DPMSolverSinglestepScheduler", **solver, **shift, lower_order_final=True),
        "flow-deis": _made("DEISMultistepScheduler", **solver, **shift),
        "flow-sa": _made("SASolverScheduler", **solver),
    }
    return {name: build for name, build in made.items() if only is None or name in only}
