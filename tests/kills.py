"""Killing a process at random points of its work."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch


def with_one_thread(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """What a killed process runs: threads share out sums in another order, and conftest.py gives the tests one only."""
    torch.set_num_threads(1)
    return main(arguments)


def kill_ten_times(main: Callable[[list[str]], int], arguments: list[str], out: Path, seconds: float) -> None:
    """Start a command ten times and kill it each time, somewhere in the first third of the time that it takes.

    One that gets to its end all the same begins anew.

    Args:
        out: What it writes.
        seconds: That it takes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([main.__module__, "open_clip"])  # imported once for all
    draws, killed = random.Random(0), 0
    while killed < 10:
        process = context.Process(target=with_one_thread, args=(main, arguments))
        process.start()
        time.sleep(draws.uniform(0, seconds / 3))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed += 1
        else:
            assert process.exitcode == 0
            shutil.rmtree(out)
