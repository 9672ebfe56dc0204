"""Known latent spaces, and the way between the latents of a scheduler and those of a VAE.

    latents = ((encoded - shift_factor) - mean) / std * scaling_factor

Most spaces use a part of it: scaling alone (Stable Diffusion 1, SDXL, Sana), scaling and shift (Stable Diffusion 3, Flux), mean and
std of each channel (Qwen, Flux 2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from einops import rearrange
from torch import Tensor

from moe_artifacts.config import LatentSpaceConfig
from moe_artifacts.errors import LatentSpaceError
from moe_artifacts.shapes import Latents

# fmt: off
_QWEN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_QWEN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on

_SPACES = (
    # scaling_factor: default of diffusers' models/autoencoders/autoencoder_kl.py.
    LatentSpaceConfig(name="sd1", vae_class="AutoencoderKL", channels=4, scaling_factor=0.18215),
    # scaling_factor: diffusers' utils/remote_utils.py.
    LatentSpaceConfig(name="sdxl", vae_class="AutoencoderKL", channels=4, scaling_factor=0.13025),
    # All: scripts/convert_sd3_to_diffusers.py of the diffusers repository.
    LatentSpaceConfig(name="sd3", vae_class="AutoencoderKL", channels=16, scaling_factor=1.5305, shift_factor=0.0609),
    # scaling_factor, shift_factor: diffusers' utils/remote_utils.py; channels: a quarter of the default in_channels of
    # models/transformers/transformer_flux.py; packing: pipelines/flux/pipeline_flux.py.
    LatentSpaceConfig(
        name="flux", vae_class="AutoencoderKL", channels=16, scaling_factor=0.3611, shift_factor=0.1159, packing="2x2"
    ),
    # channels, downsampling: defaults of diffusers' models/autoencoders/autoencoder_kl_flux2.py; packing:
    # pipelines/flux2/pipeline_flux2.py. mean and std are among the weights of the VAE, in no configuration.
    LatentSpaceConfig(
        name="flux2",
        vae_class="AutoencoderKLFlux2",
        channels=128,
        scaling_factor=1.0,
        downsampling=16,
        packing="tokens",
    ),
    # All: dc-ae-f32c32-sana-1.0 in scripts/convert_dcae_to_diffusers.py of the diffusers repository.
    LatentSpaceConfig(name="sana", vae_class="AutoencoderDC", channels=32, scaling_factor=0.41407, downsampling=32),
    # All: defaults of diffusers' models/autoencoders/autoencoder_kl_qwenimage.py; packing:
    # pipelines/qwenimage/pipeline_qwenimage.py.
    LatentSpaceConfig(
        name="qwen",
        vae_class="AutoencoderKLQwenImage",
        channels=16,
        scaling_factor=1.0,
        packing="2x2",
        mean=_QWEN_MEAN,
        std=_QWEN_STD,
    ),
    # The pipeline that comes with this package: bundled/fashion/pipeline/vae/config.json.
    LatentSpaceConfig(
        name="fashion", vae_class="AutoencoderKL", channels=4, scaling_factor=0.43939289814869137, downsampling=4
    ),
)
LATENT_SPACES: Mapping[str, LatentSpaceConfig] = MappingProxyType({space.name: space for space in _SPACES})


def space_of_vae(vae: Any, name: str) -> LatentSpaceConfig:
    """The latent space of a VAE of diffusers, as a pipeline without packing would use it.

    Args:
        vae: An ``AutoencoderKL``, ``AutoencoderKLFlux2``, ``AutoencoderKLQwenImage``, ``AutoencoderDC`` or
            ``AutoencoderTiny``. The last was made to take the latents of another VAE as the scheduler holds them, but does
            not say of which: its space is one of its own.
        name: For messages, e.g. "sd1".
    Raises:
        LatentSpaceError: If it is of another class.
    """
    config, kind = vae.config, type(vae).__name__
    mean = std = None
    patch = 1
    if kind == "AutoencoderKL":
        channels, levels = config.latent_channels, len(config.block_out_channels)
        mean, std = config.get("latents_mean"), config.get("latents_std")  # Playground 2.5 has them
    elif kind == "AutoencoderKLFlux2":
        patch = 2  # each 2x2 patch of encoded pixels is one pixel of four times the channels
        channels, levels = patch**2 * config.latent_channels, len(config.block_out_channels)
        mean = vae.bn.running_mean.tolist()
        std = (vae.bn.running_var.double() + config.batch_norm_eps).sqrt().tolist()
    elif kind == "AutoencoderKLQwenImage":
        channels, levels = config.z_dim, len(config.temperal_downsample) + 1
        mean, std = config.latents_mean, config.latents_std
    elif kind in ("AutoencoderDC", "AutoencoderTiny"):
        channels, levels = config.latent_channels, len(config.encoder_block_out_channels)
    else:
        raise LatentSpaceError(
            f"vae is a {kind}, whose latent space is not known; known: AutoencoderKL, AutoencoderKLFlux2, "
            "AutoencoderKLQwenImage, AutoencoderDC, AutoencoderTiny"
        )
    if mean is None or std is None:
        mean = std = None  # diffusers ignores one without the other
    return LatentSpaceConfig(
        name=name,
        vae_class=kind,
        channels=channels,
        scaling_factor=float(config.get("scaling_factor", 1.0)),
        shift_factor=float(config.get("shift_factor") or 0.0),  # some configurations store None for 0
        downsampling=patch * 2 ** (levels - 1),
        mean=None if mean is None else tuple(map(float, mean)),
        std=None if std is None else tuple(map(float, std)),
    )


def raw_latents(latents: Latents, space: LatentSpaceConfig) -> Tensor:
    """What a pipeline hands to ``vae.decode``: mean, scaling and shift undone, in the layout of that VAE.

    Args:
        latents: Unpacked, as the scheduler holds them.
    Returns:
        (batch, channels, height, width); for Flux 2, whose channels are patches, (batch, channels / 4, 2 height, 2 width);
        for Qwen, whose VAE is one of videos, (batch, channels, 1, height, width).
    Raises:
        LatentSpaceError: If ``space`` lacks the statistics that it needs.
    """
    if space.mean is not None and space.std is not None:
        latents = latents * _per_channel(space.std, latents)
    elif space.vae_class == "AutoencoderKLFlux2":
        raise LatentSpaceError(
            f"the latent space {space.name!r} does not state mean and std, which AutoencoderKLFlux2 keeps in its weights; "
            "take it from the model: space_of_vae(vae, name)"
        )
    raw = latents / space.scaling_factor + space.shift_factor
    if space.mean is not None:
        raw = raw + _per_channel(space.mean, latents)
    if space.vae_class == "AutoencoderKLFlux2":
        return rearrange(raw, "b (c ph pw) h w -> b c (h ph) (w pw)", ph=2, pw=2)
    return raw.unsqueeze(2) if space.vae_class == "AutoencoderKLQwenImage" else raw


def scheduler_latents(encoded: Tensor, space: LatentSpaceConfig) -> Latents:
    """What ``vae.encode`` gave, as the scheduler holds it, unpacked: the inverse of :func:`raw_latents`."""
    if space.vae_class == "AutoencoderKLQwenImage":
        encoded = encoded.squeeze(2)
    if space.vae_class == "AutoencoderKLFlux2":
        encoded = rearrange(encoded, "b c (h ph) (w pw) -> b (c ph pw) h w", ph=2, pw=2)
    latents = encoded - space.shift_factor
    if space.mean is not None and space.std is not None:
        latents = (latents - _per_channel(space.mean, latents)) / _per_channel(space.std, latents)
    return latents * space.scaling_factor


def differences(found: LatentSpaceConfig, expected: LatentSpaceConfig) -> list[str]:
    """In words, what makes the latents of ``found`` mean something else than those of ``expected``; their names do not.

    Statistics that ``expected`` leaves to the weights of a Flux 2 VAE are not compared.
    """
    skipped = {"name"}
    if expected.mean is None and expected.vae_class == "AutoencoderKLFlux2":
        skipped |= {"mean", "std"}
    names = [f.name for f in dataclasses.fields(LatentSpaceConfig) if f.name not in skipped]
    pairs = [(name, getattr(found, name), getattr(expected, name)) for name in names]
    return [f"{name} {_shown(a)} instead of {_shown(b)}" for name, a, b in pairs if not _same(a, b)]


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(1, -1, 1, 1)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, tuple) and isinstance(expected, tuple):
        # 2**-8: those of Flux 2 are rounded when the VAE is loaded in bfloat16.
        return len(found) == len(expected) and all(
            math.isclose(*pair, rel_tol=2**-8) for pair in zip(found, expected, strict=True)
        )
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-5)  # configurations may have been stored in float32
    return bool(found == expected)


def _shown(value: Any) -> str:
    """Statistics of 128 channels would bury the message."""
    if isinstance(value, tuple) and len(value) > 4:
        return f"({', '.join(f'{v:g}' for v in value[:3])}, ... {len(value)} in all)"
    return repr(value)
