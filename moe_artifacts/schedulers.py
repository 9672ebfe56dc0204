"""Short names of schedulers, and putting one into a pipeline in place of another."""

from __future__ import annotations

from typing import Any

from moe_artifacts.errors import InputError
from moe_artifacts.noise_tables import uses_flow_sigmas

# All values are diffusers class names. These seven the demo, the training and the benchmarks go through by name.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler",
}
# For the same models. Some leave noise in the last sample (deis, sa), ask the model twice a step (heun, kdpm2, kdpm2-a,
# dpm-sde), or are for distilled models (lcm, tcd).
MORE_SCHEDULERS = {
    "ddim-parallel": "DDIMParallelScheduler",
    "ddpm-parallel": "DDPMParallelScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm-sde": "DPMSolverSDEScheduler",  # diffusers needs torchsde for it
    "dpm-single": "DPMSolverSinglestepScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-a": "KDPM2AncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "sa": "SASolverScheduler",
    "tcd": "TCDScheduler",
}
# For models that predict a flow.
FLOW_SCHEDULERS = {
    "flow-deis": "DEISMultistepScheduler",
    "flow-dpm": "DPMSolverMultistepScheduler",
    "flow-dpm-single": "DPMSolverSinglestepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "flow-lcm": "FlowMatchLCMScheduler",
    "flow-sa": "SASolverScheduler",
    "flow-unipc": "UniPCMultistepScheduler",
}


def set_scheduler(pipe: Any, name: str) -> None:
    """Put another scheduler with the same noise schedule into ``pipe``.

    Args:
        name: A key of ``SCHEDULERS``, ``MORE_SCHEDULERS`` or ``FLOW_SCHEDULERS``.
    Raises:
        InputError: If it is none, or is for another kind of model than the scheduler that it is to replace.
    """
    import diffusers

    known = SCHEDULERS | MORE_SCHEDULERS | FLOW_SCHEDULERS
    if name not in known:
        raise InputError(f"scheduler must be one of {', '.join(known)}, got {name!r}")
    old, flow = pipe.scheduler, name in FLOW_SCHEDULERS
    if uses_flow_sigmas(old) != flow:
        kinds = ("models that predict a flow", "models with a discrete noise schedule")
        others = known.keys() - FLOW_SCHEDULERS.keys() if flow else FLOW_SCHEDULERS
        raise InputError(
            f"scheduler {name!r} is for {kinds[not flow]} and the pipeline's {type(old).__name__} for {kinds[flow]}; "
            f"use one of {', '.join(sorted(others))}"
        )
    config = dict(old.config)
    if "SASolverScheduler" in (type(old).__name__, known[name]):
        config.pop("algorithm_type", None)  # means something else there
    if flow:
        shift = config.get("flow_shift" if hasattr(old, "model_outputs") else "shift", 1.0)
        config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "shift": shift}
    if name == "pndm":
        # Its Runge-Kutta warm-up: Stable Diffusion goes without it too, and DDIM's config, which lacks the key, means with.
        config["skip_prk_steps"] = True
    pipe.scheduler = getattr(diffusers, known[name]).from_config(config)
