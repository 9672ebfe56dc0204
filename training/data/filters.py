"""What every filter of a clean-up took away: nothing is left out without being counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool


@dataclass(frozen=True)
class FilterCount:
    """One filter: ``dropped`` of its ``unit`` (ratings, images), ``left`` after it."""

    unit: str
    filter: str
    dropped: int
    left: int


@dataclass
class FilterCounts:
    """The filters in the order in which they ran, of one or several units.

    Example:
        >>> counts = FilterCounts()
        >>> counts.start("images", "read", 10)
        >>> counts.drop("images", "blurred", 3)
        >>> print(counts)
        unit    filter      dropped        left
        images  read              -          10
        images  blurred           3           7
        >>> counts["blurred"]
        3
    """

    rows: list[FilterCount] = field(default_factory=list)

    def start(self, unit: str, what: str, count: int) -> None:
        """Begin to count a unit."""
        self.rows.append(FilterCount(unit, what, 0, count))

    def drop(self, unit: str, name: str, dropped: int) -> None:
        """Note a filter that ran on what was left of ``unit``; also where it dropped nothing."""
        left = self.left(unit)
        assert 0 <= dropped <= left, f"{name} cannot drop {dropped} of {left} {unit}"
        self.rows.append(FilterCount(unit, name, dropped, left - dropped))

    def apply(self, unit: str, table: pa.Table, masks: Mapping[str, Bool[np.ndarray, " row"]]) -> pa.Table:
        """The rows of ``table`` that pass every mask; each dropped row counts for the first that it fails."""
        keep = np.ones(len(table), dtype=bool)
        for name, mask in masks.items():
            self.drop(unit, name, int((keep & ~mask).sum()))
            keep &= mask
        return table.filter(pa.array(keep))

    def left(self, unit: str) -> int:
        """How many passed every filter so far."""
        return next(row.left for row in reversed(self.rows) if row.unit == unit)

    def __getitem__(self, name: str) -> int:
        """What the filters of this name dropped; 0 where none of that name ran."""
        return sum(row.dropped for row in self.rows if row.filter == name)

    def as_rows(self) -> list[dict[str, str | int]]:
        """For JSON."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        units = list(dict.fromkeys(row.unit for row in self.rows))
        unit_width = max([4, *map(len, units)]) + 2
        name_width = max([6, *(len(row.filter) for row in self.rows)]) + 2
        lines = [f"{'unit':<{unit_width}}{'filter':<{name_width}}{'dropped':>10}{'left':>12}"]
        for unit in units:
            for i, row in enumerate(row for row in self.rows if row.unit == unit):
                dropped = f"{row.dropped:,}" if i else "-"  # the first says how many there were
                lines.append(f"{unit:<{unit_width}}{row.filter:<{name_width}}{dropped:>10}{row.left:>12,}")
        return "\n".join(lines)


def has_text(column: pa.ChunkedArray) -> Bool[np.ndarray, " row"]:
    """Whether a value is there and is more than blanks."""
    return pc.fill_null(pc.match_substring_regex(column, r"\S"), False).to_numpy()
