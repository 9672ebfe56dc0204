"""The bundled default: a small latent text-to-image pipeline, its scorer and its judge, all as safetensors.

Everything in the folders beside this file was trained from scratch by ``training/`` on Fashion-MNIST (see NOTICE).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_artifacts.errors import CheckpointError
from moe_artifacts.files import read_json
from moe_artifacts.judge import ManifoldJudge, class_in, load_judge

FOLDER = Path(__file__).parent


def bundled_pipeline(name: str = "fashion") -> tuple[Any, dict[str, Any]]:
    """A diffusers pipeline and the sampling settings that its scorer was calibrated for.

    Example: ``pipe, defaults = bundled_pipeline("fashion")``, then ``pipe("an ankle boot", **defaults)``.

    Raises:
        CheckpointError: If there is no bundled pipeline of that name, or its files are damaged.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    folder = _folder(name)
    try:
        pipe = StableDiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the bundled pipeline {name!r} cannot be read, reinstall moe-artifacts: {error}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(read_json(folder / "defaults.json"))


def bundled_judge(name: str = "fashion") -> ManifoldJudge:
    """The judge of finished images that labelled the bundled scorer's training data.

    Raises:
        CheckpointError: If there is no bundled judge of that name, or its file is damaged.
    """
    return load_judge(_folder(name) / "judge.safetensors")


def class_of(prompt: str, name: str = "fashion") -> int | None:
    """The judge's class that a prompt asks for, by the longest name in its class list; None where there is none.

    Raises:
        CheckpointError: If there is no bundled judge of that name.
    """
    return class_in(prompt, read_json(_folder(name) / "classes.json"))


def _folder(name: str) -> Path:
    folder = FOLDER / name
    if not name.isidentifier() or not folder.is_dir():
        have = sorted(p.name for p in FOLDER.iterdir() if p.is_dir() and not p.name.startswith("_"))
        raise CheckpointError(f"nothing bundled is called {name!r}; there is: {', '.join(have)}")
    return folder
