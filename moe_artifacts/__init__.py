"""Watch a diffusion run and stop an image once it is going wrong.

The way of one image, stage by stage; each stage is one file that can be used and tested alone:

    noise.py        1  what enters scheduler.step -> x0 prediction and log-SNR
    preview.py      2  x0 latents -> RGB preview in [0, 1]
    embedder.py     3  preview -> CLIP embedding of length 1 (towers.py: the image tower of the bundled scorer)
    experts.py      4  embedding -> states and logits, one expert per log-SNR band
    gate.py         5  log-SNR and embedding -> mixture weights
    accumulator.py  6  mixed state -> posterior, exit distribution, cumulative artifact probability
    decision.py     7  continue, abort or clear
    calibration.py  8  recorded runs -> certified thresholds

    scorer.py       one step through stages 1 to 6
    guard/          the scorer around a whole diffusers pipeline call
    trajectory.py   the records and their files
    checkpoint.py config.py files.py shapes.py errors.py    what the rest stands on
    bundled/        a small text-to-image pipeline, its scorer and its judge
    offline.py      recorded trajectories scored folder by folder
    demo.py         the bundled pipeline with and without the guard; report.py: its pictures
    cli.py          the command moe-artifacts

The public names below are imported when first used, so that ``import moe_artifacts`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from moe_artifacts.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    GuardStateError,
    InputError,
    LatentSpaceError,
    MoeArtifactsError,
    UnsupportedPipelineError,
)

__version__ = "0.1.0"

_MODULE_OF = {
    "ArtifactGuard": "moe_artifacts.guard.guard",
    "ArtifactScorer": "moe_artifacts.scorer",
    "GuardedOutput": "moe_artifacts.guard.guard",
    "StepScore": "moe_artifacts.scorer",
    "ThresholdConfig": "moe_artifacts.config",
    "Trajectory": "moe_artifacts.trajectory",
    "Verdict": "moe_artifacts.trajectory",
    "bundled_pipeline": "moe_artifacts.bundled",
}

__all__ = [
    "ArtifactGuard",
    "ArtifactScorer",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "GuardStateError",
    "GuardedOutput",
    "InputError",
    "LatentSpaceError",
    "MoeArtifactsError",
    "StepScore",
    "ThresholdConfig",
    "Trajectory",
    "UnsupportedPipelineError",
    "Verdict",
    "bundled_pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
