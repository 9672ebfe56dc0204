from __future__ import annotations

import gzip
import io
import math
import re
import socket
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from moe_artifacts.bundled import class_of
from training.data.fashion import FILES, SIZE, load_fashion, read_idx, read_parquet, to_rgb
from training.data.prompts import (
    CLASS_NAMES,
    HELD_OUT_TEMPLATES,
    SYNONYMS,
    TEMPLATES,
    draw_prompts,
    prompts_of,
)
from training.generator import CONTEXT_LENGTH
from training.tokenizer import END, START, build_tokenizer

LABELS = range(len(CLASS_NAMES))
ALL_PROMPTS = [prompt for label in LABELS for prompt in prompts_of(label, "all")]


# --- Fashion-MNIST ---------------------------------------------------------------------------------------------------


def idx_bytes(values: np.ndarray) -> bytes:
    return b"\x00\x00\x08" + struct.pack(f">B{values.ndim}I", values.ndim, *values.shape) + values.tobytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_split(folder: Path, split: str, images: np.ndarray, labels: np.ndarray, suffix: str) -> None:
    for stem, values in zip(FILES[split], (images, labels), strict=True):
        write(folder / f"{stem}{suffix}", idx_bytes(values))


def some_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def test_an_idx_file_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"\x00\x00\x08\x02" + b"\x00\x00\x00\x02" + b"\x00\x00\x00\x03" + bytes(range(6)))
    assert read_idx(path).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("name", ["values-idx3-ubyte", "values-idx3-ubyte.gz"])
@pytest.mark.parametrize("shape", [(300,), (5, 28, 28)])  # 300: more than one byte of the header
def test_an_idx_file_comes_back_as_the_array(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(read_idx(write(tmp_path / name, idx_bytes(values))), values)


@pytest.mark.parametrize("name", ["a", "a.gz"])
@pytest.mark.parametrize("content", [b"", b"\x00\x00", b"\x89PNG\r\n", b"\x00\x00\x0d\x01\x00\x00\x00\x00"])
def test_another_kind_of_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(ValueError, match=rf"{name} is not an idx file of unsigned bytes"):  # 0x0d: an idx of floats
        read_idx(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a", "a.gz"])
@pytest.mark.parametrize("missing", [1, 28 * 28, 2 * 28 * 28 + 5])  # the last ends within the header
def test_a_truncated_file_is_named(tmp_path: Path, name: str, missing: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} .*is it truncated"):
        read_idx(write(tmp_path / name, idx_bytes(some_images(2))[:-missing]))


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gz", idx_bytes(some_images(2)))
    whole = path.read_bytes()
    for damaged in (whole[:50], whole[:-3], whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.gz is not a whole gzip file"):
            read_idx(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_each_split_has_its_own_images_and_labels(tmp_path: Path, suffix: str) -> None:
    for seed, split in enumerate(FILES):
        write_split(tmp_path, split, some_images(4, seed), np.arange(4, dtype=np.uint8) + seed, suffix)
    for seed, split in enumerate(FILES):
        data = load_fashion(split, tmp_path)
        assert len(data) == 4
        assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
        np.testing.assert_array_equal(data.images.numpy(), some_images(4, seed))
        assert data.labels.tolist() == [seed, seed + 1, seed + 2, seed + 3]


def write_parquet(path: Path, images: np.ndarray, labels: list[int]) -> Path:
    """As ``datasets`` writes it."""
    encoded = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": encoded, "label": labels}), path)
    return path


def test_the_dataset_of_the_hub_is_read_where_the_caller_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, asked = some_images(4), []

    def download(repo: str, name: str, repo_type: str) -> str:
        asked.append((repo, name, repo_type))
        return str(write_parquet(tmp_path / "part.parquet", images, [3, 1, 2, 9]))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setenv("MOE_ARTIFACTS_FASHION", "zalando-datasets/fashion_mnist")
    data = load_fashion("test")
    assert asked == [("zalando-datasets/fashion_mnist", "fashion_mnist/test-00000-of-00001.parquet", "dataset")]
    np.testing.assert_array_equal(data.images.numpy(), images)
    assert data.labels.tolist() == [3, 1, 2, 9]

    monkeypatch.setenv("MOE_ARTIFACTS_FASHION", str(tmp_path))  # a folder is never asked of the Hub
    with pytest.raises(FileNotFoundError, match="zalando-datasets/fashion_mnist"):
        load_fashion("test")
    assert len(asked) == 1


def test_a_parquet_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for table in (pa.table({"text": ["x"]}), pa.table({"image": [{"bytes": b"no image"}], "label": [1]})):
        pq.write_table(table, path)
        with pytest.raises(ValueError, match=r"a\.parquet is no Parquet file with the columns image and label"):
            read_parquet(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        read_parquet(path)


def test_missing_files_name_the_debian_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist"):
        load_fashion("train", tmp_path)


def test_images_without_their_labels_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "test", some_images(4), np.zeros(3, dtype=np.uint8), "")
    with pytest.raises(ValueError, match="do not belong together"):
        load_fashion("test", tmp_path)


def test_rgb_has_a_black_margin_and_three_equal_channels() -> None:
    images = torch.from_numpy(some_images(3))
    images[0, 0, 0], images[0, 27, 27] = 0, 255
    rgb = to_rgb(images).clone()
    assert rgb.shape == (3, 3, SIZE, SIZE) and rgb.dtype == torch.float32
    margin = (SIZE - 28) // 2
    inside = rgb[:, :, margin:-margin, margin:-margin]
    assert torch.equal(inside, (images / 255)[:, None].expand(-1, 3, -1, -1))
    assert (inside[0, 0, 0, 0], inside[0, 0, -1, -1]) == (0, 1)
    inside.zero_()
    assert rgb.abs().max() == 0  # nothing outside


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LABELS)
def test_every_prompt_is_recognised_as_its_class(label: int) -> None:
    prompts = prompts_of(label, "all")
    assert len(prompts) == len(TEMPLATES + HELD_OUT_TEMPLATES) * len(SYNONYMS[label])
    assert {class_of(prompt) for prompt in prompts} == {label}


def test_no_training_prompt_fits_a_held_out_template() -> None:
    train = [prompt for label in LABELS for prompt in prompts_of(label, "train")]
    held_out = [prompt for label in LABELS for prompt in prompts_of(label, "held-out")]
    for template in HELD_OUT_TEMPLATES:
        pattern = re.compile(re.escape(template).replace(r"\{\}", ".+"))
        assert not [prompt for prompt in train if pattern.fullmatch(prompt)]
    assert sorted(train + held_out) == sorted(ALL_PROMPTS)
    assert len(set(ALL_PROMPTS)) == len(ALL_PROMPTS)


def test_prompts_have_the_right_article() -> None:
    assert "an ankle boot" in ALL_PROMPTS
    assert not [prompt for prompt in ALL_PROMPTS if re.search(r"\ba [aeiou]|\ban [^aeiou]", prompt)]


def test_a_class_is_recognised_by_whole_words_and_the_longest_name() -> None:
    assert class_of("An ANKLE BOOT") == class_of("boot") == 9
    assert class_of("a short sleeved top") == 0
    assert class_of("a button shirt or a dress") == 6  # the longest name decides between two classes
    for prompt in ("a laptop", "a t-shirts", ""):  # "top" and "t-shirt" are within longer words
        assert class_of(prompt) is None


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_drawn_prompts_are_reproducible_and_of_their_class_and_split(split: str) -> None:
    def draw(seed: int) -> tuple[list[str], list[int]]:
        prompts, labels = draw_prompts(100, split, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
        return prompts, labels.tolist()

    prompts, labels = draw(0)
    assert draw(0) == (prompts, labels)
    assert draw(1) != (prompts, labels)
    for prompt, label in zip(prompts, labels, strict=True):
        assert prompt in prompts_of(label, split)  # type: ignore[arg-type]


def test_classes_are_drawn_evenly_and_independently() -> None:
    count = 10_000
    prompts, labels = draw_prompts(count, "train", torch.Generator().manual_seed(0))
    share = 1 / len(CLASS_NAMES)
    error = math.sqrt(share * (1 - share) / count)
    frequency = torch.bincount(labels, minlength=len(CLASS_NAMES)) / count
    assert (frequency - share).abs().max() < 4 * error
    assert abs((labels[1:] == labels[:-1]).float().mean() - share) < 4 * error
    assert set(prompts) == {prompt for label in LABELS for prompt in prompts_of(label, "train")}  # none is out of reach


# --- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return build_tokenizer(ALL_PROMPTS, tmp_path_factory.mktemp("tokenizer"), CONTEXT_LENGTH)


def inner_tokens(tokenizer: CLIPTokenizer, prompt: str) -> list[str]:
    """Tokens between start and end."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    assert tokens[0] == START and tokens[-1] == END
    return list(tokens[1:-1])


def test_needs_no_network_and_gives_the_same_tokens_again(
    tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for number in range(5):  # the trainer's hash tables differ from one to the next
        again = build_tokenizer(ALL_PROMPTS, tmp_path / str(number), CONTEXT_LENGTH)
        assert again.get_vocab() == tokenizer.get_vocab()
    assert again(ALL_PROMPTS).input_ids == tokenizer(ALL_PROMPTS).input_ids


def test_every_prompt_is_spelt_whole_within_the_context(tokenizer: CLIPTokenizer) -> None:
    for prompt in ALL_PROMPTS:
        tokens = inner_tokens(tokenizer, prompt)
        assert "".join(tokens).replace("</w>", "") == prompt.replace(" ", "")
        assert len(tokens) + 2 <= CONTEXT_LENGTH


def test_other_words_fall_into_letters(tokenizer: CLIPTokenizer) -> None:
    tokens = inner_tokens(tokenizer, "Zebra 7!")
    assert "".join(tokens) == "zebra</w>7</w>!</w>"
    assert len(tokens) > 3


@pytest.mark.parametrize("sign", ["\u4f60", "\u00e9", "\U0001f600", "\u0007"])
def test_unknown_signs_become_the_end_token(tokenizer: CLIPTokenizer, sign: str) -> None:
    assert set(inner_tokens(tokenizer, f"bag {sign} bag")) <= {"bag</w>", END}
    assert max(tokenizer(sign).input_ids) < len(tokenizer)


def test_long_prompts_are_cut_and_short_ones_padded(tokenizer: CLIPTokenizer) -> None:
    rows = tokenizer(["a bag " * 50, "a bag", ""], padding="max_length", truncation=True).input_ids
    start, end = (tokenizer.convert_tokens_to_ids(sign) for sign in (START, END))
    assert {len(row) for row in rows} == {CONTEXT_LENGTH}
    assert all(row[0] == start and row[-1] == end for row in rows)
    assert end not in rows[0][:-1]
    assert rows[2] == [start] + [end] * (CONTEXT_LENGTH - 1)
    assert rows[1][1:3] == rows[0][1:3] and rows[1][3:] == [end] * (CONTEXT_LENGTH - 3)
