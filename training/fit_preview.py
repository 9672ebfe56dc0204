"""Factors of a linear preview for the latent space of any VAE, fitted to a folder of images.

``python -m training.fit_preview --vae ID|FOLDER --images FOLDER --out FILE`` encodes the images, fits a ridge regression from
latent pixels to colours on most of them, prints R2 and PSNR on the rest, and writes a file that ``LinearPreview.from_file``
reads. The VAE is a folder of diffusers or a Hub id, its own or that of a pipeline. A thousand images of the kind that will
be made, or more, give factors that carry over.

Which images are held out depends on the seed and on what the files hold, not on their names; a file with the bytes of
another is left out, so that no image is on both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from moe_artifacts.config import LatentSpaceConfig
from moe_artifacts.errors import InputError, LatentSpaceError, MoeArtifactsError
from moe_artifacts.files import sha256_file
from moe_artifacts.latent_spaces import LATENT_SPACES, differences, scheduler_latents, space_of_vae
from moe_artifacts.loading import checked_device
from moe_artifacts.preview import LinearPreview
from moe_artifacts.preview_fit import FactorFit, PreviewError
from moe_artifacts.shapes import Latents, Preview
from training.data.images import BadImage, image_files, read_image

VAES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderDC", "AutoencoderTiny")


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What to fit and on what."""

    size: int = 512  # pixels; images are cut to squares of this side
    patch: int = 1  # pixels of the preview per latent, along one side
    ridge: float = 1e-4  # see FactorFit.solve; so little only steadies channels that depend on each other
    held_out: float = 0.2  # share of the images on which R2 and PSNR are measured
    seed: int = 0
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name in ("size", "patch", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must be a share between 0 and 1, got {self.held_out}")


@dataclass
class FitReport:
    """How the fit went; all of it is stored with the factors."""

    fitted: int = 0  # images
    held_out: int = 0
    duplicates: int = 0
    broken: dict[str, str] = field(default_factory=dict)  # file: why it could not be read
    r2: float = 0.0
    psnr: float = 0.0  # dB

    def __str__(self) -> str:
        lines = [
            f"fitted on {self.fitted} images; on {self.held_out} held out: R2 {self.r2:.3f}, PSNR {self.psnr:.1f} dB",
            f"left out: {len(self.broken)} that could not be read, {self.duplicates} that are copies of others",
        ]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in list(self.broken.items())[:5]])


def load_vae(name: str, revision: str | None = None) -> Any:
    """A VAE of diffusers in float32, from a folder or a Hub id; of a pipeline, its ``vae``. Safetensors only.

    Raises:
        InputError: If there is none.
        LatentSpaceError: If it is of a class whose latents are not known.
    """
    import diffusers

    problems = []
    for subfolder in (None, "vae"):
        where: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
        try:
            config = diffusers.AutoencoderKL.load_config(name, **where)
            kind = config.get("_class_name")
            if kind not in VAES:
                raise LatentSpaceError(f"{name} holds a {kind}, expected one of {', '.join(VAES)}")
            loading = where | {"use_safetensors": True, "torch_dtype": torch.float32}
            return getattr(diffusers, kind).from_pretrained(name, **loading).eval()
        except (OSError, ValueError) as error:
            if isinstance(error, LatentSpaceError):
                raise
            problems.append(str(error).strip().splitlines()[0])
    raise InputError(f"there is no VAE in {name!r}, nor in its subfolder vae: {'; '.join(problems)}")


def space_for(vae: Any, name: str | None) -> LatentSpaceConfig:
    """The latent space that the factors will belong to.

    Args:
        name: One of ``LATENT_SPACES``, which ``vae`` must be of; None: what ``vae`` itself tells. An ``AutoencoderTiny``
            does not tell which VAE it stands for, so that it needs one.
    Raises:
        LatentSpaceError: If the two do not go together.
    """
    found = space_of_vae(vae, name or type(vae).__name__)
    if name is None:
        known = [space for space in LATENT_SPACES.values() if not differences(_unpacked(space), found)]
        return dataclasses.replace(found, name=known[0].name) if known else found
    if name not in LATENT_SPACES:
        raise LatentSpaceError(f"space must be one of {', '.join(LATENT_SPACES)}, got {name!r}")
    space = _unpacked(LATENT_SPACES[name])
    if found.vae_class == "AutoencoderTiny":
        told = [] if (found.channels, found.downsampling) == (space.channels, space.downsampling) else ["its shape"]
    else:
        told = differences(found, space)
    if told:
        raise LatentSpaceError(f"the VAE is not one of the latent space {name!r}: {', '.join(told)}")
    return space if found.vae_class == "AutoencoderTiny" else found


@torch.no_grad()
def encode(vae: Any, images: Preview) -> Latents:
    """Latents as a scheduler would hold them, unpacked."""
    space = space_of_vae(vae, "")
    pixels = 2 * images - 1
    if space.vae_class == "AutoencoderKLQwenImage":
        pixels = pixels.unsqueeze(2)  # a video of one frame
    encoded = vae.encode(pixels, return_dict=False)[0]
    if not isinstance(encoded, Tensor):
        encoded = encoded.mode()  # of the posterior: without its noise
    return scheduler_latents(encoded, space)


def fit_preview(vae: Any, folder: Path, options: FitOptions, device: str = "cpu") -> tuple[LinearPreview, FitReport]:
    """Fit on the images of a folder, and measure on those held out.

    Raises:
        InputError: If sizes do not go together, or too few images can be read.
    """
    space = space_of_vae(vae, "")
    if options.size % space.downsampling or options.patch > space.downsampling:
        raise InputError(
            f"size must be a multiple of {space.downsampling}, the pixels per latent, and patch at most that; "
            f"got size={options.size} and patch={options.patch}"
        )
    report = FitReport()
    fitted, held_out = split(folder, options, report)
    vae = vae.to(device)
    side = options.size // space.downsampling * options.patch

    def batches(paths: Sequence[Path], what: str) -> Iterator[tuple[Tensor, Tensor]]:
        for images in read_batches(tqdm(paths, desc=what, unit="image"), options, report):
            yield encode(vae, images.to(device)).cpu(), F.interpolate(images, size=(side, side), mode="area")

    fit = FactorFit(space.channels, options.patch)
    for latents, images in batches(fitted, "fit"):
        fit.add(latents, images)
        report.fitted += len(images)
    if report.fitted == 0:
        raise InputError(f"none of the images in {folder} could be read: {report.broken}")
    preview = LinearPreview.from_factors(*fit.solve(options.ridge))
    error = PreviewError()
    with torch.no_grad():
        for latents, images in batches(held_out, "held out"):
            error.add(preview(latents), images)
            report.held_out += len(images)
    if report.held_out == 0:
        raise InputError(f"none of the images held out could be read: {report.broken}")
    report.r2, report.psnr = error.r2, error.psnr
    return preview, report


def split(folder: Path, options: FitOptions, report: FitReport) -> tuple[list[Path], list[Path]]:
    """The image files of a folder and its subfolders: those to fit on and those held out.

    Raises:
        InputError: If there are fewer than two different ones.
    """
    paths = image_files(folder)
    by_content: dict[str, Path] = {}
    for path in paths:
        by_content.setdefault(sha256_file(path), path)
    report.duplicates = len(paths) - len(by_content)
    if len(by_content) < 2:
        raise InputError(
            f"images must be a folder with at least two different images, found {len(by_content)} in {folder}"
        )
    ranked = sorted(by_content, key=lambda content: hashlib.sha256(f"{options.seed} {content}".encode()).digest())
    count = min(max(round(options.held_out * len(ranked)), 1), len(ranked) - 1)
    return [by_content[content] for content in ranked[count:]], [by_content[content] for content in ranked[:count]]


def read_batches(paths: Iterator[Path], options: FitOptions, report: FitReport) -> Iterator[Tensor]:
    """Images in batches; those that cannot be read are noted in ``report``."""
    batch: list[Tensor] = []
    for path in paths:
        try:
            batch.append(read_image(path, options.size))
        except BadImage as error:
            report.broken[str(path)] = error.detail
        if len(batch) == options.batch_size:
            yield torch.cat(batch)
            batch = []
    if batch:
        yield torch.cat(batch)


def _unpacked(space: LatentSpaceConfig) -> LatentSpaceConfig:
    """As a preview sees it: a VAE alone does not tell how a pipeline packs its latents."""
    return dataclasses.replace(space, packing="none")


def main(arguments: Sequence[str] | None = None) -> int:
    defaults = FitOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", required=True, help="folder of diffusers or Hub id, of a VAE or of a pipeline")
    parser.add_argument("--images", required=True, type=Path, help="folder, with its subfolders")
    parser.add_argument("--out", required=True, type=Path, help="the file to write, .safetensors")
    parser.add_argument("--size", type=int, default=defaults.size, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--patch", type=int, default=defaults.patch, help="preview pixels per latent (%(default)s)")
    parser.add_argument("--ridge", type=float, default=defaults.ridge, help="penalty on the factors (%(default)s)")
    parser.add_argument("--held-out", type=float, default=defaults.held_out, help="share measured on (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of what is held out (%(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=defaults.batch_size, help="images encoded at once (%(default)s)"
    )
    parser.add_argument("--space", help=f"for tiny autoencoders: the space they stand for; {', '.join(LATENT_SPACES)}")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    try:
        options = FitOptions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(FitOptions)})
        vae = load_vae(args.vae, args.revision)
        space = space_for(vae, args.space)
        preview, report = fit_preview(vae, args.images, options, str(checked_device(args.device)))
        facts = {"vae": args.vae, "revision": args.revision, **dataclasses.asdict(options)}
        facts |= {f"{name}_images": getattr(report, name) for name in ("fitted", "held_out", "duplicates")}
        facts |= {"broken_images": len(report.broken), "r2": report.r2, "psnr": report.psnr}
        preview.save(args.out, space, facts)
    except (MoeArtifactsError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    print(f"{args.out}: latent space {space.name}, {space.channels} channels, patch {preview.patch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
