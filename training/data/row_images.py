"""The picture of a table's row, whichever table it is from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from training.data.filters import FilterCounts
from training.data.images import BadImage, read_rgb
from training.data.zip_parts import ZipParts


class RowImages:
    """Pictures of rows that have a ``path`` (``training.data.rated``), or a ``zip`` and a ``member`` (DiffusionDB).

    Args:
        folder: What paths and zip files are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts = ZipParts(folder)

    def __call__(self, row: Mapping[str, Any]) -> Image.Image:
        """The picture in mode RGB, of its own size.

        Raises:
            BadImage: If there is none, with the reason.
        """
        if "path" in row:
            return read_rgb(self.folder / row["path"])
        part, member = row["zip"], row["member"]
        return read_rgb(self.parts.read(part, member), f"{part}/{member}")


def decodable(table: pa.Table, folder: Path, counts: FilterCounts) -> pa.Table:
    """Drop rows whose picture cannot be decoded; ``counts`` receives a row per reason of :class:`BadImage` met."""
    picture = RowImages(folder)
    lost: Counter[str] = Counter()
    keep = np.ones(len(table), dtype=bool)
    columns = {name: table[name].to_pylist() for name in ("path", "zip", "member") if name in table.column_names}
    for row in tqdm(range(len(table)), desc="images", unit="image"):
        try:
            picture({name: values[row] for name, values in columns.items()})
        except BadImage as error:
            keep[row] = False
            lost[error.reason] += 1
    picture.parts.close()
    for reason, count in sorted(lost.items()):
        counts.drop("images", f"picture: {reason}", count)
    return table.filter(pa.array(keep))
