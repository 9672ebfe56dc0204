from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch

from benchmarks import compatibility
from benchmarks.results import table, write_results
from moe_artifacts.errors import InputError


def test_the_file_holds_the_rows_of_the_table_as_plain_json(tmp_path, capsys):
    rows = [
        {"rule": "cumulative", "recall": np.float32(0.5), "images": torch.tensor(8), "certified": True},
        {"rule": "none", "recall": math.nan},
    ]
    path = write_results("some", rows, seed=3, out=tmp_path / "deep" / "some.json")
    written = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert list(written) == ["benchmark", "command", "commit", "seed", "hardware", "rows"]
    assert (written["benchmark"], written["seed"]) == ("some", 3)
    assert written["rows"][0] == {"rule": "cumulative", "recall": 0.5, "images": 8, "certified": True}
    assert written["rows"][1] == {"rule": "none", "recall": None}
    assert capsys.readouterr().out.startswith(table(written["rows"]))


def test_a_table_has_every_column_in_the_order_of_appearance():
    assert table([{"a": "x", "b": 0.123456}, {"b": True, "c": None}]).splitlines() == [
        "a  b       c",
        "-  ------  -",
        "x  0.1235  -",
        "-  yes     -",
    ]


@pytest.mark.parametrize(("rows", "told"), [([], "no rows"), ([{"x": [1]}], "'x' must hold scalars, got list")])
def test_what_cannot_be_written_is_refused_and_leaves_no_file(rows, told, tmp_path):
    with pytest.raises(InputError, match=told):
        write_results("some", rows, seed=0, out=tmp_path / "some.json")
    assert not list(tmp_path.iterdir())


def test_the_compatibility_of_a_scheduler_is_measured():
    row = compatibility.compare(tiny.stable_diffusion("unipc"), guidance_scale=3.0, images=3, steps=4, seed=0)
    assert (row["record"], row["drop"], row["why"]) == ("equal", "equal", "")
    assert row["max_abs_difference"] <= compatibility.ATOL


def test_a_difference_is_reported_as_one(monkeypatch):
    monkeypatch.setattr(compatibility, "ATOL", -1.0)
    row = compatibility.compare(tiny.stable_diffusion(), guidance_scale=1.0, images=3, steps=4, seed=0)
    assert row["drop"] == "different"
    assert "kept [1]" in row["why"] or "kept []" in row["why"]


def test_a_refusal_is_reported_with_its_reason():
    from diffusers import DDIMScheduler

    class OneOfMyOwn(DDIMScheduler):
        """May step in another way."""

    pipe = tiny.stable_diffusion()
    pipe.scheduler = OneOfMyOwn.from_config(pipe.scheduler.config)
    row = compatibility.compare(pipe, guidance_scale=1.0, images=2, steps=3, seed=0)
    assert (row["record"], row["drop"]) == ("refused", "refused")
    assert "OneOfMyOwn is not supported" in row["why"]
