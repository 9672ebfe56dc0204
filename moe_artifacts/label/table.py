"""The table of one rater: ``labels.csv`` in the folder of the images, or ``labels-NAME.csv``.

    file,artifact
    images/p00012-a0003.png,1

1 has artifacts, 0 is clean, empty was skipped. ``moe-artifacts audit --labels`` reads it. After every verdict it is written
again and moved into place, so a rater who is cut off loses nothing.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path
from moe_artifacts.label.images import LabelImage

COLUMNS = ("file", "artifact")
ARTIFACT, CLEAN, SKIPPED = "1", "0", ""
_MEANINGS = {"1": ARTIFACT, "1.0": ARTIFACT, "True": ARTIFACT, "0": CLEAN, "0.0": CLEAN, "False": CLEAN, "": SKIPPED}


def table_path(folder: str | os.PathLike[str], rater: str | None = None) -> Path:
    """Where the table of a rater lies.

    Raises:
        InputError: If the name of the rater has other characters than letters, digits, ``_`` and ``-``.

    Example:
        >>> str(table_path("run")), str(table_path("run", "ann"))
        ('run/labels.csv', 'run/labels-ann.csv')
    """
    if rater is not None and not re.fullmatch(r"[\w-]+", rater):
        raise InputError(f"rater must be a name of letters, digits, '_' and '-', got {rater!r}")
    return Path(folder) / ("labels.csv" if rater is None else f"labels-{rater}.csv")


class Table:
    """The verdicts of one rater on some images.

    Rows of other images, and other columns, stay as they are. A row may also name its image by its path from the
    working directory, or by its bare name.

    Raises:
        InputError: If there is a table that cannot be read, has an image twice, or has another value than 1, 0 or none.
    """

    def __init__(self, path: str | os.PathLike[str], images: Sequence[LabelImage]) -> None:
        self.path = Path(path)
        self._columns: list[str] = list(COLUMNS)
        self._rows: list[dict[str, str]] = []
        self._row_of: dict[str, dict[str, str]] = {}  # by LabelImage.file
        self._content = self._on_disk()
        if self._content is not None:
            self._read(self._content, _Finder(self.path, images))

    def get(self, image: LabelImage) -> str | None:
        """``ARTIFACT``, ``CLEAN`` or ``SKIPPED``; None: the table has no row of it."""
        row = self._row_of.get(image.file)
        return None if row is None else row["artifact"]

    def put(self, image: LabelImage, verdict: str | None) -> None:
        """Store a verdict, or take the row of an image away, and write the table.

        Raises:
            InputError: If somebody else has written the table since: their verdicts are not overwritten.
            OSError: If it cannot be written; the old table stays.
        """
        if self._on_disk() != self._content:
            raise InputError(
                f"{self.path} was changed by someone else, so the last verdict was not stored: start again, and let every "
                "rater have a table of their own"
            )
        row = self._row_of.get(image.file)
        if verdict is None:
            if row is not None:
                self._rows.remove(row)
                del self._row_of[image.file]
        elif row is None:
            row = {name: "" for name in self._columns} | {"file": image.file, "artifact": verdict}
            self._rows.append(row)
            self._row_of[image.file] = row
        else:
            row["artifact"] = verdict
        self._write()

    def _write(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        content = text.getvalue().encode()
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(content)
        self._content = content

    def _on_disk(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _read(self, content: bytes, find: _Finder) -> None:
        self._columns, self._rows = _parse(self.path, content)
        for row in self._rows:
            image = find(row["file"])
            if image is None:
                continue
            if image.file in self._row_of:
                raise InputError(f"{self.path}: {row['file']!r} is there twice; keep one row of each image")
            self._row_of[image.file] = row


def read_verdicts(path: str | os.PathLike[str], images: Sequence[LabelImage]) -> dict[str, int]:
    """1 with artifacts and 0 clean by ``LabelImage.file``; skipped images and those of other folders are left out.

    Raises:
        InputError: If the table is missing or cannot be read.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no table {path}; `moe-artifacts label` writes it")
    table = Table(path, images)
    found = {image.file: table.get(image) for image in images}
    return {file: int(verdict) for file, verdict in found.items() if verdict in (ARTIFACT, CLEAN)}


class _Finder:
    """Which image a row means; None: none of these."""

    def __init__(self, table: Path, images: Sequence[LabelImage]) -> None:
        self._table = table
        self._by_file = {image.file: image for image in images}
        self._by_path = {os.path.abspath(image.path): image for image in images}
        self._by_name: dict[str, list[LabelImage]] = defaultdict(list)
        for image in images:
            self._by_name[image.path.name].append(image)

    def __call__(self, file: str) -> LabelImage | None:
        image = self._by_file.get(file) or self._by_path.get(os.path.abspath(file))
        named = self._by_name.get(file, [])
        if image is None and len(named) > 1:
            raise InputError(f"{self._table}: {file!r} could be any of {len(named)} images; write its path")
        return image or (named[0] if named else None)


def _parse(path: Path, content: bytes) -> tuple[list[str], list[dict[str, str]]]:
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        columns = list(reader.fieldnames or [])
        if missing := [name for name in COLUMNS if name not in columns]:
            raise InputError(f"{path} lacks the columns {missing}; it has {columns}")
        rows = []
        for row in reader:
            if None in row:  # what came after the last column
                raise InputError(f"{path}: line {reader.line_num} has more values than the {len(columns)} columns")
            cells = {name: row[name] or "" for name in columns}
            value = cells["artifact"].strip()
            if value not in _MEANINGS:
                raise InputError(
                    f"{path}: artifact of {cells['file']!r} must be 1 with artifacts, 0 for a clean image, or empty, got "
                    f"{value!r}"
                )
            rows.append(cells | {"artifact": _MEANINGS[value]})
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    return columns, rows
