"""The results of benchmarks/compatibility.py as a page: what works, what is refused, and which mechanism is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS
from benchmarks.tables import Row, markdown
from moe_artifacts.files import atomic_path, read_json

INTRODUCTION = """\
# Pipelines and schedulers

Every pipeline below was built from a configuration, with random weights, and run with every scheduler it takes and every way of guiding
it: once unwatched; once in record mode; and while images leave the batch, from all to half of them, to all but one and then to one,
and one by one to none. "Equal" means, for record, that every bit of the images is that of the unwatched run; for drop, that the images that
are kept equal the same rows of the unwatched run, to {atol:g} of images in [0, 1], in float32: a smaller batch sums in another order. Each
image had its own prompt and its own generator; most pipelines were also run with two images per prompt.

{totals}

Written by `python -m benchmarks.compatibility` and `python -m benchmarks.compatibility --docs docs/compatibility.md`.
"""
REFUSALS = """\
## What is refused

Before the first step, with an `UnsupportedPipelineError` that says why. A pipeline that is in no table is refused too, subclasses of
those that are supported included: they may have another loop.
"""


def write(page: Path, results: Path = RESULTS / "compatibility.json") -> None:
    """Write the page from a result file of the families."""
    text = text_of(read_json(results)["rows"])
    with atomic_path(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written to {page}")


def text_of(rows: Sequence[Row]) -> str:
    """The page.

    Args:
        rows: Of ``measure_families``.
    """
    from benchmarks.compatibility import ATOL

    known = _scheduler_lists(rows)
    parts = [
        INTRODUCTION.format(totals=totals(rows), atol=ATOL),
        "## What works\n",
        _pipelines(rows, known),
        "\nSchedulers, by the names of tests/tiny_pipelines/schedulers.py:\n",
        *(f"* {name}: {', '.join(members)}" for name, members in known.items()),
        "",
        REFUSALS,
        _refusals(rows),
    ]
    return "\n".join(parts).rstrip() + "\n"


def totals(rows: Sequence[Row]) -> str:
    """How many combinations there are and what became of them, in a sentence."""
    counts = {
        way: {value: sum(row[way] == value for row in rows) for value in ("equal", "refused", "different")}
        for way in ("record", "drop")
    }
    pipelines, schedulers = ({row[column] for row in rows} for column in ("pipeline", "scheduler"))
    found = "; ".join(
        f"{way}: " + ", ".join(f"{count} {value}" for value, count in found.items() if count)
        for way, found in counts.items()
    )
    worst = max(row["max_abs_difference"] for row in rows)
    return (
        f"{len(rows)} combinations of a pipeline ({len(pipelines)}), a scheduler ({len(schedulers)}) and a way of guiding. "
        f"{found}. Largest difference {worst:.1e}."
    )


def _scheduler_lists(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The two long lists: of models that predict the noise and the like, and of those that predict a flow."""
    names = list(dict.fromkeys(row["scheduler"] for row in rows))
    flow = [name for name in names if name.startswith("flow-")]
    shared = [name for name in names if name not in flow and _used_by(rows, name) > 2]
    return {"noise": shared, "flow": flow}


def _used_by(rows: Sequence[Row], scheduler: str) -> int:
    return len({row["pipeline"] for row in rows if row["scheduler"] == scheduler})


def _pipelines(rows: Sequence[Row], known: dict[str, list[str]]) -> str:
    header = ["pipeline", "class", "schedulers", "guidance", "record", "drop", "largest difference"]
    lines = []
    for name in dict.fromkeys(row["pipeline"] for row in rows):
        found = [row for row in rows if row["pipeline"] == name and row["record"] != "refused"]
        if not found:
            continue
        lines.append(
            [
                name,
                found[0]["class"],
                _schedulers(found, known),
                ", ".join(_values(found, "guidance")),
                *(" and ".join(_values(found, way)) for way in ("record", "drop")),
                f"{max(row['max_abs_difference'] for row in found):.1e}",
            ]
        )
    return markdown(header, lines)


def _schedulers(rows: Sequence[Row], known: dict[str, list[str]]) -> str:
    """In short: "noise (33)" for all of a list, "flow (9) but flow-sa"."""
    names = _values(rows, "scheduler")
    for label, members in known.items():
        missing = [name for name in members if name not in names]
        if len(missing) < len(members) / 3:
            others = "".join(f", {name}" for name in names if name not in members)
            but = f" but {', '.join(missing)}" if missing else ""
            return f"{label} ({len(members) - len(missing)}){but}{others}"
    return ", ".join(names)


def _refusals(rows: Sequence[Row]) -> str:
    from moe_artifacts.guard.pipelines import REFUSED, SPECS
    from moe_artifacts.noise import REFUSED_SCHEDULERS

    tried = {(row["class"], row["scheduler"], row["why"]) for row in rows if "refused" in (row["record"], row["drop"])}
    combined: dict[tuple[str, str], list[str]] = {}
    for kind, scheduler, why in sorted(tried):
        if kind not in REFUSED:
            combined.setdefault((kind, why), []).append(scheduler)
    pipelines = [
        ["pipelines", "missing"],
        *([", ".join(k for k in REFUSED if REFUSED[k] == why), why] for why in dict.fromkeys(REFUSED.values())),
    ]
    arguments = {
        (argument, why): [kind for kind in SPECS if SPECS[kind].refused_arguments.get(argument) == why]
        for spec in SPECS.values()
        for argument, why in spec.refused_arguments.items()
    }
    tables = [
        pipelines,
        [["scheduler", "missing"], *([name, why] for name, why in REFUSED_SCHEDULERS.items())],
        [
            ["argument", "of", "missing"],
            *([f"`{argument}`", ", ".join(kinds), why] for (argument, why), kinds in arguments.items()),
        ],
        [
            ["pipeline", "with", "message"],
            *([kind, _some(names), why] for (kind, why), names in combined.items()),
        ],
    ]
    return "\n\n".join(markdown(lines[0], lines[1:]) for lines in tables if len(lines) > 1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"all {len(names)} schedulers tried"


def _values(rows: Iterable[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))
