"""Whole runs, each a function: ``python -m training.recipes bundled``.

Every stage finds what it has already done and goes on from there, so a killed run is simply started again.
"""

from __future__ import annotations

import argparse
import logging
import os

from training.ancestor import train_ancestor
from training.bundle import bundle, write_training_log
from training.calibrate import calibrate
from training.clip import train_clip
from training.collect import SPLITS, collect, load_judges, load_pipeline
from training.generator import GeneratorRecipe, load_vae, train_denoiser, train_vae
from training.judges import train_judges
from training.train import ABLATIONS, embed_split, train_posterior
from training.workspace import compile_if_possible


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


RECIPES = {"bundled": bundled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--tracker", default="tensorboard", help="tensorboard, wandb, trackio or none")
    args = parser.parse_args()
    os.environ["MOE_ARTIFACTS_TRACKER"] = args.tracker
    RECIPES[args.recipe]()


if __name__ == "__main__":
    main()
