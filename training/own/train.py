"""Train gate and experts, the posterior, on the embeddings of one's own pipeline or images.

``python -m training.own.train EMBEDDED --out HEADS`` reads what :mod:`training.embed` wrote to ``EMBEDDED/train`` and
``EMBEDDED/validation``: trajectories or noised images, of any embedder, with labels that are 0, 1 or between, and margins of the
judge where it has them. Images without a label are left out, and counted. Of the heads those with the best AUROC on validation are
kept: within prompts where enough of them have images of both kinds, else over all. Next: ``python -m training.own.calibrate``.

A batch is read at a time, so any number of images will do. A run that was killed goes on where it was; ``accelerate launch -m
training.own.train ...`` trains on several processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open

from moe_artifacts.errors import ConfigError, MoeArtifactsError
from moe_artifacts.loading import checked_device
from training.embedded import EmbeddedRows
from training.head_data import HeadData, at_most, is_bad, labelled, log_snr_range_of, rows_per_band
from training.heads import HeadRecipe, HeadSpace, Variant, head_configs
from training.own.heads_folder import (
    FACTS_NAME,
    WEIGHTS_NAME,
    HeadFacts,
    made_with,
    read_facts,
    require_distinct,
    require_same_embedder,
)
from training.posterior import train_posterior
from training.trackers import add_tracker_option, chosen_tracker, open_tracker

RECIPE = HeadRecipe(name="heads", steps=2_000, patience=6)
VALIDATION_IMAGES = 10_000  # more would change little, and are looked at again and again

log = logging.getLogger(__name__)


def train(
    embedded: Path,
    out: Path,
    recipe: HeadRecipe = RECIPE,
    *,
    log_snr_range: tuple[float, float] | None = None,
    device: str | torch.device = "cpu",
    track: Callable[..., None] | None = None,
) -> HeadFacts:
    """Train heads into ``out``.

    Args:
        embedded: With the folders ``train`` and ``validation``.
        log_snr_range: Nats, that progress is measured over; None: that of the training images.
    Raises:
        InputError: If a split is missing, has no labels or only one kind of image, or the two are of different embedders.
        ConfigError: If ``out`` holds another run, or the loss is no longer finite.
    """
    rows, other = EmbeddedRows(embedded / "train"), EmbeddedRows(embedded / "validation")
    require_same_embedder(other, rows)
    require_distinct({"train": rows, "validation": other})
    data, unseen = labelled(rows, "train"), labelled(other, "validation")
    for name, source, known in (("train", rows, data), ("validation", other, unseen)):
        log.info("%s", describe(name, source, known))
    space = HeadSpace(embed_dim=rows.embed_dim, log_snr_range=log_snr_range or log_snr_range_of(data))
    facts = HeadFacts(
        recipe=recipe,
        space=space,
        **made_with(rows, other),
        images=len(data),
        bad_rate=data.label.mean().item(),
        rows_per_band=tuple(rows_per_band(data, space.log_snr_range)),
    )
    if empty := [band for band, count in enumerate(facts.rows_per_band) if count == 0]:
        log.warning(
            "no check lies in the bands %s of %d, counted from the noisiest, of log-SNR %.2f to %.2f: nothing is learned there",
            empty,
            len(facts.rows_per_band),
            *space.log_snr_range,
        )
    head_configs(recipe, space)  # what is wrong with them, before the folder is theirs
    _claim(out, facts)
    path = train_posterior(
        recipe,
        space,
        data,
        at_most(unseen, VALIDATION_IMAGES, recipe.seed),
        out / WEIGHTS_NAME,
        device=device,
        track=track,
    )
    with safe_open(path, framework="pt") as file:
        facts = dataclasses.replace(facts, auroc=float(file.metadata()["auroc"]))
    facts.write(out)
    return facts


def describe(name: str, source: EmbeddedRows, known: HeadData) -> str:
    """A split in a line."""
    bad, prompts = is_bad(known.label), len(known.prompt_id.unique())
    without = len(source) - len(known)
    return (
        f"{name}: {len(known):,} images of {prompts:,} prompts, {bad.mean():.1%} bad"
        + (f"; {without:,} without a label left out" if without else "")
        + (f"; {int((~known.margin.isnan()).sum()):,} with a margin" if (~known.margin.isnan()).any() else "")
    )


def _claim(out: Path, facts: HeadFacts) -> None:
    """A run is continued only with what it was started with.

    Raises:
        ConfigError: Naming what differs.
    """
    if (out / FACTS_NAME).exists():
        found = dataclasses.replace(read_facts(out), auroc=None)
        names = [field.name for field in dataclasses.fields(HeadFacts)]
        if different := [name for name in names if getattr(found, name) != getattr(facts, name)]:
            raise ConfigError(
                f"{out} holds heads that differ in {', '.join(different)}; use what they were trained with, or choose another "
                "folder"
            )
    facts.write(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embedded", type=Path, metavar="EMBEDDED", help="with the folders train and validation")
    parser.add_argument("--out", required=True, type=Path, metavar="HEADS")
    parser.add_argument(
        "--log-snr-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="nats that progress is measured over (those of the training images)",
    )
    parser.add_argument("--device", default="cpu")
    add_tracker_option(parser)
    options = parser.add_argument_group("recipe", "documented at training.heads.HeadRecipe")
    for field in dataclasses.fields(HeadRecipe):
        default = getattr(RECIPE, field.name)
        if field.name == "variant":
            options.add_argument("--variant", choices=get_args(Variant), default=default, help="(%(default)s)")
        elif field.name != "name":
            options.add_argument(
                f"--{field.name.replace('_', '-')}", type=type(default), default=default, help="(%(default)s)"
            )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        chosen = {name: value for name, value in vars(args).items() if name in vars(RECIPE)}
        recipe = dataclasses.replace(RECIPE, **chosen)
        facts = train(
            args.embedded,
            args.out,
            recipe,
            log_snr_range=args.log_snr_range and tuple(args.log_snr_range),
            device=checked_device(args.device),
            track=_tracker(chosen_tracker(args.tracker), args.out),
        )
    except (MoeArtifactsError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: AUROC {facts.auroc:.4f} on validation, mean over the checks")
    return 0


def _tracker(name: str, folder: Path) -> Callable[..., None]:
    """Figures go to the log, and to the tracker from the first on."""
    opened = None

    def track(step: int, **values: float) -> None:
        nonlocal opened
        log.info("step %d  %s", step, "  ".join(f"{key} {value:.5g}" for key, value in values.items()))
        if name != "none":
            opened = opened or open_tracker(name, folder)
            opened.log({f"heads/{key}": value for key, value in values.items()}, step=step)

    return track


if __name__ == "__main__":
    sys.exit(main())
