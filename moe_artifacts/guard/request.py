"""What is asked of the pipeline: read, and checked for what the guard cannot do, before the first step.

Pipelines name their arguments alike, but none has all of them: what a pipeline lacks is simply not there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from moe_artifacts.errors import InputError, UnsupportedPipelineError
from moe_artifacts.guard.pipelines import PipelineSpec, spec_of
from moe_artifacts.noise import require_supported

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ATTENTION_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


@dataclass(frozen=True)
class Request:
    """One pipeline call. Images are numbered in the pipeline's order: all images of the first prompt come first."""

    batch_size: int
    prompts: list[str] | None  # one per image; None where only embeddings were given
    seeds: list[int | None]  # one per image, where each has a generator of its own that is as it was seeded
    num_inference_steps: int | None  # None: a grid of the caller's own, or a part of one (img2img)
    guidance_scale: float
    eta: float  # 0 where the scheduler takes none
    output_type: str
    height: int | None  # pixels, as given or the default; None: that of an image given
    width: int | None
    return_dict: bool
    generator_kind: Literal["none", "single", "list"]


def denoiser_of(pipe: Any) -> nn.Module:
    """The module whose calls are worth saving.

    Raises:
        UnsupportedPipelineError: If the pipeline is not known to work with the guard.
    """
    return getattr(pipe, spec_of(pipe).denoiser)


def read_request(
    pipe: Any, spec: PipelineSpec, args: tuple[Any, ...], kwargs: dict[str, Any], prompts: list[str] | None
) -> Request:
    """Read the arguments of a call of ``pipe``, refusing what the guard cannot treat correctly.

    Args:
        prompts: One per row of ``prompt_embeds``, when these are given in place of ``prompt``.
    Raises:
        UnsupportedPipelineError: For a scheduler, or an argument, that is not supported.
        InputError: For an argument that no run can take.
    """
    require_supported(pipe.scheduler)
    bound = inspect.signature(type(pipe).__call__).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    asked = bound.arguments
    _refuse_unsupported(asked, spec)
    _refuse_late_runge_kutta(pipe.scheduler, asked)

    if not _has_own_grid(asked):
        require_steps(asked["num_inference_steps"])
    copies = asked["num_images_per_prompt"]
    if not isinstance(copies, int) or copies < 1:
        raise InputError(f"num_images_per_prompt must be a whole number of at least 1, got {copies!r}")
    texts = _prompts(asked["prompt"], prompts, asked["prompt_embeds"])
    rows = len(texts) if texts is not None else len(asked["prompt_embeds"])
    batch_size = rows * copies
    latents = asked.get("latents")
    if latents is not None and len(latents) != batch_size:
        raise InputError(f"latents has {len(latents)} rows, expected {batch_size}: one per image")
    generator_kind, seeds = _generators(asked["generator"], batch_size)
    height, width = _size(pipe, spec, asked)
    return Request(
        batch_size=batch_size,
        prompts=None if texts is None else [text for text in texts for _ in range(copies)],
        seeds=seeds,
        num_inference_steps=None if _has_own_grid(asked) else asked["num_inference_steps"],
        guidance_scale=_guidance_scale(asked),
        eta=_eta(pipe.scheduler, asked),
        output_type=asked["output_type"],
        height=height,
        width=width,
        return_dict=bool(asked["return_dict"]),
        generator_kind=generator_kind,
    )


def require_steps(steps: Any, most: int | None = None) -> None:
    """Refuse a number of denoising steps that no run can take; above ``most`` the schedulers refuse, or repeat steps.

    Raises:
        InputError: Naming it.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"num_inference_steps must be a whole number of at least 1, got {steps!r}")
    if most is not None and steps > most:
        raise InputError(
            f"num_inference_steps must be at most {most}, the steps that the pipeline was trained with, got {steps}"
        )


def _refuse_unsupported(asked: dict[str, Any], spec: PipelineSpec) -> None:
    for name, reason in spec.refused_arguments.items():
        if asked.get(name) is not None:
            raise UnsupportedPipelineError(f"{name} is not supported by the guard: {reason}")
    for name in ATTENTION_KWARGS:
        inputs = spec.batched | spec.shared
        known = {"scale"} | {key.removeprefix(f"{name}.") for key in inputs if key.startswith(f"{name}.")}
        if others := sorted(set(asked.get(name) or {}) - known):
            raise UnsupportedPipelineError(
                f"{name} {others} are not supported by the guard: they may hold one entry per image. "
                "Only 'scale' (LoRA) is"
            )
    if asked["output_type"] not in OUTPUT_TYPES:
        raise UnsupportedPipelineError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {asked['output_type']!r}"
        )


def _refuse_late_runge_kutta(scheduler: Any, asked: dict[str, Any]) -> None:
    """What noise_levels refuses too, but only when the first step has been run."""
    later = asked.get("strength", 1.0) < 1.0 or asked.get("denoising_start") is not None
    if later and type(scheduler).__name__ == "PNDMScheduler" and not scheduler.config.skip_prk_steps:
        raise UnsupportedPipelineError(
            "PNDMScheduler with skip_prk_steps=False cannot begin within its grid, as strength below 1 and denoising_start "
            "ask: its Runge-Kutta steps know only the start of it; use skip_prk_steps=True"
        )


def _has_own_grid(asked: dict[str, Any]) -> bool:
    given = any(asked.get(name) is not None for name in ("timesteps", "sigmas", "denoising_start"))
    return given or asked.get("strength", 1.0) != 1.0


def _guidance_scale(asked: dict[str, Any]) -> float:
    """The scale of the guidance by two denoiser calls where there is one, else that which the denoiser is told."""
    true_scale = asked.get("true_cfg_scale")
    negative = any(asked.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    if true_scale is not None and true_scale > 1.0 and negative:
        return float(true_scale)
    return 1.0 if asked["guidance_scale"] is None else float(asked["guidance_scale"])


def _eta(scheduler: Any, asked: dict[str, Any]) -> float:
    takes = "eta" in inspect.signature(scheduler.step).parameters
    return float(asked.get("eta") or 0.0) if takes else 0.0


def _size(pipe: Any, spec: PipelineSpec, asked: dict[str, Any]) -> tuple[int | None, int | None]:
    control = asked.get("control_image")
    if spec.default_size == "control" and isinstance(control, torch.Tensor):
        return control.shape[-2], control.shape[-1]
    height, width = asked.get("height"), asked.get("width")
    if (height and width) or spec.default_size == "image":
        return height, width
    if isinstance(spec.default_size, int):
        return height or spec.default_size, width or spec.default_size
    of_denoiser = spec.default_size == "denoiser"
    size = getattr(pipe, spec.denoiser).config.sample_size if of_denoiser else pipe.default_sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return height or rows * pipe.vae_scale_factor, width or columns * pipe.vae_scale_factor


def _prompts(prompt: Any, texts: list[str] | None, embeds: Any) -> list[str] | None:
    """The prompts as a list, from whichever argument has them."""
    if (prompt is None) == (embeds is None):
        raise InputError("give either prompt or prompt_embeds to the pipeline, got both or neither")
    if prompt is not None and texts is not None:
        raise InputError("prompts tells the scorer what prompt_embeds stand for; with prompt, leave it out")
    if embeds is not None and texts is None:
        return None
    name, given = ("prompts", texts) if prompt is None else ("prompt", prompt)
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise InputError(f"{name} must be a string or a list of strings, got {type(given).__name__}: {given!r}")
    if not given:
        raise InputError(f"{name} is an empty list, expected at least one prompt")
    if embeds is not None and len(given) != len(embeds):
        raise InputError(f"prompts has {len(given)} entries, expected {len(embeds)}: one per row of prompt_embeds")
    return given


def _generators(generator: Any, batch_size: int) -> tuple[Literal["none", "single", "list"], list[int | None]]:
    """How random numbers are drawn, and the seed of each image that has a generator of its own."""
    if generator is None:
        return "none", [None] * batch_size
    if isinstance(generator, torch.Generator):
        return "single", [_seed_of(generator)] if batch_size == 1 else [None] * batch_size
    if not isinstance(generator, list) or not all(isinstance(g, torch.Generator) for g in generator):
        raise InputError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")
    if len(generator) != batch_size:
        raise InputError(f"generator is a list of {len(generator)}, expected {batch_size}: one per image")
    return "list", [_seed_of(g) for g in generator]


def _seed_of(generator: torch.Generator) -> int | None:
    """The seed, if it makes the image again; None for a generator from which numbers have been drawn."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return generator.initial_seed() if torch.equal(fresh.get_state(), generator.get_state()) else None
