"""Runs and the labels of their images to tallies, one per audit rate."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_artifacts.audit.rates import Tally
from moe_artifacts.errors import InputError
from moe_artifacts.guard.run_folder import RUN_NAME, Attempt, RunRecord, read_run

ImageId = tuple[int, str]  # place of its run, file in the folder of the run


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What is known of the finished images."""

    source: str | None  # for people; None: there are none
    artifact: Mapping[ImageId, int]  # 1 with artifacts, 0 clean
    left_out: Collection[str] = field(
        default=()
    )  # prompts whose images cannot be labelled, so that none of them counts


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[RunRecord]:
    """Runs of one threshold, finished or not.

    Raises:
        InputError: If there are none, one cannot be read or has no audits, they differ in their threshold, or an image
            is there twice.
    """
    if not folders:
        raise InputError("runs must hold at least one folder of a run, got none")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        rate, images = run.settings["audit_rate"], run.settings["images_per_prompt"]
        if rate == 0:
            raise InputError(
                f"{run.folder} was made with audit_rate 0: nobody knows what its aborted images would have become. "
                "Leave it out, or make a run with audit_rate 0.02 or more"
            )
        if not isinstance(rate, (int, float)) or not isinstance(images, int):
            raise InputError(
                f"{run.folder / RUN_NAME}: audit_rate must be a number and images_per_prompt a whole number, got {rate!r} "
                f"and {images!r}"
            )
        for name in ("scorer", "rule"):
            if run.settings[name] != runs[0].settings[name]:
                raise InputError(
                    f"{runs[0].folder} and {run.folder} differ in their {name}: audit runs of one threshold at a time"
                )
    _refuse_repeats(runs)
    return runs


def tallies(runs: Sequence[RunRecord], labels: Labels, *, first_only: bool) -> list[Tally]:
    """One per audit rate, in the order in which the rates first appear.

    Args:
        first_only: Count as many attempts of each prompt as images were asked for. The others were made only because an
            image was not kept, so there are more of them for the prompts that the guard aborts often.
    """
    counts: dict[float, Counter[str]] = {}
    for place, run in enumerate(runs):
        count = counts.setdefault(run.settings["audit_rate"], Counter())
        for attempt in counted(run, labels, first_only=first_only):
            label = None if attempt.file is None else labels.artifact.get((place, attempt.file))
            count.update(_kinds(attempt, label))
    names = (
        "aborts", "audited", "audited_labelled", "audited_clean", "kept", "kept_labelled", "kept_clean", "rejected"
    )  # fmt: skip
    return [Tally(audit_rate=rate, **{name: count[name] for name in names}) for rate, count in counts.items()]


def counted(run: RunRecord, labels: Labels, *, first_only: bool) -> Iterator[Attempt]:
    """The attempts of a run that a tally counts."""
    for attempt in run.attempts:
        is_first = attempt.attempt < run.settings["images_per_prompt"]
        if (is_first or not first_only) and attempt.prompt not in labels.left_out:
            yield attempt


def _kinds(attempt: Attempt, label: int | None) -> list[str]:
    """Fields of the tally in which an attempt counts."""
    if attempt.audited:
        if attempt.status == "error":  # its latents broke afterwards: not clean, whatever it was aborted for
            label = 1
        kinds = ["aborts", "audited"]
    elif attempt.kept:
        kinds = ["kept"]
    else:
        return {"aborted": ["aborts"], "rejected": ["rejected"]}.get(attempt.status, [])
    if label is not None:
        kinds.append(f"{kinds[-1]}_labelled")
        kinds += [] if label else [f"{kinds[-2]}_clean"]
    return kinds


def _refuse_repeats(runs: Sequence[RunRecord]) -> None:
    """Doubled images would count as evidence twice."""
    seen: dict[tuple[str, str | None, str, int], Path] = {}
    for run in runs:
        made_by = json.dumps([run.settings[name] for name in ("pipeline", "model", "scheduler", "call")])
        for denoiser, attempt in ((wave.setting.denoiser, attempt) for wave in run.waves for attempt in wave.attempts):
            first = seen.setdefault((made_by, denoiser, attempt.prompt, attempt.seed), run.folder)
            if first is not run.folder:
                raise InputError(
                    f"{first} and {run.folder} hold the same images, the first of {attempt.prompt!r} with seed "
                    f"{attempt.seed}: leave one of them out, or make it with another seed"
                )
