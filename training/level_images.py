"""Images that were seen at several noise levels, one after another: what :mod:`training.embed` reads.

A source is a folder of trajectories, one shard each, or the folder of :mod:`training.forward_noise`, shard by shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.files import read_json, sha256_file
from moe_artifacts.trajectory_files import META_NAME, TABLE_NAME, iter_trajectories, trajectory_folders
from training.own.batches import require_all_batches
from training.row_jobs import META, complete_shards


@dataclass(frozen=True)
class LevelImage:
    """One image, noisiest level first."""

    key: str
    prompt: str
    label: float | None  # P(artifacts) of the finished image, in [0, 1]; None: not known
    margin: float | None  # the judge's
    setting: str  # how it was sampled, in JSON; "" where that is not known
    num_steps: int  # of the whole run
    step: Int[np.ndarray, " level"]
    log_snr: Float[np.ndarray, " level"]  # nats
    pictures: Shaped[Tensor, "level channel height width"]  # latents, or previews as floats in [0, 1] or as 8 bits


class LevelSource(Protocol):
    """Shards of images."""

    kind: Literal["previews", "latents"]  # what the pictures are
    shows: Literal["x0", "noisy"]  # and of what: the prediction of the clean latents, or the noisy ones themselves
    checks: int  # the most levels that an image has
    shards: int

    def images(self, shard: int, at_once: int) -> Iterator[LevelImage]:
        """Those of a shard, always the same; ``at_once`` of them in memory.

        Raises:
            InputError: If the shard is damaged.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What tells this source from others, as JSON values."""
        ...


def open_source(folder: Path) -> LevelSource:
    """The source in a folder, by what it is.

    Raises:
        InputError: If it is none, or is not finished.
    """
    meta = read_json(folder / META) if (folder / META).exists() else {}
    return NoisedSource(folder) if "levels_per_image" in meta else TrajectorySource(folder)


class TrajectorySource:
    """The x0 predictions of recorded trajectories; a folder, or a folder of them.

    Raises:
        InputError: If there are none, or one was never finished.
    """

    kind: Literal["previews", "latents"] = "latents"
    shows: Literal["x0", "noisy"] = "x0"

    def __init__(self, folder: Path) -> None:
        require_all_batches(folder)
        self.folders = trajectory_folders(folder)
        self.shards, self.checks = len(self.folders), 0
        self._digest = hashlib.sha256()
        for one in self.folders:
            meta = read_json(one / META_NAME)  # a folder without it was not finished
            if not isinstance(meta, dict) or not isinstance(meta.get("steps"), list):
                raise InputError(f"{one / META_NAME} is not that of a trajectory: it lacks steps; record it again")
            self.checks = max(self.checks, len(meta["steps"]))
            for name in (META_NAME, TABLE_NAME):  # the second holds the labels
                self._digest.update(f"{one.name} {sha256_file(one / name)}\n".encode())

    def images(self, shard: int, at_once: int) -> Iterator[LevelImage]:
        folder, first = self.folders[shard], 0
        margins = self.margins(shard)
        for part in iter_trajectories(folder, at_once):
            if part.x0 is None:
                raise InputError(f"{folder} holds no x0: record it again, with its latents")
            count = len(part.prompts)
            setting = json.dumps(part.meta["setting"]) if "setting" in part.meta else ""
            step, log_snr = np.array(part.step), part.log_snr.numpy()
            for place in range(count):
                yield LevelImage(
                    key=f"{folder.name}/{first + place:05d}",
                    prompt=part.prompts[place],
                    label=None if part.label is None else part.label[place].item(),
                    margin=None if margins is None else margins[first + place],
                    setting=setting,
                    num_steps=part.num_steps,
                    step=step,
                    log_snr=log_snr,
                    pictures=part.x0[place],
                )
            first += count

    def margins(self, shard: int) -> list[float | None] | None:
        """What the judge that labelled the images of a shard says of each; above 0: bad. None: nothing is known.

        Raises:
            InputError: If that is not one for every image.
        """
        folder = self.folders[shard]
        meta = read_json(folder / META_NAME)
        margins: list[float | None] | None = meta.get("margin")
        if margins is None:
            return None
        if len(margins) != meta.get("num_images"):
            raise InputError(f"{folder}: margin must be one per image, got {len(margins)}; record it again")
        if wrong := [value for value in margins if not isinstance(value, float | int | None)]:
            raise InputError(f"{folder}: margin must be a number or null, got {wrong[0]!r}; record it again")
        return margins

    def facts(self) -> dict[str, Any]:
        return {"trajectories": self.shards, "sha256": self._digest.hexdigest()}


class NoisedSource:
    """The previews of :mod:`training.forward_noise`, or its latents where it wrote no previews.

    Raises:
        InputError: If shards are missing, or it was written by an older version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = read_json(folder / META)
        if missing := {"levels_per_image", "num_steps", "pictures", "show"} - self.meta.keys():
            raise InputError(f"{folder / META} lacks {', '.join(sorted(missing))}; run training.forward_noise anew")
        self.files = complete_shards(folder)
        self.shards, self.checks = len(self.files), self.meta["levels_per_image"]
        self.kind: Literal["previews", "latents"] = self.meta["pictures"]
        self.shows: Literal["x0", "noisy"] = self.meta["show"]

    def images(self, shard: int, at_once: int) -> Iterator[LevelImage]:
        path = self.files[shard]
        try:
            table = pq.read_table(path).combine_chunks()
            if len(table) == 0:
                return
            with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
                pictures = file.get_slice(self.kind)
                if pictures.get_shape()[0] != len(table):
                    raise InputError(
                        f"{path} has {len(table)} rows, its tensors {pictures.get_shape()[0]}; make it again"
                    )
                starts = _starts(table["key"])
                for first in range(0, len(starts) - 1, at_once):
                    yield from self._images(table, starts[first : first + at_once + 1], pictures)
        except (OSError, pa.ArrowException, SafetensorError) as error:
            raise InputError(f"{path} cannot be read: {error}; make it again") from error

    def facts(self) -> dict[str, Any]:
        return {"noised": self.shards, "sha256": sha256_file(self.folder / META)}

    def _images(self, table: pa.Table, starts: list[int], pictures: Any) -> Iterator[LevelImage]:
        """Those that begin at ``starts``, of which the last is where they end; their pictures are read together."""
        # A copy: else they are pages of the file, and it is the reader of the picture who waits for the disk.
        held, before = pictures[starts[0] : starts[-1]].clone(), starts[0]
        of_images = table.select(["key", "prompt", "label", "scheduler"]).take(starts[:-1]).to_pylist()
        step, log_snr = (table[name].to_numpy() for name in ("step", "log_snr"))
        for one, start, stop in zip(of_images, starts, starts[1:], strict=False):
            yield LevelImage(
                key=one["key"],
                prompt=one["prompt"],
                label=one["label"],
                margin=None,
                setting=json.dumps({"scheduler": one["scheduler"]}),
                num_steps=self.meta["num_steps"][one["scheduler"]],
                step=step[start:stop],
                log_snr=log_snr[start:stop],
                pictures=held[start - before : stop - before],
            )


def _starts(keys: pa.ChunkedArray) -> list[int]:
    """Where the rows of each picture begin, and where those of the last one end."""
    changes = pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1)).to_numpy()
    return [0, *(np.flatnonzero(changes) + 1).tolist(), len(keys)]
