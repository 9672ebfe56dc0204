"""Whole runs, each a function: ``python -m training.recipes bundled``.

Every stage finds what it has already done and goes on from there, so a killed run is simply started again.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq

from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path
from training.ancestor import train_ancestor
from training.bundle import bundle, write_training_log
from training.calibrate import calibrate
from training.clip import train_clip
from training.collect import SPLITS, collect, load_judges, load_pipeline
from training.data.prompts import CLASS_NAMES, prompts_of
from training.generator import GeneratorRecipe, load_vae, train_denoiser, train_vae
from training.judges import train_judges
from training.own.images import small_run
from training.own.run import run as run_own
from training.trackers import add_tracker_option, chosen_tracker
from training.train import ABLATIONS, embed_split, train_posterior
from training.workspace import compile_if_possible, work_folder


def bundled() -> None:
    """The bundled default from nothing but Fashion-MNIST: pipeline, judges, trajectories, scorer, thresholds."""
    recipe = GeneratorRecipe()
    train_denoiser(recipe, load_vae(train_vae(recipe)))
    train_judges()
    pipe = load_pipeline()
    compile_if_possible(pipe.unet, logging.getLogger("training"))
    for split in SPLITS:
        collect(split, pipe, load_judges())
    train_clip()
    data, validation = embed_split("train"), embed_split("validation")
    for head in ABLATIONS:  # the first is the one that is shipped
        train_posterior(head, data, validation)
    train_ancestor()
    calibrate()
    bundle()
    write_training_log()


def own_fashion() -> None:
    """A scorer for the bundled pipeline as any user would train one: from nothing but prompts, by the commands of training.own.

    The judge is the bundled one. The figures are in ``scorer/evaluation.json``, next to those of the bundled scorer on the same
    trajectories.
    """
    folder = work_folder() / "own-fashion"
    held_out = {"train": False, "validation": False, "calibration": True, "test": True}
    rows = [
        {"prompt": prompt, "split": split, "group": name}
        for split, held in held_out.items()
        for label, name in enumerate(CLASS_NAMES)
        for prompt in prompts_of(label, "held-out" if held else "train")
    ]
    with atomic_path(folder / "prompts.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    own = small_run(
        folder,
        pipeline="fashion",
        prompts=folder / "prompts.parquet",
        judge="fashion",
        size=32,
        count="train=60000,validation=2000,calibration=4000,test=4000",
        classify_steps=6_500,
        collect=["--compile"],
        against="fashion",
    )
    run_own(own)


RECIPES = {"bundled": bundled, "own-fashion": own_fashion}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    add_tracker_option(parser)
    args = parser.parse_args()
    try:
        os.environ["MOE_ARTIFACTS_TRACKER"] = chosen_tracker(args.tracker)
    except InputError as error:
        parser.error(str(error))
    try:
        RECIPES[args.recipe]()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{args.recipe}: a stage failed; start it again to go on from there") from error


if __name__ == "__main__":
    main()
