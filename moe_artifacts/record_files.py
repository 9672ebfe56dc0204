"""The readers of moe_artifacts/records.py, one per format; its docstring has the columns."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from moe_artifacts.errors import InputError
from moe_artifacts.records import RawRecords

TEXT = ("image", "prompt", "split")
PER_IMAGE = ("prompt", "label", "final", "split")
FILLED = ("image", "prompt", "split", "step", "calls", "num_steps", "label", "final")
NOT_SCORES = (*TEXT, "step", "calls", "num_steps", "label", "final", "seed", "log_snr")
IMAGES_AT_ONCE = 32  # of a trajectory folder, whose latents are read along


def read_raw(path: Path, key: str | None, num_steps: int | None) -> RawRecords:
    """The file or folder, by what it is.

    Raises:
        InputError: If it is missing, of another format, or not as its format says.
    """
    if key is not None and path.suffix != ".npz":
        raise InputError(f"a key names an array of an npz, got {key!r} for {path}")
    if path.is_dir():
        return _from_trajectories(path)
    if not path.is_file():
        raise InputError(f"there is no file or folder {path}")
    if path.suffix == ".npz":
        return _from_key(path, key) if key is not None else _from_arrays(path, num_steps)
    if path.suffix in (".parquet", ".csv"):
        return _from_rows(path, num_steps)
    raise InputError(f"{path} must be a trajectory folder, or end in .parquet, .csv or .npz")


def _from_trajectories(path: Path) -> RawRecords:
    from moe_artifacts.trajectory import join_trajectories
    from moe_artifacts.trajectory_files import iter_trajectories

    joined = join_trajectories(list(_without_latents(iter_trajectories(path, IMAGES_AT_ONCE))))
    known = [f"{prompt!r}, seed {seed}" for prompt, seed in zip(joined.prompts, joined.seeds, strict=True)]
    anonymous = any(seed is None for seed in joined.seeds)  # the same prompt again is then another image
    return RawRecords(
        scores={name: values.double().numpy() for name, values in joined.scores.items()},
        prompt=joined.prompts,
        calls=np.array(joined.step) + 1,
        total_calls=joined.num_steps,
        image=None if anonymous else known,
        label=None if joined.label is None else joined.label.double().numpy(),
        log_snr=joined.log_snr.double().numpy(),
        meta=joined.meta,
    )


def _without_latents(parts: Any) -> Any:
    from dataclasses import replace

    for part in parts:
        yield replace(part, x0=None, latents=None)


def _from_rows(path: Path, num_steps: int | None) -> RawRecords:
    table = _table(path)
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} has more than one column of the name {twice[0]!r}: keep one of them")
    if table.num_rows == 0:
        raise InputError(f"{path} has no rows")
    if missing := [name for name in ("image", "prompt", "step") if name not in names]:
        raise InputError(f"{path} lacks the columns {missing}; it has {names}")
    for name in names:
        if name in FILLED and table[name].null_count:
            raise InputError(
                f"{path}: the column {name!r} must be filled in every row, {table[name].null_count} are empty"
            )
    ids, image = _codes(table["image"])
    steps, column = np.unique(_numbers(path, table, "step"), return_inverse=True)
    if (steps != np.round(steps)).any() or steps[0] < 0:
        raise InputError(f"{path}: step must be whole numbers from 0 on, got {steps[:5]}")
    place = image * len(steps) + column
    found, counts = np.unique(place, return_counts=True)
    if (counts > 1).any():
        first = found[counts.argmax()]
        raise InputError(
            f"{path}: {(counts > 1).sum()} pairs of image and step have more than one row, the first is image "
            f"{ids[first // len(steps)]!r} at step {steps[first % len(steps)]:g}; keep one row of each"
        )
    first_row = np.unique(image, return_index=True)[1]
    single = {name: _per_image(path, table, name, image, first_row, ids) for name in PER_IMAGE if name in names}
    scores = {}
    for name in names:
        if name not in NOT_SCORES and (pa.types.is_floating(table[name].type) or pa.types.is_integer(table[name].type)):
            scores[name] = np.full((len(ids), len(steps)), np.nan)
            scores[name][image, column] = _numbers(path, table, name)
    text = [name for name in names if name not in NOT_SCORES and name not in scores]
    calls = steps + 1
    if "calls" in names:
        calls = np.array([_one(path, "calls", _numbers(path, table, "calls")[column == k]) for k in range(len(steps))])
    if num_steps is None:
        if "num_steps" not in names:
            raise InputError(
                f"{path} does not say how long a whole run is: add a column num_steps, or give --num-steps"
            )
        num_steps = int(
            _whole(path, "num_steps", np.array(_one(path, "num_steps", _numbers(path, table, "num_steps"))))
        )
    return RawRecords(
        scores=scores,
        prompt=single["prompt"],
        calls=_whole(path, "calls", calls),
        total_calls=num_steps,
        image=ids,
        not_numbers=text,
        **{name: single[name] for name in ("label", "final", "split") if name in single},
    )


def _table(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        text = {name: pa.string() for name in TEXT}  # an id such as 007 is no number
        return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=text))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _codes(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Distinct values as text, in the order in which they first appear, and the place of each row's among them."""
    coded = pc.cast(column, pa.string()).combine_chunks().dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy()


def _numbers(path: Path, table: pa.Table, name: str) -> np.ndarray:
    kind = table[name].type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise InputError(f"{path}: the column {name!r} must hold numbers, got {kind}")
    return table[name].to_numpy().astype(np.float64)  # null becomes NaN


def _per_image(path: Path, table: pa.Table, name: str, image: np.ndarray, first_row: np.ndarray, ids: list[str]) -> Any:
    """One value per image, which all its rows must have."""
    if name in TEXT:
        known, values = _codes(table[name])
    else:
        known, values = None, _numbers(path, table, name)
    of_image = values[first_row]
    differs = (values != of_image[image]) & ~(np.isnan(values) & np.isnan(of_image[image]))
    if differs.any():
        raise InputError(
            f"{path}: the column {name!r} must be the same in all rows of an image, "
            f"but differs for image {ids[image[differs.argmax()]]!r}; do two images share this id?"
        )
    return of_image if known is None else [known[code] for code in of_image]


def _one(path: Path, name: str, values: np.ndarray) -> float:
    if (values != values[0]).any():
        among = "all rows" if name == "num_steps" else "all images at a step"
        raise InputError(f"{path}: {name} must be the same for {among}, got {sorted(set(values.tolist()))[:5]}")
    return float(values[0])


def _arrays(path: Path, names: list[str] | None = None) -> dict[str, np.ndarray]:
    """All arrays, or the named ones."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if missing := [name for name in names or [] if name not in file]:
                raise InputError(f"{path} lacks the arrays {missing}; it has {sorted(file)}")
            return {name: file[name] for name in names or file}
    except InputError:
        raise
    # A pickle inside is a ValueError; an npy, which has no arrays to close, a TypeError.
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read {path} as an npz of plain arrays: {error}") from error


def _from_arrays(path: Path, num_steps: int | None) -> RawRecords:
    arrays = _arrays(path)
    if missing := [name for name in ("prompt", "calls") if name not in arrays]:
        raise InputError(f"{path} lacks the arrays {missing}; it has {sorted(arrays)}. Is a --key wanted?")
    if num_steps is None:
        if "total_calls" not in arrays:
            raise InputError(
                f"{path} lacks total_calls, the denoiser calls of a whole run: add it, or give --num-steps"
            )
        if arrays["total_calls"].size != 1:
            shape = arrays["total_calls"].shape
            raise InputError(f"{path}: total_calls must be one number, the same for all images, got shape {shape}")
        num_steps = int(_whole(path, "total_calls", arrays["total_calls"]).item())
    for name in ("prompt", "calls"):
        if arrays[name].ndim != 1:
            raise InputError(f"{path}: {name} must have one dimension, got shape {arrays[name].shape}")
    shape = (len(arrays["prompt"]), len(arrays["calls"]))
    scores = {name: _floats(path, name, values) for name, values in arrays.items() if values.shape == shape}
    if "scores" in scores:
        scores["score"] = scores.pop("scores")
    found: dict[str, Any] = {}
    for name in ("label", "final", "split", "image"):
        if name in arrays:
            if arrays[name].shape != shape[:1]:
                raise InputError(f"{path}: {name} must have shape {shape[:1]}, one per image, got {arrays[name].shape}")
            numeric = name in ("label", "final")
            values = arrays[name]
            found[name] = _floats(path, name, values) if numeric else [str(value) for value in values]
    return RawRecords(
        scores=scores,
        prompt=[str(value) for value in arrays["prompt"]],
        calls=_whole(path, "calls", arrays["calls"]),
        total_calls=num_steps,
        **found,
    )


def _floats(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "fiub":
        raise InputError(f"{path}: {name} must hold numbers, got an array of {values.dtype}")
    return values.astype(np.float64)


def _whole(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    numbers = _floats(path, name, values)
    if not np.isfinite(numbers).all() or (numbers != np.round(numbers)).any():
        raise InputError(f"{path}: {name} must hold whole numbers, got {numbers.ravel()[:5]}")
    return numbers.astype(np.int64)


def _from_key(path: Path, key: str) -> RawRecords:
    base = f"{key.rpartition('_')[0]}_base"
    arrays = _arrays(path, [key, base])
    scores, finals = _floats(path, key, arrays[key]), _floats(path, base, arrays[base])
    if scores.ndim != 3 or scores.shape != finals.shape:
        raise InputError(
            f"{path}: {key} and {base} must be [prompt image step] alike, got {scores.shape}, {finals.shape}"
        )
    distinct = [np.sort(np.unique(rows, axis=0, return_index=True)[1]) for rows in finals]
    prompt = np.repeat(np.arange(len(finals)), [len(rows) for rows in distinct])
    rows = np.concatenate(distinct)
    step = np.flatnonzero(~np.isnan(scores).all(axis=(0, 1)))
    repeats = scores.shape[0] * scores.shape[1] - len(rows)
    return RawRecords(
        scores={"score": scores[prompt, rows][:, step]},
        prompt=[str(number) for number in prompt],
        calls=step + 1,
        total_calls=scores.shape[2],
        final=finals[prompt, rows, -1],
        notes=[f"{repeats} exact repeats of an image of the same prompt were left out"] if repeats else [],
    )
