"""The command ``moe-artifacts score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_artifacts.cli.shared import errors_in_one_line


def score(
    trajectories: Annotated[Path, typer.Argument(help="A trajectory folder, or a folder of them; with latents.")],
    scorer: Annotated[str, typer.Option(help="A bundled name, a folder or a Hub id (owner/name).")],
    out: Annotated[Path, typer.Option(help="Folder for the scored trajectories; what is done is not done again.")],
    keep_latents: Annotated[bool, typer.Option("--keep-latents", help="Copy the latents too.")] = False,
) -> None:
    """Score recorded trajectories.

    Says of each folder how many images the scorer's threshold would stop.
    """
    with errors_in_one_line():
        from moe_artifacts.offline import score_folders
        from moe_artifacts.scorer import ArtifactScorer

        for done in score_folders(trajectories, ArtifactScorer.from_pretrained(scorer), out, keep_latents):
            parts = [f"{done.images} images", f"mean final artifact_prob {done.artifact_prob:.3f}"]
            if done.aborted is None:
                parts.append("no threshold")
            else:
                parts.append(f"{done.aborted} would be aborted")
            parts += [f"{done.rejected} would be rejected at the last step"] if done.rejected else []
            parts += [f"{done.errors} not finite"] if done.errors else []
            parts += ["scored before"] if done.resumed else []
            typer.echo(f"{done.folder}: {', '.join(parts)}")
