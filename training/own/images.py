"""From a folder of images to a guarded pipeline with one command: a small pipeline, its judge, and a scorer for it.

    python -m training.own.images FOLDER --out WORK

``FOLDER`` has a sub-folder of images for each class, named like the class. The pipeline is trained on them
(``training.generator``), the judge says how far a generated image is from the real ones of its class (``training.judges``), and
the scorer is made as for any other pipeline (``training.own.run``); each of these commands is printed with its arguments. All
resume: a run that was killed is started again with the same arguments.

    WORK/pipeline         load it with diffusers       WORK/judges/first.safetensors    its judge
    WORK/prompts.parquet  prompts of every class       WORK/own/scorer                  its scorer, and evaluation.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_artifacts.files import write_json
from training.clip import MODEL_CONFIG
from training.data.folder import SIZES
from training.generator_models import DOWNSAMPLING
from training.own.run import OwnRun, add_stage_option, failed, run

SETTINGS = (
    "ddim:50,ddim:25,dpm:12,ddim:50,euler-a:25,ddim:20,unipc:12,ddim:25,ddim:12,dpm:25"  # the promise is for the first
)
# Guidance makes images of a class alike and hides what is wrong with the pipeline; the bundled one is run without it, too.
COLLECT = ["--settings", SETTINGS, "--guidance-scale", "1", "--batch", "250", "--autocast", "bf16"]
TUNE = [
    *("--noise-steps", "300", "--noise-lr", "1e-3", "--batch", "512", "--micro-batch", "512"),
    *("--classify-lr", "1.5e-3", "--classify-batch", "512", "--weight-decay", "0.05"),
    *("--precision", "bf16", "--save-every", "250"),
]
COUNT = "train=20000,validation=2000,calibration=4000,test=2000"
CLASSIFY_STEPS = 3_000


def small_run(
    out: Path,
    pipeline: str,
    prompts: Path,
    judge: str,
    size: int,
    count: str,
    classify_steps: int,
    collect: Sequence[str] = (),
    tune: Sequence[str] = (),
    calibrate: Sequence[str] = (),
    **options: Any,
) -> OwnRun:
    """The stages of a scorer for a pipeline as small as the bundled one, with an image tower as small as its scorer's.

    Args:
        out: Folder of the run; the tower's configuration is written there.
        size: Pixels a side of the pipeline's images.
        count: Images of each split, as of training.own.collect.
        collect, tune, calibrate: Further arguments of these stages.
        options: Further ones of :class:`training.own.run.OwnRun`.
    """
    model = {**MODEL_CONFIG, "vision_cfg": {**MODEL_CONFIG["vision_cfg"], "image_size": size}}
    write_json(out / "model.json", model)
    return OwnRun(
        pipeline=pipeline,
        prompts=prompts,
        judge=judge,
        model=str(out / "model.json"),
        out=out,
        preview_size=size,
        patch=DOWNSAMPLING,
        unit="image",  # the promise is for the prompts of the table, drawn anew for every image
        collect=["--count", count, *COLLECT, *collect],
        tune=[*TUNE, "--classify-steps", str(classify_steps), *tune],
        # As many as `moe-artifacts demo` makes: small models are slow on few.
        calibrate=["--timed-batch", "48", *calibrate],
        **options,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", metavar="FOLDER", type=Path, help="has a sub-folder of images for each class")
    parser.add_argument("--out", required=True, type=Path, metavar="WORK")
    parser.add_argument("--size", type=int, choices=SIZES, default=SIZES[0], help="pixels a side (%(default)s)")
    parser.add_argument("--count", default=COUNT, help="images that the pipeline makes (%(default)s)")
    parser.add_argument("--classify-steps", type=int, default=CLASSIFY_STEPS, help="of the scorer (%(default)s)")
    for name in ("generator", "judges", "collect", "tune", "train", "calibrate"):
        add_stage_option(parser, name)
    args = parser.parse_args(arguments)
    work: Path = args.out
    source = ["--images", str(args.images), "--out", str(work), "--size", str(args.size)]
    before = [("training.generator", [*source, *args.generator]), ("training.judges", [*source, *args.judges])]
    judge = f"manifold:{work / 'judges' / 'first.safetensors'}"
    own = small_run(
        work / "own",
        pipeline=str(work / "pipeline"),
        prompts=work / "prompts.parquet",
        judge=judge,
        size=args.size,
        count=args.count,
        classify_steps=args.classify_steps,
        **{name: getattr(args, name) for name in ("collect", "tune", "train", "calibrate")},
    )
    try:
        run(own, before)
    except subprocess.CalledProcessError as error:
        return failed(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
