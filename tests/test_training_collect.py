from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import training.collect
from moe_artifacts.bundled import class_of
from moe_artifacts.judge import FeatureMaps, ManifoldJudge
from moe_artifacts.noise import check_steps, noise_levels
from moe_artifacts.schedulers import SCHEDULERS, set_scheduler
from moe_artifacts.trajectory import Trajectory
from training.collect import (
    DEFAULT,
    LOG_SNR_RANGE,
    RECORD_SHARES,
    SPLITS,
    TRAIN_SETTINGS,
    Recorded,
    Setting,
    Split,
    check_progress,
    collect,
    decode,
    default_grid,
    load_split,
    record_batch,
    record_steps_of,
)
from training.generator import build_scheduler

PROMPTS, SEEDS = ["a bag", "a coat", "a dress"], [11, 12, 13]


# --- which steps are recorded ----------------------------------------------------------------------------------------


def grid_of(setting: Setting) -> Any:
    pipe = SimpleNamespace(scheduler=build_scheduler())
    set_scheduler(pipe, setting.scheduler)
    pipe.scheduler.set_timesteps(setting.steps)
    return noise_levels(pipe.scheduler)


def test_the_default_run_is_recorded_at_the_steps_named() -> None:
    named = [3, 7, 10, 12, 15, 17, 21, 25, 33, 41, 50]  # as the comment at RECORD_SHARES has them, counted from 1
    assert record_steps_of(default_grid()) == [step - 1 for step in named]


@pytest.mark.parametrize("setting", sorted({DEFAULT, *TRAIN_SETTINGS}, key=str), ids=str)
def test_other_runs_are_recorded_at_the_first_step_past_each_level_and_where_a_scorer_looks(setting: Setting) -> None:
    levels = grid_of(setting)
    log_snrs = [level.log_snr for level in levels]
    wanted = [default_grid()[step] for step in record_steps_of(default_grid())[:-1]]
    expected = set()
    for level in wanted:
        past = [i for i, log_snr in enumerate(log_snrs) if log_snr >= level - 1e-4]
        expected.add(past[0] if past else len(log_snrs) - 1)
    steps = record_steps_of(log_snrs)
    assert steps == sorted(expected | {len(log_snrs) - 1})
    config = tiny.scorer_config(log_snr_range=LOG_SNR_RANGE, check_progress=check_progress())
    assert check_steps(levels, config) == steps  # the scorer is trained on the very steps that a guard scores


def test_a_run_of_few_steps_records_each_of_them_once() -> None:
    assert record_steps_of([-5.0, 0.0, 6.0]) == [1, 2]  # the first is noisier than any level recorded
    assert record_steps_of([6.0]) == [0]


def test_the_splits_share_no_seed_and_measure_on_held_out_prompts() -> None:
    ranges = sorted((split.first_seed, split.first_seed + split.count) for split in SPLITS)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    prompts = {split.name: split.prompts for split in SPLITS}
    assert prompts == {"train": "train", "validation": "train", "calibration": "held-out", "test": "held-out"}


# --- one batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "pndm"])  # which repeats a step
def test_a_batch_is_recorded_at_its_steps_up_to_the_finished_latents(name: str) -> None:
    pipe: Any = tiny.stable_diffusion()
    trajectory, noisy, final = record_batch(pipe, PROMPTS, SEEDS, Setting(scheduler=name, steps=6))
    log_snrs = [level.log_snr for level in noise_levels(pipe.scheduler)]
    assert trajectory.num_steps == len(log_snrs) == 6
    assert trajectory.step == record_steps_of(log_snrs)
    assert trajectory.log_snr.tolist() == pytest.approx([log_snrs[i] for i in trajectory.step])
    assert (trajectory.prompts, trajectory.seeds) == (PROMPTS, SEEDS)
    assert trajectory.meta["setting"] == {"scheduler": name, "steps": 6, "guidance_scale": 1.0}
    assert trajectory.x0 is not None and trajectory.x0.dtype == noisy.dtype == torch.float16
    assert trajectory.x0.shape == (3, len(trajectory.step), 4, 8, 8) and noisy.shape == (3, 4, 8, 8)
    # The last step of these runs goes all the way to no noise: it returns its x0. float16 has 11 bits.
    torch.testing.assert_close(trajectory.x0[:, -1].float(), final, rtol=1e-3, atol=1e-3)


def test_steps_asked_for_are_the_ones_recorded() -> None:
    trajectory, _, _ = record_batch(tiny.stable_diffusion(), PROMPTS, SEEDS, Setting(steps=5), record_steps=[1, 3])
    assert trajectory.step == [1, 3]


def test_recording_does_not_change_the_run_and_takes_the_noisy_latents_half_way() -> None:
    pipe: Any = tiny.stable_diffusion()
    _, noisy, final = record_batch(pipe, PROMPTS, SEEDS, Setting(steps=6))
    after_step: list[torch.Tensor] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        after_step.append(values["latents"].clone())
        return values

    plain = pipe(
        PROMPTS,
        num_inference_steps=6,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        callback_on_step_end=keep,
    ).images
    assert torch.equal(final, plain)
    assert torch.equal(noisy, after_step[2].half())  # what enters step 3 of 6


def test_a_trajectory_follows_from_its_seeds_whatever_the_order_of_the_batch() -> None:
    pipe, setting = tiny.stable_diffusion(), Setting(scheduler="euler-a", steps=4)  # draws noise at every step
    first, _, final = record_batch(pipe, PROMPTS, SEEDS, setting)
    again, _, final_again = record_batch(pipe, PROMPTS, SEEDS, setting)
    assert first.x0 is not None and again.x0 is not None
    assert torch.equal(first.x0, again.x0) and torch.equal(final, final_again)

    order = [2, 0, 1]
    moved, _, final_moved = record_batch(pipe, [PROMPTS[i] for i in order], [SEEDS[i] for i in order], setting)
    assert moved.x0 is not None
    # Other places in a batch round differently in float32, and then by one unit in float16.
    torch.testing.assert_close(moved.x0, first.x0[order], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(final_moved, final[order], rtol=1e-4, atol=1e-4)
    assert (first.x0[0] - first.x0[1]).abs().max() > 0.1


def test_going_through_all_schedulers_brings_the_first_one_back() -> None:
    pipe: Any = tiny.stable_diffusion()
    original: Any = build_scheduler()
    pipe.scheduler = original
    for name in (*SCHEDULERS, "ddim"):
        set_scheduler(pipe, name)
        found: Any = pipe.scheduler
        assert type(found).__name__ == SCHEDULERS[name]
        assert found.config.prediction_type == "v_prediction"
        torch.testing.assert_close(found.alphas_cumprod, original.alphas_cumprod)
    options = [key for key in original.config if not key.startswith("_")]
    assert [found.config[key] for key in options] == [original.config[key] for key in options]


def test_decoded_images_are_in_range_whatever_the_batch() -> None:
    pipe, latents = tiny.stable_diffusion(), 30 * torch.randn(3, 4, 8, 8)
    images = decode(pipe, latents)
    assert images.shape == (3, 3, 16, 16)
    assert images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(decode(pipe, latents, batch=2), images, atol=1e-5, rtol=0)


# --- whole splits ----------------------------------------------------------------------------------------------------

MINI = Split(
    name="mini",
    count=5,
    first_seed=70,
    prompts="train",
    settings=(Setting(steps=8), Setting(scheduler="euler-a", steps=2)),
    batch=2,
)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(tmp_path))
    yield tmp_path
    log = logging.getLogger("training.collect")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = True  # pytest hangs a handler of its own on loggers that keep to themselves


def run_collect() -> Path:
    """32x32 images, as the judges want them, from a pipeline and judges that are always the same."""
    judges = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        maps = FeatureMaps(2)
        projection = torch.nn.Linear(maps.dim, 4)
        judge = ManifoldJudge(maps, projection, torch.randn(10, 6, 4), torch.zeros(10), neighbours=2)
        judges.append(judge)
    return collect(MINI, tiny.stable_diffusion(sample_size=16), (judges[0], judges[1]))


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_killed_run_goes_on_where_it_stopped(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = work / "trajectories" / "mini"

    def killed_in_the_second_batch(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if (folder / "00000" / "final.safetensors").exists():
            raise KeyboardInterrupt
        save_file(tensors, path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training.collect, "save_file", killed_in_the_second_batch)
        run_collect()
    assert len(load_split("mini").prompts) == MINI.batch  # of what is unfinished, nothing is read
    done = times(folder / "00000")
    assert (folder / "00001").exists() and not (folder / "00001" / "final.safetensors").exists()

    assert run_collect() == folder
    assert times(folder / "00000") == done
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "00002"]
    resumed = load_split("mini")
    finished = times(folder)
    run_collect()
    assert times(folder) == finished

    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(work / "other"))
    run_collect()
    whole = load_split("mini")
    assert whole.prompts == resumed.prompts
    for name in Recorded.__annotations__:
        if name != "prompts":
            found, expected = getattr(resumed, name), getattr(whole, name)
            torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)


def test_a_split_comes_back_as_it_was_recorded(work: Path) -> None:
    folder = run_collect()
    data = load_split("mini")
    assert data.seeds.tolist() == [70, 71, 72, 73, 74]
    assert data.label.tolist() == [class_of(prompt) for prompt in data.prompts]
    assert data.num_steps.tolist() == [8, 8, 2, 2, 8]  # the settings take turns
    width = len(RECORD_SHARES) + 1
    assert data.x0.shape == (5, width, 4, 16, 16)
    for number, rows in enumerate(([0, 1], [2, 3], [4])):
        trajectory = Trajectory.load(folder / f"{number:05d}")
        missing = width - len(trajectory.step)
        assert missing > 0 and trajectory.x0 is not None and trajectory.label is not None
        assert data.log_snr[rows, :missing].isnan().all() and (data.x0[rows, :missing] == 0).all()
        torch.testing.assert_close(data.log_snr[rows, missing:], trajectory.log_snr.repeat(len(rows), 1))
        assert data.step[rows, missing:].tolist() == [trajectory.step] * len(rows)
        assert torch.equal(data.x0[rows, missing:], trajectory.x0)
        assert torch.equal(data.bad[rows], trajectory.label)
        stored = load_file(folder / f"{number:05d}" / "final.safetensors")
        assert torch.equal(data.final[rows], stored["final"]) and torch.equal(data.noisy[rows], stored["noisy"])
        assert torch.equal(data.margin[rows], stored["margin_first"])
        assert torch.equal(data.margin_second[rows], stored["margin_second"])
    assert not torch.equal(data.margin, data.margin_second)
    assert len(load_split("mini", limit=2).prompts) == 2


def test_a_split_that_is_not_there_names_the_command(work: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no trajectories for 'mini' .* python -m training\.collect"):
        load_split("mini")
