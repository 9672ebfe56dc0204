"""Fitting the factors of a linear preview, and saying how well a preview shows the image: sums over any number of batches.

Ridge regression from the channels of a latent pixel to the colours of its patch. Sums are in float64 and take no memory
to speak of, so nothing needs all images at once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.shapes import Latents, Preview

LARGEST_PSNR = 100.0  # dB; of images that are equal but for rounding


class FactorFit:
    """Sums from which the factors of a :class:`~moe_artifacts.preview.LinearPreview` follow.

    Args:
        channels: Of the latents.
        patch: Pixels that one latent pixel becomes, along one side.
    """

    def __init__(self, channels: int, patch: int) -> None:
        self.channels = channels
        self.patch = patch
        self._gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        self._moments = torch.zeros(channels + 1, 3 * patch * patch, dtype=torch.float64)

    def add(self, latents: Latents, images: Preview) -> None:
        """Take in images and their latents; the images are ``patch`` times as large.

        Raises:
            InputError: If the two do not fit together, or hold NaN or infinity; the sums are then as before.
        """
        if patch_size(latents, images) != self.patch or latents.shape[1] != self.channels:
            raise InputError(
                f"latents must have {self.channels} channels and images be {self.patch} times as large, "
                f"got shapes {tuple(latents.shape)} and {tuple(images.shape)}"
            )
        pixels = rearrange(latents.cpu().double(), "b c h w -> (b h w) c")
        pixels = F.pad(pixels, (0, 1), value=1.0)  # a constant channel, whose factor is the bias
        patches = 2 * images.cpu().double() - 1
        sizes = {"ph": self.patch, "pw": self.patch}
        patches = rearrange(patches, "b rgb (h ph) (w pw) -> (b h w) (rgb ph pw)", **sizes)
        gram, moments = pixels.T @ pixels, pixels.T @ patches
        if not (gram.isfinite().all() and moments.isfinite().all()):
            raise InputError("latents and images must be finite to be fitted, got NaN or infinity; drop those images")
        self._gram += gram
        self._moments += moments

    def solve(self, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
        """Factors [3 * patch * patch, channels] and bias [3 * patch * patch], for colours in [-1, 1]; float64.

        Args:
            ridge: Penalty on the squares of the factors, not of the bias, as a share of the mean variance of the channels:
                0.01 does to an average channel what a hundredth of its variance in noise would do.
        Raises:
            InputError: If ``ridge`` is negative or nothing was added.
        """
        if not (math.isfinite(ridge) and ridge >= 0):
            raise InputError(f"ridge must be a finite number of at least 0, got {ridge}")
        count = self._gram[-1, -1]
        if not count:
            raise InputError("there is nothing to fit: add latents and images first")
        gram = self._gram.clone()
        mean = gram[:-1, -1] / count
        variance = (gram.diagonal()[:-1] / count - mean.square()).mean()
        gram.diagonal()[:-1] += ridge * count * variance
        # gelsd: the smallest solution where channels depend on each other or one of them is constant.
        solution = torch.linalg.lstsq(gram, self._moments, driver="gelsd").solution
        return solution[:-1].T, solution[-1]


class PreviewError:
    """How far previews are from the images, over any number of batches."""

    def __init__(self) -> None:
        self.pixels = 0
        self._error = self._square = 0.0
        self._total = torch.zeros(3, dtype=torch.float64)
        self._psnr: list[float] = []

    def add(self, shown: Preview, images: Preview) -> None:
        """Take in previews and the images they stand for.

        Raises:
            InputError: If their sizes differ.
        """
        if shown.shape != images.shape:
            raise InputError(
                f"images must be {tuple(shown.shape[2:])} like the previews, got {tuple(images.shape[2:])}"
            )
        shown, images = shown.cpu().double(), images.cpu().double()
        squares = (shown - images).square()
        self._error += squares.sum().item()
        self._square += images.square().sum().item()
        self._total += images.sum(dim=(0, 2, 3))
        self.pixels += images[:, 0].numel()
        mean_squares = squares.mean(dim=(1, 2, 3)).clamp(min=10 ** (-LARGEST_PSNR / 10))
        self._psnr += (-10 * mean_squares.log10()).tolist()

    @property
    def r2(self) -> float:
        """Share of the variance of the images about their mean colour that the previews explain; at most 1.

        Raises:
            InputError: If the images have no variance to explain.
        """
        variance = self._square - self._total.square().sum().item() / max(self.pixels, 1)
        if not variance > 1e-9 * self.pixels:
            raise InputError(
                f"r2 needs images that differ from their mean colour, got {self.pixels} pixels of one colour"
            )
        return 1.0 - self._error / variance

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB for colours in [0, 1], the mean over images; at most 100.

        Raises:
            InputError: If there are no images.
        """
        if not self._psnr:
            raise InputError("psnr needs at least one image")
        return math.fsum(self._psnr) / len(self._psnr)


def patch_size(latents: Tensor, images: Tensor) -> int:
    """Pixels per latent, along one side.

    Raises:
        InputError: If the sizes are no whole multiples, or the shapes not those of latents and images.
    """
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
