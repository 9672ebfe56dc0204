import math
import statistics
from collections import defaultdict

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.errors import InputError
from training.data.filters import FilterCounts
from training.data.ratings import COLUMNS, RatingFilters, as_the_ancestor_did, clean_ratings

NAN = math.nan


def table(*rows):
    """Of (id, user, rating, artifacts, kudos)."""
    return pa.table({name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(COLUMNS.items())})


def cleaned(ratings, **options):
    counts = FilterCounts()
    images = clean_ratings(ratings, RatingFilters(**options), counts)
    return {row["id"]: row for row in images.to_pylist()}, counts


def slow(rows, min_ratings, clean):
    """The ancestor's clean-up, or without ``clean`` what it trained on, a row at a time."""
    if clean:
        rows = [row for row in rows if row[3] is not None and not math.isnan(row[3]) and 0 <= row[3] <= 5]
        rows = [row for row in rows if row[2] is None or 1 <= row[2] <= 10]
        pairs = [row[:2] for row in rows if row[4] != -50 and row[1]]
        rows = [row for row in rows if row[4] != -50 and row[1] and pairs.count(row[:2]) == 1]
    by_image = defaultdict(list)
    for row in rows:
        by_image[row[0]].append(row)
    found = {}
    for key, group in by_image.items():
        if len(group) >= min_ratings:
            found[key] = {"id": key, "ratings_count": len(group)}
            for column, name in ((2, "rating"), (3, "artifacts")):
                values = [row[column] for row in group if row[column] is not None and not math.isnan(row[column])]
                found[key][f"{name}_median"] = statistics.median(values) if values else None
                found[key][f"{name}_mean"] = statistics.fmean(values) if values else None
    return found


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert found[key] == pytest.approx(row)  # the order of additions differs


ratings = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from(["1", "2", "3", "4", "5", "6", None, ""]),
        st.none() | st.integers(0, 11).map(float),
        st.none() | st.just(NAN) | st.integers(-1, 6).map(float),
        st.sampled_from([0.0, 12.5, -50.0, None]),
    ),
    max_size=40,
)


@given(ratings, st.integers(1, 4))
def test_agrees_with_the_loop(rows, min_ratings):
    ours, counts = cleaned(table(*rows), min_ratings=min_ratings)
    assert_close(ours, slow(rows, min_ratings, clean=True))
    assert list(ours) == sorted(ours)
    theirs = {row["id"]: row for row in as_the_ancestor_did(table(*rows), min_ratings).to_pylist()}
    assert_close(theirs, slow(rows, min_ratings, clean=False))
    assert counts.left("images") == len(ours)
    assert sum(row.dropped for row in counts.rows if row.unit == "ratings") == len(rows) - counts.left("ratings")


def test_what_the_ancestor_meant_and_what_it_did():
    """Its script cleaned one table and aggregated another."""
    rows = [
        ("house", "ann", 8.0, 0.0, 10.0),
        ("house", "bob", 7.0, 1.0, 10.0),
        ("house", "cyd", 9.0, 0.0, 10.0),
        ("house", "anon", 1.0, 5.0, -50.0),
        ("house", "dan", 1.0, 5.0, 10.0),
        ("house", "dan", 1.0, 5.0, 10.0),
        ("boat", "ann", 5.0, 2.0, 10.0),
        ("boat", "bob", 5.0, 2.0, 10.0),
        ("boat", "anon", 5.0, 5.0, -50.0),
    ]
    meant, counts = cleaned(table(*rows))
    did = {row["id"]: row for row in as_the_ancestor_did(table(*rows)).to_pylist()}
    assert meant == {
        "house": pytest.approx(
            {"id": "house", "ratings_count": 3}
            | {"rating_median": 8.0, "rating_mean": 8.0, "artifacts_median": 0.0, "artifacts_mean": 1 / 3}
        )
    }
    assert did["house"]["ratings_count"] == 6 and did["house"]["artifacts_median"] == 3.0  # between 1 and 5
    assert did["house"]["artifacts_mean"] == pytest.approx(16 / 6)
    assert did["boat"]["ratings_count"] == 3  # the anonymous user makes it the third
    assert (counts["anonymous user"], counts["same user and image"], counts["fewer than 3 ratings"]) == (2, 2, 1)


def test_the_first_of_repeated_ratings_can_be_kept():
    rows = [("a", user, 5.0, value, 0.0) for user, value in (("1", 1.0), ("2", 2.0), ("1", 5.0), ("3", 3.0))]
    assert cleaned(table(*rows))[0] == {}
    images, counts = cleaned(table(*rows), repeated="first")
    assert images["a"]["artifacts_mean"] == 2.0 and counts["same user and image"] == 1


def test_missing_values_are_counted_and_not_averaged():
    rows = [("a", str(user), None, 1.0, 0.0) for user in range(3)]
    rows += [
        ("a", "4", 5.0, None, 0.0),
        ("a", "5", 5.0, NAN, 0.0),
        (None, "6", 5.0, 1.0, 0.0),
        ("", "6", 5.0, 1.0, 0.0),
    ]
    rows += [("a", None, 5.0, 1.0, 0.0), ("a", "7", 5.0, 5.5, 0.0), ("a", "8", 0.0, 1.0, 0.0)]
    images, counts = cleaned(table(*rows))
    assert images["a"] == {
        "id": "a",
        "ratings_count": 3,
        "rating_median": None,
        "rating_mean": None,
        "artifacts_median": 1.0,
        "artifacts_mean": 1.0,
    }
    assert {row.filter: row.dropped for row in counts.rows if row.dropped} == {
        "no image id": 2,
        "no artifacts value": 2,
        "artifacts outside 0 to 5": 1,
        "rating outside 1 to 10": 1,
        "no user id": 1,
    }


def test_an_empty_file_of_ratings_gives_no_images():
    images, counts = cleaned(table())
    assert images == {} and counts.left("images") == 0


def test_filters_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="min_ratings must be at least 1, got 0"):
        RatingFilters(min_ratings=0)
    with pytest.raises(InputError, match="repeated must be drop or first, got 'last'"):
        RatingFilters(repeated="last")
