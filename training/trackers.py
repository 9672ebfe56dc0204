"""Trackers of training figures, by accelerate: TensorBoard, wandb, trackio and others, or "none"."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from moe_artifacts.errors import InputError
from training.processes import LAUNCHED


def chosen_tracker(name: str | None = None) -> str:
    """A tracker that is there: ``name``, else what ``MOE_ARTIFACTS_TRACKER`` says, else TensorBoard.

    Raises:
        InputError: If accelerate knows no such tracker, or its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    name = name or os.environ.get("MOE_ARTIFACTS_TRACKER") or "tensorboard"
    if name == "none":
        return name
    if name not in LOGGER_TYPE_TO_CLASS:
        raise InputError(f"tracker must be none or one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, got {name!r}")
    if name not in [str(found) for found in get_available_trackers()]:
        raise InputError(f"the tracker {name} is not installed: install its package, or choose another, such as none")
    return name


def add_tracker_option(parser: argparse.ArgumentParser) -> None:
    """``--tracker``, for :func:`chosen_tracker`."""
    parser.add_argument(
        "--tracker", help="any that accelerate knows, or none (MOE_ARTIFACTS_TRACKER, else tensorboard)"
    )


def open_tracker(name: str, folder: Path) -> Any:
    """An ``Accelerator`` whose ``log`` writes to a tracker of :func:`chosen_tracker`, into ``folder`` if it writes files."""
    from accelerate import Accelerator
    from accelerate.state import is_initialized

    # All Accelerators of a process share one device: a tracker must not choose it for a training that accelerate runs.
    shared = is_initialized() or any(variable in os.environ for variable in LAUNCHED)
    accelerator = Accelerator(log_with=name, project_dir=folder, cpu=not shared)
    accelerator.init_trackers("tracker")
    return accelerator
