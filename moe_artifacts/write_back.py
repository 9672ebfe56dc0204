"""What was calibrated into the folder of a scorer.

A scorer of ours gets its threshold, in config.json; a scalar scorer gets the posterior fitted to its scores too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from moe_artifacts import checkpoint
from moe_artifacts.calibrated import Calibrated
from moe_artifacts.config import ThresholdConfig, to_dict
from moe_artifacts.errors import CheckpointError, InputError
from moe_artifacts.files import write_json
from moe_artifacts.noise import progress
from moe_artifacts.scalar.checkpoint import is_scalar
from moe_artifacts.scorer import ArtifactScorer


def own_folder(name: str) -> Path:
    """The checkpoint folder that ``name`` stands for, if it may be written to.

    Raises:
        CheckpointError: If it is bundled with the package or on the Hub: a copy is needed first.
    """
    found = checkpoint.find_checkpoint(name)
    if found.resolve().is_relative_to(checkpoint.BUNDLED.resolve()) or not Path(name).is_dir():
        where = "part of the installed package" if checkpoint.HUB_ID.fullmatch(name) is None else "on the Hub"
        raise CheckpointError(
            f'{name!r} is {where} and is not changed; make a copy and name its folder: python -c "from moe_artifacts import '
            f"ArtifactScorer; ArtifactScorer.from_pretrained('{name}').save_pretrained('my-scorer')\", then --scorer "
            "./my-scorer"
        )
    return found


def write_threshold(folder: Path, found: Calibrated) -> Path:
    """Put the rule with its provenance, and what it decides by, into the folder.

    Returns:
        The file written.
    Raises:
        InputError: If the records are of another scorer, or of another kind of scorer.
        CheckpointError: If the folder holds no whole checkpoint.
    """
    target = folder / checkpoint.CONFIG_NAME
    if is_scalar(target):
        return _write_scalar(folder, found)
    records = found.records
    if found.fitted.posterior is not None:
        raise InputError(
            f"the records hold plain scores, whose posterior is not the one of the scorer in {folder}; calibrate what "
            "`moe-artifacts score` writes with it"
        )
    scorer = ArtifactScorer.from_pretrained(folder)
    identity, made_by = scorer.identity(), records.meta.get("scorer")
    if made_by is not None and made_by != identity:
        raise InputError(
            f"the records were scored by {made_by}, and {folder} holds {identity}: thresholds do not carry over"
        )
    if made_by is None and records.log_snr is not None:
        raise InputError(
            f"the records do not say which scorer made them, and thresholds do not carry over to another than {identity}: "
            'record with on_abort="record", or score recorded latents with `moe-artifacts score`'
        )
    rule = _over_log_snr(found, scorer.config.log_snr_range)
    write_json(target, to_dict(dataclasses.replace(scorer.config, threshold=rule)))
    return target


def _write_scalar(folder: Path, found: Calibrated) -> Path:
    from moe_artifacts.scalar import checkpoint as scalar

    config, _, _ = scalar.load(folder)
    if config.siblings != (found.request.siblings > 1):
        raise InputError(
            f"the scorer in {folder} looks at {'siblings' if config.siblings else 'each image alone'}, "
            f"the calibration had siblings={found.request.siblings}; give --siblings accordingly"
        )
    return scalar.write_calibration(folder, found)


def _over_log_snr(found: Calibrated, log_snr_range: tuple[float, float]) -> ThresholdConfig:
    """The rule over the scorer's own progress, by log-SNR; it was fitted over shares of the denoiser calls.

    A boundary has one point per scored step, so only the places of the points change.
    """
    rule, log_snr = found.rule, found.records.log_snr
    if rule.boundary is None:
        return rule
    if log_snr is None:
        raise InputError("an economic boundary of a scorer lies over log-SNR, which only trajectory folders hold")
    at = progress(torch.from_numpy(log_snr), log_snr_range).numpy()[: len(rule.boundary)]
    if (np.diff(at) <= 0).any():
        raise InputError(
            f"two scored steps lie at the same end of the scorer's log-SNR range {log_snr_range}, where a boundary cannot tell "
            f"them apart: log-SNR {log_snr.tolist()}"
        )
    points = tuple((float(u), abort, clear) for u, (_, abort, clear) in zip(at, rule.boundary, strict=True))
    return dataclasses.replace(rule, boundary=points)
