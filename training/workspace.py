"""Where the stages keep their files, and the log, progress bar and tracker of one stage."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from training.trackers import chosen_tracker, open_tracker


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensors, up to 1 GB, in place of giving it back to the system after each.

    Fresh pages take a good part of the time of a small model. Elsewhere than with glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(ctypes.c_int(-1), ctypes.c_int(2**30))  # M_TRIM_THRESHOLD
        mallopt(ctypes.c_int(-3), ctypes.c_int(2**25))  # M_MMAP_THRESHOLD, at its limit


def work_folder() -> Path:
    """``MOE_ARTIFACTS_WORK``, by default ``~/.cache/moe-artifacts``: outside the checkout, made when missing."""
    folder = Path(os.environ.get("MOE_ARTIFACTS_WORK", "~/.cache/moe-artifacts")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Stage:
    """The folder of one stage: ``log.txt``, its tracker files and its resumable state.

    Args:
        tracker: As of :func:`training.trackers.chosen_tracker`.
    Raises:
        InputError: If there is no such tracker.
    """

    def __init__(self, name: str, tracker: str | None = None) -> None:
        self.name, self._tracker_name = name, chosen_tracker(tracker)
        self.folder = work_folder() / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = logging.getLogger(f"training.{name}")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        if not self.log.handlers:
            for handler in (logging.FileHandler(self.folder / "log.txt"), logging.StreamHandler(sys.stderr)):
                handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s", "%H:%M:%S"))
                self.log.addHandler(handler)
        self._accelerator: Any = None

    def track(self, step: int, **values: float) -> None:
        """Log numbers to the log file and to the tracker."""
        self.log.info("step %d  %s", step, "  ".join(f"{k} {v:.5g}" for k, v in values.items()))
        if self._tracker_name == "none":
            return
        if self._accelerator is None:
            self._accelerator = open_tracker(self._tracker_name, self.folder)
        self._accelerator.log({f"{self.name}/{k}": v for k, v in values.items()}, step=step)


@contextmanager
def progress(total: int, start: int, name: str) -> Iterator[Any]:
    """A tqdm bar that stays quiet when nobody is looking."""
    from tqdm import tqdm

    with tqdm(total=total, initial=start, desc=name, mininterval=5.0, disable=not sys.stderr.isatty()) as bar:
        yield bar


def compile_if_possible(module: nn.Module, log: logging.Logger) -> None:
    """Compile the forward pass in place where a C++ compiler is found: 1.2 to 2 times faster here, equal to rounding."""
    if shutil.which("g++") is None:
        log.warning("no g++ found: %s runs uncompiled, which is slower", type(module).__name__)
        return
    warnings.filterwarnings("ignore", module="torch._dynamo")  # about a cached version check inside diffusers
    module.compile()
