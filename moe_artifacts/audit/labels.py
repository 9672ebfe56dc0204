"""Which finished images have artifacts: from a table that people filled in, or from a bundled judge."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from moe_artifacts.audit.counts import ImageId, Labels
from moe_artifacts.bundled import bundled_judge, class_of
from moe_artifacts.errors import InputError
from moe_artifacts.guard.run_folder import RunRecord
from moe_artifacts.shapes import Preview

COLUMNS = ("file", "artifact")
BATCH = 256  # images judged at a time
SIDE = 32  # pixels of the images that a bundled judge looks at


def read_labels(path: str | os.PathLike[str], runs: Sequence[RunRecord]) -> Labels:
    """Labels from a .csv or .parquet with the columns ``file`` and ``artifact``; others are ignored.

    ``file`` is the path of an image as seen from the working directory, from the table or from a run, or its bare name.
    ``artifact`` is 1 with artifacts, 0 clean, or empty: not labelled.

    Raises:
        InputError: If the table cannot be read, a file is no image of the runs, could be one of several or is there
            twice, or a value is another one.
    """
    path = Path(path)
    find = _Finder(path, runs)
    found: dict[ImageId, int | None] = {}
    for file, value in _rows(path):
        image = find(file)
        if image in found:
            raise InputError(f"{path}: {file!r} is there twice; keep one row of each image")
        found[image] = _label(value, f"{path}: artifact of {file!r}")
    # A safety checker paints black what it flags: nobody can say whether that is an artifact.
    black = {
        (place, attempt.file)
        for place, run in enumerate(runs)
        for attempt in run.attempts
        if attempt.nsfw_content_detected
    }
    known = {image: label for image, label in found.items() if label is not None and image not in black}
    return Labels(source=str(path), artifact=known)


def judge_labels(name: str, runs: Sequence[RunRecord]) -> Labels:
    """Labels of a bundled judge for all finished images; prompts of no class that it knows are left out.

    Raises:
        CheckpointError: If there is no bundled judge of that name.
        InputError: If an image cannot be read, or has not the size that the judge looks at.
    """
    judge = bundled_judge(name)
    classes = {prompt: class_of(prompt, name) for prompt in {a.prompt for run in runs for a in run.attempts}}
    images: list[ImageId] = []
    numbers: list[int] = []
    for place, run in enumerate(runs):
        for attempt in run.attempts:
            number = classes[attempt.prompt]
            if attempt.file is not None and number is not None and not attempt.nsfw_content_detected:
                images.append((place, attempt.file))
                numbers.append(number)
    margins: list[float] = []
    for start in range(0, len(images), BATCH):
        part = [runs[place].folder / file for place, file in images[start : start + BATCH]]
        margins += judge.margin(_read_images(part), torch.tensor(numbers[start : start + BATCH])).tolist()
    return Labels(
        source=f"the judge {name!r}",
        artifact={image: int(margin > 0) for image, margin in zip(images, margins, strict=True)},
        left_out={prompt for prompt, number in classes.items() if number is None},
    )


class _Finder:
    """Which image a path in a table means."""

    def __init__(self, table: Path, runs: Sequence[RunRecord]) -> None:
        self._table = table
        self._folders = [run.folder.resolve() for run in runs]
        self._by_path: dict[Path, ImageId] = {}
        self._by_name: dict[str, set[ImageId]] = defaultdict(set)
        for place, (run, folder) in enumerate(zip(runs, self._folders, strict=True)):
            for attempt in run.attempts:
                if attempt.file is not None:
                    self._by_path[folder / attempt.file] = (place, attempt.file)
                    self._by_name[Path(attempt.file).name].add((place, attempt.file))

    def __call__(self, file: Any) -> ImageId:
        if not isinstance(file, str) or not file:
            raise InputError(f"{self._table}: every row must name a file, got {file!r}")
        bases = [Path.cwd(), self._table.resolve().parent, *self._folders]  # an absolute path stays what it is
        found = {self._by_path[path] for path in (_resolved(base / file) for base in bases) if path in self._by_path}
        if not found and Path(file).name == file:
            found = self._by_name[file]
        if len(found) == 1:
            return next(iter(found))
        raise InputError(
            f"{self._table}: {file!r} could be an image of {len(found)} of the runs; write the path with its run"
            if found
            else f"{self._table}: {file!r} is no finished image of {', '.join(map(str, self._folders))}"
        )


def _resolved(path: Path) -> Path:
    """Without following a link at its end: an image may be one, to a store elsewhere."""
    return path.parent.resolve() / path.name


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The file and the value of each row."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as table:
                _require_columns(path, table.schema_arrow.names)
                for batch in table.iter_batches(columns=list(COLUMNS)):
                    yield from zip(*(batch.column(name).to_pylist() for name in COLUMNS), strict=True)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"cannot read {path}: {error}") from error
    elif path.suffix == ".csv":
        try:
            with open(path, encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream)
                _require_columns(path, reader.fieldnames or [])
                for row in reader:
                    yield row["file"], row["artifact"]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"cannot read {path}: {error}") from error
    else:
        raise InputError(f"labels must be a .csv or .parquet file, got {path}")


def _require_columns(path: Path, names: Sequence[str]) -> None:
    if missing := [name for name in COLUMNS if name not in names]:
        raise InputError(f"{path} lacks the columns {missing}; it has {list(names)}")


def _label(value: Any, where: str) -> int | None:
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    if text not in ("0", "1", "0.0", "1.0", "False", "True"):  # as spreadsheets and parquet have them
        raise InputError(f"{where} must be 1 with artifacts, 0 for a clean image, or empty, got {value!r}")
    return int(text in ("1", "1.0", "True"))


def _read_images(paths: Sequence[Path]) -> Preview:
    images = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
        except (OSError, SyntaxError, ValueError) as error:  # PIL calls a broken PNG a SyntaxError
            raise InputError(f"cannot read {path}: {error}") from error
        if pixels.shape[:2] != (SIDE, SIDE):
            height, width = pixels.shape[:2]
            raise InputError(f"the judge looks at images of {SIDE}x{SIDE} pixels, but {path} has {width}x{height}")
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return torch.stack(images)
