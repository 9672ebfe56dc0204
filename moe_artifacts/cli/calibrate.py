"""The command ``moe-artifacts calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_artifacts.cli.shared import errors_in_one_line
from moe_artifacts.config import RuleName
from moe_artifacts.errors import InputError


def calibrate(
    trajectories: Annotated[
        Path, typer.Argument(help="Trajectory folder, or a folder of them; or a file: .parquet, .csv or .npz.")
    ],
    rule: Annotated[RuleName, typer.Option(help="What decides.")] = "economic",
    risk: Annotated[
        Literal["per-image", "per-prompt", "miss", "wrong-aborts"],
        typer.Option(
            help="What is promised: clean images aborted, of all clean ones (per-image) or on average over prompts "
            "(per-prompt); bad images not aborted (miss); clean ones among the aborted (wrong-aborts)."
        ),
    ] = "per-image",
    max_risk: Annotated[float, typer.Option(help="It is at most this ...")] = 0.05,
    confidence: Annotated[float, typer.Option(help="... with this probability.")] = 0.95,
    unit: Annotated[
        Literal["prompt", "image"],
        typer.Option(help="What was drawn independently: prompts, or images that all have a prompt of their own."),
    ] = "prompt",
    check_cost: Annotated[float, typer.Option(help="Price of scoring one image once, in denoiser calls.")] = 0.02,
    q: Annotated[float, typer.Option(help="q-exit: decide once exit_cdf is above this.")] = 0.5,
    patience: Annotated[int, typer.Option(help="patience: this many alarms in a row.")] = 2,
    column: Annotated[
        str | None,
        typer.Option(
            "--score", help="Column of a plain score.  [default: artifact_prob and what belongs to it, or score]"
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Array [prompt image step] of an .npz.")] = None,
    label_from_final: Annotated[
        float | None, typer.Option(help="Label this share of the images, with the lowest final scores, as bad.")
    ] = None,
    label_within: Annotated[
        Literal["pooled", "prompt"], typer.Option(help="That share of all images, or of each prompt's.")
    ] = "pooled",
    num_steps: Annotated[
        int | None, typer.Option(help="Denoiser calls of a whole run, where the file does not say it.")
    ] = None,
    drop_incomplete: Annotated[
        bool, typer.Option("--drop-incomplete", help="Leave out images without a posterior at every step.")
    ] = False,
    choose_steps: Annotated[
        bool | None,
        typer.Option(
            "--choose-steps/--all-steps",
            help="Plain scores: look only at the steps that pay.  [default: where all images have all scores]",
        ),
    ] = None,
    siblings: Annotated[
        int, typer.Option(help="Plain scores: images of a prompt in one batch, which see each other's scores.")
    ] = 1,
    shares: Annotated[
        str, typer.Option(help="Of the prompts: fitted on, threshold from, held back for the report.")
    ] = "0.3,0.5,0.2",
    seed: Annotated[int, typer.Option(help="Of that split.")] = 0,
    scorer: Annotated[str | None, typer.Option(help="Folder of the scorer to write to.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the threshold into that folder.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for curves.png and calibration.json.")] = None,
) -> None:
    """Find a threshold that keeps a promise.

    From recorded runs with labels; prints what it promises, and what it does on prompts that took no part in it.
    docs/which-threshold.md says which rule and promise to take, moe_artifacts/records.py which columns a file needs.
    """
    with errors_in_one_line():
        if write and scorer is None:
            raise InputError("--write needs --scorer, the folder to write to")
        from moe_artifacts.calibrate import calibrate as find_threshold
        from moe_artifacts.calibrated import Request
        from moe_artifacts.records import read_records

        request = Request(
            rule=rule,
            risk=risk,
            max_risk=max_risk,
            confidence=confidence,
            unit=unit,
            check_cost=check_cost,
            q=q,
            patience=patience,
            choose_steps=choose_steps,
            siblings=siblings,
            shares=_shares(shares),
            seed=seed,
        )
        folder = None
        if scorer is not None and write:
            from moe_artifacts.write_back import own_folder

            folder = own_folder(scorer)  # refused before the work, not after it
        records = read_records(
            trajectories,
            score=column,
            key=key,
            label_from_final=label_from_final,
            label_within=label_within,
            num_steps=num_steps,
            drop_incomplete=drop_incomplete,
        )
        found = find_threshold(records, request)
        typer.echo(found.text())
        if out is not None:
            from moe_artifacts.files import write_json
            from moe_artifacts.report import save_calibration

            save_calibration(out / "curves.png", found)
            write_json(out / "calibration.json", found.summary())
            typer.echo(f"\n{out / 'curves.png'}\n{out / 'calibration.json'}")
        if folder is not None:
            from moe_artifacts.write_back import write_threshold

            typer.echo(f"\nwritten to {write_threshold(folder, found)}")
        else:
            typer.echo("\nnot written to any scorer: that takes --scorer FOLDER --write")


def _shares(text: str) -> tuple[float, float, float]:
    try:
        first, second, third = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--shares must be three numbers such as 0.3,0.5,0.2, got {text!r}") from error
    return first, second, third
