from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.files import write_json
from training import embedded
from training.embed import COLUMNS
from training.embedded import EmbeddedRows
from training.row_jobs import ShardRows, open_folder, write_shard

CHECKS, WIDTH = 3, 4
PROMPTS = [["a", "ü", "a", "b"], [], ["b", "a", "a c"], ["", "a", "b", "b", ""]]


def shard_rows(number: int) -> ShardRows:
    """Every second image has no first check; the first image of a shard has neither label nor margin."""
    rows, generator = ShardRows(COLUMNS), torch.Generator().manual_seed(number)
    prompts = PROMPTS[number]
    distinct = list(dict.fromkeys(prompts))
    for place, prompt in enumerate(prompts):
        missing = place % 2
        label = None if place == 0 else place / 8
        margin = None if place == 0 else place - 2.5
        rows.add(key=f"{number}-{place}", prompt=prompt, label=label, margin=margin, setting="", num_steps=10 + place)
        embedding = torch.randn(1, CHECKS, WIDTH, generator=generator).half()
        embedding[:, :missing] = 0
        rows.add_tensor("embedding", embedding)
        rows.add_tensor("log_snr", torch.tensor([[torch.nan] * missing + [-1.0, 0.0, 1.0 + place][missing:]]))
        rows.add_tensor("step", torch.tensor([[-1] * missing + [2, 5, 8 + place][missing:]], dtype=torch.int32))
    rows.add_tensor("prompt", torch.tensor([distinct.index(prompt) for prompt in prompts], dtype=torch.int32))
    rows.add_tensor("text", torch.randn(len(distinct), WIDTH, generator=generator).half())
    return rows


def write(folder: Path) -> Path:
    open_folder(folder, {"embed_dim": WIDTH, "checks": CHECKS, "shards": len(PROMPTS)})
    for number in range(len(PROMPTS)):
        write_shard(folder, number, shard_rows(number))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="module")
def rows(folder: Path) -> EmbeddedRows:
    return EmbeddedRows(folder)


def slowly(folder: Path, row: int) -> dict[str, Tensor]:
    """One image, from whole files."""
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path).to_pylist()
        if row < len(table):
            tensors, one = load_file(path.with_suffix(".safetensors")), table[row]
            return {
                "embedding": tensors["embedding"][row].float(),
                "log_snr": tensors["log_snr"][row],
                "spent": (tensors["step"][row] + 1) / one["num_steps"],
                "text": tensors["text"][tensors["prompt"][row]].float(),
                "label": torch.tensor(float("nan") if one["label"] is None else one["label"]),
                "margin": torch.tensor(float("nan") if one["margin"] is None else one["margin"]),
            }
        row -= len(table)
    raise IndexError


@given(wanted=st.lists(st.integers(0, 11), max_size=30))
def test_rows_are_those_asked_for_in_that_order(folder, rows, wanted):
    batch = rows.take(torch.tensor(wanted, dtype=torch.int64))
    assert batch.embedding.shape == (len(wanted), CHECKS, WIDTH) and batch.embedding.dtype == torch.float32
    for place, row in enumerate(wanted):
        for name, expected in slowly(folder, row).items():
            torch.testing.assert_close(getattr(batch, name)[place], expected, rtol=0, atol=0, equal_nan=True)


def test_columns_are_held_for_all_images(rows):
    assert (len(rows), rows.checks, rows.embed_dim) == (12, CHECKS, WIDTH)
    prompts = [prompt for shard in PROMPTS for prompt in shard]
    order = list(dict.fromkeys(prompts))
    assert rows.prompt_id.tolist() == [order.index(prompt) for prompt in prompts]
    assert rows.label.isnan().nonzero().flatten().tolist() == [0, 4, 7] and rows.label[8] == 1 / 8
    assert rows.margin[10] == 0.5 and rows.label.dtype == rows.margin.dtype == torch.float32


def test_where_there_is_no_check_nothing_is_spent(rows):
    batch = rows.take(torch.tensor([1]))
    assert batch.log_snr.isnan().tolist() == [[True, False, False]]
    assert batch.spent.tolist() == [pytest.approx([0, 6 / 11, 10 / 11])]
    assert not batch.embedding[0, 0].any()


def test_a_row_that_is_none_is_an_error(rows):
    for row in (-1, 12):
        with pytest.raises(IndexError, match=f"rows must be from 0 to 11, got {min(row, 3)} to {max(row, 3)}"):
            rows.take(torch.tensor([3, row]))


def test_few_files_are_open_at_once(folder, rows, monkeypatch):
    monkeypatch.setattr(embedded, "OPEN_FILES", 1)
    again = EmbeddedRows(folder)
    wanted = torch.tensor([0, 11, 5, 0, 6])
    assert again.take(wanted).text.equal(rows.take(wanted).text)
    assert len(again._open) == 1


def test_another_process_opens_the_files_itself(rows):
    wanted = torch.tensor([3, 4])
    expected = rows.take(wanted)
    other = pickle.loads(pickle.dumps(rows))
    assert not other._open
    assert other.take(wanted).embedding.equal(expected.embedding)


def test_neighbours_are_read_together(rows, monkeypatch):
    reads = []
    monkeypatch.setattr(rows, "_read", lambda shard, offset, into: reads.append((shard, len(into))))
    rows._gather("log_snr", np.array([0, 1, 1, 0, 0]), np.array([3, 1, 0, 2, 2]), (CHECKS,))
    assert reads == [(0, 2), (1, 2)]


# --- damaged folders


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write(tmp_path / "embedded")


def test_a_folder_that_is_not_finished_is_refused(own):
    (own / "000001.parquet").unlink()
    with pytest.raises(InputError, match=r"has 3 of 4 shards; run the stage that writes it again"):
        EmbeddedRows(own)


def test_a_folder_that_is_none_is_refused(own, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*meta.json"):
        EmbeddedRows(tmp_path)
    write_json(own / "meta.json", {"shards": 4})
    with pytest.raises(InputError, match=r"not a folder of training.embed: its meta.json lacks checks or embed_dim"):
        EmbeddedRows(own)


def test_a_folder_without_images_is_refused(tmp_path):
    open_folder(tmp_path, {"embed_dim": WIDTH, "checks": CHECKS, "shards": 1})
    write_shard(tmp_path, 0, ShardRows(COLUMNS))
    with pytest.raises(InputError, match="holds no images: all were rejected, see its folder rejects"):
        EmbeddedRows(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("text"), r"text must be F16 \(None, 4\), got None"),
        (lambda tensors: tensors.update(log_snr=tensors["log_snr"].double()), r"log_snr must be F32 \(3, 3\)"),
        (lambda tensors: tensors.update(embedding=tensors["embedding"][:2]), r"embedding must be F16 \(3, 3, 4\)"),
        (lambda tensors: tensors.update(text=tensors["text"][:, :2].contiguous()), r"text must be F16"),
        (lambda tensors: tensors["prompt"].fill_(3), "prompt must be rows of text, 0 to 2"),
        (lambda tensors: tensors["prompt"].fill_(-1), "prompt must be rows of text, 0 to 2"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(own, change, message):
    path = own / "000002.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(InputError, match=rf"000002.parquet cannot be read: .*{message}.*; delete it and embed again"):
        EmbeddedRows(own)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"no", bytes(64)])
def test_a_file_that_is_damaged_is_refused(own, content):
    (own / "000002.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"000002.parquet cannot be read"):
        EmbeddedRows(own)


def test_a_file_that_is_cut_short_is_refused(own):
    path = own / "000002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"000002.parquet cannot be read"):
        EmbeddedRows(own)
    path.write_bytes(whole)
    rows = EmbeddedRows(own)
    path.write_bytes(whole[:-200])  # later on
    with pytest.raises(InputError, match=r"000002.safetensors is cut short; delete its .parquet file"):
        rows.take(torch.arange(4, 7))
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*000002.safetensors: No such file"):
        EmbeddedRows.take(pickle.loads(pickle.dumps(rows)), torch.tensor([4]))


def test_a_table_that_is_damaged_is_refused(own):
    (own / "000003.parquet").write_bytes(b"half")
    with pytest.raises(InputError, match=r"000003.parquet cannot be read"):
        EmbeddedRows(own)
