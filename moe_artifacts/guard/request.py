"""What is asked of the pipeline: read, and checked for what the guard cannot do, before the first step.

Supporting a further pipeline means: its class here, its batched denoiser arguments in rows.py, and the tests of
tests/test_guard.py that compare the rows of a run that loses some with those of the undisturbed run.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_artifacts.config import LatentSpaceConfig
from moe_artifacts.errors import InputError, LatentSpaceError, UnsupportedPipelineError
from moe_artifacts.noise import require_supported

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Request:
    """One pipeline call. Images are numbered in the pipeline's order: all images of the first prompt come first."""

    batch_size: int
    prompts: list[str] | None  # one per image; None where only embeddings were given
    seeds: list[int | None]  # one per image, where each has a generator of its own
    num_inference_steps: int | None  # None: the caller gave a grid of his own
    guidance_scale: float
    output_type: str


def denoiser_of(pipe: Any) -> nn.Module:
    """The module whose calls are worth saving.

    Raises:
        UnsupportedPipelineError: If the pipeline is not known to work with the guard.
    """
    from diffusers import StableDiffusionPipeline

    known = type(pipe) is StableDiffusionPipeline  # not isinstance: a subclass may have another loop
    if not known:
        raise UnsupportedPipelineError(
            f"pipe is a {type(pipe).__name__}; the guard supports StableDiffusionPipeline (not its subclasses)"
        )
    return pipe.unet


def read_request(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any], prompts: list[str] | None) -> Request:
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
    _refuse_unsupported(asked)

    copies = asked["num_images_per_prompt"]
    if not isinstance(copies, int) or copies < 1:
        raise InputError(f"num_images_per_prompt must be a whole number of at least 1, got {copies!r}")
    texts = _prompts(asked["prompt"], prompts, asked["prompt_embeds"])
    rows = len(texts) if texts is not None else len(asked["prompt_embeds"])
    batch_size = rows * copies
    latents = asked["latents"]
    if latents is not None and len(latents) != batch_size:
        raise InputError(f"latents has {len(latents)} rows, expected {batch_size}: one per image")
    own_grid = asked["timesteps"] is not None or asked["sigmas"] is not None
    return Request(
        batch_size=batch_size,
        prompts=None if texts is None else [text for text in texts for _ in range(copies)],
        seeds=_seeds(asked["generator"], batch_size),
        num_inference_steps=None if own_grid else asked["num_inference_steps"],
        guidance_scale=float(asked["guidance_scale"]),
        output_type=asked["output_type"],
    )


def latent_space_of(pipe: Any, name: str) -> LatentSpaceConfig:
    """What makes the latents of a pipeline comparable with others.

    Args:
        name: For messages, e.g. "sd1".
    """
    config = pipe.vae.config
    return LatentSpaceConfig(
        name=name,
        vae_class=type(pipe.vae).__name__,
        channels=pipe.unet.config.in_channels,
        scaling_factor=float(config.scaling_factor),
        shift_factor=float(config.get("shift_factor") or 0.0),
        downsampling=pipe.vae_scale_factor,
    )


def check_latent_space(pipe: Any, space: LatentSpaceConfig) -> None:
    """Refuse a pipeline whose latents mean something else than those the scorer was trained on.

    Raises:
        LatentSpaceError: Naming everything that differs.
    """
    found = dataclasses.asdict(latent_space_of(pipe, space.name))
    differences = [
        f"{name} {value!r} instead of {getattr(space, name)!r}"
        for name, value in found.items()
        if not _same(value, getattr(space, name))
    ]
    if differences:
        raise LatentSpaceError(
            f"the scorer was trained on the latent space {space.name!r}, the pipeline has another one: "
            f"{', '.join(differences)}; use a scorer made for this pipeline"
        )


def _refuse_unsupported(asked: dict[str, Any]) -> None:
    if asked["ip_adapter_image"] is not None or asked["ip_adapter_image_embeds"] is not None:
        raise UnsupportedPipelineError("ip_adapter_image and ip_adapter_image_embeds are not supported by the guard")
    if others := sorted(set(asked["cross_attention_kwargs"] or {}) - {"scale"}):
        raise UnsupportedPipelineError(
            f"cross_attention_kwargs {others} are not supported by the guard: they may hold one entry per image. "
            "Only 'scale' (LoRA) is"
        )
    if not asked["return_dict"]:
        raise UnsupportedPipelineError("return_dict=False is not supported: the guard returns a GuardedOutput")
    if asked["output_type"] not in OUTPUT_TYPES:
        raise UnsupportedPipelineError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {asked['output_type']!r}"
        )


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


def _seeds(generator: Any, batch_size: int) -> list[int | None]:
    if isinstance(generator, torch.Generator) and batch_size == 1:
        generator = [generator]
    if generator is None or isinstance(generator, torch.Generator):
        return [None] * batch_size
    if not isinstance(generator, list) or not all(isinstance(g, torch.Generator) for g in generator):
        raise InputError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")
    if len(generator) != batch_size:
        raise InputError(f"generator is a list of {len(generator)}, expected {batch_size}: one per image")
    return [g.initial_seed() for g in generator]


def _same(found: str | int | float, expected: str | int | float) -> bool:
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-5)  # configs may have been stored in float32
    return found == expected
