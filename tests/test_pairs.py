from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import training.data.pairs
from moe_artifacts.errors import InputError
from moe_artifacts.files import write_json
from tests.some_pairs import LEVELS, trajectory
from training.data.pairs import MicroBatches, PreviewPairs, RowSampler, hold_out, read_pairs
from training.noised_shards import COLUMNS
from training.row_jobs import META, ShardRows, write_shard

NAN = math.nan


def in_memory(prompt: list[int], **changes: Any) -> PreviewPairs:
    """Rows whose picture is filled with the number of the row."""
    rows = len(prompt)
    pairs = PreviewPairs(
        kind="latents",
        prompts=[f"prompt {i}" for i in range(max(prompt) + 1)],
        prompt=torch.tensor(prompt),
        log_snr=torch.zeros(rows),
        label=torch.full((rows,), NAN),
        margin=torch.full((rows,), NAN),
        read=lambda some: some[:, None, None, None].float(),
    )
    return dataclasses.replace(pairs, **changes)


# --- trajectories and shards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["x0", "latents"])
def test_each_image_and_step_of_trajectories_is_a_row(
    tmp_path: Path, which: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.data.pairs, "AT_ONCE", 2)  # the first has 3 images
    runs = [trajectory(["a", "b", "b"], 0), trajectory(["b", "c"], 1)]
    for number, run in enumerate(runs):
        run.save(tmp_path / f"run-{number}")
    pairs = read_pairs(tmp_path, which)
    assert (len(pairs), pairs.kind, pairs.prompts, pairs.left_out) == (15, "latents", ["a", "b", "c"], 0)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    batch = pairs.batch(order)
    expected = [
        (getattr(run, which)[i, j], run.prompts[i], LEVELS[j].item(), float(i % 2))
        for run in runs
        for i in range(len(run.prompts))
        for j in range(3)
    ]
    for row, place in enumerate(order.tolist()):
        picture, prompt, log_snr, label = expected[place]
        assert torch.equal(batch.images[row], picture)
        assert (batch.prompts[row], batch.log_snr[row], batch.label[row]) == (prompt, log_snr, label)
    margins = [value for run in runs for value in run.meta["margin"] for _ in range(3)]
    assert batch.margin.tolist() == torch.tensor(margins)[order].tolist()


def test_margins_are_known_where_a_judge_gave_them(tmp_path: Path) -> None:
    trajectory(["a", "b"]).save(tmp_path / "0")
    dataclasses.replace(trajectory(["c", "d"]), meta={"margin": [None, 0.5]}).save(tmp_path / "1")
    dataclasses.replace(trajectory(["e"]), meta={}).save(tmp_path / "2")
    assert read_pairs(tmp_path).margin.isnan().tolist() == 6 * [False] + 3 * [True] + 3 * [False] + 3 * [True]
    for wrong, told in (([0.1, 0.2], "one per image, got 2"), (["much"], "a number or null, got 'much'")):
        dataclasses.replace(trajectory(["c"]), meta={"margin": wrong}).save(tmp_path / "1")
        with pytest.raises(InputError, match=f"margin must be {told}"):
            read_pairs(tmp_path)
    with pytest.raises(InputError, match="margin must be finite, or NaN where it is not known"):
        in_memory([0], margin=torch.tensor([math.inf]))


def test_rows_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    run = trajectory(["a", "b"])
    assert run.x0 is not None
    run.x0[0, 1:] = NAN  # its image had left
    run.x0[1, 0, 0, 0, 0] = math.inf
    run.save(tmp_path / "run")
    pairs = read_pairs(tmp_path / "run")
    assert (len(pairs), pairs.left_out) == (3, 3)
    assert torch.equal(pairs.log_snr, LEVELS[[0, 1, 2]])
    assert torch.equal(pairs.batch(torch.arange(3)).images, run.x0[[0, 1, 1], [0, 1, 2]])
    assert len(read_pairs(tmp_path / "run", "latents")) == 6  # the noisy ones are whole


def test_trajectories_without_labels_or_latents(tmp_path: Path) -> None:
    run = trajectory(["a"], labelled=False)
    run.save(tmp_path / "unlabelled")
    pairs = read_pairs(tmp_path / "unlabelled")
    assert pairs.label.isnan().all() and pairs.margin.isnan().all()
    dataclasses.replace(run, x0=None).save(tmp_path / "no-x0")
    with pytest.raises(InputError, match=r"no-x0 has no x0 in latents.safetensors; record it again"):
        read_pairs(tmp_path / "no-x0")
    with pytest.raises(InputError, match=r"no complete shards of training.forward_noise, and as trajectories:"):
        read_pairs(tmp_path / "missing")


def shard(folder: Path, number: int, prompts: list[str], **tensors: Tensor) -> None:
    count = len(prompts)
    rows = ShardRows(COLUMNS, tensors={name: [value] for name, value in tensors.items()})
    label = [None if i == 0 else 0.25 for i in range(count)]
    numbers = list(range(count))
    columns = (map(str, numbers), prompts, label, numbers, ["ddim"] * count, numbers, [float(i) for i in numbers])
    rows.columns = dict(zip(rows.columns, map(list, columns), strict=True))
    write_shard(folder, number, rows)


def test_shards_of_forward_noise_are_read_as_previews_in_0_to_1(tmp_path: Path) -> None:
    previews = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    latents = torch.randn(5, 4, 2, 2).half()
    shard(tmp_path, 0, ["a", "ü"], previews=previews[:2], latents=latents[:2])
    shard(tmp_path, 1, [])
    shard(tmp_path, 2, ["a", "b", ""], previews=previews[2:], latents=latents[2:])
    write_json(tmp_path / META, {"shards": 3})
    pairs = read_pairs(tmp_path)
    assert (pairs.kind, pairs.prompts, pairs.prompt.tolist()) == ("previews", ["a", "ü", "b", ""], [0, 1, 0, 2, 3])
    assert pairs.log_snr.tolist() == [0, 1, 0, 1, 2]
    assert pairs.label.isnan().tolist() == [True, False, True, False, False] and pairs.label[1] == 0.25
    assert torch.equal(pairs.batch(torch.tensor([4, 0, 2])).images, previews[[4, 0, 2]].float() / 255)


def test_shards_without_previews_are_read_as_latents(tmp_path: Path) -> None:
    latents = torch.randn(2, 4, 2, 2).half()
    shard(tmp_path, 0, ["a", "b"], latents=latents)
    write_json(tmp_path / META, {"shards": 1})
    pairs = read_pairs(tmp_path)
    assert pairs.kind == "latents"
    assert torch.equal(pairs.batch(torch.tensor([1, 0])).images, latents[[1, 0]].float())
    shard(tmp_path, 1, ["a"], previews=torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    write_json(tmp_path / META, {"shards": 2})
    with pytest.raises(InputError, match="all with previews or all without"):
        read_pairs(tmp_path)


def test_shards_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    shard(tmp_path, 0, ["a"], latents=torch.zeros(1, 4, 2, 2))
    with pytest.raises(InputError, match=r"cannot read .*meta.json"):
        read_pairs(tmp_path)
    write_json(tmp_path / META, {"shards": 2})
    with pytest.raises(InputError, match="has 1 of 2 shards; run the stage that writes it again"):
        read_pairs(tmp_path)


def test_facts_tell_pictures_from_others(tmp_path: Path) -> None:
    run = trajectory(["a", "b"])
    run.save(tmp_path / "run")
    found = [read_pairs(tmp_path, which).facts for which in ("x0", "latents", "x0")]
    dataclasses.replace(run, seeds=[1, 2]).save(tmp_path / "run")  # rows of the same columns
    found.append(read_pairs(tmp_path).facts)
    assert found[0] == found[2] and found[0] not in (found[1], found[3])
    assert read_pairs(tmp_path).subset(torch.tensor([0])).facts == found[3]
    noised = []
    for seed in (0, 1):
        shard(tmp_path / "noised", 0, ["a"], latents=torch.zeros(1, 4, 2, 2))
        write_json(tmp_path / "noised" / META, {"shards": 1, "seed": seed})
        noised.append(read_pairs(tmp_path / "noised").facts)
    assert noised[0] != noised[1] and noised[0]["images"] == "latents"


def test_a_file_that_is_damaged_later_is_named(tmp_path: Path) -> None:
    trajectory(["a"]).save(tmp_path)
    pairs = read_pairs(tmp_path)
    (tmp_path / "latents.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"cannot read .*latents.safetensors"):
        pairs.batch(torch.tensor([0]))


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"label": torch.zeros(2)}, r"of one length, at least 1, got \[3, 3, 2, 3\]"),
        ({"prompt": torch.tensor([0, 1, 7])}, "indices into the 2 prompts"),
        ({"log_snr": torch.tensor([0.0, NAN, 0.0])}, "log_snr must be finite"),
        ({"label": torch.tensor([0.0, NAN, 1.5])}, r"label must be in \[0, 1\]"),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        dataclasses.replace(in_memory([0, 1, 1]), **changes)


def test_a_subset_of_a_subset_reads_its_own_rows() -> None:
    some = in_memory([0, 1, 0, 1, 2]).subset(torch.tensor([4, 2, 1])).subset(torch.tensor([2, 0]))
    assert some.batch(torch.tensor([0, 1])).images.flatten().tolist() == [1, 4]
    assert some.batch(torch.tensor([1])).prompts == ["prompt 2"]
    with pytest.raises(InputError, match="at least 1"):
        some.subset(torch.tensor([], dtype=torch.int64))


def test_micro_batches_are_read_when_they_are_asked_for() -> None:
    asked: list[list[int]] = []

    def read(rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return rows[:, None, None, None].float()

    batches = MicroBatches(in_memory([0] * 9, read=read), torch.tensor([8, 3, 5, 0, 1]), 2)
    assert len(batches) == 3 and asked == []
    for _ in range(2):
        assert [batch.images.flatten().tolist() for batch in batches] == [[8, 3], [5, 0], [1]]
    assert asked == [[8, 3], [5, 0], [1]] * 2


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 9))
def test_a_batch_has_as_many_prompts_as_it_can(prompt: list[int], count: int, seed: int) -> None:
    pairs = in_memory(prompt)
    rows = RowSampler(pairs).draw(count, torch.Generator().manual_seed(seed))
    assert rows.shape == (count,)
    times = torch.bincount(pairs.prompt[rows], minlength=6)[pairs.prompt.unique()]
    assert times.max() - times.min() <= 1


def test_each_row_of_a_prompt_is_drawn_as_often() -> None:
    pairs = in_memory([1, 0, 1, 1, 0])
    sampler, generator = RowSampler(pairs), torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.cat([sampler.draw(2, generator) for _ in range(3_000)])).tolist()
    assert counts == pytest.approx([1000, 1500, 1000, 1000, 1500], abs=130)  # 4 standard errors


def test_prompts_that_differ_in_spelling_only_are_held_out_together() -> None:
    pairs = in_memory([i % 20 for i in range(60)])
    names = [f"Prompt {i // 2}" if i % 2 else f"prompt  {i // 2}" for i in range(20)]
    train, held_out = hold_out(dataclasses.replace(pairs, prompts=names), 0.3, seed=0)
    assert len(train) + len(held_out) == 60 and len(held_out) == 18
    kinds = [{int(i) // 2 for i in part.prompt.tolist()} for part in (train, held_out)]
    assert not kinds[0] & kinds[1]
    with pytest.raises(InputError, match="held_out must be between 0 and 1"):
        hold_out(pairs, 1.0, seed=0)
    with pytest.raises(InputError, match="no image is left"):
        hold_out(in_memory([0, 0]), 0.5, seed=0)
