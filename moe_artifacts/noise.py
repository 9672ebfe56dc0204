"""Stage 1: what enters ``scheduler.step`` to the noise level and the prediction of the clean latents.

    x_t = alpha * x0 + sigma * noise        log_snr = log(alpha**2 / sigma**2)

Every scheduler keeps its noise levels in its own form; here they all become (alpha, sigma) of the sample that *enters*
a step, because that is the sample the model output belongs to. Nothing is asked of ``pred_original_sample``, which many
schedulers do not have, nor of ``add_noise``, which ignores its timestep once a run has begun (Euler).

Source: the ``step`` and ``convert_model_output`` methods of diffusers 0.42; tests/test_noise.py checks each of them
against a denoiser that knows x0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

from moe_artifacts.config import WatchedConfig
from moe_artifacts.errors import InputError, UnsupportedPipelineError
from moe_artifacts.shapes import Latents

_DISCRETE = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")  # variance preserving, from alphas_cumprod
_EXPLODING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")  # alpha = 1
_SOLVERS = (
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)  # variance preserving, from sigma / alpha; or flow
_FLOW = ("FlowMatchEulerDiscreteScheduler",)  # alpha = 1 - sigma
SUPPORTED_SCHEDULERS = (*_DISCRETE, *_EXPLODING, *_SOLVERS, *_FLOW)


@dataclass(frozen=True)
class NoiseLevel:
    """Signal and noise of the sample that enters one step.

    Example:
        >>> NoiseLevel(alpha=0.8, sigma=0.8).log_snr
        0.0
    """

    alpha: float
    sigma: float
    # A further model evaluation within one step, on a provisional sample (PNDM's warm-up): not a step of its own.
    half_step: bool = False

    @property
    def log_snr(self) -> float:
        """Nats; ``inf`` without noise, ``-inf`` without signal."""
        if self.sigma == 0:
            return math.inf
        return 2 * math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


def require_supported(scheduler: Any) -> None:
    """Refuse a scheduler, or a setting of it, whose noise levels are not known here.

    Raises:
        UnsupportedPipelineError: Naming the scheduler and those that are supported.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name not in SUPPORTED_SCHEDULERS:
        raise UnsupportedPipelineError(
            f"scheduler {name} is not supported; supported are {', '.join(SUPPORTED_SCHEDULERS)}. "
            "Most can be built from the config of another: DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    kind, flow_sigmas = (_prediction_type(scheduler), name in _FLOW or bool(config.get("use_flow_sigmas")))
    if kind not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        raise UnsupportedPipelineError(f"prediction_type {kind!r} of {name} is not supported")
    if (kind == "flow_prediction") != flow_sigmas:
        raise UnsupportedPipelineError(
            f"{name} has prediction_type={kind!r} with use_flow_sigmas={flow_sigmas}: flow prediction needs flow "
            "sigmas and the other prediction types need them off"
        )
    if str(config.get("variance_type")).startswith("learned"):
        raise UnsupportedPipelineError(f"{name} with variance_type={config.get('variance_type')!r} is not supported")
    if config.get("invert_sigmas"):
        raise UnsupportedPipelineError(f"{name} with invert_sigmas=True is not supported")


def noise_levels(scheduler: Any) -> list[NoiseLevel]:
    """The level of the sample that enters each step of the grid, in denoising order, one per ``scheduler.timesteps``.

    Call it after ``set_timesteps``, which makes the grid.

    Raises:
        UnsupportedPipelineError: If the scheduler is not one of ``SUPPORTED_SCHEDULERS``.
        InputError: If the scheduler has no grid yet.
    """
    require_supported(scheduler)
    if scheduler.timesteps is None:
        raise InputError(f"{type(scheduler).__name__} has no timesteps yet, call set_timesteps first")
    name = type(scheduler).__name__
    if name in _DISCRETE:
        signal = scheduler.alphas_cumprod.cpu()[scheduler.timesteps.cpu()].tolist()
        half = _pndm_half_steps(scheduler) if name == "PNDMScheduler" else set()
        return [NoiseLevel(math.sqrt(a), math.sqrt(1 - a), i in half) for i, a in enumerate(signal)]

    sigmas = scheduler.sigmas[: len(scheduler.timesteps)].tolist()  # one more than steps: the level of the end
    if name in _EXPLODING:
        return [NoiseLevel(1.0, s) for s in sigmas]
    if name in _FLOW or scheduler.config.use_flow_sigmas:
        return [NoiseLevel(1 - s, s) for s in sigmas]
    return [NoiseLevel(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in sigmas]


def predict_x0(scheduler: Any, model_output: Latents, sample: Latents, level: NoiseLevel) -> Latents:
    """The clean latents that ``model_output`` implies, before any clipping or thresholding by the scheduler.

    Args:
        model_output: What the pipeline hands to ``scheduler.step``, hence after guidance; any float dtype.
        sample: The latents that enter the step, at ``level``; any float dtype.
    Returns:
        Float32; not finite where the model output is not, or where an epsilon is to be undone without any signal.
    """
    x, out = sample.float(), model_output.float()
    a, s = level.alpha, level.sigma
    kind = _prediction_type(scheduler)
    if kind == "sample":
        return out
    if kind == "flow_prediction":
        return x - s * out  # out = noise - x0 and a = 1 - s
    if kind == "v_prediction":
        r = math.hypot(a, s)  # 1 if variance preserving; for the others v is that of the sample scaled to variance one
        return (a / r**2) * x - (s / r) * out
    return (x - s * out) / a


def variance_preserving(sample: Latents, level: NoiseLevel) -> Latents:
    """The sample scaled to alpha**2 + sigma**2 = 1, so that it looks alike under every scheduler; float32."""
    return sample.float() / math.hypot(level.alpha, level.sigma)


@overload
def progress(log_snr: float, log_snr_range: tuple[float, float]) -> float: ...
@overload
def progress(log_snr: Tensor, log_snr_range: tuple[float, float]) -> Tensor: ...
def progress(log_snr: float | Tensor, log_snr_range: tuple[float, float]) -> float | Tensor:
    """``log_snr`` (nats) mapped linearly to [0, 1] over the range, clamped outside of it.

    Example:
        >>> progress(1.0, (-6.0, 8.0))
        0.5
    """
    low, high = log_snr_range
    share = (log_snr - low) / (high - low)
    return share.clamp(0, 1) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)


def check_steps(levels: list[NoiseLevel], config: WatchedConfig) -> list[int]:
    """The steps to score: the first at or past each value of ``config.check_progress``, and the last step if it says so.

    Where no step is past a value the last one is scored for it.

    Returns:
        Rising indices into ``levels``, without repetition; half-steps are never scored.
    """
    steps = [
        (i, progress(level.log_snr, config.log_snr_range)) for i, level in enumerate(levels) if not level.half_step
    ]
    if config.check_progress is None:
        return [i for i, _ in steps]
    last = steps[-1][0]
    found = {next((i for i, u in steps if u >= check), last) for check in config.check_progress}
    return sorted(found | {last} if config.checks_last else found)


def _prediction_type(scheduler: Any) -> str:
    return "flow_prediction" if type(scheduler).__name__ in _FLOW else scheduler.config.prediction_type


def _pndm_half_steps(scheduler: Any) -> set[int]:
    """PNDM asks the model again for its first step (PLMS), or four times for each of its first three (Runge-Kutta)."""
    if scheduler.config.skip_prk_steps:
        return {1}  # enters with a first guess; the next step enters at the same timestep with the better one
    return {i for i in range(len(scheduler.prk_timesteps)) if i % 4}
