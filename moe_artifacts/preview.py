"""Latents to RGB previews in [0, 1]: stage 2. A linear map, a tiny autoencoder or the full VAE, in order of cost.

The linear map is the "latent to RGB factors" that user interfaces show while an image is made: cheap, and for a scorer
often all there is to see. Factors belong to one latent space: those of SDXL are published, for others fit them to a few
thousand images (docs/previews.md).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_artifacts.checkpoint import load_state_strict, read_weights
from moe_artifacts.config import LatentSpaceConfig, PreviewConfig, from_dict, to_dict
from moe_artifacts.errors import CheckpointError, InputError, LatentSpaceError
from moe_artifacts.files import atomic_path
from moe_artifacts.latent_spaces import LATENT_SPACES, differences, raw_latents, space_of_vae
from moe_artifacts.preview_fit import FactorFit, PreviewError, patch_size
from moe_artifacts.shapes import Latents, Preview

CHUNK = 1_024  # images summed at a time: float64 copies of a whole data set would not fit in memory
METADATA = "moe_artifacts_linear_preview"  # one entry holds all: safetensors writes several in random order
FORMAT_VERSION = 1
# Factors (rows: red, green, blue; columns: latent channels) and biases, on a scale of 0 to 255.
SDXL_FACTORS = ((60.0, -60.0, 25.0, -70.0), (60.0, -5.0, 15.0, -50.0), (60.0, 10.0, -5.0, -35.0))
SDXL_BIASES = (150.0, 140.0, 130.0)


class LinearPreview(nn.Module):
    """Each latent pixel becomes a patch of ``patch`` x ``patch`` pixels, as an affine map of its channels.

    ``patch=1`` is a preview at the size of the latents; with ``patch`` equal to the VAE's downsampling it has the size
    of the image. The factors are parameters: fitted by ``fit``, loaded, or learned with what comes after.

    Attributes:
        space: The latent space of the factors, where that is known: of ``sdxl`` and of files.
    Example:
        >>> preview = LinearPreview(channels=4, patch=8)
        >>> preview(torch.randn(2, 4, 16, 16)).shape
        torch.Size([2, 3, 128, 128])
    """

    space: LatentSpaceConfig | None = None

    def __init__(self, channels: int, patch: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.patch = patch
        self.factors = nn.Conv2d(channels, 3 * patch * patch, kernel_size=1)

    def forward(self, latents: Latents) -> Preview:
        """Preview of ``latents`` as the scheduler holds them; float32, on the device of the factors.

        The gradient is zero where a colour is clipped.

        Raises:
            InputError: If ``latents`` is not a float tensor of rank 4.
            LatentSpaceError: If it has another number of channels.
        """
        _check_latents(latents, self.channels)
        patches = self.factors(latents.to(self.factors.weight)).float()
        size = {"rgb": 3, "patch_h": self.patch, "patch_w": self.patch}
        image = rearrange(patches, "b (rgb patch_h patch_w) h w -> b rgb (h patch_h) (w patch_w)", **size)
        return (0.5 + 0.5 * image).clamp(0, 1)

    @classmethod
    def fit(cls, latents: Latents, images: Preview, ridge: float = 0.0) -> LinearPreview:
        """Least-squares factors, in float64 from sums over all pixels.

        The patch is the ratio of the sizes: for ``patch=1`` give images shrunk to the size of the latents. Factors from
        a handful of images do not carry over to others: use a thousand or more, and look at ``r2`` on images held out.

        Args:
            latents: Clean latents, scaled as the scheduler holds them.
            images: What they decode to, in [0, 1].
            ridge: Penalty on the factors; see :meth:`~moe_artifacts.preview_fit.FactorFit.solve`.
        Raises:
            InputError: If the two do not fit together, or hold NaN or infinity.
        """
        patch = patch_size(latents, images)
        fit = FactorFit(latents.shape[1], patch)
        for rows in _chunks(len(latents)):
            fit.add(latents[rows], images[rows])
        return cls.from_factors(*fit.solve(ridge))

    @classmethod
    def from_factors(cls, weight: Tensor, bias: Tensor) -> LinearPreview:
        """From factors [3 * patch * patch, channels] and bias [3 * patch * patch], for colours in [-1, 1].

        Raises:
            InputError: If the shapes are others.
        """
        patch = round((weight.shape[0] / 3) ** 0.5)
        if weight.ndim != 2 or weight.shape[0] != 3 * patch * patch or bias.shape != weight.shape[:1]:
            raise InputError(
                "factors must be (3 * patch * patch, channels) and bias (3 * patch * patch,), "
                f"got shapes {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        preview = cls(weight.shape[1], patch)
        preview.factors.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
        return preview

    @classmethod
    def sdxl(cls) -> LinearPreview:
        """The published factors for SDXL, one pixel per latent.

        By Timothy Alexis Vass ("Explaining the SDXL latent space", Hugging Face blog), in diffusers'
        docs/source/en/using-diffusers/callback.md, Apache-2.0.
        """
        weight, bias = torch.tensor(SDXL_FACTORS), torch.tensor(SDXL_BIASES)
        preview = cls.from_factors(2 * weight / 255, 2 * bias / 255 - 1)
        preview.space = LATENT_SPACES["sdxl"]
        return preview

    def save(self, path: str | os.PathLike[str], space: LatentSpaceConfig, facts: Mapping[str, Any]) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            space: The latent space that the factors belong to.
            facts: How they were made and how good they are, as JSON values: for people.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        config = PreviewConfig(kind="linear", channels=self.channels, patch=self.patch)
        parts = {"preview": to_dict(config), "latent_space": to_dict(space), "facts": dict(facts)}
        metadata = {METADATA: json.dumps({"format_version": FORMAT_VERSION} | parts, allow_nan=False)}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], space: LatentSpaceConfig | None = None) -> LinearPreview:
        """Read a file that ``save``, or ``python -m training.fit_preview``, wrote.

        Args:
            space: The latent space in which it will be used, to be compared with that of the file.
        Raises:
            CheckpointError: If the file is missing, damaged or of another kind.
            ConfigError: If its configuration is.
            LatentSpaceError: If its factors belong to another latent space.
        """
        state, metadata = read_weights(Path(path)), _read_metadata(Path(path))
        config = from_dict(PreviewConfig, metadata["preview"], where=f"{path}: preview")
        if config.kind != "linear":
            raise CheckpointError(f"{path} is of kind {config.kind!r}, expected a linear preview")
        found = from_dict(LatentSpaceConfig, metadata["latent_space"], where=f"{path}: latent_space")
        # Latents come here unpacked, whichever way a pipeline packs them.
        if space is not None and (told := differences(dataclasses.replace(found, packing=space.packing), space)):
            raise LatentSpaceError(
                f"{path} was fitted to the latent space {found.name!r}, expected {space.name!r}: {', '.join(told)}"
            )
        preview = cls(config.channels, config.patch)
        load_state_strict(preview, state, name=str(path))
        preview.space = found
        return preview

    @staticmethod
    def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
        """The facts that ``save`` was given.

        Raises:
            CheckpointError: If the file is damaged or of another kind.
        """
        return _read_metadata(Path(path)).get("facts", {})


class _DecoderPreview(nn.Module):
    """What decoders have in common: undo the scaling of the latents, decode, [-1, 1] to [0, 1].

    Args:
        autoencoder: One of those that ``space_of_vae`` knows.
    """

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.space = space_of_vae(autoencoder, type(autoencoder).__name__)
        self.channels = self.space.channels

    def forward(self, latents: Latents) -> Preview:
        """Preview of ``latents`` as the scheduler holds them, unpacked; float32, at the size of the image.

        Raises:
            InputError: If ``latents`` is not a float tensor of rank 4.
            LatentSpaceError: If it has another number of channels.
        """
        _check_latents(latents, self.channels)
        image = self._decode(raw_latents(latents, self.space))
        if image.ndim == 5:
            image = image[:, :, 0]  # a video of one frame
        return (0.5 + 0.5 * image.float()).clamp(0, 1)

    def _decode(self, raw: Tensor) -> Tensor:
        vae = self.autoencoder
        if getattr(vae, "_hf_hook", None) is None:  # offloaded ones come to the latents by themselves
            raw = raw.to(vae.device)
        if vae.dtype != torch.float16 or not vae.config.get("force_upcast", False):
            return vae.decode(raw.to(vae.dtype), return_dict=False)[0]
        vae.to(torch.float32)  # SDXL's overflows in float16; its pipeline decodes the finished image in this way too
        try:
            return vae.decode(raw.float(), return_dict=False)[0]
        finally:
            vae.to(torch.float16)


class TinyPreview(_DecoderPreview):
    """A diffusers ``AutoencoderTiny``: TAESD, TAESDXL, TAESD3, TAEF1.

    Its ``scaling_factor`` is 1: it was distilled on latents as the scheduler holds them, and wants neither the VAE's
    scaling nor its own ``scale_latents``, which packs latents into 8 bits. Diffusers decodes to [-1, 1], the original
    to [0, 1].
    """


class VaePreview(_DecoderPreview):
    """The pipeline's own VAE: what the finished image would look like, at the highest price."""


@torch.no_grad()
def r2(preview: nn.Module, latents: Latents, images: Preview) -> float:
    """Share of the variance of ``images`` about their mean colour that the previews explain; at most 1.

    Use images the preview was not fitted on.

    Raises:
        InputError: If sizes differ, or the images have no variance to explain.
    """
    error = PreviewError()
    for rows in _chunks(len(latents)):
        error.add(preview(latents[rows]), images[rows])
    return error.r2


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


def _check_latents(latents: Tensor, channels: int) -> None:
    if latents.ndim != 4 or 0 in latents.shape[1:] or not latents.is_floating_point():
        raise InputError(
            f"latents must be float (batch, {channels}, height, width), got {latents.dtype} {tuple(latents.shape)}; "
            "unpack the tokens of a transformer pipeline (moe_artifacts.guard.space.unpack), and give the frames of a "
            "video one by one"
        )
    if latents.shape[1] != channels:
        raise LatentSpaceError(f"the preview was made for latents of {channels} channels, got {latents.shape[1]}")


def _read_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:  # read_weights has found it whole
        metadata = file.metadata() or {}
    if METADATA not in metadata:
        raise CheckpointError(f"{path} is not a linear preview: its metadata have no {METADATA!r}")
    try:
        values = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:  # no JSON, or nested without end
        raise CheckpointError(f"{path} has damaged metadata: {error}; fit it again") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format_version {version!r}, this release reads {FORMAT_VERSION}")
    if missing := {"preview", "latent_space"} - values.keys():
        raise CheckpointError(f"{path} has damaged metadata: it lacks {sorted(missing)}; fit it again")
    return values
