"""Shards of noised pictures: how :mod:`training.forward_noise` stores its rows, and how to read them.

A folder holds one shard per range of the source, ``shards`` of them, and can be read while workers still write others:

    meta.json                   what was asked for: source, latent space, schedulers, noise; ``shards``, their number
    000000.parquet              one row per picture and noise level; its presence says that shard 0 is complete
    000000.safetensors          row i belongs to row i: ``previews``, uint8 [row 3 pixel_h pixel_w], RGB from 0 to 255; or
                                ``latents``, float16 [row channel height width], noisy, scaled to alpha**2 + sigma**2 = 1;
                                or both. A shard of no rows has no tensors
    rejects/000000.parquet      one row per picture that could not be used: key, reason, detail

Rows of a picture follow one another, noisiest first:

    key, prompt     of the picture; prompts may be empty or hold any Unicode
    label           share of raters who saw artifacts, in [0, 1]; null where the source knows none
    seed            of the picture's noise (``torch.Generator``); from the run's seed and the key
    scheduler       as it was asked for, e.g. "ddim" or "euler:30"
    step            place in a run of that scheduler, 0 first
    log_snr         nats; always finite
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path, read_json, write_json

META = "meta.json"
COLUMNS = pa.schema(
    {
        "key": pa.string(),
        "prompt": pa.string(),
        "label": pa.float32(),
        "seed": pa.int64(),
        "scheduler": pa.string(),
        "step": pa.int32(),
        "log_snr": pa.float32(),
    }
)
REJECTS = pa.schema({"key": pa.string(), "reason": pa.string(), "detail": pa.string()})


@dataclass
class ShardRows:
    """What one shard will hold."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS.names})
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)  # parts, to be joined
    rejects: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.columns["key"])

    def reject(self, key: str, reason: str, detail: str) -> None:
        """Note a picture that could not be used."""
        self.rejects.append({"key": key, "reason": reason, "detail": detail})


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` as worker i of n.

    Example:
        >>> parse_shard("0/4")
        (0, 4)
    """
    worker, _, workers = text.partition("/")
    if not (worker.isdecimal() and workers.isdecimal() and int(worker) < int(workers)):
        raise InputError(f"shard must be i/n with i from 0 to n - 1, got {text!r}")
    return int(worker), int(workers)


def open_folder(folder: Path, meta: Mapping[str, Any]) -> None:
    """Make the folder, or make sure that it belongs to the same run.

    Raises:
        InputError: If it holds shards of another run, naming what differs.
    """
    path, meta = folder / META, json.loads(json.dumps(meta))  # as it is read back: no tuples
    if path.exists():
        found = read_json(path)
        for name in dict.fromkeys([*meta, *found]):
            if found.get(name) != meta.get(name):
                raise InputError(
                    f"{folder} holds shards made with {name}={found.get(name)!r}, this run has {meta.get(name)!r}; "
                    "choose another folder"
                )
    else:
        write_json(path, meta)  # several workers write the same


def shard_files(folder: Path) -> list[Path]:
    """The Parquet files of the shards that are complete, in order; tensors have the same name with ``.safetensors``."""
    return sorted(path for path in folder.glob("*.parquet") if path.stem.isdigit())  # not those half written


def missing_shards(folder: Path, total: int, worker: int = 0, workers: int = 1) -> Iterator[int]:
    """Numbers of the shards of one worker that are not complete, each asked about when it is its turn."""
    return (number for number in range(worker, total, workers) if not _path(folder, number).exists())


def write_shard(folder: Path, number: int, rows: ShardRows) -> None:
    """Write a shard; its Parquet file comes last and makes it count."""
    for leftover in (*folder.glob(f".{number:06d}-*"), *(folder / "rejects").glob(f".{number:06d}-*")):
        leftover.unlink(missing_ok=True)  # of a worker that was killed; no two workers have the same shard
    if len(rows):
        tensors = {name: torch.cat(parts).contiguous() for name, parts in rows.tensors.items()}
        with atomic_path(_path(folder, number).with_suffix(".safetensors")) as temporary:
            save_file(tensors, temporary)
    _write_table(folder / "rejects" / f"{number:06d}.parquet", pa.Table.from_pylist(rows.rejects, schema=REJECTS))
    _write_table(_path(folder, number), pa.table(rows.columns, schema=COLUMNS))


def count_rows(folder: Path) -> tuple[int, dict[str, int]]:
    """Rows of the complete shards, and how many pictures were rejected for each reason."""
    rows = 0
    reasons: dict[str, int] = {}
    for path in shard_files(folder):
        rows += pq.read_metadata(path).num_rows
        for reason in pq.read_table(folder / "rejects" / path.name, columns=["reason"])["reason"].to_pylist():
            reasons[reason] = reasons.get(reason, 0) + 1
    return rows, reasons


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.parquet"


def _write_table(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
