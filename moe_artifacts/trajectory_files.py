"""The files of a trajectory: written, read whole, and read a few images at a time.

A trajectory on disk is a folder:

    trajectory.parquet   one row per image and scored step, images one after the other: image, prompt, seed, step,
                         log_snr, label (where known) and one column per score, null where there is none
    latents.safetensors  optional: x0 (and the noisy latents) of every row
    meta.json            num_steps, num_images, steps, scores, and what else is worth keeping (scheduler, guidance, ...)

``meta.json`` is written last: a folder without it was not finished. Readers stream, and never hold more than a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path, read_json, write_json
from moe_artifacts.trajectory import RESERVED_COLUMNS, RESERVED_META, Trajectory

FORMAT_VERSION = 1
TABLE_NAME, LATENTS_NAME, META_NAME = "trajectory.parquet", "latents.safetensors", "meta.json"
REQUIRED_COLUMNS = tuple(name for name in RESERVED_COLUMNS if name != "label")


def write_trajectory(trajectory: Trajectory, folder: str | os.PathLike[str]) -> None:
    """What ``Trajectory.save`` does."""
    folder = Path(folder)
    if not trajectory.prompts or not trajectory.step:
        raise InputError(
            f"a trajectory needs images and scored steps, got {len(trajectory.prompts)} and {len(trajectory.step)}"
        )
    table = _table(trajectory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META_NAME).unlink(missing_ok=True)  # from here on, until the last line, unfinished
    with atomic_path(folder / TABLE_NAME) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    (folder / LATENTS_NAME).unlink(missing_ok=True)
    pairs = (("x0", trajectory.x0), ("latents", trajectory.latents))
    tensors = {name: t.detach().cpu().contiguous() for name, t in pairs if t is not None}
    if tensors:
        with atomic_path(folder / LATENTS_NAME) as temporary:
            save_file(tensors, temporary)
    sizes = (trajectory.num_steps, len(trajectory.prompts))
    own = (FORMAT_VERSION, *sizes, list(trajectory.step), list(trajectory.scores))
    write_json(folder / META_NAME, {**dict(zip(RESERVED_META, own, strict=True)), **trajectory.meta})


def read_trajectory(folder: str | os.PathLike[str]) -> Trajectory:
    """What ``Trajectory.load`` does."""
    [trajectory, *_] = _iter_folder(Path(folder), batch_size=None)  # not next(): the end of the file is checked too
    return trajectory


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


def _table(trajectory: Trajectory) -> pa.Table:
    batch, steps = len(trajectory.prompts), len(trajectory.step)

    def per_image(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array([value for value in values for _ in range(steps)], type=kind)

    try:
        seeds = per_image(trajectory.seeds, pa.uint64())
    except (OverflowError, pa.ArrowException) as error:
        raise InputError(f"seeds must be in 0..2**64-1, as torch has them, got {trajectory.seeds}") from error
    columns = {
        "image": per_image(range(batch), pa.int64()),
        "prompt": per_image(trajectory.prompts, pa.string()),
        "seed": seeds,
        "step": pa.array(list(trajectory.step) * batch, type=pa.int32()),
        "log_snr": pa.array(np.tile(_float32(trajectory.log_snr), batch)),
    }
    if trajectory.label is not None:
        columns["label"] = pa.array(_float32(trajectory.label).repeat(steps))
    for name, score in trajectory.scores.items():
        columns[name] = pa.array(_float32(score).reshape(-1), from_pandas=True)  # NaN becomes null
    return pa.table(columns)


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
