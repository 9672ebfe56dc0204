"""Weights between a pretrained and a fine-tuned model (WiSE-FT, Wortsman et al., arXiv:2109.01903).

How far to go is chosen on validation, one band of noise levels at a time: what fine-tuning gains on nearly clean previews it
may lose on noisy ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_artifacts.checkpoint import read_weights
from moe_artifacts.embedder import state_sha256
from moe_artifacts.errors import CheckpointError, InputError
from moe_artifacts.files import atomic_path

METADATA = "wise_ft"  # one entry holds all: safetensors writes several in random order
MIXES = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class MixScores:
    """How good one mix is on validation."""

    mix: float
    bands: tuple[float, ...]  # one score per band of noise levels, the noisiest first; NaN where none can be told

    @property
    def mean(self) -> float:
        """Over the bands that have a score."""
        finite = [score for score in self.bands if math.isfinite(score)]
        return sum(finite) / len(finite)


def interpolate(pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], mix: float) -> dict[str, Tensor]:
    """``(1 - mix) * pretrained + mix * finetuned`` in float32; the ends are bit-identical to the parents.

    Tensors that are not floating point are taken from ``finetuned``, or from ``pretrained`` at ``mix=0``.

    Raises:
        ValueError: If the two differ in keys or shapes, hold NaN, or ``mix`` is outside [0, 1].

    Example:
        >>> interpolate({"w": torch.zeros(1)}, {"w": torch.ones(1)}, 0.25)
        {'w': tensor([0.2500])}
    """
    if not 0 <= mix <= 1:
        raise ValueError(f"mix must be in [0, 1], got {mix}")
    if different := sorted(pretrained.keys() ^ finetuned.keys()):
        raise ValueError(f"the two models differ in keys: {different[:5]} ({len(different)} in all)")
    mixed = {}
    for key, first in pretrained.items():
        second = finetuned[key]
        if first.shape != second.shape:
            raise ValueError(f"{key} has the shapes {tuple(first.shape)} and {tuple(second.shape)}")
        if not first.is_floating_point():
            mixed[key] = (first if mix == 0 else second).clone()
            continue
        if not (first.isfinite().all() and second.isfinite().all()):
            raise ValueError(f"{key} holds NaN or infinity")
        if mix in (0, 1):  # lerp turns -0.0 into 0.0, and gives NaN where the difference overflows
            mixed[key] = (first if mix == 0 else second).clone()
        else:
            mixed[key] = torch.lerp(first.float(), second.float(), mix).to(first.dtype)
    return mixed


def sweep(
    pretrained: Mapping[str, Tensor],
    finetuned: Mapping[str, Tensor],
    measure: Callable[[dict[str, Tensor]], Sequence[float]],
    mixes: Sequence[float] = MIXES,
) -> list[MixScores]:
    """Score the weights of every mix.

    Args:
        measure: From weights to one score per band of noise levels, larger is better; NaN for a band where nothing can be
            measured, such as one without images.
        mixes: Each in [0, 1].
    Raises:
        InputError: If there are no mixes, no band has a score, or a band has one at some mixes only.
        ValueError: As :func:`interpolate`.
    """
    if not mixes:
        raise InputError("mixes must hold at least one number in [0, 1], got none")
    scores = [MixScores(mix, tuple(measure(interpolate(pretrained, finetuned, mix)))) for mix in mixes]
    measured = {tuple(math.isfinite(score) for score in row.bands) for row in scores}
    if len(measured) > 1:
        raise InputError(f"measure must tell the same bands of every mix, got {scores}")
    if not any(measured.pop()):
        raise InputError(
            f"none of the {len(scores[0].bands)} bands of noise levels has a score: each lacks images of one kind, to "
            "train on or to validate; label more images"
        )
    return scores


def best_mix(scores: Sequence[MixScores]) -> float:
    """The mix with the best mean over the bands; of equals the one nearest to the pretrained model.

    Example:
        >>> best_mix([MixScores(0.0, (0.6, 0.8)), MixScores(0.5, (0.7, 0.9)), MixScores(1.0, (0.9, 0.5))])
        0.5
    """
    return min(scores, key=lambda row: (-row.mean, row.mix)).mix


def best_per_band(scores: Sequence[MixScores]) -> list[float | None]:
    """The best mix of each band by itself; None where none can be told. One backbone serves all bands: this is to look at.

    Example:
        >>> best_per_band([MixScores(0.0, (0.6, math.nan)), MixScores(1.0, (0.9, math.nan))])
        [1.0, None]
    """
    bands = range(len(scores[0].bands))
    best = [min(scores, key=lambda row: (-row.bands[k], row.mix)) for k in bands]
    return [row.mix if math.isfinite(row.bands[k]) else None for k, row in zip(bands, best, strict=True)]


def as_rows(scores: Sequence[MixScores]) -> list[dict[str, Any]]:
    """The table of a sweep as JSON values; None where there is no score."""
    return [
        {"mix": row.mix, "mean": row.mean, "bands": [s if math.isfinite(s) else None for s in row.bands]}
        for row in scores
    ]


def write_mix(path: Path, pretrained: Path, finetuned: Path, mix: float) -> dict[str, Tensor]:
    """Mix two safetensors files into a third, which says in its metadata what it was made of.

    Returns:
        The weights.
    Raises:
        CheckpointError: If a parent is missing or damaged.
        ValueError: As :func:`interpolate`.
    """
    parents = {"pretrained": _read(pretrained), "finetuned": _read(finetuned)}
    mixed = interpolate(parents["pretrained"], parents["finetuned"], mix)
    provenance = {"mix": mix} | {f"{name}_sha256": state_sha256(state) for name, state in parents.items()}
    with atomic_path(path) as temporary:
        save_file(mixed, temporary, metadata={METADATA: json.dumps(provenance)})
    return mixed


def read_provenance(path: Path) -> dict[str, Any]:
    """What ``write_mix`` noted: ``mix``, and the SHA-256 of both parents' weights, as ``weights_sha256`` of a checkpoint.

    Raises:
        CheckpointError: If the file is not one of ``write_mix``.
    """
    read_weights(path)  # whole, or an error that says so
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if METADATA not in metadata:
        raise CheckpointError(f"{path} does not say what it was mixed of: its metadata have no {METADATA!r}")
    return json.loads(metadata[METADATA])


def _read(path: Path) -> dict[str, Tensor]:
    read_weights(path)  # whole and finite, or an error that says so; it gives float32, where the ends keep the dtype
    return load_file(path)
