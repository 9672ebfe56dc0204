"""Trajectories on disk, in batches that are there as a whole or not at all:

    OUT/<split>/00000/              a batch: the files of a moe_artifacts ``Trajectory`` with labels, and
        rejects.parquet             one row per image that was left out: key, reason, detail
        images/0000.png             where images are kept: that of row 0 of the trajectory
    OUT/unlabelled/<split>/00000/   likewise, of images that nobody has judged yet (:mod:`training.own.label`)
    OUT/collect.json                what collect was asked for: how many images of each split, in batches of which size
    OUT/.unfinished/                what is being written, or was when a run was killed

``meta.json`` of a trajectory also holds

    setting     scheduler (class), num_inference_steps, guidance_scale, eta, image_size, denoiser (fingerprint)
    pipeline    class;  model: as it was named
    judge       as it was named
    margin      of each image: how far it is from the judge's threshold, above 0 bad; where the judge has one
    images      of each image: its file as seen from the folder of the batch; where images are kept
    truncated   prompts that are longer than the pipeline's text encoder reads

A batch of which every image was left out has no trajectory, only rejects.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path, read_json
from moe_artifacts.shapes import Preview, Rows
from moe_artifacts.trajectory import Trajectory
from moe_artifacts.trajectory_files import META_NAME, TABLE_NAME
from training.row_jobs import REJECTS

UNLABELLED, UNFINISHED, IMAGES_NAME, REJECTS_NAME = "unlabelled", ".unfinished", "images", "rejects.parquet"
RUN_NAME = "collect.json"
PER_IMAGE_META = ("margin", "images")

Reject = dict[str, str]  # key, reason, detail


def batch_folder(root: Path, split: str, number: int) -> Path:
    """Where a batch lies; ``root`` is OUT or OUT/unlabelled."""
    return root / split / f"{number:05d}"


def batch_folders(root: Path, split: str) -> list[Path]:
    """The finished batches of a split, in order."""
    return sorted(path for path in (root / split).glob("*") if path.name.isdigit())


def require_all_batches(split: Path) -> None:
    """Refuse a split that collect or label has not finished, whether it was killed or a worker is still at it.

    Args:
        split: Its folder; one that collect has not written is taken as it is.
    Raises:
        InputError: If batches are missing.
    """
    split = split.absolute()
    root = split.parents[1] if split.parent.name == UNLABELLED else split.parent
    if not (root / RUN_NAME).exists():
        return
    run = read_json(root / RUN_NAME)
    expected = -(-run["counts"].get(split.name, 0) // run["batch"])
    found = len(batch_folders(split.parent, split.name))
    if found < expected:
        raise InputError(
            f"{split} has {found} of {expected} batches: run training.own.collect again, and training.own.label where it was "
            "labelled afterwards; they make those missing"
        )


def write_batch(
    folder: Path, trajectory: Trajectory | None, rejects: Sequence[Reject], images: Preview | None = None
) -> None:
    """Write a batch in one move; one that is there already is replaced.

    Args:
        trajectory: None, or one of no images: all were left out.
        images: Of the rows of the trajectory, to keep.
    """
    unfinished = folder.parents[1] / UNFINISHED / f"{folder.parent.name}-{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    try:
        if trajectory is not None and trajectory.prompts:
            trajectory.save(unfinished)
            for file, image in zip(trajectory.meta["images"], images, strict=True) if images is not None else ():
                _write_png(unfinished / file, image)
        with atomic_path(unfinished / REJECTS_NAME) as temporary:
            pq.write_table(pa.Table.from_pylist(list(rejects), schema=REJECTS), temporary)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            remove_batch(folder)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk gets its space back
        raise


def remove_batch(folder: Path) -> None:
    """In one move, too."""
    leaving = folder.parents[1] / UNFINISHED / f"{folder.parent.name}-{folder.name}-removed"
    shutil.rmtree(leaving, ignore_errors=True)
    leaving.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(leaving)
    shutil.rmtree(leaving)


def read_batch(folder: Path) -> tuple[Trajectory | None, list[Reject]]:
    """What :func:`write_batch` was given; images are read by their path."""
    trajectory = Trajectory.load(folder) if (folder / META_NAME).exists() else None
    return trajectory, pq.read_table(folder / REJECTS_NAME).to_pylist()


def image_names(count: int) -> list[str]:
    """``images`` of a trajectory's meta."""
    return [f"{IMAGES_NAME}/{row:04d}.png" for row in range(count)]


def take_rows(trajectory: Trajectory, rows: Rows) -> Trajectory:
    """Some images of a trajectory, with what its meta says of each."""

    def of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    kept = rows.tolist()
    per_image = {name: [trajectory.meta[name][k] for k in kept] for name in PER_IMAGE_META if name in trajectory.meta}
    return dataclasses.replace(
        trajectory,
        prompts=[trajectory.prompts[k] for k in kept],
        seeds=[trajectory.seeds[k] for k in kept],
        scores={name: score[rows] for name, score in trajectory.scores.items()},
        x0=of(trajectory.x0),
        latents=of(trajectory.latents),
        label=of(trajectory.label),
        meta=trajectory.meta | per_image,
    )


@dataclass(frozen=True)
class SplitCount:
    """What a split holds.

    Example:
        >>> print(SplitCount("test", 500, 0.25, 0, {"label": 12}))
        test: 500 images, 25.0 % with artifacts; left out: 12 label
    """

    split: str
    images: int
    mean_label: float | None  # None: not labelled
    truncated: int  # prompts
    rejects: dict[str, int]  # by reason

    def __str__(self) -> str:
        text = f"{self.split}: {self.images:,} images"
        if self.mean_label is not None:
            text += f", {self.mean_label:.1%} with artifacts".replace("%", " %")
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.rejects.items())) or "none"
        text += f"; left out: {left_out}"
        if self.truncated:
            text += f"; {self.truncated:,} prompts are longer than the text encoder reads"
        if self.mean_label in (0.0, 1.0):
            text += (
                f"; WARNING: every image is {'bad' if self.mean_label else 'clean'}, so nothing can be learned from it"
            )
        return text


def count_splits(root: Path, splits: Sequence[str]) -> Iterator[SplitCount]:
    """Count the finished batches of each split that has any."""
    for split in splits:
        images = truncated = 0
        label_sum: float | None = 0.0
        reasons: Counter[str] = Counter()
        folders = batch_folders(root, split)
        for folder in folders:
            reasons.update(pq.read_table(folder / REJECTS_NAME, columns=["reason"])["reason"].to_pylist())
            if not (folder / META_NAME).exists():
                continue
            meta = read_json(folder / META_NAME)
            images += meta["num_images"]
            truncated += meta.get("truncated", 0)
            if label_sum is not None and "label" in pq.read_schema(folder / TABLE_NAME).names:
                # Every image has as many rows, so the mean over rows is that over images.
                labels = pq.read_table(folder / TABLE_NAME, columns=["label"])["label"]
                label_sum += pc.mean(labels).as_py() * meta["num_images"]
            else:
                label_sum = None
        if folders:
            mean = label_sum / images if label_sum is not None and images else None
            yield SplitCount(split, images, mean, truncated, dict(reasons))


def _write_png(path: Path, image: Tensor) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path, format="PNG")
