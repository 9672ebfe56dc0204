"""The result file that every benchmark and evaluation writes, and the table that it prints.

    {"benchmark", "command", "commit", "seed", "hardware", "rows": [{column: value}]}

Rates are fractions; a number that does not exist, such as the AUROC of a single class, is null.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_artifacts.errors import InputError
from moe_artifacts.files import write_json

RESULTS = Path(__file__).parent / "results"
Value = str | int | float | bool | None


def write_results(
    name: str, rows: Sequence[Mapping[str, Any]], *, seed: int, out: str | os.PathLike[str] | None = None
) -> Path:
    """Print the table and write the file, whole or not at all.

    Args:
        name: Of the benchmark.
        rows: Plain values, or numpy and torch scalars; rows may lack columns.
        out: Where to; by default ``benchmarks/results/<name>.json``.
    Returns:
        The path of the file.
    Raises:
        InputError: If there are no rows, or a value is no scalar.
    """
    if not rows:
        raise InputError(f"the benchmark {name!r} has no rows to write")
    plain = [{column: plain_value(column, value) for column, value in row.items()} for row in rows]
    path = RESULTS / f"{name}.json" if out is None else Path(out)
    write_json(
        path,
        {
            "benchmark": name,
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "commit": _commit(),
            "seed": seed,
            "hardware": _hardware(),
            "rows": plain,
        },
    )
    for kind in dict.fromkeys(row.get("table") for row in plain):  # rows of several kinds have columns of their own
        print(table([row for row in plain if row.get("table") == kind]))
    print(f"written to {path}")
    return path


def table(rows: Sequence[Mapping[str, Value]]) -> str:
    """Rows as text, columns in the order in which they first appear.

    Example:
        >>> print(table([{"rule": "cumulative", "recall": 0.51234}, {"rule": "q-exit", "recall": None}]))
        rule        recall
        ----------  ------
        cumulative  0.5123
        q-exit      -
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def plain_value(column: str, value: Any) -> Value:
    item = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
    if item is not None and not isinstance(item, (str, int, float)):
        raise InputError(f"the column {column!r} must hold scalars, got {type(value).__name__}")
    return None if isinstance(item, float) and not math.isfinite(item) else item


def _text(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            # The results themselves are what is being made.
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit


def _hardware() -> str:
    parts = [_processor(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} torch threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
