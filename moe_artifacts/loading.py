"""The pipeline and the device that a command line names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_artifacts.bundled import FOLDER, bundled_pipeline
from moe_artifacts.checkpoint import HUB_ID
from moe_artifacts.errors import CheckpointError, InputError

DTYPES = ("float32", "float16", "bfloat16")


def checked_device(name: str | None = None) -> torch.device:
    """The device of that name, such as "cpu" or "cuda:1"; without a name, cuda where there is one, else cpu.

    Raises:
        InputError: If there is none here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def is_bundled(name: str) -> bool:
    """Whether a pipeline of that name, and a scorer for it, are in the package."""
    return name.isidentifier() and (FOLDER / name / "pipeline").is_dir()


def require_pipeline(name: str) -> None:
    """Refuse a name that can be no pipeline's, before anything is read or fetched.

    Raises:
        CheckpointError: If it is neither bundled, nor a folder, nor of the form of a Hub id.
    """
    if not is_bundled(name) and not (name and Path(name).is_dir()) and not HUB_ID.fullmatch(name):
        raise CheckpointError(f"no pipeline {name!r}: it is neither bundled, nor a folder, nor a Hub id (owner/name)")


def load_pipeline(
    name: str, dtype: torch.dtype = torch.float32, device: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """A pipeline, quiet and on its device, and the arguments of a call that it was made for.

    Args:
        name: A bundled name, a folder or a Hub id; safetensors only.
        device: As of :func:`checked_device`.
    Raises:
        CheckpointError: If there is none, or it cannot be read.
        InputError: If there is no such device.
    """
    require_pipeline(name)
    place = checked_device(device)
    defaults: dict[str, Any] = {}
    if is_bundled(name):
        pipe, defaults = bundled_pipeline(name)
        pipe = pipe if pipe.dtype == dtype else pipe.to(dtype=dtype)
    else:
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, AttributeError) as error:  # the last: a class that diffusers lacks
            raise CheckpointError(f"the pipeline {name!r} cannot be read: {error}") from error
        pipe.set_progress_bar_config(disable=True)
    return pipe.to(place), defaults
