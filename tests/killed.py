"""Every stage of the road from a folder of images to a scorer, killed again and again: ``python -m tests.killed FOLDER``.

Each stage runs once to its end in ``FOLDER/whole``, and in ``FOLDER/often`` it is killed ten times at random points of the time that
it takes, then run to its end. A stage that was done before the tenth kill begins anew. Stages are forked from one process:
importing torch takes seconds, and a kill should hit the work.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from moe_artifacts.files import write_json
from tests.class_folder import discs_and_bars
from tests.diffusiondb_fixture import write_diffusiondb
from training.own.images import small_run

KILLS = 10
Stage = tuple[str, list[str]]


def stages() -> list[Stage]:
    """All of them with relative paths, small enough for a test."""
    source = ["--images", "../images", "--out", "."]
    own = small_run(
        Path("own"),
        pipeline="pipeline",
        prompts=Path("prompts.parquet"),
        judge="manifold:judges/first.safetensors",
        size=32,
        count="train=200,validation=100,calibration=300,test=100",
        classify_steps=10,
        train=["--steps", "60"],
    )
    small = ["--noise-steps", "6", "--save-every", "2", "--batch", "64", "--micro-batch", "32"]
    few = ["--settings", "ddim:10,dpm:6", "--batch", "50"]
    # Of an option that is given twice the last one counts.
    own = replace(own, tune=[*own.tune, *small], collect=[*own.collect, *few])
    extra = {"training.own.calibrate": ["--check-cost", "0.02"]}  # otherwise measured
    by_hand = ["pipeline", "--prompts", "prompts.parquet", "--out", "by-hand", "--guidance-scale", "1"]
    later = [
        ("training.own.collect", [*by_hand, "--count", "train=100", *few]),
        ("training.own.label", ["by-hand", "--judge", "manifold:judges/first.safetensors"]),
    ]
    tables = ["--metadata", "../diffusiondb/metadata.parquet", "--ratings", "../diffusiondb/diffusiondb_export.parquet"]
    return [
        ("training.generator", [*source, "--steps", "4", "--vae-steps", "4"]),
        ("training.judges", [*source, "--steps", "20"]),
        *((module, [*arguments, *extra.get(module, [])]) for module, arguments in own.stages()),
        *later,
        ("training.data.diffusiondb", [*tables, "--parts", "../diffusiondb", "--out", "images.parquet"]),
    ]


def fork(stage: Stage, folder: Path) -> int:
    """Run a stage in a process of its own, quietly, with ``folder`` as its working directory; returns the process."""
    module, arguments = stage
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        with open("output.txt", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        main: Callable[[list[str]], int | None] = importlib.import_module(module).main
        code = main(arguments) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_often(stage: Stage, folder: Path, seconds: float, draws: random.Random) -> dict[str, int]:
    """Ten kills, at up to a third of the time that the stage takes; how many hit it, and how often it got to its end."""
    backup = folder.with_name("before")
    shutil.copytree(folder, backup)
    told = {"killed": 0, "ended": 0}
    while told["killed"] < KILLS:
        child = fork(stage, folder)
        time.sleep(draws.uniform(0, seconds / 3))
        os.kill(child, signal.SIGKILL)
        code = code_of(child)
        if code == 0:
            told["ended"] += 1
            shutil.rmtree(folder)
            shutil.copytree(backup, folder)
        elif code == -signal.SIGKILL:
            told["killed"] += 1
        else:
            raise RuntimeError(f"{stage[0]} ended with {code}: see {folder / 'output.txt'}")
    shutil.rmtree(backup)
    return told


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["MOE_ARTIFACTS_TRACKER"] = "none"
    discs_and_bars(folder / "images", 200)
    write_diffusiondb(folder / "diffusiondb")
    whole, often = folder / "whole", folder / "often"
    whole.mkdir()
    os.chdir(whole)  # the configuration of the image tower is written beside it
    todo = stages()
    shutil.copytree(whole, often)
    for module, _ in todo:
        importlib.import_module(module)
    draws, told = random.Random(0), {}
    for number, stage in enumerate(todo):
        start = time.perf_counter()
        if code := code_of(fork(stage, whole)):
            raise RuntimeError(f"{stage[0]} ended with {code}: see {whole / 'output.txt'}")
        seconds = time.perf_counter() - start
        hits = kill_often(stage, often, seconds, draws)
        if code := code_of(fork(stage, often)):
            raise RuntimeError(f"{stage[0]} ended with {code}: see {often / 'output.txt'}")
        told[f"{number} {stage[0]}"] = {**hits, "seconds": seconds}
        print(f"{stage[0]}: {seconds:.1f} s, {hits}", flush=True)
    write_json(folder / "told.json", told)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
