"""Labelled pictures to noisy latents and previews of every noise level, without running a diffusion model.

    x_t = alpha_t * x0 + sigma_t * noise

``python -m training.forward_noise --source TABLE.parquet --images FOLDER --vae ID|FOLDER --preview linear --factors FILE
--out FOLDER`` encodes each picture with the VAE, draws one of ``--schedulers`` (:mod:`training.noise_grids`) and some steps
of it, adds noise, and writes the previews as shards (:mod:`training.noised_shards`). A killed run goes on with the shards
that are missing; ``--shard i/n`` does the i-th of n parts of them, counted from 0; ``--ray`` does them on Ray Data
(:mod:`training.row_jobs`).

``--noise trajectory`` adds the same noise at all levels of a picture, as in a run of a deterministic sampler; ``fresh``
walks the forward chain, with new noise at every step of it. Each level by itself is distributed alike; what differs is how
the levels of one picture go together. ``--show x0`` leaves the noise out: at each level what a perfect denoiser would predict.

What is drawn for a picture follows from its key and ``--seed`` alone, so it does not depend on workers, shards and batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_artifacts.config import LatentSpaceConfig, to_dict
from moe_artifacts.embedder import resize_and_crop, state_sha256
from moe_artifacts.errors import InputError, LatentSpaceError
from moe_artifacts.loading import checked_device
from moe_artifacts.preview import LinearPreview, TinyPreview, VaePreview
from moe_artifacts.seeds import attempt_seed
from moe_artifacts.shapes import Latents, Preview
from training.data.images import BadImage
from training.fit_preview import encode, load_vae, space_for
from training.forward_chain import NoiseKind, add_noise, draw_levels
from training.image_rows import FashionImages, ImageRow, ImageSource, TableImages
from training.noise_grids import NoiseGrid, model_scheduler, parse_grids
from training.noised_shards import COLUMNS
from training.row_jobs import RowJob, ShardRows, add_run_options, in_batches, run_command


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """What to make of each picture; all of it is stored with the shards."""

    size: int = 512  # pixels; pictures are cut to squares of this side
    levels_per_image: int = 4
    noise: NoiseKind = "trajectory"
    show: Literal["noisy", "x0"] = "noisy"
    keep_latents: bool = False  # write latents beside the previews
    preview_size: int | None = None  # pixels; None: as the preview comes
    seed: int = 0
    images_per_shard: int = 256

    def __post_init__(self) -> None:
        for name in ("size", "levels_per_image", "images_per_shard"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.preview_size is not None and self.preview_size < 1:
            raise InputError(f"preview_size must be at least 1, got {self.preview_size}")
        for name, known in (("noise", ("trajectory", "fresh")), ("show", ("noisy", "x0"))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


class ForwardNoise:
    """The function from rows of pictures to rows of noised ones.

    Args:
        vae: One that ``space_of_vae`` knows; it works where it is, e.g. on a GPU.
        preview: Of :mod:`moe_artifacts.preview`, on the same device; None: latents alone are written.
        batch_size: Pictures encoded, and latents decoded, at once.
    Raises:
        InputError: If a run of a scheduler has fewer levels than are to be drawn, or the size does not suit the VAE.
        LatentSpaceError: If ``preview`` was made for another latent space.
    """

    def __init__(
        self,
        vae: Any,
        space: LatentSpaceConfig,
        grids: Sequence[NoiseGrid],
        preview: nn.Module | None,
        options: NoiseOptions,
        batch_size: int = 8,
    ) -> None:
        if options.size % space.downsampling:
            raise InputError(
                f"size must be a multiple of {space.downsampling}, the pixels per latent, got {options.size}"
            )
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        for grid in grids:
            if len(grid.levels) < options.levels_per_image:
                raise InputError(
                    f"levels_per_image must be at most {len(grid.levels)}, the levels of scheduler {grid.name!r}, got "
                    f"{options.levels_per_image}"
                )
        if preview is not None and preview.channels != space.channels:
            raise LatentSpaceError(
                f"the preview was made for latents of {preview.channels} channels, those of the VAE have {space.channels}"
            )
        self.vae, self.grids, self.preview, self.options, self.batch_size = vae, grids, preview, options, batch_size

    def __call__(self, rows: Iterable[ImageRow]) -> ShardRows:
        """Noise all of them; a row that cannot be used is noted among the rejects and its neighbours are untouched."""
        result = ShardRows(COLUMNS)
        in_batches(rows, self.batch_size, self._batch, result, key=lambda row: row.key)
        return result

    @torch.no_grad()
    def _batch(self, rows: list[ImageRow]) -> ShardRows:
        result = ShardRows(COLUMNS)
        batch = list(self._pictures(rows, result))
        if not batch:
            return result
        images = torch.cat([image for _, image in batch])
        encoded = encode(self.vae, images.to(self.vae.device, self.vae.dtype)).float().cpu()
        noised = []
        for (row, _), x0 in zip(batch, encoded, strict=True):
            if not x0.half().isfinite().all():  # as it is stored
                result.reject(row.key, "latents", "the VAE encodes it to NaN, infinity or numbers beyond float16")
                continue
            noised.append(self._noised(row, x0, result))
        if not noised:
            return result
        latents = torch.cat(noised)
        if self.preview is None or self.options.keep_latents:
            result.add_tensor("latents", latents.half())
        if self.preview is not None:
            result.add_tensor("previews", self._previews(latents))
        return result

    def _pictures(self, rows: Iterable[ImageRow], result: ShardRows) -> Iterator[tuple[ImageRow, Preview]]:
        for row in rows:
            if row.prompt is None:
                result.reject(row.key, "prompt", "there is no prompt")
            elif row.label is not None and not 0 <= row.label <= 1:
                result.reject(row.key, "label", f"label must be in [0, 1], got {row.label}")
            else:
                try:
                    yield row, row.read(self.options.size)
                except BadImage as error:
                    result.reject(row.key, error.reason, str(error))

    def _noised(self, row: ImageRow, x0: Tensor, result: ShardRows) -> Latents:
        seed = attempt_seed(self.options.seed, row.key, attempt=0)
        generator = torch.Generator().manual_seed(seed)
        grid, places = draw_levels(self.grids, self.options.levels_per_image, generator)
        levels = [grid.levels[place] for place in places]
        for place, level in zip(places, levels, strict=True):
            result.add(
                key=row.key,
                prompt=row.prompt,
                label=row.label,
                seed=seed,
                scheduler=grid.name,
                step=grid.steps[place],
                log_snr=level.log_snr,
            )
        if self.options.show == "x0":
            return x0.expand(len(levels), -1, -1, -1)
        return add_noise(x0, levels, self.options.noise, generator)

    def _previews(self, latents: Latents) -> Tensor:
        """As they are stored: uint8 [row 3 pixel_h pixel_w]."""
        assert self.preview is not None
        parts = []
        for part in latents.split(self.batch_size):
            shown = self.preview(part.to(self.vae.device))
            if self.options.preview_size is not None:  # as the embedder would, so that it finds its size
                size = {"size": self.options.preview_size, "interpolation": "bicubic", "resize_mode": "shortest"}
                shown = resize_and_crop(shown, size)
            parts.append((255 * shown).round().to(torch.uint8).cpu())
        return torch.cat(parts)


def noise_job(
    noise: ForwardNoise,
    source: ImageSource,
    folder: Path,
    facts: Mapping[str, Any],
    shard: Callable[[int], ShardRows] | None = None,
) -> RowJob:
    """What is asked for, to be run by :mod:`training.row_jobs`.

    Args:
        facts: What tells this run from others besides its options and its source, as JSON values.
        shard: :func:`noised_shard` of the two, where they cannot be pickled.
    """
    told = {
        "source": source.facts(),
        **facts,
        **dataclasses.asdict(noise.options),
        "log_snr_range_and_levels": {
            grid.name: [grid.levels[0].log_snr, grid.levels[-1].log_snr, len(grid.levels)] for grid in noise.grids
        },
        "levels_sha256": {grid.name: _levels_sha256(grid) for grid in noise.grids},
        "num_steps": {grid.name: max(grid.steps) + 1 for grid in noise.grids},
        "vae_sha256": state_sha256(noise.vae.state_dict()),
        "preview_sha256": None if noise.preview is None else state_sha256(noise.preview.state_dict()),
        "pictures": "latents" if noise.preview is None else "previews",  # for who can take either
    }
    return RowJob(
        name="forward noise",
        folder=folder,
        shards=-(-len(source) // noise.options.images_per_shard),
        facts=told,
        shard=shard or partial(noised_shard, noise, source),
    )


def _levels_sha256(grid: NoiseGrid) -> str:
    """In float32: the last bits of the schedule may be others on another machine."""
    levels = torch.tensor([(level.alpha, level.sigma) for level in grid.levels])
    return state_sha256({"steps": torch.tensor(grid.steps), "levels": levels})


def noised_shard(noise: ForwardNoise, source: ImageSource, number: int) -> ShardRows:
    """The rows of one shard."""
    first = number * noise.options.images_per_shard
    return noise(source.rows(first, first + noise.options.images_per_shard))


def make_preview(
    kind: str, vae: Any, space: LatentSpaceConfig, factors: str | None, decoder: str | None
) -> nn.Module | None:
    """The preview named on the command line.

    Args:
        factors: Of a linear preview: a file of ``training.fit_preview``, or "sdxl".
        decoder: Of a tiny preview: folder or Hub id of an ``AutoencoderTiny``.
    Raises:
        InputError: If what this kind needs is not given.
        LatentSpaceError: If it was made for another latent space.
    """
    if kind == "none":
        return None
    if kind == "vae":
        return VaePreview(vae)
    if kind == "linear":
        if factors is None:
            raise InputError("a linear preview needs factors: a file of python -m training.fit_preview, or sdxl")
        if factors != "sdxl":
            return LinearPreview.from_file(factors, space)
        if space.name != "sdxl":
            raise LatentSpaceError(
                f"the factors sdxl are of another latent space than the VAE, which is {space.name!r}"
            )
        return LinearPreview.sdxl()
    if decoder is None:
        raise InputError("a tiny preview needs a decoder: folder or Hub id of an AutoencoderTiny")
    tiny = load_vae(decoder)
    if type(tiny).__name__ != "AutoencoderTiny":
        raise InputError(f"decoder must be an AutoencoderTiny, got {type(tiny).__name__} in {decoder}")
    return TinyPreview(tiny)


class _FromArguments:
    """:func:`noised_shard` of what the command line names. Other processes make it again: an open table cannot be pickled."""

    def __init__(self, args: argparse.Namespace) -> None:
        defaults = NoiseOptions()
        self.args = args
        self.source: ImageSource
        if args.fashion:
            self.source, size = FashionImages(args.split or "train"), 32
        elif args.images is None:
            raise InputError("a source needs images: the folder that its paths or zip files are relative to")
        else:
            self.source, size = TableImages(args.source, args.images, args.split), defaults.size
        given = {f.name: getattr(args, f.name) for f in dataclasses.fields(NoiseOptions)}
        options = NoiseOptions(**given | {"size": size if args.size is None else args.size})
        grids = parse_grids(
            args.schedulers, model_scheduler(args.model or args.vae, None if args.model else args.revision)
        )
        vae = load_vae(args.vae, args.revision)
        self.space = space_for(vae, args.space)
        preview = make_preview(args.preview, vae, self.space, args.factors, args.decoder)
        self.noise = ForwardNoise(vae, self.space, grids, preview, options, args.batch_size)

    def __call__(self, number: int) -> ShardRows:
        device = checked_device(self.args.device)  # not before: where Ray is started there may be no such device
        for module in (self.noise.vae, self.noise.preview):
            if module is not None:
                module.to(device)
        return noised_shard(self.noise, self.source, number)

    def __reduce__(self) -> tuple[Any, ...]:
        return _FromArguments, (self.args,)

    def job(self) -> RowJob:
        if not self.args.ray:
            checked_device(self.args.device)
        names = ("vae", "revision", "preview", "factors", "decoder")
        facts = {name: getattr(self.args, name) for name in names} | {"latent_space": to_dict(self.space)}
        return noise_job(self.noise, self.source, self.args.out, facts, self)


def main(arguments: Sequence[str] | None = None) -> int:
    defaults = NoiseOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--source", type=Path, help="table of training.data.diffusiondb or training.data.rated")
    source.add_argument("--fashion", action="store_true", help="Fashion-MNIST, at 32 pixels")
    parser.add_argument("--images", type=Path, help="folder that the paths or zip files of the table are relative to")
    parser.add_argument(
        "--split", help="of the table: train, validation, test; by default all. Of Fashion-MNIST: train, test"
    )
    parser.add_argument("--vae", required=True, help="folder of diffusers or Hub id, of a VAE or of a pipeline")
    parser.add_argument("--space", help="latent space, as in moe_artifacts.latent_spaces; an AutoencoderTiny needs it")
    parser.add_argument("--revision", help="branch, tag or commit of the VAE's Hub id")
    parser.add_argument(
        "--schedulers", default="ddim", help="NAME[:STEPS][:SETTING=VALUE]..., separated by commas (%(default)s)"
    )
    parser.add_argument(
        "--model",
        help="folder or Hub id of a pipeline whose noise schedule is meant; by default that of --vae if it is a pipeline, or "
        "else that of Stable Diffusion",
    )
    parser.add_argument("--preview", choices=("linear", "tiny", "vae", "none"), default="vae", help="(%(default)s)")
    parser.add_argument("--factors", help="of a linear preview: file of training.fit_preview, or sdxl")
    parser.add_argument("--decoder", help="of a tiny preview: folder or Hub id of an AutoencoderTiny")
    parser.add_argument("--preview-size", type=int, help="store previews at this many pixels")
    parser.add_argument("--size", type=int, help=f"side of the pictures in pixels ({defaults.size}; Fashion-MNIST: 32)")
    parser.add_argument("--levels-per-image", type=int, default=defaults.levels_per_image, help="(%(default)s)")
    parser.add_argument("--noise", choices=("trajectory", "fresh"), default=defaults.noise, help="(%(default)s)")
    parser.add_argument("--show", choices=("noisy", "x0"), default=defaults.show, help="(%(default)s)")
    parser.add_argument("--keep-latents", action="store_true", help="write latents beside the previews")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    parser.add_argument("--images-per-shard", type=int, default=defaults.images_per_shard, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures encoded at once (%(default)s)")
    parser.add_argument("--device", default="cpu")
    add_run_options(parser)
    args = parser.parse_args(arguments)
    return run_command(lambda: _FromArguments(args).job(), args, "rows")


if __name__ == "__main__":
    sys.exit(main())
