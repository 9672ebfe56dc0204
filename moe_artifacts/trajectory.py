"""What was seen and scored on the way: the records of a batch over its steps, and their files.

A trajectory on disk is a folder:

    trajectory.parquet   one row per image and scored step, images one after the other: image, prompt, seed, step,
                         log_snr, label (where known) and one column per score, null where there is none
    latents.safetensors  optional: x0 (and the noisy latents) of every row
    meta.json            num_steps, num_images, steps, scores, and what else is worth keeping (scheduler, guidance, ...)

``meta.json`` is written last: a folder without it was not finished. Readers stream, and never hold more than a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path, read_json, write_json
from moe_artifacts.shapes import PerImage, StepLatents

FORMAT_VERSION = 1
TABLE_NAME, LATENTS_NAME, META_NAME = "trajectory.parquet", "latents.safetensors", "meta.json"
REQUIRED_COLUMNS = ("image", "prompt", "seed", "step", "log_snr")
RESERVED_COLUMNS = (*REQUIRED_COLUMNS, "label")
RESERVED_META = ("format_version", "num_steps", "num_images", "steps", "scores")

# cleared: kept, and not scored to the end; rejected: bad, but found at the last step, so that nothing was saved;
# error: the latents were not finite.
Status = Literal["kept", "cleared", "aborted", "rejected", "error"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one image that was asked for."""

    index: int  # its place among the images asked for
    status: Status
    step: int | None  # 0-based denoising step of the decision; None: never decided, hence kept
    artifact_prob: float  # when it was decided, or at the last scored step; NaN: not scored
    cumulative_artifact_prob: float
    prompt: str
    seed: int | None  # None: drawn by a generator shared by the batch


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """The records of a batch over its scored steps, in denoising order.

    Raises:
        InputError: If lengths and shapes differ, or a value is not finite that should be.
    """

    prompts: list[str]
    seeds: list[int | None]  # None: drawn by a generator shared by the batch
    step: list[int]  # scored steps: 0-based indices into the denoising loop, rising
    log_snr: Tensor  # [step], nats
    scores: dict[str, Tensor]  # name to [batch step]; NaN where an image had left, or was not finite
    num_steps: int  # of the whole denoising loop
    x0: StepLatents | None = None
    latents: StepLatents | None = None  # the noisy ones, x_t
    label: PerImage | None = None  # P(artifacts) of the finished image: 0, 1, or the share of raters who saw them
    meta: dict[str, Any] = field(default_factory=dict)  # plain JSON values: scheduler, guidance_scale, ...

    def __post_init__(self) -> None:
        batch, steps = len(self.prompts), len(self.step)
        if len(self.seeds) != batch:
            raise InputError(f"seeds must be one per prompt, {batch}, or None for each, got {len(self.seeds)}")
        if list(self.step) != sorted(set(self.step)) or any(not 0 <= s < self.num_steps for s in self.step):
            raise InputError(f"step must rise within 0..{self.num_steps - 1}, got {self.step}")
        if self.log_snr.shape != (steps,) or not self.log_snr.isfinite().all():
            raise InputError(f"log_snr must be {steps} finite numbers, one per scored step, got {self.log_snr}")
        for name, score in self.scores.items():
            if name in RESERVED_COLUMNS:
                raise InputError(f"a score cannot be called {name!r}: that column has another meaning")
            if score.shape != (batch, steps):
                got = tuple(score.shape)
                raise InputError(f"the score {name!r} must have the shape {(batch, steps)} (batch, step), got {got}")
            if score.isinf().any():
                raise InputError(
                    f"the score {name!r} must be finite, or NaN where an image was not scored, got infinity"
                )
        for name in ("x0", "latents"):
            value = getattr(self, name)
            if value is not None and (value.ndim != 5 or value.shape[:2] != (batch, steps)):
                shape = f"({batch}, {steps}, channel, height, width)"
                raise InputError(f"{name} must have the shape {shape}, got {tuple(value.shape)}")
        label = self.label
        if label is not None and (label.shape != (batch,) or not ((label >= 0) & (label <= 1)).all()):
            raise InputError(f"label must be {batch} numbers in [0, 1], one per image, got {label}")
        if taken := sorted(set(self.meta) & set(RESERVED_META)):
            raise InputError(f"meta must not hold {taken}: the file has them already")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder; one that is there already is replaced.

        Raises:
            InputError: If there is nothing to write, or a seed does not fit into 64 bits.
        """
        folder = Path(folder)
        if not self.prompts or not self.step:
            raise InputError(
                f"a trajectory needs images and scored steps, got {len(self.prompts)} and {len(self.step)}"
            )
        table = self._table()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / META_NAME).unlink(missing_ok=True)  # from here on, until the last line, unfinished
        with atomic_path(folder / TABLE_NAME) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        (folder / LATENTS_NAME).unlink(missing_ok=True)
        pairs = (("x0", self.x0), ("latents", self.latents))
        tensors = {name: t.detach().cpu().contiguous() for name, t in pairs if t is not None}
        if tensors:
            with atomic_path(folder / LATENTS_NAME) as temporary:
                save_file(tensors, temporary)
        own = (FORMAT_VERSION, self.num_steps, len(self.prompts), list(self.step), list(self.scores))
        write_json(folder / META_NAME, {**dict(zip(RESERVED_META, own, strict=True)), **self.meta})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Trajectory:
        """Read a whole folder; ``iter_trajectories`` reads it in parts.

        Raises:
            InputError: As ``iter_trajectories``.
        """
        [trajectory, *_] = _iter_folder(Path(folder), batch_size=None)  # not next(): the end of the file is checked too
        return trajectory

    def _table(self) -> pa.Table:
        batch, steps = len(self.prompts), len(self.step)

        def per_image(values: Any, kind: pa.DataType) -> pa.Array:
            return pa.array([value for value in values for _ in range(steps)], type=kind)

        try:
            seeds = per_image(self.seeds, pa.uint64())
        except (OverflowError, pa.ArrowException) as error:
            raise InputError(f"seeds must be in 0..2**64-1, as torch has them, got {self.seeds}") from error
        columns = {
            "image": per_image(range(batch), pa.int64()),
            "prompt": per_image(self.prompts, pa.string()),
            "seed": seeds,
            "step": pa.array(list(self.step) * batch, type=pa.int32()),
            "log_snr": pa.array(np.tile(_float32(self.log_snr), batch)),
        }
        if self.label is not None:
            columns["label"] = pa.array(_float32(self.label).repeat(steps))
        for name, score in self.scores.items():
            columns[name] = pa.array(_float32(score).reshape(-1), from_pandas=True)  # NaN becomes null
        return pa.table(columns)


def iter_trajectories(path: str | os.PathLike[str], batch_size: int) -> Iterator[Trajectory]:
    """Read one trajectory folder, or a folder of them in the order of their names, ``batch_size`` images at a time.

    The last part of a folder may be smaller. Only the rows and latents of one part are in memory.

    Raises:
        InputError: If nothing is found, a folder is unfinished or damaged, columns are missing, rows are missing,
            doubled or out of order, or values are not finite that should be.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    for folder in trajectory_folders(path):
        yield from _iter_folder(folder, batch_size)


def trajectory_folders(path: str | os.PathLike[str]) -> list[Path]:
    """The folder itself, if it is one of a trajectory, or the trajectory folders in it, in the order of their names.

    Raises:
        InputError: If there is none.
    """
    path = Path(path)
    folders = [path] if _looks_like_one(path) else sorted(p for p in path.glob("*/") if _looks_like_one(p))
    if not folders:
        raise InputError(f"{path} is not a trajectory folder, nor a folder of them: {META_NAME} not found")
    return folders


def join_trajectories(parts: Sequence[Trajectory]) -> Trajectory:
    """The images of several runs in one setting, one run after the other, without latents and with the first one's meta.

    A run whose images all left early has fewer scored steps: its scores are NaN at the others.

    Raises:
        InputError: If there are no parts, or they differ in their number of steps, their noise levels or their scores.
    """
    if not parts:
        raise InputError("parts must hold at least one trajectory, got none")
    first, levels = parts[0], dict[int, float]()
    for number, part in enumerate(parts):
        same = (part.num_steps, part.scores.keys()) == (first.num_steps, first.scores.keys())
        if not same or any(levels.setdefault(s, v) != v for s, v in zip(part.step, part.log_snr.tolist(), strict=True)):
            raise InputError(
                f"parts must be runs in one setting, but part {number} differs from those before it in its number of "
                "steps, its noise levels or its scores"
            )
    steps = sorted(levels)

    def padded(part: Trajectory, name: str) -> Tensor:
        values = torch.full((len(part.prompts), len(steps)), torch.nan)
        values[:, [steps.index(s) for s in part.step]] = part.scores[name].float()
        return values

    labels = [part.label for part in parts if part.label is not None]
    return replace(
        first,
        prompts=[prompt for part in parts for prompt in part.prompts],
        seeds=[seed for part in parts for seed in part.seeds],
        step=steps,
        log_snr=torch.tensor([levels[s] for s in steps]),
        scores={name: torch.cat([padded(part, name) for part in parts]) for name in first.scores},
        label=torch.cat(labels) if len(labels) == len(parts) else None,
        x0=None,
        latents=None,
    )


def _looks_like_one(folder: Path) -> bool:
    return (folder / META_NAME).exists() or (folder / TABLE_NAME).exists()  # the second alone: unfinished, an error


def _iter_folder(folder: Path, batch_size: int | None) -> Iterator[Trajectory]:
    if not (folder / META_NAME).exists():
        raise InputError(f"{folder} has no {META_NAME}: it is no trajectory, or was never finished; record it again")
    own, meta = _read_meta(folder / META_NAME)
    steps, images = len(own["steps"]), own["num_images"]
    start = stop = 0
    for table in _parts(folder / TABLE_NAME, own["scores"], rows=steps * (batch_size or images)):
        if len(table) % steps:
            raise InputError(f"{folder / TABLE_NAME} must have {steps} rows for every image, the last has fewer")
        stop = start + len(table) // steps
        if stop > images:
            break
        yield _trajectory(folder, table, range(start, stop), own, meta)
        start = stop
    if stop != images:
        raise InputError(f"{folder / TABLE_NAME} must have the rows of {images} images, got those of {stop}")


def _read_meta(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file format needs, and the rest."""
    values = read_json(path)
    if not isinstance(values, dict) or not set(RESERVED_META) <= set(values):
        raise InputError(f"{path} must be a JSON object with the keys {list(RESERVED_META)}")
    own = {name: values.pop(name) for name in RESERVED_META}
    if own["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {own['format_version']!r}, this release reads {FORMAT_VERSION}")
    counts = [own["num_steps"], own["num_images"]]
    ok = all(isinstance(n, int) and n >= 1 for n in counts)
    ok = (
        ok
        and isinstance(own["steps"], list)
        and len(own["steps"]) >= 1
        and all(isinstance(s, int) for s in own["steps"])
    )
    ok = ok and isinstance(own["scores"], list) and all(isinstance(s, str) for s in own["scores"])
    if not ok:
        raise InputError(f"{path}: num_steps and num_images must be >= 1, steps integers, scores names; got {own}")
    return own, values


def _parts(path: Path, scores: list[str], rows: int) -> Iterator[pa.Table]:
    """The table, ``rows`` at a time."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in (*REQUIRED_COLUMNS, *scores) if name not in names]:
                raise InputError(f"{path} lacks the columns {missing}; it has {names}")
            wanted = [name for name in (*RESERVED_COLUMNS, *scores) if name in names]
            rest = file.schema_arrow.empty_table().select(wanted)
            for batch in file.iter_batches(batch_size=rows, columns=wanted):
                # pyarrow cuts at row groups too, so what is left over waits for the next.
                rest = pa.concat_tables([rest, pa.Table.from_batches([batch]).select(wanted)])
                while len(rest) >= rows:
                    yield rest[:rows]
                    rest = rest[rows:]
            if len(rest):
                yield rest
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _trajectory(folder: Path, table: pa.Table, images: range, own: dict[str, Any], meta: dict[str, Any]) -> Trajectory:
    """Rows, image after image, as tensors [batch step]."""
    where, shape = folder / TABLE_NAME, (len(images), len(own["steps"]))

    def grid(name: str, kind: type) -> np.ndarray:
        column = table.column(name)
        if kind is not object and not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise InputError(f"{where}: the column {name!r} must hold numbers, got {column.type}")
        if column.null_count and name not in ("seed", *own["scores"]):
            raise InputError(f"{where}: the column {name!r} must not have nulls")
        return np.array(column.to_pylist() if kind is object else column.to_numpy(), dtype=kind).reshape(shape)

    # One comparison finds rows that are missing, doubled or out of order.
    expected = np.repeat(np.arange(images.start, images.stop), shape[1]).reshape(shape)
    if (grid("image", np.int64) != expected).any() or (grid("step", np.int64) != np.array(own["steps"])).any():
        raise InputError(
            f"{where} must have one row per image and step, sorted by image (0 to {own['num_images'] - 1}) and then by "
            f"step ({own['steps']}); rows of images {images.start} to {images.stop - 1} are missing, doubled or out of "
            "order"
        )
    single = {name: grid(name, object) for name in ("prompt", "seed")} | {"log_snr": grid("log_snr", np.float32).T}
    if "label" in table.column_names:
        single["label"] = grid("label", np.float32)
    for name, values in single.items():
        if (values != values[:, :1]).any():
            among = "the images of one step" if name == "log_snr" else "the steps of one image"
            raise InputError(f"{where}: {name!r} must be the same, and finite, for all {among}")
    label = torch.from_numpy(single["label"][:, 0].copy()) if "label" in single else None
    try:
        return Trajectory(
            prompts=single["prompt"][:, 0].tolist(),
            seeds=single["seed"][:, 0].tolist(),
            step=own["steps"],
            log_snr=torch.from_numpy(single["log_snr"][:, 0].copy()),
            scores={name: torch.from_numpy(grid(name, np.float32)) for name in own["scores"]},
            num_steps=own["num_steps"],
            label=label,
            meta=meta,
            **_read_latents(folder / LATENTS_NAME, images, (own["num_images"], shape[1])),
        )
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _read_latents(path: Path, images: range, expected: tuple[int, int]) -> dict[str, Tensor]:
    """The rows of some images, read from the middle of the file."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            for name, values in slices.items():
                if name not in ("x0", "latents") or tuple(values.get_shape()[:2]) != expected:
                    raise InputError(
                        f"{path} must hold x0 or latents for {expected[0]} images and {expected[1]} steps, "
                        f"got {name!r} of shape {values.get_shape()}"
                    )
            return {name: values[images.start : images.stop] for name, values in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _float32(values: Tensor) -> np.ndarray:
    return values.detach().cpu().float().numpy()
