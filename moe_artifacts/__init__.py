"""Watch a diffusion run and stop an image once it is going wrong.

The way of one image, stage by stage; each stage is one file that can be used and tested alone:

    noise.py        1  what enters scheduler.step -> x0 prediction and log-SNR
    preview.py      2  x0 latents -> RGB preview in [0, 1]
    embedder.py     3  preview -> CLIP embedding of length 1 (towers.py: the image tower of the bundled scorer)
    experts.py      4  embedding -> states and logits, one expert per log-SNR band
    gate.py         5  log-SNR and embedding -> mixture weights
    accumulator.py  6  mixed state -> posterior, exit distribution, cumulative artifact probability
    decision.py     7  continue, abort or clear
    calibration/    8  recorded runs -> calibrated probabilities, certified thresholds, the economic boundary

    scorer.py       one step through stages 1 to 6
    scalar/         the same session on anybody's score: one number per image and step becomes a posterior
    guard/          a scorer around a whole diffusers pipeline call, and generate_clean around many of them
    noise_tables.py latent_spaces.py    the same facts of every scheduler, and of every latent space
    verdict.py trajectory.py trajectory_files.py    what became of an image; the records of a batch, and their files
    recorded.py records.py record_files.py    recorded runs as plain numbers, and from other files
    label/          verdicts of people, by keys in the terminal
    audit/          the false-abort rate of production runs, against the promise
    policy.py       what a rule does to recorded runs: false aborts, steps saved, cost per clean image
    racing/         best of N: a compute budget for the most promising candidates of a prompt
    calibrate.py calibrated.py held_back.py write_back.py    the command calibrate: find a threshold, say what it does, store it
    exit_loss.py    the losses of an exit head
    checkpoint.py config.py files.py shapes.py errors.py    what the rest stands on
    bundled/        a small text-to-image pipeline, its scorer and its judge
    offline.py      recorded trajectories scored folder by folder
    demo.py         the bundled pipeline with and without the guard; report.py: its pictures; schedulers.py: short names
    cli/            the command moe-artifacts, one file per sub-command

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
    ReproducibilityWarning,
    UnsupportedPipelineError,
)

__version__ = "0.1.0"

_MODULE_OF = {
    "ArtifactGuard": "moe_artifacts.guard.guard",
    "ArtifactScorer": "moe_artifacts.scorer",
    "Certified": "moe_artifacts.calibration",
    "CleanRun": "moe_artifacts.guard.clean_run",
    "GuardedOutput": "moe_artifacts.guard.guard",
    "Race": "moe_artifacts.racing",
    "Risk": "moe_artifacts.calibration",
    "ScalarScorer": "moe_artifacts.scalar.scorer",
    "ScoredRuns": "moe_artifacts.recorded",
    "StepScore": "moe_artifacts.scorer",
    "ThresholdConfig": "moe_artifacts.config",
    "Trajectory": "moe_artifacts.trajectory",
    "Verdict": "moe_artifacts.verdict",
    "bundled_pipeline": "moe_artifacts.bundled",
    "certify": "moe_artifacts.calibration",
    "generate_clean": "moe_artifacts.guard.generate",
    "read_run": "moe_artifacts.guard.run_folder",
}

__all__ = [
    "ArtifactGuard",
    "ArtifactScorer",
    "CalibrationError",
    "Certified",
    "CheckpointError",
    "CleanRun",
    "ConfigError",
    "GuardStateError",
    "GuardedOutput",
    "InputError",
    "LatentSpaceError",
    "MoeArtifactsError",
    "Race",
    "ReproducibilityWarning",
    "Risk",
    "ScalarScorer",
    "ScoredRuns",
    "StepScore",
    "ThresholdConfig",
    "Trajectory",
    "UnsupportedPipelineError",
    "Verdict",
    "bundled_pipeline",
    "certify",
    "generate_clean",
    "read_run",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
