"""Record trajectories of one's own pipeline, judged by their finished images.

``python -m training.own.collect PIPELINE --prompts FILE --out OUT --judge JUDGE`` runs the pipeline on the prompts of each
split (:mod:`training.own.prompts`), records x0 predictions at steps spread over the noise levels
(:mod:`training.own.record`), asks the judge for the label of each finished image (:mod:`training.judging`), and writes
batches of trajectories (:mod:`training.own.batches`). Without a judge the images are kept, to be labelled by people:

    moe-artifacts label OUT/unlabelled
    python -m training.own.label OUT --judge verdicts:OUT/unlabelled

The train split goes through all of ``--settings`` in turn, so that a scorer carries over to other schedulers and lengths;
the others use the first. What an image is follows from its number in its split and ``--seed`` alone: a killed run goes on with
the batches that are missing, and ``--shard i/n`` does the i-th of n parts of them. Splits share no seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_artifacts.calibration import fewest_units
from moe_artifacts.cli.shared import no_loading_bars
from moe_artifacts.errors import InputError, MoeArtifactsError
from moe_artifacts.files import read_json, write_json
from moe_artifacts.guard.call_settings import check_call
from moe_artifacts.guard.pipelines import spec_of
from moe_artifacts.loading import DTYPES, load_pipeline
from moe_artifacts.trajectory import Trajectory
from training.judging import Judge, LabelTable, ManifoldLabels, import_function
from training.own.batches import (
    RUN_NAME,
    UNLABELLED,
    Reject,
    batch_folder,
    count_splits,
    image_names,
    take_rows,
    write_batch,
)
from training.own.label import JUDGE_OPTIONS, NO_LABEL, VERDICTS, add_judge_options, judge_from, judged, reject
from training.own.prompts import SPLITS, PromptSplits, draw_prompts, read_prompts
from training.own.record import PipelineRecorder, Recording, Setting, parse_settings
from training.row_jobs import parse_shard
from training.workspace import compile_if_possible, progress

COUNTS = {"train": 3_000, "validation": 300, "calibration": 500, "test": 500}
# torch's CPU generator looks at the lowest 32 bits of a seed only, so that all splits must fit into these.
SEEDS_PER_SPLIT = 2**32 // len(SPLITS)
ONE_SIDED_AFTER = 300  # judged images
LOOK_AFTER = 50  # images; if every one of them was left out, something is wrong with all


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """What to record; all of it is stored with the trajectories."""

    counts: Mapping[str, int]  # images of each split; they may grow when a run is resumed
    settings: tuple[Setting, ...] = (Setting(),)
    batch: int = 8
    images_per_prompt: int = 1  # that follow one another with the same prompt
    checks: int = 10  # recorded steps of a run in the first setting, at most
    keep_images: bool = False
    keep_latents: bool = False
    autocast: bool = False  # the denoiser in bfloat16; the train split only, the others are what users make
    seed: int = 0

    def __post_init__(self) -> None:
        for split, count in self.counts.items():
            if split not in SPLITS or not 0 <= count <= SEEDS_PER_SPLIT:
                raise InputError(
                    f"counts must be of {', '.join(SPLITS)}, from 0 to {SEEDS_PER_SPLIT}, got {split}={count}"
                )
        for name, lowest in {"batch": 1, "images_per_prompt": 1, "checks": 2, "seed": 0}.items():
            if getattr(self, name) < lowest:
                raise InputError(f"{name} must be at least {lowest}, got {getattr(self, name)}")

    def setting(self, split: str, number: int) -> Setting:
        """Of a batch."""
        return self.settings[number % len(self.settings)] if split == "train" else self.settings[0]


@dataclass(frozen=True)
class Batch:
    """Some images of a split, that follow one another."""

    split: str
    number: int
    images: range  # numbers in the split


def batches_of(options: CollectOptions) -> list[Batch]:
    """All batches of a run; the last one of a split may be smaller."""
    return [
        Batch(split, number, range(start, min(start + options.batch, options.counts[split])))
        for split in SPLITS
        if split in options.counts
        for number, start in enumerate(range(0, options.counts[split], options.batch))
    ]


def image_seed(split: str, image: int, seed: int) -> int:
    """The seed of an image, below 2**32; another one for every image, and no other split has it, whatever ``seed`` is.

    Example:
        >>> image_seed("train", 0, seed=0), image_seed("train", 1, seed=0), image_seed("test", 0, seed=0)
        (0, 1, 3221225472)
    """
    first = seed * 0x9E3779B1  # 2**32 over the golden ratio: runs of different seeds start far from each other
    return SPLITS.index(split) * SEEDS_PER_SPLIT + (first + image) % SEEDS_PER_SPLIT


def collect(
    recorder: PipelineRecorder,
    prompts: PromptSplits,
    out: Path,
    options: CollectOptions,
    *,
    judge: Judge | None = None,
    judge_name: str = "",
    made_with: Mapping[str, Any] | None = None,
    worker: int = 0,
    workers: int = 1,
) -> None:
    """Record the batches of one worker that are not there yet.

    Args:
        judge: None: the images are kept, under ``out/unlabelled``.
        made_with: What tells this run from others besides its options, as JSON values.
    Raises:
        InputError: If ``out`` holds another run, a split has no prompt, the judge cannot judge images that are just being
            made, or each of the first images had to be left out.
    """
    if isinstance(judge, LabelTable):
        raise InputError(
            f"judge {judge_name!r} knows images by their files, which are still to be made: collect without a judge, then "
            "use python -m training.own.label"
        )
    for split, count in options.counts.items():
        if count and not prompts.prompts[split]:
            raise InputError(
                f"the split {split!r} has no prompt: {prompts.counts.left('prompts')} are too few to share out; give more, or "
                "say the split of each in a column"
            )
    told = dataclasses.asdict(options) | {"prompts": prompts.sha256(), "judge": judge_name, **(made_with or {})}
    if isinstance(judge, ManifoldLabels):
        told["judge_sha256"] = judge.sha256()
    _warn_if_few_prompts(options, len(prompts.prompts["calibration"]))
    # Rounded: on other machines they may differ in the last digits.
    levels = {name: getattr(recorder.config, name) for name in ("log_snr_range", "check_progress")}
    told |= {name: [round(value, 4) for value in values] for name, values in levels.items()}
    _open(out, told)
    root = out if judge is not None else out / UNLABELLED
    mine = batches_of(options)[worker::workers]
    missing = [batch for batch in mine if not batch_folder(root, batch.split, batch.number).exists()]
    kept, left_out, labels = 0, Counter[str](), list[float]()
    with progress(len(mine), len(mine) - len(missing), "collect") as bar:
        for batch in missing:
            recording = recorder(
                draw_prompts(prompts.prompts[batch.split], batch.images, options.seed, options.images_per_prompt),
                [image_seed(batch.split, image, options.seed) for image in batch.images],
                options.setting(batch.split, batch.number),
                bfloat16=options.autocast and batch.split == "train",
            )
            folder = batch_folder(root, batch.split, batch.number)
            written, rejects = _write(folder, recording, options, judge, judge_name)
            kept += len(written.prompts)
            if written.label is not None and len(labels) < ONE_SIDED_AFTER <= len(labels) + len(written.label):
                _warn_if_one_sided([*labels, *written.label.tolist()])
            labels += [] if written.label is None else written.label.tolist()
            left_out.update(row["reason"] for row in rejects)
            if not kept and left_out.total() >= LOOK_AFTER:
                raise InputError(
                    f"each of the first {left_out.total()} images had to be left out: {dict(left_out)}; the last one: "
                    f"{rejects[-1]['detail']}"
                )
            bar.update()


def _warn_if_few_prompts(options: CollectOptions, prompts: int) -> None:
    used = min(prompts, -(-options.counts.get("calibration", 0) // options.images_per_prompt))
    needed = fewest_units(0.05, 0.95)  # what training.own.calibrate promises unless told otherwise
    if 0 < used < needed:
        logging.getLogger(__name__).warning(
            "the calibration images will be of %d prompts: a promise over prompts, of 5 %% with 95 %% confidence, takes %d of them "
            "and more; give more prompts, or have another promise in mind (training.own.calibrate)",
            used,
            needed,
        )


def _write(
    folder: Path, recording: Recording, options: CollectOptions, judge: Judge | None, judge_name: str
) -> tuple[Trajectory, list[Reject]]:
    """Judge and write a batch; returns what it holds, and the images left out."""
    recorded, split = recording.trajectory, folder.parent.name
    rejects = [reject(split, recorded.seeds[row], recorded.prompts[row], *why) for row, why in recording.wrong.items()]
    rows = torch.tensor([row for row in range(len(recorded.prompts)) if row not in recording.wrong], dtype=torch.int64)
    trajectory, images = take_rows(recorded, rows), recording.images[rows]
    if judge is not None:
        before = trajectory
        trajectory, known = judged(before, judge, images, judge_name)
        images = images[known]
        unknown = (~known).nonzero().flatten().tolist()
        rejects += [reject(split, before.seeds[row], before.prompts[row], *NO_LABEL) for row in unknown]
    keeps_images = judge is None or options.keep_images
    if keeps_images:
        names = image_names(len(images))
        trajectory = dataclasses.replace(trajectory, meta=trajectory.meta | {"images": names})
    write_batch(folder, trajectory, rejects, images if keeps_images else None)
    return trajectory, rejects


def _warn_if_one_sided(labels: Sequence[float]) -> None:
    """While there is still much to save: nothing can be learned from images that are all alike."""
    bad = sum(label > 0.5 for label in labels)
    if bad in (0, len(labels)):
        print(
            f"WARNING: the judge finds all of the first {len(labels)} images {'bad' if bad else 'clean'}; if that goes on, nothing "
            "can be learned from them: let it be more or less strict, or make other images",
            file=sys.stderr,
        )


def _open(out: Path, told: dict[str, Any]) -> None:
    """Make the folder, or make sure that it belongs to the same run, of which more images may be asked for now.

    Raises:
        InputError: If it holds another run, naming what differs.
    """
    path, told = out / RUN_NAME, json.loads(json.dumps(told))  # as it is read back: no tuples
    if path.exists():
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("counts"), dict):
            raise InputError(f"{path} is not what this command writes; choose another folder")
        for name in dict.fromkeys([*told, *found]):
            if name != "counts" and found.get(name) != told.get(name):
                raise InputError(
                    f"{out} holds trajectories with {name}={found.get(name)!r}, this run has {told.get(name)!r}; choose "
                    "another folder"
                )
        for split in SPLITS:
            before, now = (counts.get(split, 0) for counts in (found["counts"], told["counts"]))
            if now < before or (now > before and before % told["batch"]):
                raise InputError(
                    f"{out} was to hold {before} images of {split}, now {now}: their number can only grow, and only from "
                    f"a multiple of the batch, {told['batch']}; choose another folder"
                )
        if found == told:
            return
    write_json(path, told)  # several workers write the same


def parse_counts(text: str) -> dict[str, int]:
    """``SPLIT=N`` separated by commas.

    Raises:
        InputError: If that is not what it is.

    Example:
        >>> parse_counts("train=3000,test=500")
        {'train': 3000, 'test': 500}
    """
    counts = {}
    for part in text.split(","):
        split, _, count = part.strip().partition("=")
        if split not in SPLITS or not count.isdecimal():
            raise InputError(f"count must be SPLIT=N separated by commas, of {', '.join(SPLITS)}, got {part!r}")
        counts[split] = int(count)
    return counts


def parse_arguments(text: str) -> dict[str, Any]:
    """Further arguments of the pipeline, as a JSON object.

    Raises:
        InputError: If it is none, or has an argument that is not the same for all images.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"arguments must be JSON, e.g. '{{\"height\": 512}}', got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"arguments must be a JSON object, e.g. '{{\"height\": 512}}', got {text!r}")
    check_call(found, into_folder=False)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", metavar="PIPELINE", help="a bundled name, a folder or a Hub id; with safetensors")
    parser.add_argument("--prompts", required=True, type=Path, help="text file, .parquet or .csv")
    parser.add_argument("--out", required=True, type=Path, help="folder of the trajectories")
    parser.add_argument(
        "--count",
        default=",".join(f"{split}={count}" for split, count in COUNTS.items()),
        help="images of each split; asked for more, a finished run goes on (%(default)s)",
    )
    parser.add_argument(
        "--settings",
        default="own",
        help="SCHEDULER:STEPS separated by commas, own:STEPS with the pipeline's own scheduler; the train split takes them in "
        "turn, the others the first (%(default)s)",
    )
    parser.add_argument("--guidance-scale", type=float, help="(the pipeline's own)")
    parser.add_argument("--arguments", default="{}", help="further arguments of the pipeline as JSON, e.g. height")
    parser.add_argument(
        "--arguments-for",
        metavar="MODULE:FUNCTION",
        help="further arguments that differ between prompts: a function of the list of prompts of a batch",
    )
    parser.add_argument("--batch", type=int, default=8, help="images in one call of the pipeline (%(default)s)")
    parser.add_argument(
        "--images-per-prompt", type=int, default=1, help="images that follow one another with a prompt (%(default)s)"
    )
    add_judge_options(parser, required=False)
    parser.add_argument("--checks", type=int, default=10, help="recorded steps of a run, at most (%(default)s)")
    parser.add_argument("--keep-images", action="store_true", help="as PNG; without a judge they always are")
    parser.add_argument("--keep-latents", action="store_true", help="the noisy ones, x_t, beside x0")
    parser.add_argument("--device", help="(cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    parser.add_argument("--autocast", choices=("bf16",), help="run the denoiser so in the train split")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser, which pays in long runs")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="do the I-th of N parts, counted from 0 (%(default)s)"
    )
    args = parser.parse_args(arguments)
    try:
        worker, workers = parse_shard(args.shard)
        options = CollectOptions(
            counts=parse_counts(args.count),
            settings=parse_settings(args.settings),
            autocast=args.autocast is not None,
            **{
                name: getattr(args, name)
                for name in ("batch", "images_per_prompt", "checks", "keep_images", "keep_latents", "seed")
            },
        )
        given = parse_arguments(args.arguments)
        if args.guidance_scale is not None:
            given["guidance_scale"] = args.guidance_scale
        judge = None if args.judge is None else judge_from(args)
        prompts = read_prompts(args.prompts, args.seed)
        print(prompts.counts)
        no_loading_bars()
        pipe, defaults = load_pipeline(args.pipeline, getattr(torch, args.dtype), args.device)
        recorder = PipelineRecorder(
            pipe,
            options.settings[0],
            next(texts[0] for texts in prompts.prompts.values() if texts),
            checks=options.checks,
            arguments=defaults | given,
            arguments_for=None if args.arguments_for is None else import_function(args.arguments_for),
            keep_latents=options.keep_latents,
        )
        if args.compile:
            for module in spec_of(pipe).modules(pipe):
                compile_if_possible(module, logging.getLogger(__name__))
        # Not the device: on another one the images are nearly the same, and a run may well be resumed there.
        told = {name: getattr(args, name) for name in ("pipeline", "arguments_for", "dtype", *JUDGE_OPTIONS)}
        told |= {"pipeline_class": type(pipe).__name__, "arguments": defaults | given}
        told |= {"compile": True} if args.compile else {}  # in 16 bits it rounds otherwise
        collect(
            recorder,
            prompts,
            args.out,
            options,
            judge=judge,
            judge_name=args.judge or "",
            made_with=told,
            worker=worker,
            workers=workers,
        )
    except (MoeArtifactsError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    for count in count_splits(args.out if judge is not None else args.out / UNLABELLED, SPLITS):
        print(count)
    if judge is None:
        images = str(args.out / UNLABELLED)
        print(f"label them: moe-artifacts label {shlex.quote(images)}")
        print(
            f"then: python -m training.own.label {shlex.quote(str(args.out))} --judge {shlex.quote(VERDICTS + images)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
