import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_artifacts.errors import InputError
from moe_artifacts.trajectory import Trajectory
from moe_artifacts.trajectory_files import iter_trajectories

STEPS = [2, 5, 9]


def make(batch=4, seed=0, **changes):
    rng = torch.Generator().manual_seed(seed)
    prob = torch.rand(batch, 3, generator=rng)
    prob[0, 1:] = float("nan")  # stopped after the first scored step
    fields = {
        "prompts": [f"image {i} of {seed}, \u00e9\n" for i in range(batch)],
        "seeds": [None if i == 1 else 2**64 - 1 - i for i in range(batch)],
        "step": STEPS,
        "log_snr": torch.tensor([-3.5, 0.0, 4.25]),
        "scores": {"artifact_prob": prob, "exit_cdf": torch.rand(batch, 3, generator=rng)},
        "num_steps": 10,
        "x0": torch.randn(batch, 3, 2, 4, 5, generator=rng),
        "label": torch.rand(batch, generator=rng),
        "meta": {"scheduler": "DDIMScheduler", "guidance_scale": 1.5},
    }
    return Trajectory(**{**fields, **changes})


def assert_same(found, expected, rows=slice(None)):
    assert found.prompts == expected.prompts[rows]
    assert found.seeds == expected.seeds[rows]
    assert (found.step, found.num_steps, found.meta) == (expected.step, expected.num_steps, expected.meta)
    torch.testing.assert_close(found.log_snr, expected.log_snr, atol=0, rtol=0)
    assert list(found.scores) == list(expected.scores)
    pairs = [(found.scores[name], score) for name, score in expected.scores.items()]
    pairs += [(getattr(found, name), getattr(expected, name)) for name in ("x0", "latents", "label")]
    for one, other in pairs:
        assert (one is None) == (other is None)
        if other is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other[rows], atol=0, rtol=0, equal_nan=True)


@pytest.fixture
def folder(tmp_path):
    make().save(tmp_path / "run")
    return tmp_path / "run"


def test_what_is_saved_is_what_is_loaded(folder):
    assert_same(Trajectory.load(folder), make())


@pytest.mark.parametrize(
    "changes",
    [
        {"x0": None, "label": None},
        {"scores": {}, "meta": {}},
        {"latents": torch.randn(4, 3, 2, 4, 5).half()},
        {"x0": torch.full((4, 3, 1, 2, 2), float("nan"))},  # what a broken image leaves behind
        {"seeds": [None] * 4},
    ],
    ids=["scores only", "latents only", "noisy latents", "latents not finite", "no seeds"],
)
def test_parts_may_be_left_out(tmp_path, changes):
    trajectory = make(**changes)
    trajectory.save(tmp_path)
    assert_same(Trajectory.load(tmp_path), trajectory)


@given(batch=st.integers(1, 7), batch_size=st.integers(1, 9), row_group=st.integers(1, 30))
def test_streaming_gives_the_same_rows_in_parts(tmp_path_factory, batch, batch_size, row_group):
    folder = tmp_path_factory.mktemp("run")
    whole = make(batch)
    whole.save(folder)
    table = pq.read_table(folder / "trajectory.parquet")
    pq.write_table(table, folder / "trajectory.parquet", row_group_size=row_group)  # as another writer might cut it
    start = 0
    for part in iter_trajectories(folder, batch_size):
        assert len(part.prompts) == min(batch_size, batch - start)
        assert_same(part, whole, slice(start, start + len(part.prompts)))
        start += len(part.prompts)
    assert start == batch


def test_a_folder_of_folders_is_read_in_the_order_of_names(tmp_path):
    for seed, name in enumerate(("0002", "0000", "0001")):
        make(seed + 2, seed=seed).save(tmp_path / name)
    (tmp_path / "logs").mkdir()  # no trajectory, and none of our business
    parts = list(iter_trajectories(tmp_path, batch_size=100))
    assert [len(part.prompts) for part in parts] == [3, 4, 2]
    assert_same(parts[0], make(3, seed=1))


def test_only_the_latents_of_one_part_are_read(folder, monkeypatch):
    read = []
    monkeypatch.setattr("moe_artifacts.trajectory_files.safe_open", lambda path, **kwargs: _Recording(path, read))
    list(iter_trajectories(folder, batch_size=3))
    assert read == [slice(0, 3), slice(3, 4)]


class _Recording:
    """A safetensors file that notes which rows are asked for."""

    def __init__(self, path, read):
        self.path, self.read = path, read

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None

    def keys(self):
        return ["x0"]

    def get_slice(self, name):
        return self

    def get_shape(self):
        return [4, 3, 2, 4, 5]

    def __getitem__(self, rows):
        self.read.append(rows)
        return torch.zeros(rows.stop - rows.start, 3, 2, 4, 5)


def test_saving_again_replaces_everything(folder):
    make(2, x0=None).save(folder)
    assert_same(Trajectory.load(folder), make(2, x0=None))
    assert not (folder / "latents.safetensors").exists()


def _rewrite(folder, change):
    table = pq.read_table(folder / "trajectory.parquet")
    pq.write_table(change(table), folder / "trajectory.parquet")


def _take(*rows):
    return lambda table: table.take(pa.array(rows, pa.int64()))


def _put(name, row, value):
    def change(table):
        values = table.column(name).to_pylist()
        values[row] = value
        return table.set_column(table.column_names.index(name), name, pa.array(values, table.column(name).type))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (_take(0, 1, 2, 3, 3, 5, *range(6, 12)), "doubled"),
        (_take(0, 1, 2, 2, 3, 4, 5, *range(6, 12)), "doubled|fewer"),
        (_take(*range(1, 12)), "missing|fewer"),
        (_take(0, 2, 1, *range(3, 12)), "out of order"),
        (_take(3, 4, 5, 0, 1, 2, *range(6, 12)), "out of order"),
        (_take(*range(9)), "rows of 4 images, got those of 3"),
        (_take(), "rows of 4 images, got those of 0"),
        (_take(*range(12), 9, 10, 11), "rows of 4 images, got those of 5|fewer"),
        (lambda table: table.drop_columns(["log_snr"]), r"lacks the columns \['log_snr'\]"),
        (lambda table: table.drop_columns(["exit_cdf"]), r"lacks the columns \['exit_cdf'\]"),
        (_put("log_snr", 4, float("nan")), "'log_snr' must be the same, and finite"),
        (_put("log_snr", 4, 1.0), "'log_snr' must be the same"),
        (_put("log_snr", 4, None), "'log_snr' must not have nulls"),
        (_put("step", 4, None), "'step' must not have nulls"),
        (_put("prompt", 4, "another"), "'prompt' must be the same"),
        (_put("seed", 8, 7), "'seed' must be the same"),
        (_put("label", 4, 0.5), "'label' must be the same"),
        (_put("exit_cdf", 4, float("inf")), "'exit_cdf' must be finite"),
        (lambda t: t.set_column(4, "log_snr", pa.array(["a"] * 12)), "must hold numbers"),
    ],
)
def test_damaged_tables_are_refused(folder, change, message):
    _rewrite(folder, change)
    for read in (lambda: list(iter_trajectories(folder, batch_size=2)), lambda: Trajectory.load(folder)):
        with pytest.raises(InputError, match=message):
            read()


@pytest.mark.parametrize("name", ["trajectory.parquet", "latents.safetensors"])
def test_truncated_files_are_refused(folder, name):
    whole = (folder / name).read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot read"):
            Trajectory.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"num_images": 0},
        {"num_images": "4"},
        {"steps": []},
        {"steps": [2, 5, None]},
        {"scores": "artifact_prob"},
        {"num_steps": 9},
        {"steps": [5, 2, 9]},
    ],
)
def test_damaged_meta_is_refused(folder, changes):
    values = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(InputError):
        Trajectory.load(folder)


def test_an_unfinished_folder_is_an_error_not_a_gap(folder):
    (folder / "meta.json").unlink()
    for path in (folder, folder.parent):
        with pytest.raises(InputError, match="never finished"):
            list(iter_trajectories(path, batch_size=2))


def test_latents_of_other_images_are_refused(folder):
    save_file({"x0": torch.zeros(5, 3, 2, 4, 5)}, folder / "latents.safetensors")
    with pytest.raises(InputError, match="4 images and 3 steps"):
        Trajectory.load(folder)


def test_a_place_without_trajectories_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"meta\.json"):
            list(iter_trajectories(path, batch_size=2))
    with pytest.raises(InputError, match="batch_size"):
        list(iter_trajectories(tmp_path, batch_size=0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": [1]}, "seeds must be one per prompt"),
        ({"step": [2, 2, 9]}, "step must rise"),
        ({"step": [2, 5, 10]}, r"within 0\.\.9"),
        ({"log_snr": torch.tensor([0.0, float("nan"), 1.0])}, "log_snr must be 3 finite"),
        ({"log_snr": torch.zeros(4, 3)}, "log_snr must be 3 finite"),
        ({"scores": {"step": torch.zeros(4, 3)}}, "cannot be called 'step'"),
        ({"scores": {"a": torch.zeros(3, 4)}}, r"the shape \(4, 3\)"),
        ({"scores": {"a": torch.full((4, 3), -float("inf"))}}, "must be finite"),
        ({"x0": torch.zeros(4, 2, 1, 1, 1)}, "x0 must have the shape"),
        ({"latents": torch.zeros(4, 3, 1, 1)}, "latents must have the shape"),
        ({"label": torch.tensor([0.0, 0.0, 0.0, float("nan")])}, r"label must be 4 numbers in \[0, 1\]"),
        ({"label": torch.tensor([0.0, 0.0, 0.0, 2.0])}, r"label must be 4 numbers in \[0, 1\]"),
        ({"meta": {"num_steps": 3}}, "meta must not hold"),
    ],
)
def test_records_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_what_cannot_be_written_is_refused_before_anything_is_lost(folder):
    empty = {"step": [], "log_snr": torch.zeros(0), "scores": {}, "x0": None}
    for bad in (make(step=[], **{k: v for k, v in empty.items() if k != "step"}), make(seeds=[-1, 0, 0, 2**64])):
        with pytest.raises(InputError):
            bad.save(folder)
    assert_same(Trajectory.load(folder), make())


def test_scores_are_columns_for_people_and_data_frames(folder):
    table = pq.read_table(folder / "trajectory.parquet")
    assert table.column_names == ["image", "prompt", "seed", "step", "log_snr", "label", "artifact_prob", "exit_cdf"]
    assert table.column("artifact_prob").null_count == 2  # nobody scored them, so not a number that could be averaged
    np.testing.assert_array_equal(table.column("step").to_numpy(), STEPS * 4)
