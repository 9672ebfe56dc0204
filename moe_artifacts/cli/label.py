"""The command ``moe-artifacts label``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_artifacts.cli.shared import errors_in_one_line
from moe_artifacts.errors import InputError


def label(
    folder: Annotated[Path, typer.Argument(help="Of images, or of runs of `moe-artifacts generate`.")],
    rater: Annotated[
        str | None,
        typer.Option(help="Who labels, where several do: the table is then labels-NAME.csv.", metavar="NAME"),
    ] = None,
    kept: Annotated[
        int | None, typer.Option(help="Of the kept images of runs only so many, by lot.  [default: all]")
    ] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Ask about every image again.")] = False,
    pictures: Annotated[
        Literal["auto", "kitty", "iterm2", "sixel", "blocks", "none"],
        typer.Option(help="How the terminal takes pictures; blocks are coarse."),
    ] = "auto",
    viewer: Annotated[
        str | None, typer.Option(help="Opens each picture; its path is appended.", metavar="COMMAND")
    ] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Ask nothing: say how well the raters of the folder agree.")
    ] = False,
) -> None:
    """Say with a key which images have artifacts.

    a has artifacts, c is clean, u takes the last answer back, s skips, q quits. Every answer goes at once to
    FOLDER/labels.csv, which `moe-artifacts audit --labels` reads. The same command goes on where it was stopped.
    """
    with errors_in_one_line():
        if agreement:
            typer.echo(_agreement(folder))
            return
        from moe_artifacts.label import Table, Terminal, find_images, label_images, table_path

        path = table_path(folder, rater)
        images = find_images(folder, kept)
        table = Table(path, images)
        with Terminal(pictures, viewer) as terminal:
            outcome = label_images(images, table, terminal, redo=redo)
        typer.echo(f"{outcome}\n{path}")


def _agreement(folder: Path) -> str:
    """One line for each pair of raters."""
    from moe_artifacts.label import agreement, find_images, rater_tables, read_verdicts

    images = find_images(folder)
    tables = rater_tables(folder)
    if len(tables) < 2:
        raise InputError(
            f"{folder} has {len(tables)} of the tables labels.csv and labels-NAME.csv, two raters are needed; let the "
            "second one run `moe-artifacts label` with --rater NAME"
        )
    verdicts = {path.name: read_verdicts(path, images) for path in tables}
    return "\n".join(
        f"{first} and {second}: {agreement(verdicts[first], verdicts[second])}"
        for first, second in itertools.combinations(verdicts, 2)
    )
