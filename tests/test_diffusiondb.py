import errno
import statistics
from collections import defaultdict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from moe_artifacts.errors import InputError
from tests.diffusiondb_fixture import (
    ANONYMOUS,
    FAULTS,
    FOREIGN_PROMPT,
    KEPT,
    LONG_PROMPT,
    METADATA_SCHEMA,
    RATINGS_SCHEMA,
    write_diffusiondb,
)
from training.data import ratings
from training.data.columns import read_columns, read_facts, stream_columns
from training.data.diffusiondb import COLUMNS, DiffusionDBOptions, build_table, join_metadata, main
from training.data.filters import FilterCounts
from training.data.ratings import as_the_ancestor_did
from training.data.row_images import RowImages
from training.data.splits import SPLITS

CHECKED = DiffusionDBOptions(check_images=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_diffusiondb(tmp_path_factory.mktemp("diffusiondb"))


@pytest.fixture(scope="module")
def built(data):
    counts = FilterCounts()
    return build_table(data.metadata, data.ratings, data.parts, CHECKED, counts), counts


def build(data, **options):
    files = [
        options.pop(name, default)
        for name, default in {"metadata": data.metadata, "rated": data.ratings, "parts": data.parts}.items()
    ]
    counts = FilterCounts()
    return build_table(*files, DiffusionDBOptions(**options), counts), counts


def command(data, out, *more):
    return [
        "--metadata",
        *map(str, (data.metadata, "--ratings", data.ratings, "--parts", data.parts, "--out", out, *more)),
    ]


# --- the clean table


def test_every_fault_is_counted_once_and_only_good_images_stay(data, built):
    table, counts = built
    expected = dict.fromkeys(FAULTS, 1) | {
        "same user and image": 2,  # both ratings
        "same image again": 2,  # rows; the other is of the image that is listed twice, differently
        "fewer than 3 ratings": 3,  # with those that lost a third rating to the anonymous user and to repetition
        "not rated": 0,  # never met: the table starts from the ratings
    }
    assert {name: counts[name] for name in FAULTS} == expected
    others = {row.filter: row.dropped for row in counts.rows if row.filter not in FAULTS and row.dropped}
    assert others == {"image not rated enough": 4}  # metadata rows: not rated at all, or fewer than three times
    good = {key for key, fault in zip(data.keys, data.faults, strict=True) if fault is None or fault in KEPT}
    assert set(table["key"].to_pylist()) == good and len(table) == len(good) == counts.left("images")


def test_ratings_are_those_of_a_loop_over_the_published_file(data, built):
    by_image = defaultdict(list)
    for row in pq.read_table(data.ratings).to_pylist():
        by_image[row["id"]].append(row)
    for row in built[0].to_pylist():
        given = [r for r in by_image[row["key"]] if r["artifacts"] is not None and r["artifacts"] <= 5]
        assert row["ratings_count"] == len(given) >= 3
        for measure in ("rating", "artifacts"):
            values = [r[measure] for r in given]
            assert row[f"{measure}_median"] == statistics.median(values)
            assert row[f"{measure}_mean"] == pytest.approx(statistics.fmean(values))
        assert row["label"] == pytest.approx(row["artifacts_mean"] / 5) and 0 <= row["label"] <= 1


def test_the_ancestor_kept_what_it_meant_to_drop(data, built):
    meant = built[0]
    did = as_the_ancestor_did(read_columns(data.ratings, ratings.COLUMNS))
    kept = dict(zip(did["id"].to_pylist(), did["ratings_count"].to_pylist(), strict=True))
    assert kept[data.key_of("anonymous user")] == 3 and kept[data.key_of("same user and image")] == 4
    assert data.key_of("fewer than 3 ratings") not in kept
    assert not {data.key_of("anonymous user"), data.key_of("same user and image")} & set(meant["key"].to_pylist())
    raters = pq.read_table(data.ratings, columns=["user_id"])["user_id"]
    assert ANONYMOUS in raters.to_pylist()


def test_prompts_come_through_unchanged(data, built):
    prompts = dict(zip(built[0]["key"].to_pylist(), built[0]["prompt"].to_pylist(), strict=True))
    first = len(FAULTS)
    assert len(LONG_PROMPT) > 30_000
    assert prompts[data.keys[first]] == LONG_PROMPT and prompts[data.keys[first + 1]] == FOREIGN_PROMPT


def test_no_prompt_and_no_user_is_in_two_splits(data, built):
    metadata = pq.read_table(data.metadata).to_pylist()
    user = {row["image_name"].partition(".")[0]: row["user_name"] for row in metadata}
    seen = defaultdict(set)
    for row in built[0].to_pylist():
        seen[row["prompt"]].add(row["split"])
        if user[row["key"]] not in (None, "deleted_account"):
            seen[user[row["key"]]].add(row["split"])
    assert {len(splits) for splits in seen.values()} == {1}
    assert set(built[0]["split"].to_pylist()) == set(SPLITS)
    for nobody in (None, "deleted_account"):  # does not link images
        assert len({row["group"] for row in built[0].to_pylist() if user[row["key"]] == nobody}) > 3


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_pictures_are_read_from_their_zip_parts(tmp_path, suffix):
    data = write_diffusiondb(tmp_path, images=24, size=16, suffix=suffix)
    table, counts = build(data)  # not looked at the pictures yet
    assert not counts["picture: damaged"]
    picture, reasons = RowImages(data.parts), defaultdict(list)
    for row in table.to_pylist():
        assert row["member"] == row["key"] + suffix
        try:
            assert picture(row).size == (16, 16)
        except InputError as error:
            reasons[error.reason].append(row["key"])
    assert reasons == {name: [data.key_of(f"picture: {name}")] for name in ("damaged", "pixels")}


# --- options


def test_repeated_ratings_and_the_number_of_ratings_are_options(data):
    table, _ = build(data, ratings=ratings.RatingFilters(repeated="first"))
    assert data.key_of("same user and image") in table["key"].to_pylist()
    table, _ = build(data, ratings=ratings.RatingFilters(min_ratings=5))
    assert 0 < len(table) < 30 and pc.min(table["ratings_count"]).as_py() == 5


def test_the_seed_decides_the_splits_alone(data):
    tables = [build(data, seed=seed)[0] for seed in (0, 0, 1)]
    assert tables[0].equals(tables[1])
    assert tables[0].drop_columns("split").equals(tables[2].drop_columns("split"))
    assert not tables[0]["split"].equals(tables[2]["split"])


def test_the_batches_in_which_metadata_are_read_do_not_matter(data, monkeypatch):
    whole = build(data)[0]
    parts = iter(range(1_000))
    monkeypatch.setattr(
        "training.data.diffusiondb.stream_columns",
        lambda path, types: (part for part in stream_columns(path, types, batch_rows=7) if next(parts) >= 0),
    )
    assert build(data)[0].equals(whole)
    assert next(parts) > 5  # it was read in parts


# --- files as they are published, and others


def test_the_columns_and_types_are_those_published(data):
    for columns, schema in ((COLUMNS, METADATA_SCHEMA), (ratings.COLUMNS, RATINGS_SCHEMA)):
        assert set(columns) <= set(schema.names)
    assert {name: METADATA_SCHEMA.field(name).type for name in COLUMNS} == COLUMNS
    assert pq.read_schema(data.metadata).remove_metadata() == METADATA_SCHEMA
    assert pq.read_schema(data.ratings).remove_metadata() == RATINGS_SCHEMA


def test_other_encodings_of_the_same_values_are_taken(data, tmp_path):
    table = pq.read_table(data.metadata)
    table = table.set_column(0, "image_name", table["image_name"].cast(pa.large_string()))
    table = table.set_column(1, "prompt", table["prompt"].dictionary_encode())
    table = table.set_column(2, "part_id", table["part_id"].cast(pa.float64()))  # as pandas has it with gaps
    pq.write_table(table, tmp_path / "metadata.parquet")
    assert build(data, metadata=tmp_path / "metadata.parquet")[0].equals(build(data)[0])


def test_an_unknown_part_or_likelihood_is_no_error(data, tmp_path):
    rows = pq.read_table(data.metadata).to_pylist()
    good = data.keys[-1]
    row = next(row for row in rows if row["image_name"].startswith(good))
    row["image_nsfw"] = None
    next(row for row in rows if row["image_name"].startswith(data.keys[-2]))["part_id"] = None
    pq.write_table(pa.Table.from_pylist(rows, METADATA_SCHEMA), tmp_path / "metadata.parquet")
    table, counts = build(data, metadata=tmp_path / "metadata.parquet")
    assert good in table["key"].to_pylist() and data.keys[-2] not in table["key"].to_pylist()
    assert counts["no zip part"] == 2 and counts["blurred"] == 1


def test_files_that_are_something_else_are_refused(data, tmp_path):
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(InputError, match=r"text\.parquet cannot be read as Parquet"):
        build(data, rated=tmp_path / "text.parquet")
    with pytest.raises(InputError, match=r"none\.parquet cannot be read as Parquet"):
        build(data, metadata=tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"has no column 'id'; its columns are \['image_name'"):
        build(data, rated=data.metadata)
    with pytest.raises(InputError, match=r"parts must be a folder that holds part-000001\.zip or others, found none"):
        build(data, parts=tmp_path)
    table = pq.read_table(data.metadata)
    for name, values, match in (
        ("part_id", ["one"] * len(table), r"column 'part_id' of .* must be of type uint16, but holds string"),
        ("part_id", [70_000] * len(table), "not in range"),
        ("prompt", pa.array([b"\xff"] * len(table)).view(pa.string()), "'prompt' .* Invalid UTF8"),
    ):
        pq.write_table(table.set_column(table.column_names.index(name), name, [values]), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=match):
            build(data, metadata=tmp_path / "a.parquet")


def test_nothing_left_and_no_split_without_a_leak_are_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"no image is left after the clean-up:\n(.|\n)*fewer than 99 ratings +59 +0"):
        build(data, ratings=ratings.RatingFilters(min_ratings=99))
    table = pq.read_table(data.metadata)
    same = pa.array(["one prompt for all"] * len(table))
    pq.write_table(table.set_column(1, "prompt", same), tmp_path / "metadata.parquet")
    with pytest.raises(InputError, match="hang together by prompts and users in 1 groups"):
        build(data, metadata=tmp_path / "metadata.parquet")


def test_joining_no_images_gives_none(data):
    empty = pa.table({"id": pa.array([], pa.string()), "ratings_count": pa.array([], pa.int64())})
    counts = FilterCounts()
    counts.start("images", "rated", 0)
    assert len(join_metadata(empty, data.metadata, counts)) == 0


# --- the command


def test_the_command_writes_the_table_and_prints_every_filter(data, built, tmp_path, capsys):
    out = tmp_path / "new" / "table.parquet"
    assert main(command(data, out, "--check-images")) == 0
    told = capsys.readouterr().out
    assert str(built[1]) in told and f"{out}: 47 images" in told
    for name in SPLITS:
        assert f"\n{name} " in told
    assert pq.read_table(out).replace_schema_metadata().equals(built[0])
    facts = read_facts(out)
    assert facts["filters"] == built[1].as_rows() and facts["options"]["ratings"]["min_ratings"] == 3
    first = out.read_bytes()
    assert main(command(data, out, "--check-images")) == 0
    assert out.read_bytes() == first  # the same again, bit by bit


def test_a_full_disk_leaves_the_old_table(data, tmp_path, capsys, monkeypatch):
    (tmp_path / "table.parquet").write_text("old")

    def full(table, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    assert main(command(data, tmp_path / "table.parquet")) == 2
    assert "error: cannot write" in (told := capsys.readouterr().err) and "No space left on device" in told
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("table.parquet", "old")]


def test_the_command_ends_with_one_line_about_an_error(data, tmp_path, capsys):
    for more, match in (
        (("--shares", "0.5", "0.5", "0.5"), "error: shares must be three numbers"),
        (("--min-ratings", "0"), "error: min_ratings must be at least 1"),
        (("--metadata", "none.parquet"), "error: none.parquet cannot be read as Parquet"),
    ):
        assert main(command(data, tmp_path / "a.parquet", *more)) == 2
        assert match in capsys.readouterr().err
    assert not (tmp_path / "a.parquet").exists()
