"""The command ``moe-artifacts audit``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_artifacts.cli.shared import errors_in_one_line


def audit(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs made with --audit-rate, of one threshold.")],
    labels: Annotated[
        Path | None, typer.Option(help=".csv or .parquet with the columns file and artifact, 1 or 0.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help='Bundled judge that says which images have artifacts: "fashion".')
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Of the intervals.  [default: that of the promise, or 0.95]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Measure false aborts in production.

    From the share of the would-be aborts that the guard finished, with exact intervals, beside what the threshold
    promises. docs/audit.md says how many audits it takes.
    """
    with errors_in_one_line():
        from moe_artifacts.audit import audit as find

        found = find(runs, labels=labels, judge=judge, confidence=confidence)
        typer.echo(json.dumps(found.summary(), indent=2) if as_json else found.text())
