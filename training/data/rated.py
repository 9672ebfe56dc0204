"""Any rated images as one clean table: a Parquet file of image path, prompt and score, and the folder the paths are in.

``python -m training.data.rated --table FILE --images FOLDER --clean 5 --bad 1 --out FILE.parquet`` reads it, with ``--clean``
and ``--bad`` the scores that mean no artifacts and ruined, shares the images out to splits that have no prompt in common
(``training.data.splits``), and prints what each filter dropped. One row of the table is one image:

    key, path    relative to the folder      prompt, score   as they came      label   0 at ``clean``, 1 at ``bad``
    group        images linked by prompt, and by user where there is a column of users       split   train, validation, test
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import posixpath
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from moe_artifacts.errors import InputError, MoeArtifactsError
from training.data.columns import read_columns, write_table
from training.data.filters import FilterCounts, has_text
from training.data.row_images import decodable
from training.data.splits import add_split_options, assign_splits, linked_groups, split_summary


@dataclass(frozen=True, kw_only=True)
class RatedOptions:
    """What the columns are called and mean, and how to split."""

    clean: float  # score of an image without artifacts; no default: it belongs to the data
    bad: float  # of a ruined one; above or below ``clean``
    path: str = "path"  # names of the columns
    prompt: str = "prompt"
    score: str = "score"
    user: str | None = None  # who made the image, where that is known
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)  # of the images, for training, validation and test
    seed: int = 0  # of the splits
    check_images: bool = False  # decode every image now, in place of when it is used

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clean) and math.isfinite(self.bad) and self.clean != self.bad):
            raise InputError(f"clean and bad must be two different numbers, got {self.clean} and {self.bad}")


def build_table(table: Path, folder: Path, options: RatedOptions, counts: FilterCounts) -> pa.Table:
    """The clean table.

    An image listed again with the same prompt and score counts once; one whose rows disagree is left out.

    Args:
        table: The Parquet file.
        folder: What its paths are relative to.
        counts: Receives a row per filter.
    Raises:
        InputError: If the file is not what it should be, nothing is left, or the images cannot be split without a leak.
    """
    types = {options.path: pa.string(), options.prompt: pa.string(), options.score: pa.float64()}
    if options.user is not None:
        types[options.user] = pa.string()
    read = read_columns(table, types)
    score = np.asarray(read[options.score].to_numpy(), dtype=np.float64)
    low, high = sorted((options.clean, options.bad))
    columns = {"path": read[options.path], "prompt": read[options.prompt], "score": score}
    if options.user is not None:
        columns["user"] = read[options.user]
    rows = pa.table(columns)
    counts.start("rows", "read", len(rows))
    filters = {
        "no path": has_text(rows["path"]),
        "no prompt": has_text(rows["prompt"]),
        "no score": ~np.isnan(score),
        f"score outside {low:g} to {high:g}": (score >= low) & (score <= high),
    }
    rows = counts.apply("rows", rows, filters)
    rows = rows.append_column("key", pa.array([posixpath.normpath(p) for p in rows["path"].to_pylist()], pa.string()))
    first, agree = _first_and_agreeing(rows)
    rows = counts.apply("rows", rows, {"rows of one image that disagree": agree, "same row again": first})

    counts.start("images", "rated", len(rows))
    there = np.array([_is_file(folder, path) for path in rows["path"].to_pylist()], dtype=bool)
    images = counts.apply("images", rows, {"no such file": there})
    if options.check_images:
        images = decodable(images, folder, counts)
    if len(images) == 0:
        raise InputError(f"no image is left after the clean-up:\n{counts}")
    users = images["user"].to_pylist() if options.user is not None else None
    groups = linked_groups(images["prompt"].to_pylist(), users)
    splits = assign_splits(images["key"].to_pylist(), groups, options.shares, options.seed)
    label = label_of(np.asarray(images["score"].to_numpy()), options.clean, options.bad)
    kept = {name: images[name] for name in ("key", "path", "prompt", "score")}
    return pa.table(kept | {"label": label, "group": groups, "split": splits})


def label_of(score: Float[np.ndarray, " image"], clean: float, bad: float) -> Float[np.ndarray, " image"]:
    """Scores as labels, 0 at ``clean`` and 1 at ``bad``, in a straight line between.

    Example:
        >>> label_of(np.array([5.0, 4.0, 1.0]), clean=5, bad=1)
        array([0.  , 0.25, 1.  ])
    """
    return (score - clean) / (bad - clean) + 0.0  # no minus zero


def _first_and_agreeing(rows: pa.Table) -> tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
    """Whether a row is the first of its key; whether all rows of its key have one prompt and one score."""
    told: dict[str, set[tuple[str, float]]] = {}
    keys, said = rows["key"].to_pylist(), list(zip(rows["prompt"].to_pylist(), rows["score"].to_pylist(), strict=True))
    first = np.zeros(len(keys), dtype=bool)
    for row, key in enumerate(keys):
        first[row] = key not in told
        told.setdefault(key, set()).add(said[row])
    return first, np.array([len(told[key]) == 1 for key in keys], dtype=bool)


def _is_file(folder: Path, path: str) -> bool:
    try:
        return (folder / path).is_file()
    except (OSError, ValueError):  # a name too long, a NUL in it
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, type=Path, help="Parquet file of paths, prompts and scores")
    parser.add_argument("--images", required=True, type=Path, help="folder that the paths are relative to")
    parser.add_argument("--out", required=True, type=Path, help="the table to write, .parquet")
    parser.add_argument("--clean", required=True, type=float, help="score of an image without artifacts")
    parser.add_argument("--bad", required=True, type=float, help="score of a ruined image")
    for name in ("path", "prompt", "score"):
        parser.add_argument(f"--{name}", default=name, help="name of the column (%(default)s)")
    parser.add_argument("--user", help="name of the column of who made the image, if there is one")
    add_split_options(parser, RatedOptions.shares, RatedOptions.seed)
    parser.add_argument("--check-images", action="store_true", help="decode every image now, and drop the damaged ones")
    args = parser.parse_args(arguments)
    counts = FilterCounts()
    try:
        given = {f.name: getattr(args, f.name) for f in dataclasses.fields(RatedOptions)}
        options = RatedOptions(**given | {"shares": tuple(args.shares)})
        table = build_table(args.table, args.images, options, counts)
        facts = {"table": args.table.name, "options": dataclasses.asdict(options), "filters": counts.as_rows()}
        write_table(table, args.out, facts)
    except MoeArtifactsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(counts, split_summary(table), f"{args.out}: {len(table):,} images", sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
