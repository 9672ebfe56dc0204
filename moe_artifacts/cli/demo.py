"""The command ``moe-artifacts demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_artifacts.cli.shared import errors_in_one_line, no_loading_bars


def demo(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to generate, may be repeated.  [default: two prompts per class]")
    ] = None,
    images: Annotated[int, typer.Option(help="How many images, shared out evenly over the prompts.")] = 48,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: as calibrated]")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="ddim, ddpm, dpm, euler, euler-a, unipc or pndm.  [default: as calibrated]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; the others follow.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for grid.png, curves.png and results.json.")] = Path("demo-out"),
) -> None:
    """Generate with and without the guard.

    Uses the bundled pipeline, and says of every image what the guard decided and what the judge says of the finished
    one; of the whole, what was saved.
    """
    with errors_in_one_line():
        from moe_artifacts.demo import plan, run_demo

        no_loading_bars()
        prompts, seeds = plan(prompt, images, seed)
        out.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be made should not cost a run
        run = run_demo(prompts, seeds, steps, scheduler)
        typer.echo(run.text())
        typer.echo("")
        for path in run.save(out):
            typer.echo(path)
