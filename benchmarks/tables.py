"""Result files as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.results import RESULTS
from moe_artifacts.files import read_json

Row = dict[str, Any]


def rows_of(name: str, **where: Any) -> list[Row]:
    """Rows of a result file that have these values."""
    rows = read_json(RESULTS / f"{name}.json")["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.1f} %"


def interval(row: Row, name: str, form: Callable[[float], str]) -> str:
    """A column with its ``_low`` and ``_high``."""
    return f"{form(row[name])} ({form(row[name + '_low'])} to {form(row[name + '_high'])})"


def three(value: float) -> str:
    """Three digits after the point."""
    return f"{value:.3f}"
