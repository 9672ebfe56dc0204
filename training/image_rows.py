"""Labelled pictures one after another, from wherever they are: what :mod:`training.forward_noise` reads.

A source knows how many rows it has and hands out any range of them, so that workers can share it out. Pictures are read when
they are asked for; a row of which the picture is damaged is a row all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moe_artifacts.errors import InputError
from moe_artifacts.files import sha256_file
from moe_artifacts.seeds import attempt_seed
from moe_artifacts.shapes import Preview
from training.data.fashion import FILES, SIZE, load_fashion, to_rgb
from training.data.images import square, to_preview
from training.data.prompts import prompts_of
from training.data.row_images import RowImages

KEYS_AT_ONCE = 65_536


@dataclass(frozen=True)
class ImageRow:
    """One picture."""

    key: str  # no two rows of a source share it: the noise follows from it
    prompt: str | None
    label: float | None  # share of raters who saw artifacts, in [0, 1]
    read: Callable[
        [int], Preview
    ]  # the middle square of the picture at this many pixels, [1, 3, size, size]; or BadImage


class ImageSource(Protocol):
    """A number of rows."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Iterator[ImageRow]:
        """Those from ``start`` up to ``stop``, without those that the source leaves out; always the same."""
        ...

    def facts(self) -> dict[str, Any]:
        """What tells this source from others, as JSON values."""
        ...


class TableImages:
    """The rows of a table of ``training.data.diffusiondb`` or ``training.data.rated``, read a row group at a time.

    Args:
        table: A Parquet file with the columns ``key``, ``prompt`` and either ``path``, or ``zip`` and ``member``; ``label``
            may be missing.
        folder: What paths and zip files are relative to.
        split: Leave out all rows that have another value in the column ``split``.
    Raises:
        InputError: If the file cannot be read, lacks a column, has rows without a key, or keys twice.
    """

    def __init__(self, table: Path, folder: Path, split: str | None = None) -> None:
        self.table, self.split = table, split
        self.images = RowImages(folder)
        try:
            self._file = pq.ParquetFile(table)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{table} cannot be read as Parquet: {error}") from error
        self._types = self._columns()
        groups = self._file.metadata
        ends = np.cumsum([groups.row_group(i).num_rows for i in range(groups.num_row_groups)], dtype=np.int64)
        self._ends: list[int] = ends.tolist()
        self._held: tuple[int, pa.Table] | None = None  # the last row group, since shards are smaller
        self._check_keys()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, start: int, stop: int) -> Iterator[ImageRow]:
        begin = 0
        for group, end in enumerate(self._ends):
            if start < end and stop > begin:
                table = self._group(group).slice(max(start - begin, 0), min(stop, end) - max(start, begin))
                for row in table.to_pylist():
                    if self.split is None or row["split"] == self.split:
                        yield self._row(row)
            begin = end

    def facts(self) -> dict[str, Any]:
        return {"table": self.table.name, "sha256": sha256_file(self.table), "split": self.split}

    def _row(self, row: dict[str, Any]) -> ImageRow:
        def read(size: int) -> Preview:
            return to_preview(square(self.images(row), size))

        return ImageRow(row["key"], row["prompt"], row.get("label"), read)

    def _columns(self) -> dict[str, pa.DataType]:
        names = self._file.schema_arrow.names
        places = ["path"] if "path" in names else ["zip", "member"]
        needed = ["key", "prompt", *places] + (["split"] if self.split is not None else [])
        if missing := [name for name in needed if name not in names]:
            raise InputError(f"{self.table} has no column {missing[0]!r}; its columns are {names}")
        return dict.fromkeys(needed, pa.string()) | ({"label": pa.float64()} if "label" in names else {})

    def _group(self, group: int) -> pa.Table:
        if self._held is None or self._held[0] != group:
            try:
                table = self._file.read_row_group(group, columns=list(self._types))
                table = table.select(list(self._types)).cast(pa.schema(list(self._types.items())))
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"row group {group} of {self.table} cannot be read: {error}") from error
            self._held = group, table
        return self._held[1]

    def _check_keys(self) -> None:
        """Keys themselves would take gigabytes for millions of rows, their hashes take 8 bytes each."""
        hashes = []
        for batch in self._file.iter_batches(KEYS_AT_ONCE, columns=["key"]):
            keys = batch.column("key")
            if keys.null_count or pc.any(pc.equal(keys.cast(pa.string()), "")).as_py():
                raise InputError(f"{self.table} has rows without a key; the noise of a row follows from its key")
            hashes.append(np.array([hash(key) for key in keys.to_pylist()], dtype=np.int64))
        count = len(np.unique(np.concatenate(hashes))) if hashes else 0
        if count < len(self):
            raise InputError(
                f"{self.table} has {len(self) - count} rows whose key came before; clean it with training.data.rated"
            )


class FashionImages:
    """Fashion-MNIST at 32x32, each picture with a prompt of its class. Label 0: these are real pictures.

    Args:
        split: "train" or "test".
        source: As of :func:`training.data.fashion.load_fashion`.
    Raises:
        InputError: If there is no such split, or the files are damaged.
        FileNotFoundError: If there are no files, naming the package that brings them.
    """

    def __init__(self, split: str = "train", source: Path | str | None = None) -> None:
        if split not in FILES:
            raise InputError(f"split must be one of {', '.join(FILES)} for Fashion-MNIST, got {split!r}")
        self.split = split
        try:
            self.data = load_fashion(split, source)
        except ValueError as error:
            raise InputError(str(error)) from error

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, start: int, stop: int) -> Iterator[ImageRow]:
        for index in range(start, min(stop, len(self))):
            key = f"fashion-{self.split}-{index:05d}"
            prompts = prompts_of(int(self.data.labels[index]), "train" if self.split == "train" else "held-out")
            prompt = prompts[attempt_seed(0, key, attempt=0) % len(prompts)]
            yield ImageRow(key, prompt, 0.0, self._reader(index))

    def facts(self) -> dict[str, Any]:
        return {"table": "Fashion-MNIST", "split": self.split, "rows": len(self)}

    def _reader(self, index: int) -> Callable[[int], Preview]:
        def read(size: int) -> Preview:
            if size != SIZE:
                raise InputError(f"size must be {SIZE} for Fashion-MNIST, got {size}")
            return to_rgb(self.data.images[index : index + 1])

        return read
