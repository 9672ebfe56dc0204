import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moe_artifacts.errors import InputError
from tests.diffusiondb_fixture import FOREIGN_PROMPT, LONG_PROMPT
from training.data.columns import read_facts
from training.data.filters import FilterCounts
from training.data.rated import RatedOptions, build_table, main
from training.data.row_images import RowImages
from training.data.splits import SPLITS

FIVE_STARS = {"clean": 5, "bad": 1}


@pytest.fixture
def folder(tmp_path):
    """Thirty pictures, one prompt for every two."""
    (tmp_path / "images" / "more").mkdir(parents=True)
    for i in range(30):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / name(i))
    return tmp_path / "images"


def name(i):
    return f"more/{i}.png" if i % 2 else f"{i}.png"


def good(count=30):
    return [{"path": name(i), "prompt": f"prompt {i // 2}", "score": 1.0 + i % 5} for i in range(count)]


def write(folder, rows):
    schema = pa.schema({"path": pa.string(), "prompt": pa.string(), "score": pa.float64()})
    pq.write_table(pa.Table.from_pylist(rows, schema), folder.parent / "rated.parquet")
    return folder.parent / "rated.parquet"


def build(folder, rows, **options):
    counts = FilterCounts()
    table = build_table(write(folder, rows), folder, RatedOptions(**(FIVE_STARS | options)), counts)
    return table, counts


def dropped(counts):
    return {row.filter: row.dropped for row in counts.rows if row.dropped}


def test_good_rows_come_through_with_labels_and_splits(folder):
    table, counts = build(folder, good())
    assert not dropped(counts) and len(table) == 30
    for row, given in zip(table.to_pylist(), good(), strict=True):
        assert {column: row[column] for column in given} == given and row["key"] == given["path"]
        assert row["label"] == (5 - given["score"]) / 4
    assert table["group"].to_pylist() == [i // 2 for i in range(30)]
    splits = table["split"].to_pylist()
    assert splits[::2] == splits[1::2] and set(splits) == set(SPLITS)  # two images a prompt


def test_what_is_missing_is_counted(folder):
    good_row = good()[0]
    rows = [
        *good(),
        good_row | {"path": None},
        good_row | {"path": "  "},
        good_row | {"prompt": None},
        good_row | {"prompt": "\t"},
        good_row | {"score": None},
        good_row | {"score": math.nan},
        good_row | {"score": 5.5},
        good_row | {"score": math.inf},
        good_row | {"path": "none.png"},
        good_row | {"path": "more"},  # a folder
        good_row | {"path": "a\0b.png"},
        good_row | {"path": "x" * 5_000},
    ]
    table, counts = build(folder, rows)
    assert len(table) == 30 and dropped(counts) == {
        "no path": 2,
        "no prompt": 2,
        "no score": 2,
        "score outside 1 to 5": 2,
        "no such file": 4,
    }


def test_copies_of_a_row_count_once_and_rows_that_disagree_not_at_all(folder):
    rows = good()
    rows += [rows[0], rows[0] | {"path": "./0.png"}]  # the same, also under another spelling
    rows += [rows[1] | {"score": 5.0}, rows[3] | {"prompt": "something else"}]
    table, counts = build(folder, rows)
    assert dropped(counts) == {"same row again": 2, "rows of one image that disagree": 4}
    assert sorted(set(map(name, range(30))) - set(table["key"].to_pylist())) == sorted([name(1), name(3)])
    assert len(set(table["key"].to_pylist())) == len(table) == 28


def test_long_and_foreign_prompts_come_through_unchanged(folder):
    rows = good()
    for row, prompt in zip(rows, (LONG_PROMPT, FOREIGN_PROMPT, "\u202eright to left", "a\nb\0c"), strict=False):
        row["prompt"] = prompt
    table, counts = build(folder, rows)
    assert table["prompt"].to_pylist() == [row["prompt"] for row in rows] and not dropped(counts)


def test_a_column_of_users_links_images_and_columns_may_have_other_names(folder):
    table = pa.table(
        {
            "file": [name(i) for i in range(30)],
            "text": [f"prompt {i}" for i in range(30)],
            "stars": pa.array([1 + i % 5 for i in range(30)], pa.int8()),
            "by": ["ann", "bob", "ann", "bob", *[None] * 26],
        }
    )
    pq.write_table(table, folder.parent / "rated.parquet")
    options = RatedOptions(**FIVE_STARS, path="file", prompt="text", score="stars", user="by")
    found = build_table(folder.parent / "rated.parquet", folder, options, FilterCounts())
    assert found["group"].to_pylist()[:6] == [0, 1, 0, 1, 2, 3]
    assert found.column_names == ["key", "path", "prompt", "score", "label", "group", "split"]


def test_damaged_pictures_are_found_now_or_when_they_are_used(folder):
    Image.effect_noise((32, 32), 64).save(folder / name(0))
    whole = (folder / name(0)).read_bytes()
    (folder / name(0)).write_bytes(whole[: len(whole) // 2])
    (folder / name(1)).write_bytes(b"")
    (folder / name(2)).write_text("no picture")
    table, counts = build(folder, good(), check_images=True)
    assert dropped(counts) == {"picture: damaged": 1, "picture: empty": 1, "picture: format": 1}
    assert table["key"].to_pylist() == [name(i) for i in range(3, 30)]
    picture = RowImages(folder)
    assert [picture(row).getpixel((0, 0))[0] for row in table.to_pylist()] == list(range(3, 30))
    table, counts = build(folder, good())
    assert len(table) == 30 and not dropped(counts)
    with pytest.raises(InputError, match=r"1\.png: the file is empty"):
        picture(table.to_pylist()[1])


def test_what_cannot_be_used_at_all_is_refused(folder):
    with pytest.raises(InputError, match=r"no image is left after the clean-up:\n(.|\n)*no such file +30 +0"):
        build(folder / "more", good())
    with pytest.raises(InputError, match="hang together by prompts and users in 1 groups"):
        build(folder, [row | {"prompt": "one for all"} for row in good()])
    with pytest.raises(InputError, match=r"has no column 'stars'; its columns are \['path', 'prompt', 'score'\]"):
        build(folder, good(), score="stars")
    with pytest.raises(InputError, match=r"column 'prompt' of .* must be of type double, but holds string"):
        build(folder, good(), score="prompt")
    for clean, bad in ((1, 1), (math.nan, 1), (0, math.inf)):
        with pytest.raises(InputError, match="clean and bad must be two different numbers"):
            RatedOptions(clean=clean, bad=bad)


def test_the_command_writes_what_the_function_gives(folder, capsys):
    table, out = write(folder, good()), folder.parent / "out" / "clean.parquet"
    arguments = [
        "--table",
        table,
        "--images",
        folder,
        "--out",
        out,
        "--clean",
        "5",
        "--bad",
        "1",
        "--shares",
        ".5",
        ".5",
        "0",
    ]
    assert main(list(map(str, arguments))) == 0
    told = capsys.readouterr().out
    assert f"{out}: 30 images" in told and "no such file" in told
    found = pq.read_table(out).replace_schema_metadata()
    assert found.equals(build(folder, good(), shares=(0.5, 0.5, 0))[0])
    assert read_facts(out)["options"]["clean"] == 5 and read_facts(out)["filters"][0]["left"] == 30

    arguments[1] = "none.parquet"
    assert main(list(map(str, arguments))) == 2
    assert capsys.readouterr().err.startswith("error: none.parquet cannot be read as Parquet")
