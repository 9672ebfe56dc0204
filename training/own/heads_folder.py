"""The folder of trained heads: ``heads.safetensors``, and ``heads.json`` with what they are and what they belong to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from moe_artifacts.config import from_dict, to_dict
from moe_artifacts.errors import InputError
from moe_artifacts.files import read_json, sha256_file, write_json
from training.embedded import EmbeddedRows
from training.heads import HeadRecipe, Heads, HeadSpace, load_heads
from training.row_jobs import META, complete_shards

WEIGHTS_NAME, FACTS_NAME = "heads.safetensors", "heads.json"
MADE_WITH = ("embedder_sha256", "preview_sha256")
SHOWN = {"x0": "x0 predictions", "noisy": "noisy latents"}


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """What is known of trained heads besides their weights."""

    recipe: HeadRecipe
    space: HeadSpace
    embedder_sha256: str | None  # of the weights of what embedded the images
    preview_sha256: str | None
    shows: Literal["x0", "noisy"]  # what the pictures are of
    train_sha256: str  # of what the embeddings of a split are, without their files
    validation_sha256: str
    images: int
    bad_rate: float  # share of bad images among those trained on
    rows_per_band: tuple[int, ...]  # checks seen in each band of the calibration, among some images
    auroc: float | None = None  # on validation, mean over the checks; None: not trained yet

    def write(self, folder: Path) -> None:
        write_json(folder / FACTS_NAME, to_dict(self))


def read_facts(folder: Path) -> HeadFacts:
    """What ``write`` wrote.

    Raises:
        InputError: If the folder holds no heads.
        ConfigError: If the file is damaged.
    """
    values = read_json(folder / FACTS_NAME)
    return from_dict(HeadFacts, values, where=str(folder / FACTS_NAME))


def read_heads(folder: Path) -> tuple[Heads, HeadFacts]:
    """Trained heads, in evaluation mode.

    Raises:
        InputError, ConfigError, CheckpointError: If they are missing or damaged.
    """
    facts = read_facts(folder)
    if facts.auroc is None:
        raise InputError(
            f"{folder} holds heads that are not trained to the end: run python -m training.own.train again"
        )
    return load_heads(facts.recipe, facts.space, folder / WEIGHTS_NAME), facts


def require_same_embedder(data: EmbeddedRows, facts: HeadFacts | EmbeddedRows) -> None:
    """Refuse embeddings of another embedder or preview than the heads', or than other embeddings, or of other pictures.

    Raises:
        InputError: Naming what differs.
    """
    other = facts.meta if isinstance(facts, EmbeddedRows) else dataclasses.asdict(facts)
    if data.meta.get("shows") != other["shows"]:
        raise InputError(
            f"{data.folder} has embeddings of {SHOWN[data.meta['shows']]}, expected {SHOWN[other['shows']]}: a scorer looks at the "
            "one or the other; training.own.collect records predictions, training.forward_noise says --show"
        )
    for name in MADE_WITH:
        found, expected = data.meta.get(name), other.get(name)
        if None not in (found, expected) and found != expected:
            raise InputError(
                f"{data.folder} was made with another {name.removesuffix('_sha256')}: SHA-256 {found}, expected {expected}; "
                "embed every split with the same --embedder and --preview"
            )


def require_distinct(splits: Mapping[str, EmbeddedRows]) -> None:
    """Refuse the same images as two splits.

    Raises:
        InputError: Naming the two.
    """
    for (one, first), (other, second) in itertools.combinations(splits.items(), 2):
        source = first.meta.get("source")
        if source and source == second.meta.get("source"):
            raise InputError(
                f"{first.folder} and {second.folder} are the same images: embed {one} and {other} each from its own trajectories"
            )


def require_unseen(calibration: EmbeddedRows, facts: HeadFacts) -> None:
    """Refuse to certify on what the heads have learned from.

    Raises:
        InputError: If it is what the heads were trained, or stopped, on.
    """
    if sha256_file(calibration.folder / META) in (facts.train_sha256, facts.validation_sha256):
        raise InputError(
            f"the heads were trained on {calibration.folder}: a threshold must come from images that nothing has seen"
        )


def require_new_prompts(splits: Mapping[str, EmbeddedRows]) -> None:
    """Refuse a promise over prompts whose prompts the heads know.

    Raises:
        InputError: Naming one.
    """
    prompts = {name: _prompts_of(rows) for name, rows in splits.items()}
    for name in ("train", "validation"):
        if known := sorted(prompts["calibration"] & prompts[name]):
            raise InputError(
                f"{len(known)} prompts of the calibration images are those of {name} too, the first is {known[0]!r}: a promise over "
                "prompts needs prompts of its own; share them out by prompt, or take --unit image"
            )


def _prompts_of(rows: EmbeddedRows) -> set[str]:
    found: set[str] = set()
    for path in complete_shards(rows.folder):
        found.update(pc.unique(pq.read_table(path, columns=["prompt"])["prompt"]).to_pylist())
    return found


def made_with(train: EmbeddedRows, validation: EmbeddedRows) -> dict[str, Any]:
    """What of the embeddings the heads depend on, labels among it, as fields of :class:`HeadFacts`."""
    of_splits = {"train": train, "validation": validation}
    return {name: train.meta.get(name) for name in (*MADE_WITH, "shows")} | {
        f"{name}_sha256": sha256_file(rows.folder / META) for name, rows in of_splits.items()
    }
