from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import scale_training
from benchmarks.scale_training import LEVELS, HalvedFashion, growth, main
from moe_artifacts.errors import InputError
from training.data.fashion import LabelledImages
from training.embed import COLUMNS
from training.row_jobs import RowJob, ShardRows

# diffusers 0.42 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


@pytest.fixture(autouse=True)
def fashion(monkeypatch: pytest.MonkeyPatch) -> LabelledImages:
    """Seven pictures; all pixels of a picture are its number."""
    images = torch.arange(7, dtype=torch.uint8)[:, None, None].expand(-1, 28, 28).contiguous()
    data = LabelledImages(images, torch.arange(7))
    monkeypatch.setattr(scale_training, "load_fashion", lambda split: data)
    return data


def test_every_second_picture_is_of_two_halves():
    rows = list(HalvedFashion("train", 30).rows(0, 99))
    assert len({row.key for row in rows}) == 30
    assert [row.label for row in rows] == [0, 1] * 15
    halves = []
    for number, row in enumerate(rows):
        picture = (255 * row.read(32)[0, 0, 2:30, 2:30]).round()
        assert (picture[:14] == number % 7).all() and len(picture[14:].unique()) == 1
        halves.append(picture[14, 0].item() != number % 7)
    assert not any(halves[::2]) and sum(halves[1::2]) >= 10  # one in seven is another copy of itself
    assert [row.key for row in HalvedFashion("train", 30).rows(10, 12)] == [row.key for row in rows[10:12]]


def test_growth_is_that_of_the_two_largest_sizes():
    rows = [
        {"stage": stage, "rows": size, "rows_per_s": rate, "peak_mb": peak}
        for stage, rate in (("noise", 50.0), ("embed", 200.0))
        for size, peak in ((100, 900.0), (10_000, 420.0), (1_000, 400.0))
    ]
    rows.append({"stage": "backbone", "rows": 1_000, "rows_per_s": 300.0})
    assert growth(rows) == [
        {"stage": stage, "rows": 10_000, "time_exponent": pytest.approx(1), "memory_ratio": 1.05}
        for stage in ("noise", "embed")
    ]
    assert growth(rows[:1]) == []


def test_rejected_rows_are_no_measurement(tmp_path):
    def shard(number):
        rows = ShardRows(COLUMNS)
        rows.reject("a", "damaged", "cut short")
        return rows

    with pytest.raises(InputError, match=r"0 new rows, rejected {'damaged': 1}"):
        scale_training.timed(RowJob(name="a", folder=tmp_path, shards=1, facts={}, shard=shard))


def test_a_size_is_measured_once_and_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(tmp_path))
    monkeypatch.setattr(scale_training, "VALIDATION_PICTURES", 8)
    ran = []

    def in_this_process(words, check):
        ran.append(words[words.index("--stage") + 1])
        assert main(words[3:]) == 0

    monkeypatch.setattr(scale_training, "subprocess", SimpleNamespace(run=in_this_process))
    words = ["--rows", str(40 * LEVELS), "--out", str(tmp_path / "out.json")]
    assert main(words) == 0
    assert ran == ["noise", "embed", "train"]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == ["noise", "backbone", "embed", "train"]
    assert all(row["rows"] == 400 and row["rows_per_s"] > 0 for row in rows)
    assert 0 < rows[2]["share_of_backbone"] < 10 and rows[3]["peak_mb"] > 100
    assert 3 * 32 * 32 < rows[0]["bytes_per_row"] < 2 * 3 * 32 * 32  # a preview of bytes, and its columns
    assert 2 * 128 < rows[2]["bytes_per_row"] < 3 * 4 * 128
    [folder] = Path(tmp_path, "scale-training").iterdir()
    (folder / "embed.json").unlink()
    assert main(words) == 0
    assert ran[3:] == ["embed"]


def test_a_size_of_another_program_begins_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(tmp_path))
    ran = []

    def in_this_process(words, check):
        assert main(words[3:]) == 0

    def measured(folder, pictures, batch):
        ran.append(folder)
        (folder / "data").touch()
        return {"rows_per_s": 1.0 * len(ran)}

    monkeypatch.setattr(scale_training, "subprocess", SimpleNamespace(run=in_this_process))
    for stage in scale_training.STAGES:
        monkeypatch.setattr(scale_training, stage, measured)
    out = tmp_path / "out.json"
    words = ["--rows", str(40 * LEVELS), "--out", str(out)]
    assert main(words) == main(words) == 0 and len(ran) == 3
    assert "deleted" not in capsys.readouterr().err
    sources = scale_training.source_hashes
    monkeypatch.setattr(
        scale_training, "source_hashes", lambda start: {**sources(start), "training/embed.py": "0" * 64}
    )
    with pytest.raises(
        InputError, match=r"was made before training/embed\.py changed; leave out --stage to begin anew"
    ):
        main([*words[:2], "--stage", "embed"])
    assert main(words) == 0 and len(ran) == 6
    assert f"{ran[0]} was made before training/embed.py changed: deleted" in capsys.readouterr().err
    rates = [row["rows_per_s"] for row in json.loads(out.read_text())["rows"] if row["table"] == "sizes"]
    assert rates == [4, 5, 6]
    (ran[0] / "sources.json").unlink()  # as of a run that took no note of them
    assert main(words) == 0 and len(ran) == 9


def test_sizes_are_whole_pictures(capsys):
    with pytest.raises(SystemExit):
        main(["--rows", "10,15"])
    assert "must be multiples of 10" in capsys.readouterr().err
