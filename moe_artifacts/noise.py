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

from jaxtyping import Float
from torch import Tensor

from moe_artifacts.config import WatchedConfig
from moe_artifacts.errors import InputError, UnsupportedPipelineError
from moe_artifacts.noise_tables import (
    EDM,
    FLOW,
    REFUSED_SCHEDULERS,
    SOLVERS,
    SUPPORTED_SCHEDULERS,
    alphas_and_sigmas,
    half_steps,
    prediction_type,
    uses_flow_sigmas,
)
from moe_artifacts.shapes import Latents

# Of a model with learned variance these take channels 0 to 2 for the mean, whether the sample has three or not.
_FIRST_THREE_CHANNELS = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler")


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
        UnsupportedPipelineError: Naming the scheduler, and the reason or those that are supported.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name in REFUSED_SCHEDULERS:
        raise UnsupportedPipelineError(f"scheduler {name} is not supported: {REFUSED_SCHEDULERS[name]}")
    if name not in SUPPORTED_SCHEDULERS:
        raise UnsupportedPipelineError(
            f"scheduler {name} is not supported; supported are {', '.join(SUPPORTED_SCHEDULERS)}. "
            "Most can be built from the config of another: DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    kind, flow_sigmas = prediction_type(scheduler), uses_flow_sigmas(scheduler)
    if kind not in _predictions(name):
        raise UnsupportedPipelineError(
            f"prediction_type {kind!r} of {name} is not supported; supported are {', '.join(_predictions(name))}"
        )
    if (kind == "flow_prediction") != flow_sigmas:
        raise UnsupportedPipelineError(
            f"{name} has prediction_type={kind!r} with use_flow_sigmas={flow_sigmas}: flow prediction needs flow "
            "sigmas and the other prediction types need them off"
        )
    if name in SOLVERS and flow_sigmas and (others := _other_sigmas(name, config)):
        raise UnsupportedPipelineError(
            f"{name} with use_flow_sigmas=True and {others[0]}=True takes sigmas above 1 for flow sigmas; "
            f"set {others[0]}=False"
        )
    if name in _FIRST_THREE_CHANNELS and str(config.get("variance_type")).startswith("learned"):
        raise UnsupportedPipelineError(
            f"{name} with variance_type={config.get('variance_type')!r} uses the first three channels of the model "
            "output, as for pixels; set variance_type=None"
        )
    if name in FLOW and config.get("invert_sigmas"):
        raise UnsupportedPipelineError(
            f"{name} with invert_sigmas=True counts sigma from the clean end, as only a video pipeline (Mochi) expects"
        )


def noise_levels(scheduler: Any, first: int = 0) -> list[NoiseLevel]:
    """The level of the sample that enters each step, in denoising order.

    One per entry of ``scheduler.timesteps``, except that the last entry of ``SCMScheduler`` and of
    ``DDPMWuerstchenScheduler`` is the end of the way and no step. Call it after ``set_timesteps``, which makes the grid.

    Args:
        first: Place in the grid where the run begins, which is 0 except for image-to-image: see :func:`first_index`.
    Raises:
        UnsupportedPipelineError: If the scheduler, a setting of it, or this beginning is not supported.
        InputError: If the scheduler has no grid yet.
    """
    require_supported(scheduler)
    if getattr(scheduler, "timesteps", None) is None:
        raise InputError(f"{type(scheduler).__name__} has no timesteps yet, call set_timesteps first")
    half = half_steps(scheduler, first)
    levels = [NoiseLevel(a, s, i in half) for i, (a, s) in enumerate(alphas_and_sigmas(scheduler))]
    return levels[first:]


def first_index(scheduler: Any, timestep: Any, num_steps: int | None = None) -> int:
    """Place in the grid where a run began, asked after its first step, before its second.

    Image-to-image pipelines leave out the noisiest steps, and tell only some of the schedulers (``set_begin_index``).

    Args:
        timestep: What the first call of ``scheduler.step`` was given: a number, or a tensor with one or more entries
            that are all the same.
        num_steps: Length of the run where it is known (``pipe.num_timesteps``). It matters for PNDM alone, which
            repeats its second timestep.
    Raises:
        UnsupportedPipelineError: If the timestep stands twice in the grid and ``num_steps`` does not tell which it is.
    """
    if getattr(scheduler, "step_index", None) is not None:
        return scheduler.step_index - 1  # the others find the level by the timestep alone, each time
    value = timestep.flatten()[0].item() if isinstance(timestep, Tensor) else timestep
    distance = (scheduler.timesteps - value).abs()  # not ==: a pipeline in bfloat16 may have rounded it
    places = (distance == distance.min()).nonzero().flatten().tolist()
    if num_steps is not None:
        places = [place for place in places if len(scheduler.timesteps) - place == num_steps] or places
    if len(places) > 1:
        raise UnsupportedPipelineError(
            f"{type(scheduler).__name__} was started at timestep {value}, which stands at the places {places} of its "
            "schedule, and the pipeline does not tell which of them it means; use another strength or scheduler"
        )
    return places[0]


def predict_x0(
    scheduler: Any,
    model_output: Float[Tensor, "batch ..."],
    sample: Float[Tensor, "batch ..."],
    level: NoiseLevel,
) -> Float[Tensor, "batch ..."]:
    """The clean latents that ``model_output`` implies, before any clipping or thresholding by the scheduler.

    Args:
        model_output: What the pipeline hands to ``scheduler.step``, hence after guidance; any float dtype. A second half
            of its channels is a learned variance, which does not matter here.
        sample: The latents that enter the step, at ``level``, of any shape (Flux has tokens); any float dtype.
    Returns:
        Float32; not finite where the model output is not, or where an epsilon is to be undone without any signal.
    """
    x, out = sample.float(), model_output.float()
    if x.ndim > 1 and out.shape[1] == 2 * x.shape[1]:
        out = out[:, : x.shape[1]]
    a, s = level.alpha, level.sigma
    kind = prediction_type(scheduler)
    if type(scheduler).__name__ in EDM:
        data = scheduler.config.sigma_data
        r = math.hypot(s, data)
        sign = 1 if kind == "epsilon" else -1
        return (data / r) ** 2 * x + sign * (s * data / r) * out
    if kind == "trigflow":
        return (a * x - s * out) / (a**2 + s**2)  # the scheduler's own x0, over sigma_data: as the VAE knows them
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


def _predictions(name: str) -> tuple[str, ...]:
    """The prediction types whose x0 is known here."""
    if name == "SCMScheduler":
        return ("trigflow",)
    if name in EDM:
        return ("epsilon", "v_prediction")
    return ("epsilon", "v_prediction", "sample", "flow_prediction")


def _other_sigmas(name: str, config: Any) -> list[str]:
    """Sigma schedules that are switched on and not meant for flow matching."""
    known = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"]
    if name == "UniPCMultistepScheduler":
        known.remove("use_karras_sigmas")  # which it converts
    return [setting for setting in known if config.get(setting)]
