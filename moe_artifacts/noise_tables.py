"""Where each diffusers scheduler keeps its noise levels, and which of its model calls are no steps of their own.

One place for what differs between schedulers, in the words of the scheduler's own ``step``; noise.py is the same for
all of them. A scheduler that is missing here is refused: a wrong noise level gives a plausible, wrong x0.

Source: the ``set_timesteps`` and ``step`` methods of diffusers 0.42.
"""

from __future__ import annotations

import math
from typing import Any

from moe_artifacts.errors import UnsupportedPipelineError

# Variance preserving, alpha**2 = alphas_cumprod[timestep].
DISCRETE = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "CogVideoXDDIMScheduler",  # of CogView3-Plus
)
# alpha = 1, whatever sigma is.
EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
# alpha = 1, and the model output is that of a network with the scalings of Karras et al. (arXiv:2206.00364).
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
# Variance preserving, from sigma / alpha; or flow matching with use_flow_sigmas.
SOLVERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
# Flow matching, alpha = 1 - sigma.
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_OTHERS = ("IPNDMScheduler", "SCMScheduler", "DDPMWuerstchenScheduler")
SUPPORTED_SCHEDULERS = (*DISCRETE, *EXPLODING, *EDM, *SOLVERS, *FLOW, *_OTHERS)

# The model is asked at each noise level and once more, on a provisional sample, before the next.
_SECOND_ORDER = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "FlowMatchHeunDiscreteScheduler",
)

_TOKENS = "it draws discrete tokens: there is no Gaussian noise, hence no log-SNR and no x0 between clean and noisy"
_INVERSE = "it runs from the picture to the noise"
_PIXELS = "it is of pipelines that denoise pixels without a prompt, and is not driven by step(model_output, t, sample)"
_VIDEO = "only video pipelines use it, and previews and scorers are of single pictures"
REFUSED_SCHEDULERS: dict[str, str] = {  # class name: what is missing
    "CogVideoXDPMScheduler": "its step takes the x0 of the step before, which the pipeline keeps, as a second batch",
    "FlowMapEulerDiscreteScheduler": "its model predicts the mean velocity of an interval, from which no x0 follows",
    "PiflowScheduler": "its model predicts a path of many x0 per step, in a tensor wider than the sample",
    "UnCLIPScheduler": "it denoises the CLIP embedding of a prior, or pixels: there are no latents to preview",
    "CMStochasticIterativeScheduler": "it samples class-conditional pixel models, which have no latents and no prompt",
    "ConsistencyDecoderScheduler": "it decodes latents that are finished",
    "RePaintScheduler": "it goes back to noisier levels on the way",
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "AmusedScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "KarrasVeScheduler": _PIXELS,
    "ScoreSdeVeScheduler": _PIXELS,
    "ScoreSdeVpScheduler": _PIXELS,
    "HeliosScheduler": _VIDEO,
    "HeliosDMDScheduler": _VIDEO,
    "LTXEulerAncestralRFScheduler": _VIDEO,
    "MiniMaxH3Scheduler": _VIDEO,
    "RFD4ProteinaScheduler": "it samples proteins",
}


def prediction_type(scheduler: Any) -> str:
    """What the model output stands for: ``epsilon``, ``v_prediction``, ``sample``, ``flow_prediction``, ``trigflow``."""
    name = type(scheduler).__name__
    if name in FLOW:
        return "flow_prediction"
    if name == "IPNDMScheduler":
        return "v_prediction"
    if name == "DDPMWuerstchenScheduler":
        return "epsilon"
    return scheduler.config.prediction_type


def uses_flow_sigmas(scheduler: Any) -> bool:
    """Whether alpha = 1 - sigma."""
    # Not of any class: from_config keeps the settings of another scheduler that this one does not know.
    name = type(scheduler).__name__
    return name in FLOW or (name in SOLVERS and bool(scheduler.config.get("use_flow_sigmas")))


def alphas_and_sigmas(scheduler: Any) -> list[tuple[float, float]]:
    """Of the sample that enters each step of the whole grid."""
    name = type(scheduler).__name__
    if name in DISCRETE:
        return _variance_preserving(scheduler.alphas_cumprod.cpu()[scheduler.timesteps.cpu()].tolist())
    if name == "DDPMWuerstchenScheduler":
        steps = scheduler.timesteps[:-1]  # the last entry is the end of the way
        return _variance_preserving(scheduler._alpha_cumprod(steps, steps.device).tolist())
    if name == "SCMScheduler":
        # Of latents with standard deviation sigma_data, by which the pipeline multiplies before and divides after.
        data = scheduler.config.sigma_data
        return [(data * math.cos(t), data * math.sin(t)) for t in scheduler.timesteps[:-1].tolist()]
    if name == "IPNDMScheduler":
        steps = len(scheduler.timesteps)
        return list(zip(scheduler.alphas[:steps].tolist(), scheduler.betas[:steps].tolist(), strict=True))
    sigmas = _sigmas(scheduler)
    if name in EXPLODING or name in EDM:
        return [(1.0, s) for s in sigmas]
    if uses_flow_sigmas(scheduler):
        return [(1 - s, s) for s in sigmas]
    return [(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in sigmas]


def half_steps(scheduler: Any, first: int) -> set[int]:
    """Indices into the whole grid of a run that begins at ``first``.

    Raises:
        UnsupportedPipelineError: If PNDM is to begin later with Runge-Kutta steps.
    """
    name = type(scheduler).__name__
    if name in _SECOND_ORDER:
        return set(range(1, len(scheduler.timesteps), 2))  # pipelines begin at multiples of scheduler.order
    if name != "PNDMScheduler":
        return set()
    if scheduler.config.skip_prk_steps:
        # The second call gets a first guess; the third enters with the better one. PNDM counts calls, so this holds
        # wherever a run begins.
        return {first + 1}
    if first:
        raise UnsupportedPipelineError(
            f"PNDMScheduler with skip_prk_steps=False was started at step {first}, and its Runge-Kutta steps know only "
            "the start of the schedule; use skip_prk_steps=True"
        )
    return {i for i in range(len(scheduler.prk_timesteps)) if i % 4}  # four calls for each of the first three steps


def _sigmas(scheduler: Any) -> list[float]:
    """As the ``step`` of the scheduler takes them for its model output."""
    name, steps = type(scheduler).__name__, len(scheduler.timesteps)
    sigmas = scheduler.sigmas[:steps].tolist()  # without the level of the end
    if name == "KDPM2DiscreteScheduler":
        sigmas[1::2] = scheduler.sigmas_interpol[1:steps:2].tolist()
    elif name == "KDPM2AncestralDiscreteScheduler":
        sigmas[1::2] = scheduler.sigmas_interpol[0 : steps - 1 : 2].tolist()  # looked up one place earlier
    elif name == "DPMSolverSDEScheduler":
        sigmas[1::2] = [math.sqrt(sigmas[i - 1] * sigmas[i]) for i in range(1, steps, 2)]
    return sigmas


def _variance_preserving(signal_variance: list[float]) -> list[tuple[float, float]]:
    return [(math.sqrt(a), math.sqrt(1 - a)) for a in signal_variance]
