"""The sweep between two models and what the mixed file says of its parents; ``interpolate`` is in test_training_state.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_artifacts.embedder import state_sha256
from moe_artifacts.errors import CheckpointError, InputError
from training.wise_ft import (
    MIXES,
    MixScores,
    as_rows,
    best_mix,
    best_per_band,
    interpolate,
    read_provenance,
    sweep,
    write_mix,
)

NAN = math.nan


def parents(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    paths = folder / "pretrained.safetensors", folder / "finetuned.safetensors"
    for path, count in zip(paths, (1, 2), strict=True):
        weight = torch.randn(50)
        weight[0] = -0.0
        save_file({"w": weight.to(dtype), "count": torch.tensor([count])}, path)
    return paths


def test_every_mix_is_measured_once_on_its_own_weights() -> None:
    first, second = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    seen: list[float] = []

    def measure(state: dict[str, Tensor]) -> list[float]:
        seen.append(state["w"].item())
        return [state["w"].item(), 1 - state["w"].item(), NAN]

    found = sweep(first, second, measure)
    assert tuple(row.mix for row in found) == MIXES == pytest.approx(tuple(seen))
    assert [row.mean for row in found] == pytest.approx([0.5] * 11)
    assert best_mix(found) == 0.0  # of equals the nearest to the pretrained model
    assert best_per_band(found) == [1.0, 0.0, None]
    assert as_rows(found)[3] == {"mix": 0.3, "mean": pytest.approx(0.5), "bands": [*found[3].bands[:2], None]}


@given(st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2), min_size=1, max_size=6), st.booleans())
def test_the_best_mix_is_the_first_of_the_best(table: list[list[float]], empty: bool) -> None:
    rows = [MixScores(i / 10, (*bands, *([NAN] * empty))) for i, bands in enumerate(table)]
    means = [sum(bands) / 2 for bands in table]
    assert best_mix(rows) == means.index(max(means)) / 10
    for k in (0, 1):
        column = [bands[k] for bands in table]
        assert best_per_band(rows)[k] == column.index(max(column)) / 10


def test_bands_without_a_score_are_told_and_never_averaged_over_some_mixes_only() -> None:
    state = {"w": torch.zeros(1)}
    with pytest.raises(InputError, match="none of the 3 bands of noise levels has a score"):
        sweep(state, state, lambda _: [NAN] * 3)
    calls = iter([[0.5, NAN], [0.5, 0.5]])
    with pytest.raises(InputError, match="the same bands of every mix"):
        sweep(state, state, lambda _: next(calls), mixes=[0.0, 1.0])
    with pytest.raises(InputError, match="mixes must hold at least one number"):
        sweep(state, state, lambda _: [1.0], mixes=[])
    with pytest.raises(ValueError, match=r"mix must be in \[0, 1\]"):
        sweep(state, state, lambda _: [1.0], mixes=[1.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_the_file_at_an_end_holds_the_parent_to_the_bit(tmp_path: Path, dtype: torch.dtype, mix: float) -> None:
    paths = parents(tmp_path, dtype)
    write_mix(tmp_path / "mixed.safetensors", *paths, mix)
    found, expected = load_file(tmp_path / "mixed.safetensors"), load_file(paths[int(mix)])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key].view(torch.uint8), value.view(torch.uint8))  # -0.0 stays -0.0
    assert state_sha256(found) == state_sha256(expected)


def test_the_file_says_what_it_was_made_of(tmp_path: Path) -> None:
    paths, path = parents(tmp_path), tmp_path / "mixed.safetensors"
    state = write_mix(path, *paths, 0.3)
    pretrained, finetuned = (load_file(p) for p in paths)
    assert read_provenance(path) == {
        "mix": 0.3,
        "pretrained_sha256": state_sha256(pretrained),
        "finetuned_sha256": state_sha256(finetuned),
    }
    expected = interpolate(pretrained, finetuned, 0.3)
    assert state_sha256(state) == state_sha256(load_file(path)) == state_sha256(expected)
    first = path.read_bytes()
    write_mix(path, *paths, 0.3)
    assert path.read_bytes() == first  # no order of entries, no time of day


def test_files_that_are_not_mixed_or_not_whole_are_refused(tmp_path: Path) -> None:
    paths, path = parents(tmp_path), tmp_path / "mixed.safetensors"
    with pytest.raises(CheckpointError, match="does not say what it was mixed of"):
        read_provenance(paths[0])
    with pytest.raises(CheckpointError, match="no such file"):
        write_mix(path, paths[0], tmp_path / "missing.safetensors", 0.5)
    paths[1].write_bytes(paths[1].read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        write_mix(path, *paths, 0.5)
    assert not path.exists()
