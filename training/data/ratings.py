"""AI-Horde's ratings of DiffusionDB images, cleaned and brought to one row per image.

One row of the published file (Haidra-Org/AI-Horde-Ratings, CC-BY-SA-4.0, 3.9M rows) is one rating: ``rating`` from 1 to 10
for looks, ``artifacts`` from 0 (none) to 5 (ruined).

The clean-up is the one that kenjiqq/aesthetics-scorer and the ancestor of this library wrote down: without the ratings of a
user who rated an image more than once, without those of the anonymous user (kudos of -50), median and mean per image, at
least three ratings. Their script then aggregated the table from before the clean-up: :func:`as_the_ancestor_did`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from moe_artifacts.errors import InputError
from training.data.filters import FilterCounts, has_text

COLUMNS = {
    "id": pa.string(),  # name of the image without its suffix
    "user_id": pa.string(),  # who rated it, hashed
    "rating": pa.float64(),
    "artifacts": pa.float64(),
    "kudos": pa.float64(),
}
ANONYMOUS_KUDOS = -50.0
MAX_ARTIFACTS = 5.0
MEASURES = ("rating", "artifacts")


@dataclass(frozen=True, kw_only=True)
class RatingFilters:
    """Which ratings and images to keep."""

    min_ratings: int = 3
    # Ratings of one user for one image: drop all of them, or all but the first in the file.
    repeated: Literal["drop", "first"] = "drop"

    def __post_init__(self) -> None:
        if self.min_ratings < 1:
            raise InputError(f"min_ratings must be at least 1, got {self.min_ratings}")
        if self.repeated not in ("drop", "first"):
            raise InputError(f"repeated must be drop or first, got {self.repeated!r}")


def clean_ratings(ratings: pa.Table, filters: RatingFilters, counts: FilterCounts) -> pa.Table:
    """One row per image that has enough ratings, sorted by id: ``id``, ``ratings_count``, and median and mean of each measure.

    A rating without a value of ``artifacts`` is left out, since it would not count towards ``min_ratings``; one without a
    value of ``rating`` is not. Where no rating of an image has one, its median and mean are null.

    Args:
        ratings: With COLUMNS.
        counts: Receives a row per filter, of ratings and then of images.
    """
    counts.start("ratings", "read", len(ratings))
    artifacts, rating, kudos = (_floats(ratings[name]) for name in ("artifacts", "rating", "kudos"))
    ratings = counts.apply(
        "ratings",
        ratings,
        {
            "no image id": has_text(ratings["id"]),
            "no artifacts value": ~np.isnan(artifacts),
            f"artifacts outside 0 to {MAX_ARTIFACTS:g}": (artifacts >= 0) & (artifacts <= MAX_ARTIFACTS),
            "rating outside 1 to 10": np.isnan(rating) | ((rating >= 1) & (rating <= 10)),
            "anonymous user": kudos != ANONYMOUS_KUDOS,
            "no user id": has_text(ratings["user_id"]),
        },
    )
    ratings = counts.apply("ratings", ratings, {"same user and image": _not_repeated(ratings, filters.repeated)})
    images = aggregate(ratings)
    counts.start("images", "with a rating left", len(images))
    enough = images.filter(pc.greater_equal(images["ratings_count"], filters.min_ratings))
    counts.drop("images", f"fewer than {filters.min_ratings} ratings", len(images) - len(enough))
    return enough


def as_the_ancestor_did(ratings: pa.Table, min_ratings: int = 3) -> pa.Table:
    """What the ancestor really trained on: the same table without any of the clean-up.

    Ratings by the anonymous user and repeated ones count, also towards ``min_ratings``. Left out is what it did next, to
    round the medians to whole numbers, at random where median and mean agree on a half.
    """
    images = aggregate(ratings.filter(pc.is_valid(ratings["id"])))
    return images.filter(pc.greater_equal(images["ratings_count"], min_ratings))


def aggregate(ratings: pa.Table) -> pa.Table:
    """One row per ``id``, sorted: the number of its ratings, median and mean of each measure, null where none has a value."""
    ids = ratings["id"].combine_chunks().dictionary_encode()
    codes = ids.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    columns = {"id": ids.dictionary, "ratings_count": np.bincount(codes, minlength=len(ids.dictionary))}
    for measure in MEASURES:
        median, mean = _median_and_mean(_floats(ratings[measure]), codes, len(ids.dictionary))
        columns[f"{measure}_median"] = pa.array(median, from_pandas=True)  # NaN becomes null
        columns[f"{measure}_mean"] = pa.array(mean, from_pandas=True)
    return pa.table(columns).sort_by("id")


def _median_and_mean(
    values: Float[np.ndarray, " rating"], codes: Int[np.ndarray, " rating"], groups: int
) -> tuple[Float[np.ndarray, " image"], Float[np.ndarray, " image"]]:
    """Of each group, without its NaN; NaN for a group that has nothing else. (Arrow's own grouped median is approximate.)"""
    given = np.isfinite(values)
    values, codes = values[given], codes[given]
    values = values[np.lexsort((values, codes))]  # sorted within each group, the groups in order
    counts = np.bincount(codes, minlength=groups)
    starts = np.cumsum(counts) - counts
    median, mean = np.full(groups, np.nan), np.full(groups, np.nan)
    some = counts > 0
    low, high = (starts + (counts - 1) // 2)[some], (starts + counts // 2)[some]
    median[some] = (values[low] + values[high]) / 2
    mean[some] = np.add.reduceat(values, starts[some]) / counts[some] if some.any() else []
    return median, mean


def _not_repeated(ratings: pa.Table, repeated: Literal["drop", "first"]) -> Bool[np.ndarray, " rating"]:
    ids, users = (ratings[name].combine_chunks().dictionary_encode() for name in ("id", "user_id"))
    pair = ids.indices.to_numpy(zero_copy_only=False).astype(np.int64) * max(len(users.dictionary), 1)
    pair += users.indices.to_numpy(zero_copy_only=False)
    _, first, inverse, count = np.unique(pair, return_index=True, return_inverse=True, return_counts=True)
    if repeated == "drop":
        return count[inverse] == 1
    keep = np.zeros(len(pair), dtype=bool)
    keep[first] = True
    return keep


def _floats(column: pa.ChunkedArray) -> Float[np.ndarray, " rating"]:
    """Null becomes NaN."""
    return np.asarray(column.to_numpy(), dtype=np.float64)
