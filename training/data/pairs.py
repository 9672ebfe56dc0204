"""What a CLIP model is tuned on: rows of a preview (or the latents behind it), a prompt, a log-SNR and perhaps a label.

``read_pairs`` reads folders of trajectories and of the shards of :mod:`training.forward_noise`. Any other source needs its
columns and a function from rows to pictures:

    pairs = PreviewPairs(kind="previews", prompts=["a bag"], prompt=..., log_snr=..., label=..., margin=...,
                         read=lambda rows: ...)

The columns are held in memory, about 35 bytes a row; pictures are read from their files a few at a time, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_artifacts.embedder import state_sha256
from moe_artifacts.errors import InputError
from moe_artifacts.files import sha256_file
from moe_artifacts.shapes import PerImage, Rows
from moe_artifacts.trajectory_files import LATENTS_NAME, iter_trajectories
from training.data.splits import assign_splits, linked_groups
from training.level_images import TrajectorySource
from training.row_jobs import META, complete_shards, shard_files

COLUMNS = ("prompt", "log_snr", "label", "margin")
AT_ONCE = 64  # images of a trajectory looked through at a time


@dataclass(frozen=True)
class PairBatch:
    """Some rows, with their pictures."""

    images: Tensor  # float32 [row 3 pixel_h pixel_w] in [0, 1], or latents [row channel height width]
    prompts: list[str]
    log_snr: PerImage
    label: PerImage
    margin: PerImage


@dataclass(frozen=True, kw_only=True, eq=False)
class PreviewPairs:
    """Rows that are read in any order, a few at a time.

    Raises:
        InputError: If there are no rows, or the columns do not fit together.
    """

    kind: Literal["previews", "latents"]  # what ``read`` gives
    prompts: list[str]  # distinct
    prompt: Rows  # index into ``prompts``
    log_snr: PerImage  # nats, finite
    label: PerImage  # P(artifacts) of the finished image, in [0, 1]; NaN: not known
    margin: PerImage  # of the judge, above 0: bad; NaN: not known
    read: Callable[[Rows], Tensor]  # pictures of some rows; floating, or 8 bits of a preview
    left_out: int = 0  # rows of the source whose picture is not finite: their image had left, or broke
    facts: dict[str, Any] = field(default_factory=dict)  # what tells these pictures from others, as JSON values

    def __post_init__(self) -> None:
        lengths = [len(getattr(self, name)) for name in COLUMNS]
        if len(set(lengths)) != 1 or 0 in lengths:
            raise InputError(f"{', '.join(COLUMNS)} must be of one length, at least 1, got {lengths}")
        first, last = (int(value) for value in self.prompt.aminmax())
        if not 0 <= first <= last < len(self.prompts):
            raise InputError(f"prompt must be indices into the {len(self.prompts)} prompts, got {first} to {last}")
        if not self.log_snr.isfinite().all():
            raise InputError("log_snr must be finite")
        if self.margin.isinf().any():
            raise InputError("margin must be finite, or NaN where it is not known, got infinity")
        known = self.label[~self.label.isnan()]
        if not ((known >= 0) & (known <= 1)).all():
            raise InputError(
                f"label must be in [0, 1], or NaN where it is not known, got {known.min():g} to {known.max():g}"
            )

    def __len__(self) -> int:
        return len(self.prompt)

    def identity(self) -> dict[str, Any]:
        """What tells these rows from others, as JSON values."""
        columns = state_sha256({name: getattr(self, name) for name in COLUMNS})
        return {"pictures": self.facts, "rows": len(self), "columns_sha256": columns}

    def batch(self, rows: Rows) -> PairBatch:
        """Some rows, in the order asked for."""
        images = self.read(rows)
        images = images.float() if images.is_floating_point() else images.float() / 255
        prompts = [self.prompts[i] for i in self.prompt[rows].tolist()]
        return PairBatch(images, prompts, self.log_snr[rows], self.label[rows], self.margin[rows])

    def subset(self, rows: Rows) -> PreviewPairs:
        """Some rows as a source of its own; nothing is read.

        Raises:
            InputError: If there are none.
        """
        columns = {name: getattr(self, name)[rows] for name in COLUMNS}
        return replace(self, **columns, read=lambda some: self.read(rows[some]))


class MicroBatches(Sequence[PairBatch]):
    """The rows of one batch, read from their files when they are asked for."""

    def __init__(self, pairs: PreviewPairs, rows: Rows, size: int) -> None:
        self.pairs, self.parts = pairs, rows.split(size)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        return self.pairs.batch(self.parts[index])


class RowSampler:
    """Random rows with as many different prompts as there are: rows of one prompt are no negatives of each other."""

    def __init__(self, pairs: PreviewPairs) -> None:
        self.order = pairs.prompt.argsort(stable=True)  # rows of one prompt lie side by side
        _, self.counts = pairs.prompt.unique(return_counts=True)
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self, count: int, generator: torch.Generator) -> Rows:
        """A random row each of ``count`` random prompts; with fewer prompts, all prompts equally often but for one."""
        number = len(self.counts)
        rounds = [torch.randperm(number, generator=generator) for _ in range(-(-count // number))]
        chosen = torch.cat(rounds)[:count]
        place = torch.rand(count, generator=generator, dtype=torch.float64) * self.counts[chosen]
        return self.order[self.starts[chosen] + place.long()]


def hold_out(pairs: PreviewPairs, share: float, seed: int) -> tuple[PreviewPairs, PreviewPairs]:
    """Rows to train on and rows of other prompts, about ``share`` of the prompts.

    Raises:
        InputError: If there are not enough prompts for both.
    """
    if not 0 < share < 1:
        raise InputError(f"held_out must be between 0 and 1, got {share}")
    splits = assign_splits(pairs.prompts, linked_groups(pairs.prompts), (1 - share, share, 0.0), seed)
    held_out = torch.tensor([split == "validation" for split in splits])[pairs.prompt]
    return pairs.subset((~held_out).nonzero().squeeze(1)), pairs.subset(held_out.nonzero().squeeze(1))


def read_pairs(folder: Path, latents: Literal["x0", "latents"] = "x0") -> PreviewPairs:
    """The rows of a folder of trajectories, or of the shards of ``training.forward_noise``.

    Args:
        latents: Which of a trajectory: the prediction of the clean image, or the noisy ones. Shards hold one of the two.
    Raises:
        InputError: If it is neither, is damaged or not finished, or holds no pictures.
    """
    if shard_files(folder):
        return shard_pairs(folder)
    try:
        return trajectory_pairs(folder, latents)
    except InputError as error:
        raise InputError(
            f"{folder} has no complete shards of training.forward_noise, and as trajectories: {error}"
        ) from error


def trajectory_pairs(folder: Path, latents: Literal["x0", "latents"] = "x0") -> PreviewPairs:
    """A row for every image and scored step of trajectories that were recorded with their latents.

    All latents are read once, to leave out rows that are not finite.
    """
    files: list[Path] = []
    columns, source = _Columns(), TrajectorySource(folder)
    for number, path in enumerate(source.folders):
        files.append(path / LATENTS_NAME)
        first, margins = 0, source.margins(number)
        for part in iter_trajectories(path, AT_ONCE):
            values = getattr(part, latents)
            if values is None:
                raise InputError(f"{path} has no {latents} in {LATENTS_NAME}; record it again, with its latents")
            finite = values.isfinite().flatten(2).all(dim=2)  # image step
            image, step = finite.nonzero(as_tuple=True)
            columns.left_out += int((~finite).sum())
            label = part.label if part.label is not None else torch.full((len(finite),), torch.nan)
            margin = torch.full_like(label, torch.nan)
            if margins is not None:
                known = margins[first : first + len(finite)]
                margin = torch.tensor([torch.nan if value is None else value for value in known])
            prompts = [part.prompts[i] for i in image.tolist()]
            place = torch.stack([torch.full_like(image, number), first + image, step], dim=1)
            columns.add(prompts, part.log_snr[step], label[image], margin[image], place)
            first += len(finite)

    def read(path: Path, places: Tensor) -> Tensor:
        with safe_open(path, framework="pt") as file:
            values = file.get_slice(latents)
            return torch.stack([values[image : image + 1, step : step + 1][0, 0] for image, step in places.tolist()])

    return columns.pairs("latents", files, read, {"images": latents, **source.facts()})


def shard_pairs(folder: Path) -> PreviewPairs:
    """The rows of the shards of ``training.forward_noise``: their previews, or latents if there are none."""
    shards = complete_shards(folder)
    files: list[Path] = []
    columns, kinds = _Columns(), set[Any]()
    for path in shards:
        table = pq.read_table(path, columns=["prompt", "log_snr", "label"])
        if len(table) == 0:
            continue
        tensors = path.with_suffix(".safetensors")
        with _opened(tensors) as file:
            kinds.add("previews" if "previews" in file.keys() else "latents")
        label = torch.tensor(table["label"].to_numpy().copy(), dtype=torch.float32)  # null becomes NaN
        log_snr = torch.tensor(table["log_snr"].to_numpy().copy(), dtype=torch.float32)
        rows = torch.arange(len(table))
        place = torch.stack([torch.full_like(rows, len(files)), rows], dim=1)
        files.append(tensors)
        columns.add(table["prompt"].to_pylist(), log_snr, label, torch.full_like(label, torch.nan), place)
    if len(kinds) != 1:
        raise InputError(
            f"{folder} must hold shards with rows, all with previews or all without, got {kinds or 'none'}"
        )
    [kind] = kinds

    def read(path: Path, places: Tensor) -> Tensor:
        with safe_open(path, framework="pt") as file:
            values = file.get_slice(kind)
            return torch.cat([values[row : row + 1] for row in places[:, 0].tolist()])

    facts = {"images": kind, "noised": len(shards), "sha256": sha256_file(folder / META)}
    return columns.pairs(kind, files, read, facts)


class _Columns:
    """The columns of a source, collected part by part."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}  # of prompts, in the order of first appearance
        self.prompt: list[Tensor] = []
        self.log_snr: list[Tensor] = []
        self.label: list[Tensor] = []
        self.margin: list[Tensor] = []
        self.place: list[Tensor] = []  # the file, and where in it
        self.left_out = 0

    def add(self, prompts: list[str], log_snr: Tensor, label: Tensor, margin: Tensor, place: Tensor) -> None:
        self.prompt.append(torch.tensor([self.numbers.setdefault(text, len(self.numbers)) for text in prompts]))
        self.log_snr.append(log_snr)
        self.label.append(label)
        self.margin.append(margin)
        self.place.append(place)

    def pairs(
        self, kind: Any, files: list[Path], read: Callable[[Path, Tensor], Tensor], facts: dict[str, Any]
    ) -> PreviewPairs:
        place = torch.cat(self.place)

        def gather(rows: Tensor) -> Tensor:
            """Each file is opened once for the rows asked of it."""
            wanted, parts, order = place[rows], [], []
            for number in wanted[:, 0].unique().tolist():
                here = (wanted[:, 0] == number).nonzero().squeeze(1)
                try:
                    parts.append(read(files[number], wanted[here, 1:]))
                except (OSError, SafetensorError) as error:
                    raise InputError(f"cannot read {files[number]}: {error}; make it again") from error
                order.append(here)
            return torch.cat(parts)[torch.cat(order).argsort()]

        return PreviewPairs(
            kind=kind,
            prompts=list(self.numbers),
            prompt=torch.cat(self.prompt).long(),  # an empty part is float
            log_snr=torch.cat(self.log_snr).float(),
            label=torch.cat(self.label).float(),
            margin=torch.cat(self.margin).float(),
            read=gather,
            left_out=self.left_out,
            facts=facts,
        )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}; make it again") from error
