"""The pipeline call of a wave: what the caller may give, and what is recorded of it."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import moe_artifacts
from moe_artifacts.config import to_dict
from moe_artifacts.errors import InputError
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.run_folder import FORMAT_VERSION

OURS = {
    "prompt": "give prompts",
    "num_images_per_prompt": "give images_per_prompt",
    "generator": "every image has a generator of its own, made from seed",
    "latents": "every image has noise of its own, made from seed",
}
_TEXT = re.compile(r"(negative_)?prompt(_\d)?")  # one entry per image


def check_call(arguments: Mapping[str, Any], *, into_folder: bool) -> None:
    """Refuse arguments that cannot be the same for all images.

    Raises:
        InputError: Naming one, and what to do instead.
    """
    for name, value in arguments.items():
        if value is None:
            continue
        if name in OURS:
            raise InputError(f"{name} cannot be given to generate_clean: {OURS[name]}")
        if "prompt" in name and isinstance(value, (list, tuple, Tensor)):
            raise InputError(
                f"{name} must be the same for all images, a text, got {type(value).__name__}: which images make up a "
                "wave is not known beforehand. Give arguments_for, a function of the prompts of a wave"
            )
    output_type = arguments.get("output_type", "pil")
    if into_folder and output_type != "pil":
        raise InputError(f"output_type must be 'pil' where a folder is given: it holds PNG files, got {output_type!r}")


def call_arguments(
    texts: list[str], arguments: Mapping[str, Any], arguments_for: Callable[[list[str]], Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Everything but the generators for one call of the guard; ``texts`` are the prompts, one per image.

    Raises:
        InputError: If ``arguments_for`` returns what is not its to say.
    """
    # Pipelines differ in what they make of one text for many prompts: some repeat it, some refuse it.
    call = {
        name: [value] * len(texts) if isinstance(value, str) and _TEXT.fullmatch(name) else value
        for name, value in arguments.items()
    }
    if arguments_for is not None:
        given = dict(arguments_for(list(texts)))
        if wrong := sorted(given.keys() & (OURS.keys() | arguments.keys())):
            raise InputError(f"arguments_for returned {wrong[0]}: {OURS.get(wrong[0], 'it is given for all images')}")
        call |= given
    # The guard takes prompts for what embeddings stand for: a scorer may look at them, and the verdicts name them.
    return call | {"prompts" if call.get("prompt_embeds") is not None else "prompt": texts}


def run_settings(
    pipe: Any, guard: ArtifactGuard, prompts: list[str], images_per_prompt: int, seed: int, call: Mapping[str, Any]
) -> dict[str, Any]:
    """What the images of a run follow from, as plain JSON values with the keys ``run_folder.SETTINGS``.

    Limits and ``batch_size`` are not among them: they say how far a run goes, and may change when it resumes.
    """
    assert guard.rule is not None, "only a guard in record mode has no rule"
    scheduler = json.loads(pipe.scheduler.to_json_string())
    scheduler.pop("_diffusers_version", None)  # of the one that runs
    return {
        "format_version": FORMAT_VERSION,
        "version": moe_artifacts.__version__,
        "pipeline": type(pipe).__name__,
        "model": _model_name(pipe),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "scheduler": scheduler,
        "call": _plain(call),
        "scorer": guard.scorer.config.name,
        "rule": to_dict(guard.rule),
        "audit_rate": guard.audit_rate,
        "audit_seed": guard.audit_seed,
        "seed": seed,
        "images_per_prompt": images_per_prompt,
        "prompts": prompts,
    }


def _model_name(pipe: Any) -> str | None:
    """A Hub id, or the last part of a local path: images are passed on, and where they were made is nobody's business."""
    name = pipe.config.get("_name_or_path")
    if name is None:
        return None
    return Path(name).name if Path(name).exists() else str(name)


def _plain(value: Any) -> Any:
    """A value as JSON: pictures and arrays by a digest, whatever else JSON lacks by its name.

    Example:
        >>> _plain({"size": (8, 8), "image": np.zeros(3), "callback_on_step_end": print})
        {'size': [8, 8], 'image': 'ndarray (3,) float64 9d908ecfb6b256de', 'callback_on_step_end': 'print'}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Tensor, np.ndarray, Image.Image)):
        kind = type(value).__name__
        array = np.asarray(_widened(value.detach().cpu()) if isinstance(value, Tensor) else value)
        return f"{kind} {array.shape} {array.dtype} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    if isinstance(value, functools.partial):
        value = value.func
    return getattr(value, "__qualname__", type(value).__qualname__)


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype is torch.bfloat16 else value  # numpy has no bfloat16
