"""Latents to RGB previews in [0, 1]: stage 2. A linear map, a tiny autoencoder or the full VAE, in order of cost.

The linear map is the "latent to RGB factors" that user interfaces show while an image is made: cheap, and for a scorer
often all there is to see. Factors belong to one latent space, so none are built in: fit them to a few thousand images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moe_artifacts.errors import InputError, LatentSpaceError
from moe_artifacts.shapes import Latents, Preview

CHUNK = 1_024  # images summed at a time: float64 copies of a whole data set would not fit in memory


class LinearPreview(nn.Module):
    """Each latent pixel becomes a patch of ``patch`` x ``patch`` pixels, as an affine map of its channels.

    ``patch=1`` is a preview at the size of the latents; with ``patch`` equal to the VAE's downsampling it has the size
    of the image. The factors are parameters: fitted by ``fit``, loaded, or learned with what comes after.

    Example:
        >>> preview = LinearPreview(channels=4, patch=8)
        >>> preview(torch.randn(2, 4, 16, 16)).shape
        torch.Size([2, 3, 128, 128])
    """

    def __init__(self, channels: int, patch: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.patch = patch
        self.factors = nn.Conv2d(channels, 3 * patch * patch, kernel_size=1)

    def forward(self, latents: Latents) -> Preview:
        """Preview of ``latents`` as the scheduler holds them; float32. The gradient is zero where a colour is clipped.

        Raises:
            InputError: If ``latents`` is not a float tensor of rank 4.
            LatentSpaceError: If it has another number of channels.
        """
        _check_latents(latents, self.channels)
        patches = self.factors(latents.to(self.factors.weight.dtype)).float()
        size = {"rgb": 3, "patch_h": self.patch, "patch_w": self.patch}
        image = rearrange(patches, "b (rgb patch_h patch_w) h w -> b rgb (h patch_h) (w patch_w)", **size)
        return (0.5 + 0.5 * image).clamp(0, 1)

    @classmethod
    def fit(cls, latents: Latents, images: Preview) -> LinearPreview:
        """Least-squares factors, in float64 from sums over all pixels.

        The patch is the ratio of the sizes: for ``patch=1`` give images shrunk to the size of the latents. Factors from
        a handful of images do not carry over to others: use a thousand or more, and look at ``r2`` on images held out.

        Args:
            latents: Clean latents, scaled as the scheduler holds them.
            images: What they decode to, in [0, 1].
        Raises:
            InputError: If the two do not fit together, or hold NaN or infinity.
        """
        patch = _patch_size(latents, images)
        channels = latents.shape[1]
        gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        moments = torch.zeros(channels + 1, 3 * patch * patch, dtype=torch.float64)
        for rows in _chunks(len(latents)):
            pixels = rearrange(latents[rows].cpu().double(), "b c h w -> (b h w) c")
            pixels = F.pad(pixels, (0, 1), value=1.0)  # a constant channel, whose factor is the bias
            patches = 2 * images[rows].cpu().double() - 1
            patches = rearrange(patches, "b rgb (h ph) (w pw) -> (b h w) (rgb ph pw)", ph=patch, pw=patch)
            gram += pixels.T @ pixels
            moments += pixels.T @ patches
        if not (gram.isfinite().all() and moments.isfinite().all()):
            raise InputError("latents and images must be finite to be fitted, got NaN or infinity; drop those images")
        # gelsd: the smallest solution where channels depend on each other or one of them is constant.
        solution = torch.linalg.lstsq(gram, moments, driver="gelsd").solution
        preview = cls(channels, patch)
        preview.factors.load_state_dict({"weight": solution[:-1].T[:, :, None, None], "bias": solution[-1]})
        return preview


class _DecoderPreview(nn.Module):
    """What the two autoencoders have in common: undo the scaling of the latents, decode, [-1, 1] to [0, 1]."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.channels = autoencoder.config.latent_channels

    def forward(self, latents: Latents) -> Preview:
        """Preview of ``latents`` as the scheduler holds them; float32, at the size of the image.

        Raises:
            InputError: If ``latents`` is not a float tensor of rank 4.
            LatentSpaceError: If it has another number of channels.
        """
        _check_latents(latents, self.channels)
        config = self.autoencoder.config
        raw = latents / config.scaling_factor + (config.shift_factor or 0.0)  # some configurations store None for 0
        image = self.autoencoder.decode(raw.to(self.autoencoder.dtype)).sample
        return (0.5 + 0.5 * image.float()).clamp(0, 1)


class TinyPreview(_DecoderPreview):
    """A diffusers ``AutoencoderTiny`` (TAESD and its kin).

    Its ``scaling_factor`` is 1: it was distilled on latents as the scheduler holds them, and wants neither the VAE's
    scaling nor its own ``scale_latents``, which packs latents into 8 bits. Diffusers decodes to [-1, 1], the original
    to [0, 1].
    """


class VaePreview(_DecoderPreview):
    """The pipeline's own ``AutoencoderKL``: what the finished image would look like, at the highest price."""


@torch.no_grad()
def r2(preview: nn.Module, latents: Latents, images: Preview) -> float:
    """Share of the variance of ``images`` about their mean colour that the previews explain; at most 1.

    Use images the preview was not fitted on.

    Raises:
        InputError: If sizes differ, or the images have no variance to explain.
    """
    error, total, square, count = 0.0, torch.zeros(3, dtype=torch.float64), 0.0, 0
    for rows in _chunks(len(latents)):
        target = images[rows].cpu().double()
        shown = preview(latents[rows]).cpu().double()
        if shown.shape != target.shape:
            raise InputError(
                f"images must be {tuple(shown.shape[2:])} like the previews, got {tuple(target.shape[2:])}"
            )
        error += (shown - target).square().sum().item()
        square += target.square().sum().item()
        total += target.sum(dim=(0, 2, 3))
        count += target[:, 0].numel()
    variance = square - total.square().sum().item() / max(count, 1)
    if not variance > 1e-9 * count:
        raise InputError(f"r2 needs images that differ from their mean colour, got {count} pixels of one colour")
    return 1.0 - error / variance


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


def _patch_size(latents: Tensor, images: Tensor) -> int:
    """Pixels per latent, along one side."""
    if (
        latents.ndim != 4
        or images.ndim != 4
        or images.shape[1] != 3
        or len(latents) != len(images)
        or 0 in latents.shape
    ):
        raise InputError(
            "fit needs latents (batch, channel, height, width) and images (batch, 3, height, width) of the same batch, "
            f"got shapes {tuple(latents.shape)} and {tuple(images.shape)}"
        )
    patch = images.shape[-1] // latents.shape[-1]
    if patch < 1 or images.shape[2:] != (patch * latents.shape[2], patch * latents.shape[3]):
        raise InputError(
            f"images must be a whole number of times larger than the latents, {tuple(latents.shape[2:])}, "
            f"got {tuple(images.shape[2:])}"
        )
    return patch


def _check_latents(latents: Tensor, channels: int) -> None:
    if latents.ndim != 4 or 0 in latents.shape[1:] or not latents.is_floating_point():
        raise InputError(
            f"latents must be float (batch, {channels}, height, width), got {latents.dtype} {tuple(latents.shape)}; "
            "unpack the tokens of a transformer pipeline, and give the frames of a video one by one"
        )
    if latents.shape[1] != channels:
        raise LatentSpaceError(f"the preview was made for latents of {channels} channels, got {latents.shape[1]}")
