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

from moe_artifacts.files import atomic_path, write_json
from training.ancestor import train_ancestor
from training.bundle import bundle, write_training_log
from training.calibrate import calibrate
from training.clip import MODEL_CONFIG, train_clip
from training.collect import SPLITS, collect, load_judges, load_pipeline
from training.data.prompts import CLASS_NAMES, prompts_of
from training.generator import GeneratorRecipe, load_vae, train_denoiser, train_vae
from training.judges import train_judges
from training.own.run import OwnRun
from training.own.run import run as run_own
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
    write_json(folder / "model.json", MODEL_CONFIG)
    settings = "ddim:50,ddim:25,dpm:12,ddim:50,euler-a:25,ddim:20,unipc:12,ddim:25,ddim:12,dpm:25"
    count = "train=30000,validation=2000,calibration=5000,test=5000"
    run_own(
        OwnRun(
            pipeline="fashion",
            prompts=folder / "prompts.parquet",
            judge="fashion",
            model=str(folder / "model.json"),
            out=folder,
            preview_size=32,
            patch=4,
            unit="image",  # every image's prompt is drawn on its own
            against="fashion",
            collect=["--count", count, "--settings", settings, "--batch", "250", "--autocast", "bf16"],
            tune=[
                *("--noise-steps", "300", "--noise-lr", "1e-3", "--batch", "512", "--micro-batch", "512"),
                *("--classify-steps", "3000", "--classify-lr", "1.5e-3", "--classify-batch", "512"),
                *("--weight-decay", "0.05", "--precision", "bf16", "--save-every", "250"),
            ],
        )
    )


RECIPES = {"bundled": bundled, "own-fashion": own_fashion}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--tracker", default="tensorboard", help="tensorboard, wandb, trackio or none")
    args = parser.parse_args()
    os.environ["MOE_ARTIFACTS_TRACKER"] = args.tracker
    try:
        RECIPES[args.recipe]()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{args.recipe}: a stage failed; start it again to go on from there") from error


if __name__ == "__main__":
    main()
