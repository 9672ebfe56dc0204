"""Previews of every noise level to CLIP embeddings, once for all heads that are trained on them.

``python -m training.embed SOURCE --embedder FOLDER|CONFIG --out FOLDER`` reads trajectories (``TRAJECTORIES/<split>``), or what
:mod:`training.forward_noise` wrote, and writes shards by :mod:`training.row_jobs`; :class:`training.embedded.EmbeddedRows` reads
them. The embedder is a folder of :mod:`training.clip_tune`, a scorer (a folder or a bundled name, with its preview), or an
open_clip model by its name or configuration. Latents need a preview: ``--preview``, or that of the scorer.

    meta.json                   embed_dim; checks, the most levels an image has; shows, whether the pictures are of x0
                                predictions or of noisy latents; preview_sha256, embedder_sha256; source
    000000.parquet              one row per image: key, prompt, label and margin (null: not known), setting (JSON, or ""),
                                num_steps
    000000.safetensors          embedding float16 [image check embed], log_snr float32 [image check] and step int32
                                [image check]: NaN and -1 where an image has no such check, always the first ones;
                                text float16 [prompt embed] of the distinct prompts; prompt int32 [image], row of text
    rejects/000000.parquet      one row per image that could not be used: key, reason, detail

Shard for shard the images are those of the source, in its order.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from moe_artifacts.bundled import FOLDER as BUNDLED
from moe_artifacts.checkpoint import CONFIG_NAME, load_checkpoint, load_state_strict, read_weights
from moe_artifacts.config import EmbedderConfig, from_dict
from moe_artifacts.embedder import ClipEmbedder, state_sha256
from moe_artifacts.errors import InputError
from moe_artifacts.files import read_json
from moe_artifacts.loading import checked_device
from moe_artifacts.preview import LinearPreview
from moe_artifacts.shapes import Embedding
from training.clip_towers import build_embedder, chosen_weights, load_preview
from training.level_images import LevelImage, LevelSource, open_source
from training.row_jobs import RowJob, ShardRows, add_run_options, in_batches, run_command

COLUMNS = pa.schema(
    {
        "key": pa.string(),
        "prompt": pa.string(),
        "label": pa.float32(),
        "margin": pa.float32(),
        "setting": pa.string(),
        "num_steps": pa.int32(),
    }
)


class Embed:
    """The function from the images of a shard to their embeddings.

    Args:
        preview: Of :mod:`moe_artifacts.preview`; None where the source holds previews.
        batch: Pictures embedded at once.
        device: Where to; the modules go there with the first shard.
    Raises:
        InputError: If ``batch`` is less than 1.
    """

    def __init__(
        self,
        source: LevelSource,
        embedder: ClipEmbedder,
        preview: nn.Module | None = None,
        batch: int = 64,
        device: str = "cpu",
    ) -> None:
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        self.source, self.embedder, self.preview = source, embedder.eval(), preview
        self.batch, self.device = batch, device

    @torch.no_grad()
    def __call__(self, shard: int) -> ShardRows:
        device = checked_device(self.device)  # not before: where Ray is started there may be no such device
        self.embedder.to(device)
        if self.preview is not None:
            self.preview.to(device)
        result = ShardRows(COLUMNS)
        images = self.source.images(shard, self.batch)
        in_batches(images, self.batch, self._batch, result, key=lambda image: image.key)
        if len(result):
            rows: dict[str, int] = {}
            numbers = [rows.setdefault(prompt, len(rows)) for prompt in result.columns["prompt"]]
            result.add_tensor("prompt", torch.tensor(numbers, dtype=torch.int32))
            result.add_tensor("text", self._texts(list(rows)))
        return result

    def facts(self) -> dict[str, Any]:
        """What the rows depend on besides the source, as JSON values."""
        preview = None if self.preview is None else state_sha256(self.preview.state_dict())
        weights = {"preview_sha256": preview, "embedder_sha256": self.embedder.weights_sha256()}
        own = {"embed_dim": self.embedder.config.embed_dim, "checks": self.source.checks, "shows": self.source.shows}
        return {**own, **weights}

    def _batch(self, images: list[LevelImage]) -> ShardRows:
        """Some images; all their pictures go through the tower together, ``batch`` at a time."""
        result, kept = ShardRows(COLUMNS), list[int]()
        counts = [len(image.pictures) for image in images]
        embedded = torch.cat([self._pictures(part) for part in rows_of([i.pictures for i in images], self.batch)])
        known = _all_finite(embedded, counts)
        for number, image in enumerate(images):
            if image.pictures.is_floating_point() and not image.pictures.isfinite().all():
                result.reject(image.key, "latents", "NaN or infinity among its latents")
            elif not known[number]:
                result.reject(image.key, "embedding", "the embedder makes NaN or infinity of it")
            else:
                kept.append(number)
        for name, column in result.columns.items():
            column += [getattr(images[number], name) for number in kept]
        if kept:
            if len(kept) < len(images):
                parts = embedded.split(counts)
                embedded = torch.cat([parts[number] for number in kept])
            self._add_levels(result, [images[number] for number in kept], embedded)
        return result

    def _add_levels(self, result: ShardRows, images: list[LevelImage], embedded: Embedding) -> None:
        """What there is once for every level, shorter runs padded at the front."""
        shape = (len(images), self.source.checks)
        padded = torch.zeros(*shape, self.embedder.config.embed_dim, dtype=torch.float16)
        log_snr, step = np.full(shape, np.nan, dtype=np.float32), np.full(shape, -1, dtype=np.int32)
        counts = np.array([len(image.step) for image in images])
        there = np.arange(self.source.checks) >= self.source.checks - counts[:, None]
        padded[torch.from_numpy(there)] = embedded
        log_snr[there] = np.concatenate([image.log_snr for image in images])
        step[there] = np.concatenate([image.step for image in images])
        result.add_tensor("embedding", padded)
        result.add_tensor("log_snr", torch.from_numpy(log_snr))
        result.add_tensor("step", torch.from_numpy(step))

    def _pictures(self, pictures: Tensor) -> Tensor:
        shown = pictures.to(self.device)
        if self.preview is not None:
            shown = self.preview(shown.float())
        return self.embedder.embed_images(shown).half().cpu()

    def _texts(self, prompts: list[str]) -> Embedding:
        parts = [prompts[i : i + self.batch] for i in range(0, len(prompts), self.batch)]
        return torch.cat([self.embedder.embed_texts(part).half().cpu() for part in parts])


def rows_of(parts: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The rows of all parts, ``size`` at a time, so that no more than these are copied at once.

    Example:
        >>> [rows.tolist() for rows in rows_of([torch.arange(3), torch.arange(3, 8)], 4)]
        [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    waiting, room = list[Tensor](), size
    for part in parts:
        while len(part) >= room:
            yield torch.cat([*waiting, part[:room]])
            part, waiting, room = part[room:], [], size
        if len(part):
            waiting.append(part)
            room -= len(part)
    if waiting:
        yield torch.cat(waiting)


def _all_finite(values: Tensor, counts: list[int]) -> list[bool]:
    """Whether all rows of each group are. A sum is finite if all its terms are, these being small; it is the faster one."""
    finite = values.sum(dim=1, dtype=torch.float32).isfinite()
    return [bool(part.all()) for part in finite.split(counts)] if not finite.all() else [True] * len(counts)


def embed_job(embed: Embed, folder: Path) -> RowJob:
    """What is asked for, to be run by :mod:`training.row_jobs`."""
    facts = {**embed.facts(), "source": embed.source.facts()}
    return RowJob(name="embed", folder=folder, shards=embed.source.shards, facts=facts, shard=embed)


def load_embedder(name: str, pretrained: str | None = None) -> tuple[ClipEmbedder, nn.Module | None]:
    """The embedder of a name, and the preview that belongs to it, if one does.

    Args:
        name: A folder of :mod:`training.clip_tune`; a scorer, as a folder or a bundled name; or a model of open_clip, by its
            name or a configuration in a JSON file.
        pretrained: As of :func:`training.clip_towers.chosen_weights`, for a model of open_clip.
    Raises:
        ConfigError, CheckpointError: If it cannot be built or loaded.
        InputError: If ``pretrained`` is given for what has its weights, or missing for a model by its name.
    """
    folder = Path(name)
    tuned = (folder / "embedder.json").exists()
    if not tuned and not (folder / CONFIG_NAME).exists() and not (BUNDLED / name / "scorer").is_dir():
        return build_embedder(name, chosen_weights(name, pretrained)), None
    if pretrained is not None:
        raise InputError(f"{name} has weights of its own: leave pretrained out, got {pretrained!r}")
    if tuned:
        config = from_dict(EmbedderConfig, read_json(folder / "embedder.json"))
        # The hash is of the tuned weights, which a name of open_clip does not bring.
        embedder = ClipEmbedder(dataclasses.replace(config, weights_sha256=None))
        load_state_strict(embedder.clip, read_weights(folder / "embedder.safetensors"), name)
        return embedder, None
    scorer, state = load_checkpoint(name, local_files_only=True)
    parts = {
        part: {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}
        for part in ("embedder.", "preview.")
    }
    embedder = ClipEmbedder(scorer.embedder)
    if parts["embedder."]:  # else they are an open_clip download
        load_state_strict(embedder, parts["embedder."], name)
    embedder.verify_weights()
    if scorer.preview.kind != "linear":
        return embedder, None  # an autoencoder of the user's own
    preview = LinearPreview(scorer.preview.channels, scorer.preview.patch)
    load_state_strict(preview, parts["preview."], name)
    return embedder, preview


class _FromArguments(Embed):
    """What the command line names. Other processes make it again: it is cheaper to load than to send."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        source = open_source(args.source)
        embedder, preview = load_embedder(args.embedder, args.pretrained)
        if args.preview is not None or source.kind == "previews" or preview is None:
            preview = load_preview(args.preview, source.kind)
        if not args.ray:
            checked_device(args.device)
        super().__init__(source, embedder, preview, args.batch, args.device)

    def __reduce__(self) -> tuple[Any, ...]:
        return _FromArguments, (self.args,)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of trajectories or of training.forward_noise")
    parser.add_argument(
        "--embedder",
        required=True,
        help="folder of training.clip_tune, scorer (folder or bundled name), or model of open_clip (name or .json file)",
    )
    parser.add_argument("--pretrained", help="for a model of open_clip: tag, .safetensors file of its weights, or none")
    parser.add_argument(
        "--preview", help="for latents: file of training.fit_preview, sdxl, or folder or Hub id of a VAE, tiny or full"
    )
    parser.add_argument("--batch", type=int, default=64, help="pictures embedded at once (%(default)s)")
    parser.add_argument("--device", default="cpu")
    add_run_options(parser)
    args = parser.parse_args(arguments)
    return run_command(lambda: embed_job(_FromArguments(args), args.out), args, "images")


if __name__ == "__main__":
    sys.exit(main())
