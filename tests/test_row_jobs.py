from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from moe_artifacts.errors import InputError, LatentSpaceError
from training import ray_jobs, row_jobs
from training.ray_jobs import run_on_ray
from training.row_jobs import (
    RowJob,
    ShardRows,
    add_run_options,
    complete_shards,
    count_rows,
    in_batches,
    read_ahead,
    run_as_asked,
    run_job,
    shard_files,
)

SCHEMA = pa.schema({"key": pa.string(), "square": pa.int64()})


def squares(numbers: list[int]) -> ShardRows:
    """Fails where a number is negative."""
    rows = ShardRows(SCHEMA)
    for number in numbers:
        if number < 0:
            raise ValueError(f"{number} is negative")
        rows.add(key=str(number), square=number**2)
        rows.add_tensor("number", torch.tensor([number]))
    return rows


def worked_through(numbers: list[int], size: int, work: Callable[[list[int]], ShardRows] = squares) -> ShardRows:
    rows = ShardRows(SCHEMA)
    in_batches(numbers, size, work, rows, key=str)
    return rows


def shard(number: int) -> ShardRows:
    """Five rows, of which one fails; nothing in shard 2."""
    return worked_through([] if number == 2 else [*range(10 * number, 10 * number + 4), -1 - number], 2)


def job(folder: Path, work: Callable[[int], ShardRows] = shard, shards: int = 7, **facts: object) -> RowJob:
    return RowJob(name="squares", folder=folder, shards=shards, facts=facts, shard=work)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its bytes, temporary ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- rows


@given(st.lists(st.integers(-3, 9)), st.integers(1, 5))
def test_a_row_that_fails_is_rejected_and_no_other(numbers, size):
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    if any(len(part) > 1 and max(part) < 0 for part in parts):
        with pytest.raises(InputError, match=r"none of \d rows works, from '-\d' on: ValueError: -\d is negative"):
            worked_through(numbers, size)
        return
    rows = worked_through(numbers, size)
    good = [number for number in numbers if number >= 0]
    assert rows.columns == {"key": [str(n) for n in good], "square": [n**2 for n in good]}
    assert [int(part) for part in rows.tensors.get("number", [])] == good
    assert [(reject["key"], reject["reason"]) for reject in rows.rejects] == [
        (str(number), "error") for number in numbers if number < 0
    ]


def test_a_row_that_fails_says_why():
    [reject] = worked_through([1, -2], 2).rejects
    assert reject == {"key": "-2", "reason": "error", "detail": "ValueError: -2 is negative"}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), MemoryError(), torch.OutOfMemoryError(), LatentSpaceError("no")]
)
@pytest.mark.parametrize("alone", [False, True])
def test_what_the_next_row_would_meet_too_is_no_reject(error, alone):
    def work(numbers):
        if alone and len(numbers) > 1:
            raise ValueError("not together")
        raise error

    with pytest.raises(type(error)):
        worked_through([1, 2, 3], 2, work)


def test_what_the_source_raises_is_no_reject():
    def numbers():
        yield 1
        raise InputError("damaged")

    rows = ShardRows(SCHEMA)
    with pytest.raises(InputError, match="damaged"):
        in_batches(numbers(), 1, squares, rows, key=str)
    assert rows.columns["square"] == [1]


def test_a_reject_holds_any_name_of_a_file(tmp_path):
    def work(number):
        rows = ShardRows(SCHEMA)
        rows.reject("a", "damaged", os.fsdecode(b"\xff.png"))
        return rows

    run_job(job(tmp_path, work, 1))
    assert pq.read_table(tmp_path / "rejects" / "000000.parquet")["detail"].to_pylist() == ["?.png"]


@given(st.lists(st.integers()))
def test_parts_read_ahead_are_the_same(parts):
    assert list(read_ahead(iter(parts))) == parts


def test_one_part_is_read_ahead_and_no_more():
    read = []

    def parts():
        for number in range(5):
            read.append(number)
            yield number

    for number in (ahead := read_ahead(parts())):
        if number == 2:
            ahead.close()  # waits for the thread
    assert read == [0, 1, 2, 3]


# --- shards


def test_the_folder_holds_rows_tensors_and_rejects(tmp_path):
    run_job(job(tmp_path, seed=3))
    assert [path.name for path in shard_files(tmp_path)] == [f"{number:06d}.parquet" for number in range(7)]
    assert pq.read_table(tmp_path / "000003.parquet")["square"].to_pylist() == [900, 961, 1024, 1089]
    assert load_file(tmp_path / "000003.safetensors")["number"].tolist() == [30, 31, 32, 33]
    assert not (tmp_path / "000002.safetensors").exists()  # no rows
    assert pq.read_table(tmp_path / "rejects" / "000003.parquet")["key"].to_pylist() == ["-4"]
    assert count_rows(tmp_path) == (24, {"error": 6})
    assert complete_shards(tmp_path) == shard_files(tmp_path)


@given(st.permutations(range(3)), st.integers(0, 2))
def test_workers_write_what_one_would(tmp_path_factory, order, done):
    one, three = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("three")
    run_job(job(one))
    for worker in order[:done]:
        run_job(job(three), worker, 3)
    if done:
        with pytest.raises(InputError, match="of 7 shards; run the stage"):
            complete_shards(three)
    for worker in order:  # those that are done have nothing left to do
        run_job(job(three), worker, 3)
    assert contents(three) == contents(one)


def test_a_shard_that_cannot_be_read_is_left_out_and_named(tmp_path):
    def work(number):
        if number in damaged:
            raise InputError(f"file {number} is damaged")
        return shard(number)

    damaged = {0, 4}
    with pytest.raises(
        InputError, match=r"^2 of 7 shards failed, the other shards are complete; the first is shard 0: f"
    ):
        run_job(job(tmp_path / "a", work))
    assert len(shard_files(tmp_path / "a")) == 5
    damaged = set()
    run_job(job(tmp_path / "a", work))
    run_job(job(tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_three_shards_that_fail_in_a_row_end_the_run(tmp_path):
    tried = []

    def work(number):
        tried.append(number)
        raise InputError("no")

    with pytest.raises(InputError, match="3 of 7 shards failed, the run was given up"):
        run_job(job(tmp_path, work))
    assert tried == [0, 1, 2]


def test_a_full_disk_ends_the_run_and_leaves_whole_shards(tmp_path, monkeypatch):
    def save(tensors, path):
        if "000003" in str(path):
            Path(path).write_bytes(b"half of it")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        saved(tensors, path)

    saved = row_jobs.save_file
    with monkeypatch.context() as patch:
        patch.setattr(row_jobs, "save_file", save)
        with pytest.raises(OSError, match="No space left"):
            run_job(job(tmp_path / "a"))
    assert len(shard_files(tmp_path / "a")) == 3
    run_job(job(tmp_path / "a"))
    run_job(job(tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_folder_of_another_run_is_refused(tmp_path):
    run_job(job(tmp_path, seed=3))
    run_job(job(tmp_path, seed=3))
    with pytest.raises(InputError, match="made with seed=3, this run has 4"):
        run_job(job(tmp_path, seed=4))
    with pytest.raises(InputError, match="made with shards=7, this run has 8"):
        run_job(job(tmp_path, shards=8, seed=3))


# --- the command line


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_run_options(parser)
    return parser.parse_args([*words, "--out", "folder"])


def test_the_way_is_chosen_on_the_command_line(tmp_path, monkeypatch):
    run_as_asked(job(tmp_path), options("--shard", "1/3"))
    assert [path.stem for path in shard_files(tmp_path)] == ["000001", "000004"]
    asked = []
    monkeypatch.setattr(ray_jobs, "run_on_ray", lambda *values: asked.append(values[1:]))
    run_as_asked(job(tmp_path), options("--ray", "--ray-workers", "4", "--ray-cpus", "0.5", "--ray-gpus", "1"))
    assert asked == [(4, 0.5, 1.0)]
    for words in (["--ray-workers", "0"], ["--ray-cpus", "0"], ["--ray-gpus", "-1"]):
        with pytest.raises(InputError, match="ray-workers must be at least 1, ray-cpus positive"):
            run_as_asked(job(tmp_path), options("--ray", *words))
    with pytest.raises(SystemExit):
        options("--ray", "--shard", "0/2")


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'moe-artifacts\[scale\]'"):
        run_on_ray(job(tmp_path))


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "room"),
    [({"CPU": 8.0}, 3, 0, 2), ({"CPU": 8.0, "GPU": 2.0}, 1, 0.5, 4), ({"CPU": 8.0}, 1, 1, 0), ({}, 1, 0, 0)],
)
def test_as_many_workers_as_there_is_room_for(resources, cpus, gpus, room):
    assert ray_jobs._room(resources, cpus, gpus) == room


# --- Ray


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """A cluster of two CPUs on this machine."""
    ray = pytest.importorskip("ray", reason="Ray Data is the optional extra [scale]")
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # nothing is sent, nothing left at home
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


IGNORE_RAY = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.mark.slow
@IGNORE_RAY
def test_ray_writes_what_a_loop_would(ray, tmp_path):
    def by_value(number):  # a local function, which Ray sends as it is: it need not find this file
        rows = row_jobs.ShardRows(schema)
        row_jobs.in_batches(range(10 * number, 10 * number + 5), 2, odd, rows, key=str)
        return rows

    def odd(numbers):
        rows = row_jobs.ShardRows(schema)
        for number in numbers:
            rows.add(key=str(1 // (number % 5)), square=number**2)  # 0, 5, ... fail
            rows.add_tensor("number", torch.tensor([number]))
        return rows

    schema = SCHEMA
    run_job(job(tmp_path / "loop", by_value))
    run_job(job(tmp_path / "ray", by_value), 1, 3)  # what is there already is left as it is
    run_on_ray(job(tmp_path / "ray", by_value), workers=2)
    assert contents(tmp_path / "ray") == contents(tmp_path / "loop")
    assert count_rows(tmp_path / "ray") == (28, {"error": 7})
    run_on_ray(job(tmp_path / "ray", by_value))  # nothing left to do
    with pytest.raises(InputError, match="no room for a worker of 3 CPUs"):
        run_on_ray(job(tmp_path / "more", by_value), cpus=3)


@pytest.mark.slow
@IGNORE_RAY
def test_a_shard_that_fails_on_ray_is_left_out_and_named(ray, tmp_path):
    def work(number):
        if number == 1:
            raise InputError("file 1 is damaged")
        if number == 5:
            raise OSError(28, "No space left on device")
        return row_jobs.ShardRows(schema)

    schema = SCHEMA
    with pytest.raises(InputError, match=r"2 of 7 shards failed, the other shards are complete"):
        run_on_ray(job(tmp_path, work), workers=1)
    assert len(shard_files(tmp_path)) == 5
