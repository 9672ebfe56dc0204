"""What heads are trained on: images behind the frozen embedder, read a few at a time.

``EmbeddedRows`` (:mod:`training.embedded`) reads them from the files of :mod:`training.embed`; the bundled recipe holds its own in
memory (:mod:`training.train`). Whatever reads them, the columns of one number an image are in memory, and ``take`` reads the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from moe_artifacts.calibration import NUM_BANDS
from moe_artifacts.errors import InputError
from moe_artifacts.shapes import PerImage, Rows
from training.embedded import EmbeddedBatch
from training.state import step_generator

LOOKED_AT = 4_096  # images read to find out which noise levels there are


@runtime_checkable  # for `make shapes`
class HeadData(Protocol):
    """Images with the embeddings of their previews at a number of checks."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def checks(self) -> int: ...  # the most that an image has
    @property
    def label(self) -> PerImage: ...  # in [0, 1]: 1 has artifacts; NaN: not known
    @property
    def margin(self) -> PerImage: ...  # how far the judge sees an image from the border, above 0: bad; NaN: not known
    @property
    def prompt_id(self) -> Int64[Tensor, " batch"]: ...  # equal for images of one prompt
    def __len__(self) -> int: ...
    def take(self, rows: Rows) -> EmbeddedBatch: ...


def on_device(batch: EmbeddedBatch, device: torch.device) -> EmbeddedBatch:
    """The same batch where the heads are."""
    return EmbeddedBatch(**{name: values.to(device) for name, values in vars(batch).items()})


@dataclass(frozen=True, eq=False)
class Subset:
    """Some of the images, as data of their own; nothing is read for it."""

    source: HeadData
    rows: Rows

    @property
    def embed_dim(self) -> int:
        return self.source.embed_dim

    @property
    def checks(self) -> int:
        return self.source.checks

    @property
    def label(self) -> PerImage:
        return self.source.label[self.rows]

    @property
    def margin(self) -> PerImage:
        return self.source.margin[self.rows]

    @property
    def prompt_id(self) -> Int64[Tensor, " batch"]:
        return self.source.prompt_id[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Rows) -> EmbeddedBatch:
        return self.source.take(self.rows[rows])


def is_bad(label: PerImage) -> np.ndarray:
    """Where more than half of the raters saw artifacts."""
    return (label > 0.5).numpy()


def labelled(data: HeadData, name: str) -> Subset:
    """The images whose label is known.

    Args:
        name: Of the split, for messages.
    Raises:
        InputError: If there are none, or all are of one kind, or a label is outside [0, 1].
    """
    label = data.label
    rows = (~label.isnan()).nonzero().squeeze(1)
    if len(rows) == 0:
        raise InputError(
            f"the split {name!r} has no label among {len(data)} images: let a judge, or people, label them"
        )
    known = label[rows]
    if not ((known >= 0) & (known <= 1)).all():
        raise InputError(f"the labels of {name!r} must be in [0, 1], got {known.min():g} to {known.max():g}")
    bad = is_bad(known)
    if bad.all() or not bad.any():
        raise InputError(
            f"all {len(rows)} labelled images of {name!r} are {'bad' if bad.all() else 'clean'}: both kinds are needed. "
            "Record more prompts, or let the judge be more or less strict"
        )
    return Subset(data, rows)


def at_most(data: HeadData, count: int, seed: int) -> HeadData:
    """About ``count`` images at most: all those of randomly chosen prompts, so that images of one prompt stay together."""
    if len(data) <= count:
        return data
    ids, place = data.prompt_id.unique(return_inverse=True)
    order = torch.empty(len(ids), dtype=torch.int64)
    order[torch.randperm(len(ids), generator=step_generator(seed, 0))] = torch.arange(len(ids))
    rows = order[place].argsort(stable=True)[:count]  # prompt after prompt; the last one may be cut
    return Subset(data, rows.sort().values)


def log_snr_range_of(data: HeadData, seed: int = 0) -> tuple[float, float]:
    """Range of log-SNR (nats) that progress is measured over: from a check before the first one recorded, to the last.

    Runs begin before their first check. Were progress 0 only there, nothing could have happened by then, and no rule that
    accumulates over progress could decide at it.

    Raises:
        InputError: If no image looked at has a check with a finite noise level.
    """
    levels = levels_of(data, seed)
    if len(levels) == 0:
        raise InputError("no image has a check with a finite log-SNR: embed trajectories or noised images")
    low, high = levels.min().item(), levels.max().item()
    low, high = low - (high - low) / data.checks, high
    return (low, high) if high - low >= 1 else (high - 1, high)  # one level: the nat before it


def rows_per_band(data: HeadData, log_snr_range: tuple[float, float], seed: int = 0) -> list[int]:
    """How many checks of the images looked at lie in each of the calibration's bands, the noisiest first."""
    low, high = log_snr_range
    band = ((levels_of(data, seed) - low) / (high - low) * NUM_BANDS).floor().long().clamp(0, NUM_BANDS - 1)
    return torch.bincount(band, minlength=NUM_BANDS).tolist()


def levels_of(data: HeadData, seed: int = 0) -> Tensor:
    """log-SNR of the checks of some images, those that are finite (pure noise has minus infinity)."""
    rows = torch.randperm(len(data), generator=step_generator(seed, 0))[:LOOKED_AT].sort().values
    levels = torch.cat([data.take(part).log_snr.flatten() for part in rows.split(512)])
    return levels[levels.isfinite()]
