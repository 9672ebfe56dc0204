"""A folder of images with a sub-folder for each class, read once and kept as pixels.

    pictures.bin       uint8 [image 3 size size]
    index.parquet      file, label, split (train or held-out) of each picture; written last
    rejects.parquet    file, reason, detail

A picture is cut to its middle square and resized. What cannot be read is left out and counted, and so is a file that is not named
like an image, one whose name is not UTF-8, and a picture that is there a second time, which could otherwise be held out and
trained on. The pixels stay on the disk and are mapped into memory, so that the number of pictures does not matter.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path
from moe_artifacts.shapes import Preview
from training.data.class_images import ClassImages
from training.data.class_prompts import class_name
from training.data.columns import read_columns, read_facts, write_table
from training.data.fashion import LabelledImages
from training.data.filters import FilterCount, FilterCounts
from training.data.images import SUFFIXES, BadImage, image_files, read_rgb, square, visible_files
from training.data.splits import same_prompt

SIZES = (32, 64, 128)  # the generator halves them down to four latents a side
# Of the pictures held out half set a judge's threshold at their 95th percentile, half confirm it: 40 are wanted, a third of a
# small class has to do. Of the others a third are references, in which the nearest five are looked for.
MIN_IMAGES, ENOUGH_HELD_OUT, LARGEST_SHARE, HELD_OUT_SHARE = 60, 40, 1 / 3, 1 / 6
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
NAMED = 20  # classes, at most, in what people are told
COLOUR_LEVELS = 3.0  # mean distance of the channels, of 255, above which a picture has colours; JPEG alone makes less
COLOURED_SHARE = 0.01  # of the pictures, from which on the set counts as coloured

Part = Literal["train", "held-out"]
File = tuple[str, int]  # path relative to the folder, label


@dataclass(frozen=True)
class StoredImages(LabelledImages):
    """``images`` uint8 [stored 3 size size], ``labels`` int64 [image], ``place`` int64 [image] of each among those stored."""

    place: Tensor
    has_colours: bool

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    @property
    def coloured(self) -> bool:
        return self.has_colours

    def rgb(self, rows: Tensor | slice) -> Preview:
        return self.images[self.place[rows]].float() / 255

    def subset(self, rows: Tensor) -> StoredImages:
        """As of the base class, but no pixel is copied."""
        return replace(self, place=self.place[rows], labels=self.labels[rows])


def folder_classes(folder: Path, store: Path, size: int | None = None, seed: int | None = None) -> ClassImages:
    """The pictures of a folder, from ``store`` where they have been read before.

    Args:
        folder: Has a sub-folder for each class, which prompts call by the name of that folder.
        store: Where the pixels are kept.
        size: Pixels a side. None: as they were stored, and 32 where they were not.
        seed: Of the pictures that are held out. None: as they were stored, and 0 where they were not.
    Raises:
        InputError: If there are fewer than two classes, two of one name, one with too few pictures, or ``store`` was made
            from another folder or with other options.
    """
    index = store / "index.parquet"
    if index.exists():
        _check_stored(read_facts(index), folder, store, size, seed)
        return _load(store)
    size, seed = SIZES[0] if size is None else size, seed or 0
    if size not in SIZES:
        raise InputError(f"size must be one of {', '.join(map(str, SIZES))}, got {size}")
    classes, others = _class_files(folder)
    names = [class_name(name) for name in classes]
    _check_names(folder, names)
    counts = FilterCounts()
    counts.start("images", "files found", sum(map(len, classes.values())) + others)
    counts.drop("images", "not named like an image", others)
    pictures, rejects, coloured = _store(
        folder, store / "pictures.bin", _in_random_order(list(classes.values()), seed), size
    )
    for reason, lost in sorted(Counter(reason for _, reason, _ in rejects).items()):
        counts.drop("images", reason, lost)
    write_table(_columns(rejects, ("file", "reason", "detail")), store / "rejects.parquet", {})
    rows = _split(pictures)
    _check_numbers(folder, store, list(classes), [label for _, label in pictures])
    facts = {"images": str(folder.resolve()), "size": size, "seed": seed, "names": names}
    facts |= {"coloured": coloured > COLOURED_SHARE * len(rows), "filters": counts.as_rows()}
    write_table(_columns(rows, ("file", "label", "split")), index, facts)
    return _load(store)


def stored_counts(store: Path) -> str:
    """What was read and left out, and the pictures of each part, for people."""
    facts = read_facts(store / "index.parquet")
    counts = FilterCounts([FilterCount(**row) for row in facts["filters"]])
    table = read_columns(store / "index.parquet", {"split": pa.string(), "label": pa.int64()})
    splits, labels = (Counter(table[name].to_pylist()) for name in ("split", "label"))
    kind = "coloured" if facts["coloured"] else "grey"
    classes = [f"{name} {labels[label]:,}" for label, name in enumerate(facts["names"])]
    more = f", and {len(classes) - NAMED} more" if len(classes) > NAMED else ""
    return (
        f"{counts}\n\n{len(classes)} classes ({', '.join(classes[:NAMED])}{more}), {splits['train']:,} pictures to train with "
        f"and {splits['held-out']:,} held out, {kind}, {facts['size']}x{facts['size']} pixels"
    )


def _class_files(folder: Path) -> tuple[dict[str, list[str]], int]:
    """The image files of each class folder, and how many files beside them are none; folders without any are no classes."""
    if not folder.is_dir():
        raise InputError(f"images must be a folder with a sub-folder for each class, {folder} is none")
    places = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
    found = {p.name: image_files(p) for p in places}
    others = sum(len(visible_files(p)) for p in places) - sum(map(len, found.values()))
    classes = {name: [str(file.relative_to(folder)) for file in files] for name, files in found.items() if files}
    if len(classes) < 2:
        raise InputError(
            f"{folder} has {len(classes)} sub-folders with images, at least 2 are needed, and {others} other files in its "
            "sub-folders: put the images of each class into a folder of its own that is called what prompts should call them; "
            f"an image is what is named {', '.join(sorted(SUFFIXES))}"
        )
    if {name.lower() for name in classes} <= SPLIT_NAMES:
        raise InputError(
            f"the sub-folders of {folder} are called {', '.join(classes)}: these are parts of a data set and no classes; give "
            f"one of them, such as {folder / next(iter(classes))}, or put the parts of each class together"
        )
    return classes, others


def _check_names(folder: Path, names: Sequence[str]) -> None:
    alike = Counter(map(same_prompt, names))
    for name in names:
        if (count := alike[same_prompt(name)]) > 1:
            raise InputError(f"{folder} has {count} folders whose class would be called {name!r}: rename them")
        if not name or not _is_text(name):
            raise InputError(f"{folder} has a folder whose name {name!r} cannot be used in a prompt: rename it")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # the bytes of a file name need not be UTF-8
        return False
    return True


def _in_random_order(classes: Sequence[Sequence[str]], seed: int) -> list[File]:
    """All files; in an order that more files do not change, and not class after class, which would teach nothing."""

    def place(file: File) -> bytes:
        return hashlib.sha256(f"{seed} {file[0]}".encode(errors="surrogateescape")).digest()

    return sorted(((file, label) for label, files in enumerate(classes) for file in files), key=place)


def _store(
    folder: Path, path: Path, files: Sequence[File], size: int
) -> tuple[list[File], list[tuple[str, str, str]], int]:
    """Write the pixels; returns the files whose pixels these are, the rejects, and how many pictures have colours."""
    kept: list[File] = []
    rejects: list[tuple[str, str, str]] = []
    seen: dict[bytes, int] = {}
    coloured = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        for file, label in tqdm(files, desc="images", unit="image", disable=None):
            if not _is_text(file):  # Parquet holds valid Unicode only
                rejects.append((file.encode(errors="replace").decode(), "file name", "not UTF-8"))
                continue
            try:
                pixels = np.asarray(square(read_rgb(folder / file, file), size))
            except BadImage as error:
                rejects.append((file, f"picture: {error.reason}", error.detail))
                continue
            first = seen.setdefault(hashlib.sha256(pixels.tobytes()).digest()[:16], len(kept))
            if first != len(kept):
                rejects.append((file, "same picture again", f"as {kept[first][0]}"))
                continue
            _write(stream, pixels, path)
            kept.append((file, label))
            coloured += _has_colours(pixels)
    return kept, rejects, coloured


def _split(pictures: Sequence[File]) -> list[tuple[str, int, Part]]:
    """The first ones of each class are held out."""
    count = Counter(label for _, label in pictures)
    left = {
        label: max(round(HELD_OUT_SHARE * number), min(ENOUGH_HELD_OUT, int(LARGEST_SHARE * number)))
        for label, number in count.items()
    }
    rows: list[tuple[str, int, Part]] = []
    for file, label in pictures:
        rows.append((file, label, "held-out" if left[label] > 0 else "train"))
        left[label] -= 1
    return rows


def _write(stream: BinaryIO, pixels: np.ndarray, path: Path) -> None:
    try:
        stream.write(pixels.transpose(2, 0, 1).tobytes())
    except OSError as error:  # the disk is full
        raise InputError(f"cannot write {path}: {error}") from error


def _has_colours(pixels: np.ndarray) -> bool:
    return bool((pixels.max(axis=-1) - pixels.min(axis=-1)).mean() > COLOUR_LEVELS)


def _check_numbers(folder: Path, store: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    number = Counter(labels)
    if few := [name for label, name in enumerate(names) if number[label] < MIN_IMAGES]:
        raise InputError(
            f"{len(few)} of {len(names)} classes of {folder} have fewer than {MIN_IMAGES} pictures that can be used, "
            f"{few[0]!r} has {number[names.index(few[0])]}: add some, or take these folders away; what was left out, "
            f"and why, stands in {store / 'rejects.parquet'}"
        )


def _check_stored(facts: dict[str, Any], folder: Path, store: Path, size: int | None, seed: int | None) -> None:
    for name, value in {"images": str(folder.resolve()), "size": size, "seed": seed}.items():
        if value is not None and facts.get(name) != value:
            raise InputError(
                f"{store} was made with {name}={facts.get(name)!r}, and {value!r} is asked for now: use another folder "
                "for the output, or delete that one"
            )


def _load(store: Path) -> ClassImages:
    facts = read_facts(store / "index.parquet")
    table = read_columns(store / "index.parquet", {"label": pa.int64(), "split": pa.string()})
    size, count, path = facts["size"], len(table), store / "pictures.bin"
    nbytes = count * 3 * size * size
    if not path.exists() or path.stat().st_size != nbytes:
        raise InputError(f"{path} does not hold {count} pictures of {size}x{size} pixels: delete {store}")
    images = torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8).view(count, 3, size, size)
    labels = torch.from_numpy(table["label"].to_numpy().copy())
    train = torch.from_numpy(np.asarray(table["split"].to_pylist()) == "train")

    def part(rows: Tensor) -> StoredImages:
        return StoredImages(images, labels[rows], place=rows, has_colours=facts["coloured"])

    names = tuple((name,) for name in facts["names"])
    return ClassImages(part(train.nonzero().flatten()), part((~train).nonzero().flatten()), names)


def _columns(rows: Sequence[tuple[Any, ...]], names: tuple[str, ...]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    if "label" in columns:
        return pa.table(columns, pa.schema([("file", pa.string()), ("label", pa.int32()), ("split", pa.string())]))
    return pa.table(columns, pa.schema([(name, pa.string()) for name in names]))
