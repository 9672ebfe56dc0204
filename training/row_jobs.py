"""Row jobs: from rows to rows, shard by shard, in one process, in the workers of any cluster, or on Ray Data.

A job is a description of what is asked for and a function from the number of a shard of the source to what comes of it:

    job = RowJob(name="embed", folder=out, shards=12, facts={"seed": 0}, shard=function)
    run_job(job)                            a plain loop
    run_job(job, worker=3, workers=8)       one of eight workers, on any machines that share the folder
    ray_jobs.run_on_ray(job)                Ray Data, on this machine or on the cluster that RAY_ADDRESS names

All three write the same folder, which can be read while workers still write to it:

    meta.json                   what was asked for; ``shards``, their number
    000000.parquet              the rows of shard 0; its presence says that the shard is complete
    000000.safetensors          their tensors; a shard without rows has none
    rejects/000000.parquet      one row for each that could not be used: key, reason, detail

A run that was killed goes on with the shards that are missing. A row that fails is rejected and its shard goes on without it
(:func:`in_batches`); a shard that cannot be read is left out, the others are made, and the run ends with an error that names it.
Rows are the same to the bit where torch has the same number of threads, and to rounding elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_artifacts.errors import InputError, MoeArtifactsError
from moe_artifacts.files import atomic_path, read_json, remove_unfinished, write_json
from training.workspace import keep_freed_memory, progress

META = "meta.json"
REJECTS = pa.schema({"key": pa.string(), "reason": pa.string(), "detail": pa.string()})
GIVE_UP = 3  # shards that fail one after the other: then it is not the shards

RowT = TypeVar("RowT")


@dataclass
class ShardRows:
    """What one shard will hold.

    Example:
        >>> rows = ShardRows(pa.schema({"key": pa.string(), "size": pa.int64()}))
        >>> rows.add(key="a", size=3)
        >>> rows.reject("b", "damaged", "cut short")
        >>> len(rows), len(rows.rejects)
        (1, 1)
    """

    schema: pa.Schema
    columns: dict[str, list[Any]] = field(default_factory=dict)
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)  # parts, to be joined
    rejects: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.columns = {name: self.columns.get(name, []) for name in self.schema.names}

    def __len__(self) -> int:
        return len(self.columns[self.schema.names[0]])

    def add(self, **values: Any) -> None:
        """One row, with a value for every column."""
        for name, column in self.columns.items():
            column.append(values[name])

    def add_tensor(self, name: str, part: Tensor) -> None:
        """Further rows of a tensor."""
        self.tensors.setdefault(name, []).append(part)

    def reject(self, key: str, reason: str, detail: str) -> None:
        """Note a row that could not be used."""
        # Parquet holds valid Unicode only; names of files may be others.
        self.rejects.append({"key": key, "reason": reason, "detail": detail.encode("utf-8", "replace").decode()})

    def extend(self, others: ShardRows) -> None:
        """Further rows, with their tensors and rejects."""
        for name, column in self.columns.items():
            column += others.columns[name]
        for name, parts in others.tensors.items():
            self.tensors.setdefault(name, []).extend(parts)
        self.rejects += others.rejects


@dataclass(frozen=True, kw_only=True)
class RowJob:
    """What is asked for."""

    name: str  # for the progress bar
    folder: Path  # of the result
    shards: int
    facts: Mapping[str, Any]  # as JSON values: all that the rows depend on. A folder of other facts is refused
    # From the number of a shard. Ray pickles it: one that holds a model says by ``__reduce__`` how to make it again.
    shard: Callable[[int], ShardRows]


def in_batches(
    rows: Iterable[RowT],
    size: int,
    work: Callable[[list[RowT]], ShardRows],
    into: ShardRows,
    key: Callable[[RowT], str],
) -> None:
    """Work through rows a batch at a time, the next of which is read meanwhile; where a batch fails, one row at a time.

    Rows that fail alone too are rejected with the reason "error". A full disk or memory is not the fault of a row, nor is what is
    wrong with a model or a configuration.

    Raises:
        InputError: If no row of a batch of several works: then it is not the rows.
        MoeArtifactsError, OSError, MemoryError: As ``work``.
    """
    remaining = iter(rows)
    for batch in read_ahead(iter(lambda: list(islice(remaining, size)), [])):
        try:
            into.extend(work(batch))
        except Exception as error:
            if _is_general(error):
                raise
            into.extend(_one_by_one(batch, work, into.schema, key, error))


def read_ahead(parts: Iterator[RowT]) -> Iterator[RowT]:
    """The same parts, each made in a thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(lambda: list(islice(parts, 1)))
        while part := waiting.result():
            waiting = thread.submit(lambda: list(islice(parts, 1)))
            yield part[0]


def _one_by_one(
    batch: list[RowT],
    work: Callable[[list[RowT]], ShardRows],
    schema: pa.Schema,
    key: Callable[[RowT], str],
    together: Exception,
) -> ShardRows:
    parts, failed = ShardRows(schema), 0
    for row in batch:
        try:
            parts.extend(work([row]))
        except Exception as error:
            if _is_general(error):
                raise
            parts.reject(key(row), "error", f"{type(error).__name__}: {error}")
            failed += 1
    if failed == len(batch) > 1:
        first = f"{type(together).__name__}: {together}"
        raise InputError(f"none of {failed} rows works, from {key(batch[0])!r} on: {first}") from together
    return parts


def _is_general(error: Exception) -> bool:
    """Whether the next row would meet it too."""
    if isinstance(error, MoeArtifactsError):
        return not isinstance(error, InputError)
    return isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError))


def run_job(job: RowJob, worker: int = 0, workers: int = 1) -> None:
    """Make the shards of one worker that are not there yet, one after the other.

    Raises:
        InputError: If the folder holds another run, or shards could not be read.
        MoeArtifactsError, OSError: As ``job.shard``; e.g. where the disk is full.
    """
    open_folder(job.folder, {**job.facts, "shards": job.shards})
    numbers = list(missing_shards(job.folder, job.shards, worker, workers))

    def results() -> Iterator[tuple[int, str | None]]:
        for number in numbers:
            try:
                write_shard(job.folder, number, job.shard(number))
            except InputError as error:
                yield number, str(error)
            else:
                yield number, None

    watch(job, len(numbers), results())


def watch(job: RowJob, total: int, results: Iterable[tuple[int, str | None]]) -> None:
    """Show how far a run is, and once the rest is done raise an error for what failed.

    Args:
        results: The number of each shard with what failed, or None.
    Raises:
        InputError: If shards failed; at once, where several do one after the other.
    """
    failed: list[str] = []
    in_a_row = 0
    with progress(total, 0, job.name) as bar:
        for number, error in results:
            bar.update()
            in_a_row = in_a_row + 1 if error is not None else 0
            if error is not None:
                failed.append(f"shard {number}: {error}")
            if in_a_row == GIVE_UP:
                break
    if failed:
        left = "the run was given up" if in_a_row == GIVE_UP else "the other shards are complete"
        raise InputError(f"{len(failed)} of {total} shards failed, {left}; the first is {failed[0]}")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """``--shard``, ``--ray`` and ``--out``, for :func:`run_command`."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--shard", default="0/1", metavar="I/N", help="do the I-th of N parts, counted from 0 (%(default)s)"
    )
    where.add_argument("--ray", action="store_true", help="on Ray Data, here or on the cluster of RAY_ADDRESS")
    parser.add_argument("--ray-workers", type=int, metavar="N", help="(as many as there is room for)")
    parser.add_argument("--ray-cpus", type=float, default=1, metavar="N", help="of each worker (%(default)s)")
    parser.add_argument("--ray-gpus", type=float, default=0, metavar="N", help="of each worker (%(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards")


def run_command(job: Callable[[], RowJob], args: argparse.Namespace, of: str) -> int:
    """Run a job as the command line asks, and say what came of it; returns the exit status.

    Args:
        job: Makes the job; what is wrong with its arguments is told as well.
        of: What the rows are, in the plural.
    """
    keep_freed_memory()
    try:
        run_as_asked(job(), args)
    except (MoeArtifactsError, OSError) as error:  # OSError: a full disk, no files of Fashion-MNIST
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows, rejects = count_rows(args.out)
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.items())) or "none"
    print(f"{args.out}: {rows:,} {of}; rejected: {told}")
    return 0


def run_as_asked(job: RowJob, args: argparse.Namespace) -> None:
    """Run a job in the way that the options of the command line name.

    Raises:
        InputError: If they are out of range; and as :func:`run_job`.
    """
    if not args.ray:
        return run_job(job, *parse_shard(args.shard))
    from training.ray_jobs import run_on_ray  # it imports this module

    if (args.ray_workers is not None and args.ray_workers < 1) or args.ray_cpus <= 0 or args.ray_gpus < 0:
        raise InputError("ray-workers must be at least 1, ray-cpus positive and ray-gpus not negative")
    return run_on_ray(job, args.ray_workers, args.ray_cpus, args.ray_gpus)


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


def complete_shards(folder: Path) -> list[Path]:
    """The same, of a folder of which every shard is complete.

    Raises:
        InputError: If shards are missing, or there is no such folder.
    """
    total, files = read_json(folder / META).get("shards"), shard_files(folder)
    if len(files) != total:
        raise InputError(
            f"{folder} has {len(files)} of {total} shards; run the stage that writes it again, it makes those missing"
        )
    return files


def missing_shards(folder: Path, total: int, worker: int = 0, workers: int = 1) -> Iterator[int]:
    """Numbers of the shards of one worker that are not complete, each asked about when it is its turn."""
    return (number for number in range(worker, total, workers) if not _path(folder, number).exists())


def write_shard(folder: Path, number: int, rows: ShardRows) -> None:
    """Write a shard; its Parquet file comes last and makes it count."""
    path = _path(folder, number)
    files = path.with_suffix(".safetensors"), folder / "rejects" / path.name, path
    for file in files:  # of a worker that was killed; no two workers have the same shard
        remove_unfinished(file)
    if len(rows):
        tensors = {name: torch.cat(parts).contiguous() for name, parts in rows.tensors.items()}
        with atomic_path(files[0]) as temporary:
            save_file(tensors, temporary)
    _write_table(files[1], pa.Table.from_pylist(rows.rejects, schema=REJECTS))
    _write_table(files[2], pa.table(rows.columns, schema=rows.schema))


def count_rows(folder: Path) -> tuple[int, dict[str, int]]:
    """Rows of the complete shards, and how many were rejected for each reason."""
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
