"""The latent space of a pipeline: read, compared with a scorer's, and unpacked from a transformer's tokens."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from einops import rearrange
from torch import Tensor

from moe_artifacts.config import LatentSpaceConfig, Packing
from moe_artifacts.errors import InputError, LatentSpaceError
from moe_artifacts.latent_spaces import differences, space_of_vae
from moe_artifacts.shapes import Latents


def latent_space_of(pipe: Any, name: str) -> LatentSpaceConfig:
    """What makes the latents of a pipeline comparable with others.

    Args:
        name: For messages, e.g. "sd1".
    Raises:
        LatentSpaceError: If the pipeline has no VAE, or one of a kind, or a packing, that is not known.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None:
        raise LatentSpaceError(
            f"{type(pipe).__name__} has no vae, so what its latents mean is unknown; load it with one"
        )
    return dataclasses.replace(space_of_vae(vae, name), packing=_packing_of(pipe))


def check_latent_space(pipe: Any, space: LatentSpaceConfig) -> None:
    """Refuse a pipeline whose latents mean something else than those the scorer was trained on.

    Raises:
        LatentSpaceError: Naming everything that differs.
    """
    if found := differences(latent_space_of(pipe, space.name), space):
        raise LatentSpaceError(
            f"the scorer was trained on the latent space {space.name!r}, the pipeline has another one: "
            f"{', '.join(found)}; use a scorer made for this pipeline"
        )


def unpack(latents: Tensor, space: LatentSpaceConfig, height: int | None, width: int | None) -> Latents:
    """Latents as the scheduler holds them, laid out as an image: ``(batch, channels, height, width)``.

    A view where it can be one; values are not changed.

    Args:
        latents: (batch, channels, height, width), or the tokens of ``space.packing``.
        height: Of the image, in pixels, as given to the pipeline; needed for tokens only.
        width: Likewise.
    Raises:
        InputError: If the shape is not that of ``space`` at this height and width.
    """
    if space.packing == "none":
        if latents.ndim != 4 or latents.shape[1] != space.channels:
            raise InputError(
                f"latents must be (batch, {space.channels}, height, width) in the latent space {space.name!r}, "
                f"got shape {tuple(latents.shape)}"
            )
        return latents
    if height is None or width is None:
        raise InputError(f"height and width are needed to unpack latents of the latent space {space.name!r}")
    side = 2 if space.packing == "2x2" else 1
    # As the pipelines do: the rows and columns of tokens that fit in whole.
    rows, columns = (int(pixels) // (space.downsampling * side) for pixels in (height, width))
    expected = (rows * columns, space.channels * side * side)
    if latents.ndim != 3 or tuple(latents.shape[1:]) != expected:
        raise InputError(
            f"latents must be {('batch', *expected)} in the latent space {space.name!r} at {height} x {width} pixels, "
            f"got shape {tuple(latents.shape)}"
        )
    sizes = {"h": rows, "w": columns, "ph": side, "pw": side}
    return rearrange(latents, "b (h w) (c ph pw) -> b c (h ph) (w pw)", **sizes)


def _packing_of(pipe: Any) -> Packing:
    """By the method with which the pipeline unpacks what it is about to decode."""
    if hasattr(pipe, "_unpack_latents_with_ids"):
        return "tokens"
    if hasattr(pipe, "_unpack_latents"):
        found = list(inspect.signature(pipe._unpack_latents).parameters)
        if found == ["latents", "height", "width", "vae_scale_factor"]:
            return "2x2"
        raise LatentSpaceError(
            f"{type(pipe).__name__} packs its latents in a way that is not known: _unpack_latents takes {found}"
        )
    return "none"
