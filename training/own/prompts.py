"""Prompts to collect trajectories of: read from a file, cleaned, shared out to splits, and drawn for each image.

A text file holds one prompt a line. A Parquet or CSV file has the column ``prompt`` and may have two more:

    split   train, validation, calibration or test
    group   prompts of one group (a class, a user, a source) go into one split; null or empty: none

Where the file says no splits, they follow from a seeded hash of the prompt or its group: more prompts in the file leave the
old ones where they were. No prompt of calibration and test is one of train or validation; an empty line or cell and a
prompt that is there twice are dropped and counted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from moe_artifacts.errors import InputError
from training.data.columns import read_columns
from training.data.filters import FilterCounts
from training.data.splits import same_prompt

# In this order they share out the hash; the shares are of the prompts.
SHARES = {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1}
SPLITS = tuple(SHARES)
HELD_OUT = ("calibration", "test")  # what is measured there must not have been trained on

Row = tuple[str | None, str | None, str | None]  # prompt, split, group


@dataclass(frozen=True)
class PromptSplits:
    """The prompts of each split, and what was dropped on the way."""

    prompts: Mapping[str, list[str]]  # every split; in the order of the file
    counts: FilterCounts

    def sha256(self) -> str:
        """Of the prompts of all splits, in lower-case hex: the same for the same outcome."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for prompt in self.prompts[split]:
                digest.update(f"{split}\0{prompt}\0".encode())
        return digest.hexdigest()


def read_prompts(path: str | os.PathLike[str], seed: int = 0) -> PromptSplits:
    """Read a file of prompts and share them out.

    Args:
        path: A text file in UTF-8, or one that ends in ``.parquet`` or ``.csv``.
        seed: Of the splits, where the file has none.
    Raises:
        InputError: If the file cannot be read, has another split than those, holds no prompt, or has a prompt in train or
            validation that is one of calibration or test too.
    """
    path = Path(path)
    read, has_splits = _read(path)
    counts = FilterCounts()
    counts.start("prompts", "read", len(read))
    rows = [(prompt, split, group) for prompt, split, group in read if prompt is not None and prompt.strip()]
    counts.drop("prompts", "empty", counts.left("prompts") - len(rows))
    if not rows:
        raise InputError(f"{path} holds no prompt")
    kept: dict[tuple[str, str], str] = {}  # by what it is compared by, and its split
    first: dict[str, str] = {}  # split of each prompt
    for prompt, split, group in rows:
        key = same_prompt(prompt)
        if has_splits:
            split = _checked_split(split, prompt, path)
        else:  # two groups may have a prompt in common: the first has it
            split = first.setdefault(key, _hashed_split(f"group {group}" if group else f"prompt {key}", seed))
        kept.setdefault((key, split), prompt.strip())
    counts.drop("prompts", "duplicate", len(rows) - len(kept))
    _refuse_leak(path, kept)
    prompts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for (_, split), prompt in kept.items():
        prompts[split].append(prompt)
    return PromptSplits(prompts, counts)


def draw_prompts(prompts: Sequence[str], images: range, seed: int, images_per_prompt: int = 1) -> list[str]:
    """The prompts of some images of a split, which follow from the numbers of the images and the seed alone.

    Image i takes prompt ``i // images_per_prompt`` of a random order. Where there are more images than that has, it goes
    on with another order: each prompt is there as often as the next, and beside other ones each time.

    Example:
        >>> drawn = draw_prompts(["a", "b", "c"], range(6), seed=0)
        >>> sorted(drawn[:3]), sorted(drawn[3:]), drawn[2:4] == draw_prompts(["a", "b", "c"], range(2, 4), seed=0)
        (['a', 'b', 'c'], ['a', 'b', 'c'], True)
    """
    drawn: list[str] = []
    orders: dict[int, list[int]] = {}
    for image in images:
        turn, place = divmod(image // images_per_prompt, len(prompts))
        if turn not in orders:
            orders[turn] = np.random.default_rng([seed, turn]).permutation(len(prompts)).tolist()
        drawn.append(prompts[orders[turn][place]])
    return drawn


def _read(path: Path) -> tuple[list[Row], bool]:
    """The rows as they come, and whether they say their split."""
    kind = path.suffix.lower()
    if kind not in (".parquet", ".csv"):
        return [(line, None, None) for line in _lines(path)], False
    try:
        table = _csv(path) if kind == ".csv" else _parquet(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as {kind[1:]}: {error}") from error
    nothing = [None] * len(table)
    columns = [table[name].to_pylist() if name in table.column_names else nothing for name in ("split", "group")]
    return list(zip(table["prompt"].to_pylist(), *columns, strict=True)), "split" in table.column_names


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be a text file in UTF-8: {error}") from error
    # Not splitlines(): that breaks at separators which a prompt may hold, such as U+2028.
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _parquet(path: Path) -> pa.Table:
    names = pq.read_schema(path).names
    return read_columns(
        path, {name: pa.string() for name in ("prompt", "split", "group") if name in names or name == "prompt"}
    )


def _csv(path: Path) -> pa.Table:
    types = {name: pa.string() for name in ("prompt", "split", "group")}
    parsing, converting = pc.ParseOptions(newlines_in_values=True), pc.ConvertOptions(column_types=types)
    table = pc.read_csv(path, parse_options=parsing, convert_options=converting)
    if "prompt" not in table.column_names:
        raise InputError(f"{path} has no column 'prompt'; its columns are {table.column_names}")
    return table


def _checked_split(split: str | None, prompt: str, path: Path) -> str:
    if split not in SHARES:
        raise InputError(f"{path}: split of the prompt {prompt!r} must be one of {', '.join(SPLITS)}, got {split!r}")
    return split


def _hashed_split(name: str, seed: int) -> str:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    place, below = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for split, share in SHARES.items():
        below += share
        if place < below:
            return split
    return SPLITS[-1]  # the shares add up to one only up to rounding


def _refuse_leak(path: Path, kept: Mapping[tuple[str, str], str]) -> None:
    seen = {key for key, split in kept if split not in HELD_OUT}
    if leaks := [prompt for (key, split), prompt in kept.items() if split in HELD_OUT and key in seen]:
        raise InputError(
            f"{path}: {len(leaks)} prompts of calibration or test are in train or validation too, the first is "
            f"{leaks[0]!r}: what is measured on them would be too good; give them one split, or leave the column out"
        )
