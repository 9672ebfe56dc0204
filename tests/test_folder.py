"""A folder of pictures as classes to learn, and the prompts for them."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moe_artifacts.errors import InputError
from moe_artifacts.judge import class_in
from training.data.class_images import ClassImages, EvenClasses, fashion_classes
from training.data.class_prompts import (
    TEMPLATES,
    class_name,
    clear_templates,
    fill,
    prompts_table,
    read_templates,
)
from training.data.columns import read_columns, write_table
from training.data.fashion import LabelledImages, to_rgb
from training.data.folder import folder_classes, stored_counts
from training.data.images import read_image
from training.own.prompts import read_prompts

COUNT = 150  # of each class


def write_pictures(folder: Path, count: int = COUNT, seed: int = 0, grey: bool = False) -> Path:
    """PNG files of noise, no two alike, of 5x4 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    shape = (4, 5) if grey else (4, 5, 3)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_pictures(folder / "Ankle_Boot", seed=1)
    write_pictures(folder / "bag" / "old", count=COUNT + 90, seed=2, grey=True)  # folders within folders
    return folder


def rejects(store: Path) -> dict[str, str]:
    table = read_columns(store / "rejects.parquet", {"file": pa.string(), "reason": pa.string()})
    return dict(zip(table["file"].to_pylist(), table["reason"].to_pylist(), strict=True))


def stored(store: Path) -> list[tuple[str, int, str]]:
    types = {"file": pa.string(), "label": pa.int64(), "split": pa.string()}
    return [tuple(row.values()) for row in read_columns(store / "index.parquet", types).to_pylist()]


# --- pictures


def test_every_picture_is_in_one_part_with_its_label_and_its_pixels(images: Path, tmp_path: Path) -> None:
    data = folder_classes(images, tmp_path)
    assert data.names == (("ankle boot",), ("bag",)) and data.size == 32 and data.train.coloured
    rows = stored(tmp_path)
    assert sorted(file for file, _, _ in rows) == sorted(str(p.relative_to(images)) for p in images.rglob("*.png"))
    # 40 held out at least, and a sixth of many.
    assert Counter((label, split) for _, label, split in rows) == {
        (0, "train"): 110, (0, "held-out"): 40, (1, "train"): 200, (1, "held-out"): 40,
    }  # fmt: skip
    for name, part in (("train", data.train), ("held-out", data.held_out)):
        of_part = [(file, label) for file, label, split in rows if split == name]
        assert part.labels.tolist() == [label for _, label in of_part] and len(part) == len(of_part)
        assert all(label == file.startswith("bag") for file, label in of_part)
        for row in (0, len(part) - 1):
            expected = read_image(images / of_part[row][0], 32)
            assert torch.equal(part.rgb(torch.tensor([row])), expected)
            assert torch.equal(part.rgb(slice(row, row + 1)), expected)
    assert not rejects(tmp_path)


def test_a_subset_copies_no_pixels(images: Path, tmp_path: Path) -> None:
    train = folder_classes(images, tmp_path).train
    rows = torch.tensor([7, 3, 3])
    part = train.subset(rows)
    assert torch.equal(part.rgb(slice(None)), train.rgb(rows)) and torch.equal(part.labels, train.labels[rows])
    assert part.images.data_ptr() == train.images.data_ptr()
    assert torch.equal(part.subset(torch.tensor([1])).rgb(slice(None)), train.rgb(torch.tensor([3])))


def test_classes_are_mixed_and_more_files_leave_the_parts_of_the_old_ones(images: Path, tmp_path: Path) -> None:
    data = folder_classes(images, tmp_path / "a")
    changes = (data.train.labels[1:] != data.train.labels[:-1]).float().mean().item()
    assert 0.3 < changes < 0.6  # at random 2 * 110/310 * 200/310 = 0.46, standard error 0.03
    before = {file: split for file, _, split in stored(tmp_path / "a")}
    shutil.copytree(images, tmp_path / "more")
    write_pictures(tmp_path / "more" / "bag" / "new", count=60, seed=5)
    folder_classes(tmp_path / "more", tmp_path / "b")
    after = {file: split for file, _, split in stored(tmp_path / "b")}
    moved = [file for file in before if before[file] != after[file]]
    assert len(moved) < 25  # new files take places among those held out: 60 of 300, of 40 places, and 10 more places


def test_it_is_read_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = folder_classes(images, tmp_path, size=64, seed=3)
    monkeypatch.setattr("training.data.folder.read_rgb", None)
    again = folder_classes(images, tmp_path)
    assert again.size == 64 and torch.equal(again.train.rgb(slice(9)), first.train.rgb(slice(9)))
    told = "2 classes (ankle boot 150, bag 240), 310 pictures to train with and 80 held out, coloured, 64x64 pixels"
    assert told in stored_counts(tmp_path)
    for options, message in (({"size": 32}, "size=64, and 32"), ({"seed": 0}, "seed=3, and 0")):
        with pytest.raises(InputError, match=message):
            folder_classes(images, tmp_path, **options)
    with pytest.raises(InputError, match="was made with images="):
        folder_classes(images.parent, tmp_path)
    with open(tmp_path / "pictures.bin", "ab") as stream:
        stream.truncate(1000)
    with pytest.raises(InputError, match=r"pictures\.bin does not hold 390 pictures of 64x64"):
        folder_classes(images, tmp_path)


def test_the_seed_chooses_what_is_held_out(images: Path, tmp_path: Path) -> None:
    held_out = []
    for seed in (0, 1, 1):
        folder_classes(images, tmp_path / "store", seed=seed)
        held_out.append({file for file, _, split in stored(tmp_path / "store") if split == "held-out"})
        shutil.rmtree(tmp_path / "store")
    assert held_out[0] != held_out[1] == held_out[2]


def test_what_cannot_be_used_is_left_out_and_counted(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "bag" / "cut.png").write_bytes((folder / "bag" / "old" / "000.png").read_bytes()[:60])
    (folder / "bag" / "empty.jpg").touch()
    shutil.copyfile(folder / "bag" / "old" / "001.png", folder / "Ankle_Boot" / "again.png")
    Image.new("CMYK", (40, 30), (10, 200, 30, 0)).save(folder / "bag" / "cmyk.jpg")  # kept, as all that can be read
    Image.new("I;16", (9, 9), 40_000).save(folder / "bag" / "deep.png")
    (folder / "readme.txt").touch()
    (folder / "notes").mkdir()  # no class: it has no picture
    (folder / ".cache").mkdir()
    write_pictures(folder / ".cache", count=3, seed=9)
    (folder / "bag" / ".DS_Store").touch()
    for name in ("Thumbs.db", "list.csv", "old/page.pdf"):
        (folder / "bag" / name).touch()
    Image.new("RGB", (30, 30), (1, 2, 3)).save(folder / "bag" / "net.ppm")  # kept
    data = folder_classes(folder, tmp_path / "store")
    assert data.names == (("ankle boot",), ("bag",)) and len(data.train) + len(data.held_out) == 393
    found = rejects(tmp_path / "store")
    again = next(file for file, reason in found.items() if reason == "same picture again")
    assert again in ("Ankle_Boot/again.png", "bag/old/001.png")  # the other is kept
    assert {k: v for k, v in found.items() if k != again} == {
        "bag/cut.png": "picture: damaged",
        "bag/empty.jpg": "picture: empty",
    }
    assert re.search(r"same picture again +1 +393\n", stored_counts(tmp_path / "store"))
    assert re.search(r"not named like an image +3 +396\n", stored_counts(tmp_path / "store"))


def test_pictures_that_are_there_many_times_leave_enough_to_hold_out(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    write_pictures(folder / "copies" / "0", count=60, seed=8)
    for number in range(1, 10):
        shutil.copytree(folder / "copies" / "0", folder / "copies" / str(number))
    data = folder_classes(folder, tmp_path / "store")
    counts = [torch.bincount(part.labels).tolist() for part in (data.train, data.held_out)]
    assert counts == [[110, 200, 40], [40, 40, 20]]  # a third of a small class is held out


def test_a_file_whose_name_is_no_text_is_left_out(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    try:
        Image.new("RGB", (8, 8)).save(folder / "bag" / os.fsdecode(b"caf\xe9.jpg"))
    except OSError:
        pytest.skip("this file system has no such names")
    data = folder_classes(folder, tmp_path / "store")
    assert len(data.train) + len(data.held_out) == 390
    assert rejects(tmp_path / "store") == {"bag/caf?.jpg": "file name"}


def test_pictures_without_colours_are_grey(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        write_pictures(tmp_path / "images" / name, seed=number, grey=True)
    Image.new("RGB", (8, 8), (250, 0, 0)).save(tmp_path / "images" / "a" / "red.png")  # one in 301 is a stray
    assert not folder_classes(tmp_path / "images", tmp_path / "store").train.coloured


def test_folders_that_are_no_classes_are_refused(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    with pytest.raises(InputError, match="must be a folder with a sub-folder for each class"):
        folder_classes(folder, tmp_path / "store")
    write_pictures(folder, count=3)
    with pytest.raises(InputError, match="has 0 sub-folders with images, at least 2 are needed"):
        folder_classes(folder, tmp_path / "store")
    shutil.copytree(images, folder, dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"size must be one of 32, 64, 128, got 48"):
        folder_classes(folder, tmp_path / "store", size=48)
    write_pictures(folder / "few", count=3, seed=7)
    (folder / "few" / "damaged.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"1 of 3 classes of .* fewer than 60 .* 'few' has 3: add some"):
        folder_classes(folder, tmp_path / "store")
    assert rejects(tmp_path / "store") and not (tmp_path / "store" / "index.parquet").exists()
    for name, message in (("ANKLE boot", "2 folders whose class would be called 'ankle boot'"), ("_", "name ''")):
        (folder / "few").rename(folder / name)
        with pytest.raises(InputError, match=message):
            folder_classes(folder, tmp_path / "store")
        (folder / name).rename(folder / "few")
    parts = tmp_path / "parts"
    for name in ("train", "Val"):
        shutil.copytree(images, parts / name)
    with pytest.raises(
        InputError, match=r"called Val, train: these are parts of a data set and no classes; give one of"
    ):
        folder_classes(parts, tmp_path / "store")


def test_a_full_disk_is_an_error_of_ours(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Path("/dev/full")  # every write to it fails
    if not device.exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr("training.data.folder.open", lambda path, mode: open(device, mode, buffering=0), raising=False)
    with pytest.raises(InputError, match="No space left on device"):
        folder_classes(images, tmp_path)
    assert not (tmp_path / "pictures.bin").exists() and not (tmp_path / "index.parquet").exists()


def test_classes_are_drawn_alike_however_many_pictures_they_have() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 6 + [2] * 300 + [5] * 60)[torch.randperm(366, generator=generator)]
    rows = EvenClasses(labels).draw(9_000, generator)
    drawn = labels[rows].bincount()
    assert drawn[[0, 2, 5]].sum() == 9_000 and (drawn[[0, 2, 5]] - 3_000).abs().max() < 200  # 4 standard errors: 180
    of_pictures = rows.bincount(minlength=366).float()
    for label in (0, 2, 5):  # and the pictures of a class alike
        mine = of_pictures[labels == label]
        assert (mine - mine.mean()).abs().max() < 5 * mine.mean().sqrt()
    even = torch.tensor([1, 0, 1, 0])
    drawn = [
        EvenClasses(even).draw(9, torch.Generator().manual_seed(1)),
        torch.randint(4, (9,), generator=torch.Generator().manual_seed(1)),
    ]
    assert drawn[0].equal(drawn[1])  # the bundled pipeline stays the same


def test_fashion_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(256, (4, 28, 28), dtype=torch.uint8)
    data = LabelledImages(pixels, torch.arange(4))
    monkeypatch.setattr("training.data.class_images.load_fashion", lambda split, source: data)
    classes = fashion_classes()
    assert isinstance(classes, ClassImages) and classes.size == 32 and not classes.train.coloured
    rows = torch.tensor([2, 0])
    assert torch.equal(classes.train.rgb(rows), to_rgb(pixels[rows]))
    assert torch.equal(data.subset(rows).rgb(slice(None)), to_rgb(pixels[rows]))


# --- prompts


def test_default_prompts_are_of_four_splits_and_share_none_that_must_not_be_shared(tmp_path: Path) -> None:
    names = ["ankle boot", "boot", "owl", "\u732b"]
    table = prompts_table(names, clear_templates(names, TEMPLATES))
    write_table(table, tmp_path / "prompts.parquet", {})
    splits = read_prompts(tmp_path / "prompts.parquet").prompts  # refuses a leak
    assert {name: len(prompts) for name, prompts in splits.items()} == {
        "train": 4 * 24, "validation": 4 * 24, "calibration": 4 * 12, "test": 4 * 12,
    }  # fmt: skip
    assert "an owl" in splits["train"] and "an example of one ankle boot" in splits["test"]
    for row in table.to_pylist():
        found = class_in(row["prompt"], [[name] for name in names])
        assert found is not None and names[found] == row["group"]


@given(st.lists(st.from_regex(r"[a-z]{1,8}( [a-z]{1,8})?", fullmatch=True), min_size=2, max_size=6, unique=True))
def test_every_prompt_is_recognised_whatever_the_classes_are_called(names: list[str]) -> None:
    try:
        clear = clear_templates(names, TEMPLATES)
    except InputError:
        return
    for template in clear:
        assert [class_in(fill(template, name), [[n] for n in names]) for name in names] == list(range(len(names)))


def test_templates_with_the_name_of_a_class_are_left_out() -> None:
    clear = clear_templates(["cat", "image"], TEMPLATES)
    assert set(TEMPLATES) - set(clear) == {t for t in TEMPLATES if "image" in t}
    with pytest.raises(InputError, match=r"at least 2 templates are needed .* got 1 of 2"):
        clear_templates(["cat", "image"], ["image of {}", "a {}"])
    assert clear_templates(["car", "red car"], ["a {}", "a red {}", "the {}"]) == ("a {}", "the {}")


def test_templates_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a {}\n\n  the   {}\na {}\n{} {0.__class__}\n", encoding="utf-8")
    assert read_templates(file) == ("a {}", "the {}", "{} {0.__class__}")
    assert fill("{} {0.__class__}", "owl") == "owl {0.__class__}"
    for text in ("a {} and a {}\n", "a cat\n"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"must hold \{\} once"):
            read_templates(file)
    with pytest.raises(InputError, match="cannot read the templates"):
        read_templates(tmp_path / "absent.txt")


def test_names_are_as_people_write_them() -> None:
    assert [class_name(n) for n in ("Ankle_Boot", "T-shirt", "007", "\uff21\uff22", "a__b ")] == [
        "ankle boot", "t-shirt", "007", "ab", "a b",
    ]  # fmt: skip
    assert fill("A {}", "owl") == "An owl" and fill("banana {}", "owl") == "banana owl"
