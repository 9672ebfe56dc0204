"""The command ``moe-artifacts generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_artifacts.cli.shared import errors_in_one_line, no_loading_bars
from moe_artifacts.errors import InputError


def generate(
    out: Annotated[Path, typer.Option(help="Folder of the run; one that was stopped is resumed.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to generate, may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line, in their place.")] = None,
    images_per_prompt: Annotated[int, typer.Option(help="Images of each prompt that the guard does not abort.")] = 1,
    pipeline: Annotated[
        str, typer.Option(help="A bundled name, a folder or a Hub id (owner/name); with safetensors.")
    ] = "fashion",
    scorer: Annotated[
        str | None,
        typer.Option(help="A bundled name, a folder or a Hub id.  [default: the bundled one of a bundled pipeline]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images in one call of the pipeline.")] = 8,
    seed: Annotated[int, typer.Option(help="The seeds of all images follow from it.")] = 0,
    max_attempts: Annotated[int, typer.Option(help="Per image wanted.")] = 4,
    max_denoiser_calls: Annotated[
        int | None, typer.Option(help="Denoiser steps of the run, summed over images.  [default: no limit]")
    ] = None,
    audit_rate: Annotated[
        float, typer.Option(help="Share of the would-be aborts to finish, for `moe-artifacts audit`.")
    ] = 0.0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: the pipeline's]")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="[default: the pipeline's]")] = None,
    on_abort: Annotated[
        Literal["drop", "mask"],
        typer.Option(help="drop shrinks the batch; mask keeps its size, for compiled denoisers."),
    ] = "drop",
    device: Annotated[str | None, typer.Option(help="[default: cuda where there is one, else cpu]")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the pipeline; the scorer keeps float32.")
    ] = "float32",
) -> None:
    """Generate until every prompt has its images.

    What the guard aborts is tried again with another seed. The same command goes on with a run that was stopped.
    """
    with errors_in_one_line():
        texts = _prompts(prompt, prompts)
        import torch

        from moe_artifacts.guard.generate import generate_clean
        from moe_artifacts.guard.guard import ArtifactGuard
        from moe_artifacts.loading import is_bundled, load_pipeline, require_pipeline
        from moe_artifacts.scorer import ArtifactScorer

        require_pipeline(pipeline)
        if scorer is None and not is_bundled(pipeline):
            raise InputError(f"--scorer is needed: the pipeline {pipeline!r} is not bundled, so none belongs to it")
        no_loading_bars()
        loaded = ArtifactScorer.from_pretrained(scorer or pipeline)  # first: it is small, the pipeline may be huge
        pipe, call = load_pipeline(pipeline, getattr(torch, dtype), device)
        given = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        run = generate_clean(
            pipe,
            texts,
            images_per_prompt,
            guard=ArtifactGuard(loaded.to(pipe.device), on_abort, audit_rate=audit_rate),
            batch_size=batch_size,
            seed=seed,
            max_attempts=max_attempts,
            max_denoiser_calls=max_denoiser_calls,
            folder=out,
            progress=sys.stderr.isatty(),
            **call | {name: value for name, value in given.items() if value is not None},
        )
        typer.echo(run.report())
        typer.echo(f"\n{out}")
        if run.audited:
            typer.echo(f"audited images: {len(run.audited)} in {out / 'audited'}; label them for moe-artifacts audit")


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    if (given is None) == (file is None):
        raise InputError("give what to generate with --prompt, or a file of prompts with --prompts, one of the two")
    if file is None:
        return given or []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines knows eight more ends of a line
    except UnicodeDecodeError as error:
        raise InputError(f"{file} must be a text file in UTF-8: {error}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{file} must hold at least one prompt, one a line, it has none")
    return texts
