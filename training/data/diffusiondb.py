"""DiffusionDB's images with AI-Horde's ratings, as one clean table; the images stay in their zip parts.

``python -m training.data.diffusiondb --metadata FILE --ratings FILE --parts FOLDER --out FILE.parquet`` joins the metadata
(``metadata.parquet`` of the 2M subset or ``metadata-large.parquet``) with the ratings (``training.data.ratings``), finds
every image in its zip part, shares the images out to splits (``training.data.splits``), and prints what each filter dropped.
One row of the table is one image:

    key      its name without the suffix        ratings_count, rating_median, rating_mean, artifacts_median, artifacts_mean
    zip      relative to the folder of parts    member    its name in the zip         prompt    as published
    label    artifacts_mean / 5, in [0, 1]      group     images linked by prompt or user           split     train, validation, test

DiffusionDB (Wang et al. 2022, arXiv:2210.14896) is CC0 1.0, AI-Horde's ratings are CC-BY-SA-4.0.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int
from tqdm import tqdm

from moe_artifacts.errors import InputError, MoeArtifactsError
from training.data import ratings
from training.data.columns import read_columns, stream_columns, write_table
from training.data.filters import FilterCounts, has_text
from training.data.images import BadImage
from training.data.ratings import MAX_ARTIFACTS, RatingFilters, clean_ratings
from training.data.row_images import decodable
from training.data.splits import add_split_options, assign_splits, linked_groups, split_summary
from training.data.zip_parts import ZipParts, find_parts

COLUMNS = {
    "image_name": pa.string(),
    "prompt": pa.string(),
    "part_id": pa.uint16(),
    "user_name": pa.string(),  # a hash; null where the image was deleted before its author was looked up
    "image_nsfw": pa.float32(),
}
BLURRED = 2.0  # in image_nsfw, in place of a likelihood
DELETED_ACCOUNT = "deleted_account"  # many users in one name


@dataclass(frozen=True, kw_only=True)
class DiffusionDBOptions:
    """How to clean and how to split."""

    ratings: RatingFilters = field(default_factory=RatingFilters)
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)  # of the images, for training, validation and test
    seed: int = 0  # of the splits
    check_images: bool = False  # decode every image now, in place of when it is used


def build_table(
    metadata: Path, rated: Path, parts: Path, options: DiffusionDBOptions, counts: FilterCounts
) -> pa.Table:
    """The clean table.

    Args:
        metadata, rated: The two Parquet files.
        parts: Folder that holds the zip parts, at any depth. They need not be all there.
        counts: Receives a row per filter.
    Raises:
        InputError: If a file is not what it should be, nothing is left, or the images cannot be split without a leak.
    """
    images = clean_ratings(read_columns(rated, ratings.COLUMNS), options.ratings, counts)
    images = join_metadata(images, metadata, counts)
    images = locate(images, parts, counts)
    if options.check_images:
        images = decodable(images, parts, counts)
    if len(images) == 0:
        raise InputError(f"no image is left after the clean-up:\n{counts}")
    prompts, users = images["prompt"].to_pylist(), images["user_name"].to_pylist()
    groups = linked_groups(prompts, [None if user == DELETED_ACCOUNT else user for user in users])
    splits = assign_splits(images["key"].to_pylist(), groups, options.shares, options.seed)
    measures = [f"{measure}_{kind}" for measure in ratings.MEASURES for kind in ("median", "mean")]
    columns = {name: images[name] for name in ("key", "zip", "member", "prompt", *measures, "ratings_count")}
    columns["label"] = pc.divide(images["artifacts_mean"], MAX_ARTIFACTS)
    return pa.table(columns | {"group": groups, "split": splits})


def join_metadata(rated: pa.Table, metadata: Path, counts: FilterCounts) -> pa.Table:
    """Add ``key`` and the metadata COLUMNS to images rated; drop those not listed, blurred or without a prompt.

    The metadata are read a part at a time: memory grows with the rated images alone.
    """
    ids = rated["id"].combine_chunks()
    found = [pa.schema([("key", pa.string()), *COLUMNS.items()]).empty_table()]
    rows = 0
    for part in tqdm(stream_columns(metadata, COLUMNS), desc="metadata", unit="part"):
        rows += len(part)
        key = pc.replace_substring_regex(part["image_name"], pattern=r"\..*", replacement="")
        part = part.add_column(0, "key", key)
        found.append(part.filter(pc.fill_null(pc.is_in(key, value_set=ids), False)))
    listed = pa.concat_tables(found)
    place = pc.index_in(listed["key"], value_set=ids).to_numpy().astype(np.int64)
    known, first = np.unique(place, return_index=True)
    counts.start("metadata rows", "read", rows)
    counts.drop("metadata rows", "image not rated enough", rows - len(listed))
    counts.drop("metadata rows", "same image again", len(listed) - len(known))

    images = listed.take(pa.array(first))
    for name in rated.column_names[1:]:
        images = images.append_column(name, rated[name].take(pa.array(known)))
    counts.drop("images", "not in the metadata", len(rated) - len(images))
    filters = {
        "listed twice, differently": _rows_agree(listed.select(["prompt", "part_id"]), place),
        "blurred": pc.fill_null(pc.not_equal(images["image_nsfw"], BLURRED), True).to_numpy(),
        "no prompt": has_text(images["prompt"]),
    }
    return counts.apply("images", images, filters)


def locate(images: pa.Table, folder: Path, counts: FilterCounts) -> pa.Table:
    """Add ``zip`` and ``member``; drop images whose zip part is absent or broken, or does not hold them."""
    parts = find_parts(folder)
    if not parts:
        raise InputError(f"parts must be a folder that holds part-000001.zip or others, found none in {folder}")
    names, part_ids = images["image_name"].to_pylist(), images["part_id"].to_pylist()
    found: list[tuple[str, str] | None] = [None] * len(images)
    lost = dict.fromkeys(("no zip part", "broken zip part", "not in its zip part"), 0)
    by_part = np.argsort(pc.fill_null(images["part_id"], 0).to_numpy(), kind="stable")  # every zip file is opened once
    with ZipParts(folder) as archive:
        for row in tqdm(by_part.tolist(), desc="zip parts", unit="image"):
            why = "no zip part"
            for part in parts.get(part_ids[row], []):
                try:
                    member = archive.members(part).get(names[row])
                except BadImage:
                    why = "broken zip part"
                    continue
                if member is not None:
                    found[row] = part, member
                    break
                why = "not in its zip part"
            if found[row] is None:
                lost[why] += 1
    for why, count in lost.items():
        counts.drop("images", why, count)
    held = [place for place in found if place is not None]
    images = images.filter(pa.array([place is not None for place in found], pa.bool_()))
    images = images.append_column("zip", pa.array([part for part, _ in held], pa.string()))
    return images.append_column("member", pa.array([member for _, member in held], pa.string()))


def _rows_agree(listed: pa.Table, place: Int[np.ndarray, " row"]) -> Bool[np.ndarray, " image"]:
    """Whether all rows of an image say the same; images in the order of ``place``."""
    known, first, image = np.unique(place, return_index=True, return_inverse=True)
    agree = np.ones(len(known), dtype=bool)
    for column in listed.columns:
        codes = column.combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy(zero_copy_only=False)
        np.logical_and.at(agree, image, codes == codes[first][image])
    return agree


def main(arguments: Sequence[str] | None = None) -> int:
    defaults = DiffusionDBOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadata", required=True, type=Path, help="metadata.parquet or metadata-large.parquet")
    parser.add_argument("--ratings", required=True, type=Path, help="diffusiondb_export.parquet of AI-Horde")
    parser.add_argument("--parts", required=True, type=Path, help="folder with the zip parts, with its subfolders")
    parser.add_argument("--out", required=True, type=Path, help="the table to write, .parquet")
    parser.add_argument(
        "--min-ratings", type=int, default=defaults.ratings.min_ratings, help="of an image, to be kept (%(default)s)"
    )
    parser.add_argument(
        "--repeated",
        choices=("drop", "first"),
        default=defaults.ratings.repeated,
        help="ratings of one user for one image: drop all, as the ancestor meant it, or keep the first (%(default)s)",
    )
    add_split_options(parser, defaults.shares, defaults.seed)
    parser.add_argument("--check-images", action="store_true", help="decode every image now, and drop the damaged ones")
    args = parser.parse_args(arguments)
    counts = FilterCounts()
    try:
        options = DiffusionDBOptions(
            ratings=RatingFilters(min_ratings=args.min_ratings, repeated=args.repeated),
            shares=tuple(args.shares),
            seed=args.seed,
            check_images=args.check_images,
        )
        table = build_table(args.metadata, args.ratings, args.parts, options, counts)
        files = {"metadata": args.metadata.name, "ratings": args.ratings.name}
        write_table(table, args.out, {**files, "options": dataclasses.asdict(options), "filters": counts.as_rows()})
    except MoeArtifactsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(counts, split_summary(table), f"{args.out}: {len(table):,} images", sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
