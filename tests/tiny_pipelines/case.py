"""What a tiny pipeline is: how to build it, how to call it, which schedulers it takes and how it can be guided."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

STEPS = 6
SIDE = 16  # pixels; the latents of most are 8x8

Build = Callable[[], Any]  # a scheduler, or a pipeline with its default one


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pipeline, built from configurations with random weights, always the same ones.

    Its text encoders are not built: ``arguments(count)`` holds prompt embeddings, each row different.
    """

    name: str
    build: Build
    arguments: Callable[[int], dict[str, Any]]  # of a call for that many prompts
    schedulers: Mapping[str, Build]  # every configuration the pipeline accepts; the first is the one it is built with
    guidance: Mapping[str, Mapping[str, Any]]  # way of guiding -> further arguments of the call
    representative: tuple[str, ...] = ()  # schedulers of the default test suite; () for the first three
    images_per_prompt: bool = True  # takes num_images_per_prompt
    callback: bool = True  # takes callback_on_step_end
    steps: int = STEPS  # num_inference_steps; an img2img run makes fewer

    @property
    def default_suite(self) -> tuple[str, ...]:
        return self.representative or tuple(self.schedulers)[:3]

    def pipe(self, scheduler: str | None = None) -> Any:
        """A new pipeline, with this one of its schedulers."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of diffusers, about its own parts
            pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        if scheduler is not None:
            pipe.scheduler = self.schedulers[scheduler]()
        return pipe

    def call(self, prompts: int, guidance: str, first_seed: int = 100, **changes: Any) -> dict[str, Any]:
        """Arguments of a call for ``prompts`` prompts, one generator per image; ``changes`` come on top."""
        images = prompts * changes.get("num_images_per_prompt", 1)
        return {
            **self.arguments(prompts),
            **self.guidance[guidance],
            "num_inference_steps": self.steps,
            "generator": generators(images, first_seed),
            "output_type": "pt",
            **changes,
        }


def generators(count: int, first_seed: int = 100) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first_seed + i) for i in range(count)]


def normal(count: int, *shape: int, seed: int) -> Tensor:
    """Standard normal rows (count, *shape); row i is the same whatever ``count``."""
    return torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * seed + i)) for i in range(count)]
    )


def pictures(count: int, side: int = SIDE, seed: int = 9) -> Tensor:
    """Images (count, 3, side, side) in [0, 1] for img2img, control and the like."""
    return normal(count, 3, side, side, seed=seed).sigmoid()


def image_to_image(count: int) -> dict[str, Any]:
    return {"image": pictures(count), "strength": 0.7}


def masks(count: int, lengths: tuple[int, ...], tokens: int) -> Tensor:
    """Attention masks (count, tokens): row i lets ``lengths[i]`` tokens through, going round."""
    return torch.stack([(torch.arange(tokens) < lengths[i % len(lengths)]).long() for i in range(count)])


def repeats_embeddings(pipe: Any) -> Any:
    """``pipe``, with ``num_images_per_prompt`` also for given embeddings: many repeat those of a text encoder only."""
    encode = pipe.encode_prompt

    @functools.wraps(encode)
    def repeated(*args: Any, num_images_per_prompt: int = 1, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if "prompt_" in name and isinstance(value, Tensor)}
        rows = {name: value.repeat_interleave(num_images_per_prompt, dim=0) for name, value in given.items()}
        return encode(*args, num_images_per_prompt=1, **kwargs | rows)

    pipe.encode_prompt = repeated
    return pipe


def random_weights(module: nn.Module, seed: int) -> nn.Module:
    """Overwrite every parameter, also those that start at zero, so that each input has a visible effect.

    Matrices keep the variance of what they are given; norms stay near one, biases near zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
    return module.eval().requires_grad_(False)


def autoencoder(channels: int = 4, **changes: Any) -> nn.Module:
    """A VAE that halves each side."""
    vae = AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "latent_channels": channels,
            "sample_size": SIDE,
            "force_upcast": False,
            **changes,
        }
    )
    return random_weights(vae, seed=1)
