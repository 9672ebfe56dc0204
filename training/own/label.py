"""Put labels to trajectories whose images people have looked at.

``python -m training.own.label OUT --judge verdicts:OUT/unlabelled`` takes every batch that :mod:`training.own.collect` has
written under ``OUT/unlabelled``, asks the judge for the label of each image, and writes ``OUT/<split>``: the images that have
one. The others are counted as rejects. What lies under ``OUT/unlabelled`` stays as it is, so that more verdicts, or another
judge, can label it again; what the one before has said is removed then. A run that was killed goes on with the batches that
are missing. ``OUT/label.json`` says whose labels they are; delete it where a function of the same name judges otherwise now.

A judge is named as ``training.judging.judge_named`` says; ``verdicts:FOLDER`` is a folder labelled with ``moe-artifacts
label FOLDER``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from moe_artifacts.errors import InputError, MoeArtifactsError
from moe_artifacts.files import read_json, write_json
from moe_artifacts.shapes import PerImage, RowMask
from moe_artifacts.trajectory import Trajectory
from training.judging import FinishedImages, Judge, LabelTable, ManifoldLabels, VerdictJudge, judge_named
from training.own.batches import (
    UNLABELLED,
    Reject,
    batch_folder,
    batch_folders,
    count_splits,
    read_batch,
    remove_batch,
    take_rows,
    write_batch,
)
from training.own.prompts import SPLITS
from training.workspace import progress

LABEL_NAME = "label.json"
VERDICTS = "verdicts:"
NO_LABEL = ("label", "the judge says nothing of it")
JUDGE_OPTIONS = ("judge_images", "clean", "bad", "bad_below", "bad_above")  # beside the judge itself


@runtime_checkable
class MarginJudge(Protocol):
    """A judge that also says how sure it is: an image has artifacts where its margin is above 0."""

    def margin(self, images: FinishedImages, prompts: Sequence[str]) -> PerImage:
        """Float32, or NaN where it says nothing of the image."""
        ...


def judged(trajectory: Trajectory, judge: Judge, images: FinishedImages, name: str) -> tuple[Trajectory, RowMask]:
    """The trajectory of the images that the judge has a label for, which may be none, and which rows those were.

    Args:
        images: Of the rows of ``trajectory``.
        name: Of the judge.
    Returns:
        With labels, and margins where the judge has them.
    Raises:
        InputError: As the judge does.
    """
    told: dict[str, Any] = {"judge": name}
    if isinstance(judge, MarginJudge):
        margin = judge.margin(images, trajectory.prompts)
        label = torch.where(margin.isnan(), margin, (margin > 0).float())
        told["margin"] = margin.tolist()
    else:
        label = judge(images, trajectory.prompts)
    known = ~label.isnan()
    # The rows first: a trajectory takes no NaN for a label.
    kept = take_rows(dataclasses.replace(trajectory, meta=trajectory.meta | told), known.nonzero().flatten())
    return dataclasses.replace(kept, label=label[known]), known


def reject(split: str, seed: int | None, prompt: str, reason: str, detail: str) -> Reject:
    """An image that was left out; no two have the same seed."""
    return {"key": f"{split}/{seed}", "reason": reason, "detail": f"{detail} ({prompt!r})"}


def label_batch(source: Path, target: Path, judge: Judge, name: str) -> None:
    """Write the labelled images of one batch to ``target``; ``source`` stays as it is."""
    trajectory, rejects = read_batch(source)
    if trajectory is not None:
        split, seeds, prompts = source.parent.name, trajectory.seeds, trajectory.prompts
        files = [source / file for file in trajectory.meta["images"]]
        present = [row for row, file in enumerate(files) if file.is_file()]
        names = [Path(os.path.relpath(file, target)).as_posix() for file in files]
        named = dataclasses.replace(trajectory, meta=trajectory.meta | {"images": names})
        there = take_rows(named, torch.tensor(present, dtype=torch.int64))
        trajectory, known = judged(there, judge, [files[row] for row in present], name)
        why = {row: ("image", "its file is gone") for row in range(len(files))} | dict.fromkeys(present, NO_LABEL)
        labelled = {row for row, ok in zip(present, known.tolist(), strict=True) if ok}
        rejects += [
            reject(split, seeds[row], prompts[row], *why[row]) for row in range(len(files)) if row not in labelled
        ]
    write_batch(target, trajectory, rejects)


def label(out: Path, judge: Judge, name: str, options: Mapping[str, Any] | None = None) -> None:
    """Label every batch under ``out/unlabelled`` that this judge has not labelled yet.

    Args:
        name: Of the judge.
        options: What tells it from another one of the same name, as JSON values.
    Raises:
        InputError: If there is none, or as the judge does.
    """
    folders = [folder for split in SPLITS for folder in batch_folders(out / UNLABELLED, split)]
    if not folders:
        raise InputError(
            f"{out / UNLABELLED} holds no trajectories: python -m training.own.collect writes them there when it is given "
            "no judge"
        )
    _begin(
        out,
        {
            "judge": name,
            **(options or {}),
            "sha256": judge.sha256() if isinstance(judge, (LabelTable, ManifoldLabels)) else None,
        },
    )
    targets = {folder: batch_folder(out, folder.parent.name, int(folder.name)) for folder in folders}
    missing = {source: target for source, target in targets.items() if not target.exists()}
    with progress(len(folders), len(folders) - len(missing), "label") as bar:
        for source, target in missing.items():
            label_batch(source, target, judge, name)
            bar.update()


def _begin(out: Path, told: dict[str, Any]) -> None:
    """Remove labels that are another judge's."""
    path = out / LABEL_NAME
    if path.exists() and read_json(path) == told:
        return
    for split in SPLITS:
        for folder in batch_folders(out, split):
            remove_batch(folder)
    write_json(path, told)  # last: a run that is killed before begins anew


def add_judge_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The options that :func:`judge_from` reads."""
    parser.add_argument(
        "--judge",
        required=required,
        help="manifold:FILE, FILE.parquet of scores, module:function, verdicts:FOLDER, or a bundled name",
    )
    parser.add_argument("--judge-images", metavar="FOLDER", help="what the paths in a Parquet file are relative to")
    parser.add_argument("--clean", type=float, help="score of a clean image in a Parquet file")
    parser.add_argument("--bad", type=float, help="score of a ruined one")
    parser.add_argument("--bad-below", type=float, help="of a function: images with a lower score have artifacts")
    parser.add_argument("--bad-above", type=float, help="of a function: images with a higher score have artifacts")


def judge_from(args: argparse.Namespace) -> Judge:
    """The judge that the options name.

    Raises:
        InputError: As ``judge_named``.
        CheckpointError: Likewise.
    """
    options = {name: getattr(args, name) for name in JUDGE_OPTIONS}
    name: str = args.judge
    if name.startswith(VERDICTS):
        if given := [option for option, value in options.items() if value is not None]:
            raise InputError(f"{' and '.join(given)} cannot be used with {name!r}, which is a folder of verdicts")
        return VerdictJudge(name.removeprefix(VERDICTS))
    return judge_named(name, folder=options.pop("judge_images"), **options)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that training.own.collect has written")
    add_judge_options(parser, required=True)
    args = parser.parse_args(arguments)
    try:
        label(args.out, judge_from(args), args.judge, {option: getattr(args, option) for option in JUDGE_OPTIONS})
        for count in count_splits(args.out, SPLITS):
            print(count)
    except (MoeArtifactsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
