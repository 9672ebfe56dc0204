"""A scalar scorer on disk: ``config.json`` and, once it is calibrated, ``model.safetensors``. Nothing is ever unpickled.

The user's function and preview are not part of it: they are given again when it is loaded.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_artifacts.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_state_strict, read_config, read_weights, save_state
from moe_artifacts.config import ThresholdConfig, to_dict
from moe_artifacts.errors import InputError
from moe_artifacts.files import read_json, write_json
from moe_artifacts.noise import progress
from moe_artifacts.scalar.config import FittedStepsConfig, ScalarConfig
from moe_artifacts.scalar.exit import ScalarExit
from moe_artifacts.scalar.posterior import ScalarPosterior

if TYPE_CHECKING:
    from moe_artifacts.calibrated import Calibrated

POSTERIOR, EXIT = "posterior.", "exit."


def save(
    folder: str | os.PathLike[str], config: ScalarConfig, posterior: ScalarPosterior | None, head: ScalarExit | None
) -> None:
    """Write the folder; one that is there already is replaced: what is half replaced does not load."""
    if posterior is not None:
        state = {POSTERIOR + name: torch.from_numpy(values) for name, values in posterior.arrays().items()}
        state |= {EXIT + name: value for name, value in (head.state_dict() if head else {}).items()}
        save_state(Path(folder, WEIGHTS_NAME), state, makes_void=Path(folder, CONFIG_NAME))
    write_json(Path(folder, CONFIG_NAME), to_dict(config))


def load(folder: str | os.PathLike[str]) -> tuple[ScalarConfig, ScalarPosterior | None, ScalarExit | None]:
    """Read a folder.

    Raises:
        CheckpointError: If files are missing or damaged, or do not belong together.
        ConfigError: If the config has unknown keys or values out of range.
    """
    config = read_config(Path(folder, CONFIG_NAME), ScalarConfig)
    if config.fitted is None:
        return config, None, None
    state = read_weights(Path(folder, WEIGHTS_NAME), dtype=torch.float64)
    posterior = ScalarPosterior.from_arrays(_named(state, POSTERIOR), len(config.fitted.log_snr))
    if not config.fitted.has_exit:
        return config, posterior, None
    head = ScalarExit()
    load_state_strict(head, {n: torch.from_numpy(v).float() for n, v in _named(state, EXIT).items()}, os.fspath(folder))
    return config, posterior, head.eval().requires_grad_(False)


def is_scalar(config: Path) -> bool:
    """Whether a ``config.json`` is that of a scalar scorer, judged by its keys; not if it is missing.

    Raises:
        InputError: If it is no JSON.
    """
    values = read_json(config) if config.is_file() else None
    return isinstance(values, dict) and "experts" not in values


def write_calibration(folder: str | os.PathLike[str], found: Calibrated) -> Path:
    """Put posterior, exit distribution and threshold into the folder of a scalar scorer.

    Returns:
        The config that was written.
    Raises:
        InputError, CheckpointError, ConfigError: As :func:`calibrated_config` and :func:`load`.
    """
    config, _, _ = load(folder)
    save(folder, calibrated_config(config, found), found.fitted.posterior, found.fitted.exit_head)
    return Path(folder, CONFIG_NAME)


def calibrated_config(config: ScalarConfig, found: Calibrated) -> ScalarConfig:
    """The config with what was calibrated.

    Raises:
        InputError: If the records are no plain scores, or their noise levels are not known.
    """
    runs, log_snr = found.records.runs, found.records.log_snr
    if found.fitted.posterior is None:
        raise InputError("the records hold the posterior of another scorer: record plain scores, the column 'score'")
    if log_snr is None:
        raise InputError(
            "the records do not say the noise levels of their steps, by which a scorer finds them in a run: calibrate on "
            'trajectory folders, as ArtifactGuard(scorer, on_abort="record") makes them'
        )
    fitted = FittedStepsConfig(
        log_snr=tuple(log_snr.astype(float).tolist()),
        share=tuple((runs.calls / runs.total_calls).tolist()),
        has_exit=found.fitted.exit_head is not None,
    )
    config = dataclasses.replace(config, fitted=fitted, threshold=None)
    return dataclasses.replace(config, threshold=_over_log_snr(found.rule, config))


def _over_log_snr(rule: ThresholdConfig, config: ScalarConfig) -> ThresholdConfig:
    """An economic boundary was fitted over shares of the denoiser calls, one point a step: only their places change."""
    if rule.boundary is None or config.fitted is None:
        return rule
    at = [progress(level, config.log_snr_range) for level in config.fitted.log_snr]
    points = [(at[config.fitted.share.index(u)], abort, clear) for u, abort, clear in rule.boundary]
    return dataclasses.replace(rule, boundary=tuple(points))


def _named(state: dict[str, Tensor], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value.numpy() for name, value in state.items() if name.startswith(prefix)}
