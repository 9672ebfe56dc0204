"""What the commands have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from moe_artifacts.errors import MoeArtifactsError


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What the caller can do something about ends in one line and exit code 2; our own mistakes keep their traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our output has seen enough, as of ``| head``: typer ends without a word
    except (MoeArtifactsError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None  # 128 + SIGINT, as shells have it


def no_loading_bars() -> None:
    """The libraries' progress bars for reading files, which they draw even into a pipe."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
