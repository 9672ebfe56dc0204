"""Trajectories of any pipeline: which steps are recorded, what is recorded, judged, left out, resumed and labelled."""

from __future__ import annotations

import errno
import itertools
import json
import math
import multiprocessing
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import more_pipelines
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import CASES

import training.own.collect
from moe_artifacts.errors import InputError, UnsupportedPipelineError
from moe_artifacts.guard.fingerprint import fingerprint
from moe_artifacts.guard.space import latent_space_of, unpack
from moe_artifacts.noise import NoiseLevel, check_steps, noise_levels
from moe_artifacts.schedulers import set_scheduler
from moe_artifacts.trajectory import Trajectory
from moe_artifacts.trajectory_files import iter_trajectories
from tests.kills import with_one_thread
from training.data.filters import FilterCounts
from training.judging import ScoreJudge
from training.level_images import TrajectorySource
from training.own import label as labelling
from training.own.batches import (
    batch_folders,
    count_splits,
    image_names,
    read_batch,
    remove_batch,
    take_rows,
    write_batch,
)
from training.own.collect import (
    SEEDS_PER_SPLIT,
    CollectOptions,
    batches_of,
    collect,
    image_seed,
    parse_arguments,
    parse_counts,
)
from training.own.evaluate import read_test_set
from training.own.prompts import SPLITS, PromptSplits
from training.own.record import (
    PipelineRecorder,
    RecorderConfig,
    Setting,
    denoiser_in_bfloat16,
    parse_settings,
    spread_checks,
)

MORE = {case.name: case for case in more_pipelines.CASES}
PROMPTS = {
    "train": ["a cat", "a dog", "a cow"],
    "validation": ["a hen"],
    "calibration": ["an owl"],
    "test": ["a fox", "an ape"],
}
SIX = Setting(steps=6)


def splits(**prompts: list[str]) -> PromptSplits:
    counts = FilterCounts()
    counts.start("prompts", "read", sum(map(len, prompts.values())))
    return PromptSplits({split: [] for split in SPLITS} | prompts, counts)


def recorder_of(pipe: Any, first: Setting = SIX, **options: Any) -> PipelineRecorder:
    return PipelineRecorder(pipe, first, "a cat", **{"checks": 4, "arguments": {"guidance_scale": 3.0}, **options})


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """A judge for :class:`ScoreJudge`: soft labels from the pixels, none for an ape."""
    return [
        None if "ape" in prompt else float(np.asarray(image).mean() / 255)
        for image, prompt in zip(images, prompts, strict=True)
    ]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.stable_diffusion()


@pytest.fixture
def recorder(pipe) -> PipelineRecorder:
    return recorder_of(pipe)


def collected(recorder: PipelineRecorder, out: Path, counts: dict[str, int], judge: Any = None, **changes: Any) -> Path:
    options = {"settings": (SIX,), "batch": 3, "checks": 4}
    running = {name: changes.pop(name) for name in ("worker", "workers", "made_with") if name in changes}
    judge = ScoreJudge(brightness) if judge is None else judge
    collect(
        recorder,
        splits(**PROMPTS),
        out,
        CollectOptions(counts=counts, **options | changes),
        judge=judge if judge else None,
        judge_name="brightness" if judge else "",
        **running,
    )
    return out


def content(out: Path) -> dict[str, Any]:
    """What a folder of trajectories holds, byte by byte, but for what is left unfinished."""
    files = {path.relative_to(out): path for path in sorted(out.rglob("*")) if path.is_file()}
    hidden = {name for name in files if any(part.startswith(".") for part in name.parts)}
    return {str(name): path.read_bytes() for name, path in files.items() if name not in hidden}


def rejected(folder: Path) -> list[tuple[str, str]]:
    rows = pq.read_table(folder / "rejects.parquet").to_pylist()
    return [(row["key"], row["reason"]) for row in rows]


# --- which steps are recorded ----------------------------------------------------------------------------------------

rising = st.lists(st.integers(-80, 80).map(lambda n: n / 10), min_size=2, max_size=40, unique=True).map(sorted)


def levels_at(log_snrs: Sequence[float]) -> list[NoiseLevel]:
    return [NoiseLevel(alpha=math.exp(value / 2), sigma=1.0) for value in log_snrs]


def watching(levels: Sequence[NoiseLevel], count: int) -> RecorderConfig:
    log_snr_range, checks = spread_checks(levels, count)
    space = tiny.scorer_config().latent_space
    return RecorderConfig(latent_space=space, log_snr_range=log_snr_range, check_progress=checks, uses_noisy=False)


@given(rising, st.integers(1, 45))
def test_as_many_steps_are_recorded_as_asked_for_and_the_last_is_among_them(log_snrs, count):
    levels = levels_at(log_snrs)
    steps = check_steps(levels, watching(levels, count))
    assert steps == sorted(set(steps)) and len(steps) == min(count, len(levels)) and steps[-1] == len(levels) - 1


def test_recorded_steps_are_even_in_the_mean_of_steps_and_noise():
    scheduler = tiny.SCHEDULERS["ddim"]()
    scheduler.set_timesteps(50)
    levels = noise_levels(scheduler)
    low, high = levels[0].log_snr, levels[-1].log_snr
    places = [(i / 49 + (level.log_snr - low) / (high - low)) / 2 for i, level in enumerate(levels)]
    *steps, before_last, last = check_steps(levels, watching(levels, 10))
    assert (len(steps), before_last, last) == (
        8,
        48,
        49,
    )  # log-SNR leaps in the last step: only that one is past 8.5 / 9
    for k, step in enumerate(steps):
        assert places[step] >= (k + 0.5) / 9 > places[step - 1]  # the first that is so far


def test_a_step_from_pure_noise_is_not_recorded_nor_a_half_step():
    levels = [NoiseLevel(0.0, 1.0), *levels_at([-3.0, -2.0, 0.0, 4.0])]
    levels[2] = NoiseLevel(levels[2].alpha, levels[2].sigma, half_step=True)
    assert check_steps(levels, watching(levels, 9)) == [1, 3, 4]


@pytest.mark.parametrize("levels", [levels_at([1.0]), [NoiseLevel(0.0, 1.0), *levels_at([0.5])], levels_at([1.0, 1.0])])
def test_a_run_with_nothing_to_stop_is_refused(levels):
    with pytest.raises(InputError, match="needs two steps beside one from pure noise"):
        spread_checks(levels, 4)


# --- what is recorded ------------------------------------------------------------------------------------------------


def plain_run(pipe: Any, prompts: list[str], seeds: list[int], **arguments: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, num_inference_steps=6, guidance_scale=3.0, **arguments).images


def test_images_are_those_of_the_unwatched_run_and_x0_that_of_the_scheduler(pipe, recorder):
    prompts, seeds = ["a cat", "a dog"], [5, 6]
    found = recorder(prompts, seeds, SIX)
    assert torch.equal(found.images, plain_run(pipe, prompts, seeds, output_type="pt"))
    assert found.trajectory.prompts == prompts and found.trajectory.seeds == seeds and not found.wrong

    expected = []
    step = pipe.scheduler.step

    def watched(*args, **kwargs):
        kwargs["return_dict"] = True
        result = step(*args, **kwargs)
        expected.append(result.pred_original_sample)
        return (result.prev_sample,)

    pipe.scheduler.step = watched
    try:
        plain_run(pipe, prompts, seeds, output_type="latent")
    finally:
        del pipe.scheduler.step
    x0 = torch.stack(expected, dim=1)[:, found.trajectory.step]
    assert found.trajectory.x0.dtype == torch.float16
    torch.testing.assert_close(found.trajectory.x0.float(), x0, rtol=1e-3, atol=2e-3)  # float16 has 11 bits


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl", "sd3", "pixart-sigma", "flux", "flux2", "qwen-image", "z-image"])
def test_every_family_is_recorded_as_an_image_of_latents(name):
    case = CASES[name]
    guidance, pipe = next(iter(case.guidance.values())), case.pipe()

    def arguments_for(prompts):
        return {name: value for name, value in case.arguments(len(prompts)).items() if name not in guidance}

    recorder = PipelineRecorder(
        pipe,
        Setting(steps=case.steps),
        "a cat",
        checks=4,
        arguments=dict(guidance),
        arguments_for=arguments_for,
        keep_latents=True,
    )
    found = recorder(["a cat", "a dog", "a cow"], [100, 101, 102], Setting(steps=case.steps))
    space = latent_space_of(pipe, name)
    final = pipe(**case.call(3, next(iter(case.guidance)), output_type="latent")).images
    height = width = found.images.shape[-1]
    assert found.trajectory.x0.shape[2] == found.trajectory.latents.shape[2] == space.channels
    # These samplers end where the last prediction says: what was recorded last is what is decoded.
    expected = unpack(final, space, height, width)
    torch.testing.assert_close(found.trajectory.x0[:, -1].float(), expected, rtol=2e-3, atol=5e-3)
    assert torch.equal(found.images, pipe(**case.call(3, next(iter(case.guidance)))).images)
    assert found.trajectory.meta["pipeline"] == type(pipe).__name__ and not found.wrong


def test_pipelines_that_start_from_pictures_are_recorded_too():
    for case in (CASES["sd-img2img"], MORE["flux-control"]):
        guidance = next(iter(case.guidance))
        recorder = PipelineRecorder(
            case.pipe(),
            Setting(steps=case.steps),
            "a cat",
            checks=3,
            arguments=dict(case.guidance[guidance]),
            arguments_for=lambda prompts, case=case: case.arguments(len(prompts)),
        )
        found = recorder(["a cat", "a dog"], [100, 101], Setting(steps=case.steps))
        assert torch.equal(found.images, case.pipe()(**case.call(2, guidance)).images)
        assert found.trajectory.x0.shape == (2, len(found.trajectory.step), 4, 8, 8)


def test_flow_is_recorded_at_finite_noise_only():
    case = CASES["sd3"]
    recorder = PipelineRecorder(
        case.pipe(),
        SIX,
        "a cat",
        checks=99,
        arguments={"guidance_scale": 1.0},
        arguments_for=lambda prompts: case.arguments(len(prompts)),
    )
    found = recorder(["a cat"], [1], SIX)
    assert found.trajectory.step == [1, 2, 3, 4, 5] and math.isfinite(recorder.config.log_snr_range[0])


def test_the_setting_says_what_was_done_and_leaves_no_trace(pipe):
    recorder = recorder_of(pipe, Setting(scheduler="ddim", steps=6))
    own = pipe.scheduler
    euler = Setting(scheduler="euler", steps=9)
    alone = recorder(["a cat"], [3], euler).trajectory
    assert alone.meta["setting"] == {
        "scheduler": "EulerDiscreteScheduler",
        "num_inference_steps": 9,
        "guidance_scale": 3.0,
        "eta": 0.0,
        "image_size": (16, 16),
        "denoiser": fingerprint(pipe.unet),
    }
    recorder(["a cat"], [3], Setting(scheduler="dpm", steps=4))
    again = recorder(["a cat"], [3], euler).trajectory
    assert torch.equal(alone.x0, again.x0) and pipe.scheduler is own
    # recorded where the first setting is, as near as nine steps come
    set_scheduler(pipe, "euler")
    pipe.scheduler.set_timesteps(9)
    assert alone.step == check_steps(noise_levels(pipe.scheduler), recorder.config)
    pipe.scheduler = own
    with pytest.raises(InputError, match="scheduler must be one of"):
        recorder(["a cat"], [3], Setting(scheduler="nobody"))
    assert pipe.scheduler is own


def test_an_unsupported_pipeline_is_refused_before_its_first_step(pipe):
    class Mine(type(pipe)):
        def __call__(self, *args, **kwargs):
            raise AssertionError("it must not be run")

    with pytest.raises(UnsupportedPipelineError, match="Mine"):
        recorder_of(Mine(**pipe.components, requires_safety_checker=False))


def test_autocast_is_for_the_denoiser_alone_and_ends_with_the_run(pipe, recorder):
    seen = set()
    hooks = [
        # The latents stay in float32 between the steps: this scheduler takes them to the dtype of the model output.
        pipe.unet.register_forward_pre_hook(lambda module, args: seen.add(("latents", args[0].dtype))),
        pipe.unet.conv_in.register_forward_hook(lambda module, args, out: seen.add(("inside", out.dtype))),
        pipe.vae.decoder.register_forward_hook(lambda module, args, out: seen.add(("image", out.dtype))),
    ]
    try:
        half = recorder(["a cat"], [3], Setting(scheduler="euler", steps=6), bfloat16=True)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == {("latents", torch.float32), ("inside", torch.bfloat16), ("image", torch.float32)}
    full = recorder(["a cat"], [3], Setting(scheduler="euler", steps=6))
    assert not torch.equal(half.images, full.images)
    torch.testing.assert_close(half.images, full.images, rtol=0, atol=0.05)  # bfloat16 has 8 bits
    assert "forward" not in vars(pipe.unet)
    with pytest.raises(RuntimeError, match="stop"), denoiser_in_bfloat16(pipe):
        raise RuntimeError("stop")
    assert "forward" not in vars(pipe.unet)


def test_what_goes_wrong_with_an_image_leaves_its_neighbours_untouched(pipe, recorder, monkeypatch):
    good = recorder(["a cat", "a dog", "a cow"], [1, 2, 3], SIX)

    for wrong in (math.nan, 1e8):  # the second is finite in the images, and x0 is not in float16

        def spoil(module, args, out, wrong=wrong):
            sample = out[0].clone()
            sample[1::3] = wrong  # of both guidance copies
            return (sample,)

        handle = pipe.unet.register_forward_hook(spoil)
        found = recorder(["a cat", "a dog", "a cow"], [1, 2, 3], SIX)
        handle.remove()
        assert {row: reason for row, (reason, _) in found.wrong.items()} == {1: "latents"}
        assert torch.equal(found.images[::2], good.images[::2])
        assert torch.equal(found.trajectory.x0[::2], good.trajectory.x0[::2])

    monkeypatch.setattr(pipe, "run_safety_checker", lambda image, device, dtype: (image, [False, False, True]))
    found = recorder(["a cat", "a dog", "a cow"], [1, 2, 3], SIX)
    assert {row: reason for row, (reason, _) in found.wrong.items()} == {2: "nsfw"}


def test_long_prompts_are_counted(recorder):
    assert recorder(["a cat", "cat " * 40, "dog " * 40], [1, 2, 3], SIX).trajectory.meta["truncated"] == 2


# --- batches ---------------------------------------------------------------------------------------------------------


def some_trajectory(count: int = 3, **meta: Any) -> Trajectory:
    values = torch.arange(count, dtype=torch.float32)
    return Trajectory(
        prompts=[f"p{i}" for i in range(count)],
        seeds=list(range(count)),
        step=[1, 3],
        log_snr=torch.tensor([-1.0, 2.0]),
        scores={"score": values[:, None].expand(-1, 2)},
        num_steps=4,
        x0=values.view(-1, 1, 1, 1, 1).expand(-1, 2, 4, 2, 2).half(),
        label=values / count,
        meta=meta,
    )


@given(st.lists(st.integers(0, 4), unique=True).map(sorted))
def test_rows_are_taken_with_all_that_belongs_to_them(rows):
    whole = some_trajectory(5, margin=[0.5 * i for i in range(5)], images=image_names(5), judge="x")
    part = take_rows(whole, torch.tensor(rows, dtype=torch.int64))
    assert part.seeds == rows and part.prompts == [f"p{i}" for i in rows]
    assert part.meta == {
        "margin": [0.5 * i for i in rows],
        "images": [f"images/{i:04d}.png" for i in rows],
        "judge": "x",
    }
    for values in (part.x0[:, 1, 0, 0, 0], part.scores["score"][:, 0], part.label * 5):
        assert values.tolist() == pytest.approx(rows)


def test_a_batch_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, images = tmp_path / "train" / "00000", torch.rand(3, 3, 8, 8)
    trajectory = some_trajectory(images=image_names(3))
    reject = {"key": "train/9", "reason": "label", "detail": "x"}

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("training.own.batches._write_png", full)
        with pytest.raises(OSError, match="No space"):
            write_batch(folder, trajectory, [reject], images)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    (tmp_path / ".unfinished" / "train-00000").mkdir(parents=True)
    (tmp_path / ".unfinished" / "train-00000" / "meta.json").write_text("{")  # of a run that was killed

    for _ in range(2):  # the second time it is replaced
        write_batch(folder, trajectory, [reject], images)
        found, rejects = read_batch(folder)
        assert found.meta == trajectory.meta and torch.equal(found.x0, trajectory.x0) and rejects == [reject]
        assert not list((tmp_path / ".unfinished").iterdir())
    for image, name in zip(images, image_names(3), strict=True):
        with Image.open(folder / name) as picture:
            assert np.array_equal(np.asarray(picture), (image.permute(1, 2, 0) * 255).round().byte().numpy())

    write_batch(tmp_path / "train" / "00001", take_rows(trajectory, torch.tensor([], dtype=torch.int64)), [reject])
    assert read_batch(tmp_path / "train" / "00001") == (None, [reject])
    assert len(list(iter_trajectories(tmp_path / "train", 8))) == 1  # readers see no batch without images
    [count] = count_splits(tmp_path, SPLITS)
    assert (count.split, count.images, count.rejects) == ("train", 3, {"label": 2})
    assert count.mean_label == pytest.approx(1 / 3)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_holds_what_was_asked_for(recorder, tmp_path):
    counts = {"train": 7, "validation": 2, "test": 4}
    out = collected(recorder, tmp_path, counts)
    assert count_of(out) == counts | {"test": 2}  # nothing is said of apes
    for split, count in counts.items():
        folders = batch_folders(out, split)
        found = [read_batch(folder) for folder in folders]
        seeds = [seed for trajectory, _ in found if trajectory is not None for seed in trajectory.seeds]
        left_out = [row for _, rows in found for row in rows]
        assert [folder.name for folder in folders] == [f"{number:05d}" for number in range(-(-count // 3))]
        assert sorted(seeds + [int(row["key"].removeprefix(f"{split}/")) for row in left_out]) == [
            image_seed(split, image, 0) for image in range(count)
        ]
        assert all(row["reason"] == "label" and "an ape" in row["detail"] for row in left_out)
    trajectory = read_batch(out / "train" / "00001")[0]
    assert trajectory.meta["judge"] == "brightness" and set(trajectory.prompts) <= set(PROMPTS["train"])
    again = recorder(trajectory.prompts, trajectory.seeds, SIX)
    assert torch.equal(again.trajectory.x0, trajectory.x0)
    assert trajectory.label.tolist() == ScoreJudge(brightness)(again.images, trajectory.prompts).tolist()


def test_only_the_train_split_goes_through_the_settings(recorder, tmp_path):
    settings = (SIX, Setting(scheduler="euler", steps=4))
    out = collected(recorder, tmp_path, {"train": 5, "validation": 3}, settings=settings, batch=2)
    used = [
        [read_batch(folder)[0].meta["setting"]["num_inference_steps"] for folder in batch_folders(out, split)]
        for split in ("train", "validation")
    ]
    assert used == [[6, 4, 6], [6, 6]]


def test_workers_write_together_what_one_writes_alone(recorder, tmp_path):
    counts = {"train": 4, "test": 2}
    alone = content(collected(recorder, tmp_path / "alone", counts))
    for worker in (1, 0):
        collected(recorder, tmp_path / "together", counts, worker=worker, workers=2)
    assert content(tmp_path / "together") == alone
    options = CollectOptions(counts={"train": 10, "test": 4}, batch=3)
    assert [(batch.number, len(batch.images)) for batch in batches_of(options)] == [
        *((0, 3), (1, 3), (2, 3), (3, 1)),
        *((0, 3), (1, 1)),
    ]


class Stop(BaseException):
    """As Ctrl-C."""


def test_a_run_that_was_stopped_goes_on_to_the_same_end(recorder, tmp_path, monkeypatch):
    counts = {"train": 5, "validation": 2}
    whole, out = content(collected(recorder, tmp_path / "whole", counts)), tmp_path / "stopped"
    write = training.own.collect.write_batch
    calls = itertools.count()

    def stopping(*args: Any) -> None:
        if next(calls) % 2:  # every second batch is made in vain
            raise Stop
        write(*args)

    with monkeypatch.context() as patched:
        patched.setattr(training.own.collect, "write_batch", stopping)
        for number in range(1, 3):
            with pytest.raises(Stop):
                collected(recorder, out, counts)
            assert sum(count_of(out).values()) < 7 and len(list(out.rglob("rejects.parquet"))) == number
    collected(recorder, out, counts)
    assert content(out) == whole
    made = [path.stat().st_mtime_ns for path in out.rglob("*.parquet")]
    collected(recorder, out, counts)  # nothing is left to do
    assert [path.stat().st_mtime_ns for path in out.rglob("*.parquet")] == made


def test_a_run_can_be_asked_for_more_and_for_nothing_else(recorder, tmp_path):
    out = collected(recorder, tmp_path, {"train": 3})
    before = content(out)
    collected(recorder, out, {"train": 7, "validation": 1})
    after = content(out)
    del before["collect.json"]
    assert before.items() <= after.items() and count_of(out) == {"train": 7, "validation": 1}
    for counts, message in [({"train": 6}, "was to hold 7 images of train, now 6"), ({"train": 9}, "from a multiple")]:
        with pytest.raises(InputError, match=message):
            collected(recorder, out, counts | {"validation": 1})
    for changes, message in [({"seed": 1}, "seed=0, this run has 1"), ({"made_with": {"dtype": "x"}}, "dtype=None")]:
        with pytest.raises(InputError, match=message):
            collected(recorder, out, {"train": 7, "validation": 1}, **changes)
    assert content(out) == after
    (out / "collect.json").write_text("[]")
    with pytest.raises(InputError, match="is not what this command writes"):
        collected(recorder, out, {"train": 7})


def count_of(out: Path) -> dict[str, int]:
    return {count.split: count.images for count in count_splits(out, SPLITS)}


def test_a_run_that_brings_nothing_ends_early(recorder, tmp_path):
    def silent(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[None]:
        return [None] * len(images)

    with pytest.raises(
        InputError, match=r"each of the first 52 images had to be left out: .'label': 52.*nothing of it"
    ):
        collected(recorder, tmp_path, {"train": 200}, ScoreJudge(silent), batch=26)


def test_splits_need_prompts_and_people_need_images(recorder, tmp_path):
    options = CollectOptions(counts={"train": 1, "test": 1})
    with pytest.raises(InputError, match="split 'test' has no prompt: 1 are too few"):
        collect(recorder, splits(train=["a cat"]), tmp_path, options, judge=ScoreJudge(brightness))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,artifact\na.png,1\n")
    with pytest.raises(InputError, match=r"collect without a judge, then use python -m training\.own\.label"):
        collected(recorder, tmp_path / "out", {"train": 1}, labelling.VerdictJudge(tmp_path))
    assert not (tmp_path / "out").exists()


@given(st.integers(0, 2**40), st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(0, SEEDS_PER_SPLIT - 1))))
def test_no_two_images_have_the_same_noise(seed, images):
    found = [image_seed(split, image, seed) for split, image in images]
    assert len(set(found)) == len(set(images))
    # torch's CPU generator drops what is above 32 bits, so that a larger number would not be a seed of its own
    assert all(0 <= value < 2**32 for value in found)
    same = [torch.randn(1, generator=torch.Generator().manual_seed(value)) for value in (7, 7 + 2**32)]
    assert torch.equal(*same)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": {"eval": 3}}, "counts must be of train"),
        ({"counts": {"train": -1}}, "got train=-1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"checks": 1}, "checks must be at least 2"),
        ({"images_per_prompt": 0}, "images_per_prompt"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        CollectOptions(**{"counts": {"train": 1}, **changes})


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_settings, "ddim:x", "got 'ddim:x'"),
        (parse_settings, "ddim:0", "got 'ddim:0'"),
        (parse_settings, "", "got ''"),
        (parse_counts, "train", "got 'train'"),
        (parse_counts, "eval=3", "got 'eval=3'"),
        (parse_arguments, "{", "must be JSON"),
        (parse_arguments, "[1]", "must be a JSON object"),
        (parse_arguments, '{"generator": 1}', "generator cannot be given"),
    ],
)
def test_texts_that_mean_nothing_are_refused(parse, text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


# --- labels of people ------------------------------------------------------------------------------------------------


def test_people_label_what_was_collected_without_a_judge(recorder, pipe, tmp_path):
    out = collected(recorder, tmp_path, {"train": 4, "test": 2}, judge=False)
    assert not (out / "train").exists() and count_of(out / "unlabelled") == {"train": 4, "test": 2}
    unlabelled = content(out / "unlabelled")
    [first, second] = batch_folders(out / "unlabelled", "train")
    trajectory = Trajectory.load(first)
    assert trajectory.label is None
    expected = plain_run(pipe, trajectory.prompts, trajectory.seeds)
    for picture, file in zip(expected, trajectory.meta["images"], strict=True):
        with Image.open(first / file) as found:
            assert np.array_equal(np.asarray(found), np.asarray(picture))

    table = out / "unlabelled" / "labels.csv"
    table.write_text("file,artifact\ntrain/00000/images/0000.png,1\ntrain/00000/images/0002.png,0\n")
    assert labelling.main([str(out), "--judge", f"verdicts:{out / 'unlabelled'}"]) == 0
    found, rejects = read_batch(out / "train" / "00000")
    assert found.label.tolist() == [1, 0] and found.seeds == [trajectory.seeds[0], trajectory.seeds[2]]
    assert torch.equal(found.x0, trajectory.x0[[0, 2]])
    assert [(row["key"], row["reason"]) for row in rejects] == [(f"train/{trajectory.seeds[1]}", "label")]
    assert (out / "train" / "00000" / found.meta["images"][1]).samefile(first / trajectory.meta["images"][2])
    assert read_batch(out / "train" / "00001")[0] is None and count_of(out) == {"train": 2, "test": 0}

    # more verdicts, and an image that is gone
    (second / "images" / "0000.png").unlink()
    table.write_text("file,artifact\n" + "".join(f"train/00000/images/000{i}.png,{i % 2}\n" for i in range(3)))
    assert labelling.main([str(out), "--judge", f"verdicts:{out / 'unlabelled'}"]) == 0
    assert read_batch(out / "train" / "00000")[0].label.tolist() == [0, 1, 0]
    assert [reason for _, reason in rejected(out / "train" / "00001")] == ["image"]
    after = content(out / "unlabelled")
    assert {name: data for name, data in after.items() if name in unlabelled and name.endswith((".json", "s"))} == {
        name: data for name, data in unlabelled.items() if name.endswith((".json", "s"))
    }


@pytest.fixture
def unlabelled(recorder, tmp_path):
    return collected(recorder, tmp_path, {"train": 6}, judge=False)


def test_labelling_goes_on_where_it_was_killed(unlabelled, monkeypatch):
    asked = []

    def judge(images, prompts):
        asked.append(len(images))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return torch.ones(len(images))

    with pytest.raises(KeyboardInterrupt):
        labelling.label(unlabelled, judge, "judge")
    with pytest.raises(InputError, match=r"train has 1 of 2 batches: run training.own.collect again"):
        TrajectorySource(unlabelled / "train")
    labelling.label(unlabelled, judge, "judge")
    assert len(asked) == 3  # the first batch was not judged again
    assert TrajectorySource(unlabelled / "train").shards == 2


def test_labels_of_two_judges_do_not_mix(unlabelled):
    def clean(images, prompts):
        return torch.zeros(len(images))

    def bad(images, prompts):
        if len(batch_folders(unlabelled, "train")) == 1:
            raise KeyboardInterrupt
        return torch.ones(len(images))

    labelling.label(unlabelled, clean, "module:clean")
    with pytest.raises(KeyboardInterrupt):
        labelling.label(unlabelled, bad, "module:bad")
    [left] = batch_folders(unlabelled, "train")
    assert read_batch(left)[0].meta["judge"] == "module:bad"
    labelling.label(unlabelled, clean, "module:clean", {"bad_below": 1.0})
    assert [read_batch(f)[0].meta["judge"] for f in batch_folders(unlabelled, "train")] == ["module:clean"] * 2


def test_a_split_that_is_half_collected_is_refused(recorder, tmp_path):
    out = collected(recorder, tmp_path, {"train": 6})
    assert TrajectorySource(out / "train").shards == 2
    remove_batch(out / "train" / "00000")
    for read in (TrajectorySource, read_test_set):
        with pytest.raises(InputError, match=r"train has 1 of 2 batches: run training.own.collect again"):
            read(out / "train")


def test_a_batch_without_a_usable_image_is_not_judged():
    def model(images, prompts):
        return torch.stack([torch.ones(()) for _ in images])  # raises where there are none

    assert ScoreJudge(model)([], []).shape == (0,)


def test_margins_stand_beside_labels(tmp_path):
    class Margins(ScoreJudge):
        def margin(self, images: Any, prompts: Sequence[str]) -> torch.Tensor:
            return torch.tensor([0.5, math.nan, -0.25])

    kept, known = labelling.judged(some_trajectory(), Margins(brightness), torch.rand(3, 3, 4, 4), "margins")
    assert known.tolist() == [True, False, True]
    assert (kept.label.tolist(), kept.meta["margin"], kept.seeds) == ([1, 0], [0.5, -0.25], [0, 2])
    kept, known = labelling.judged(some_trajectory(), ScoreJudge(brightness), torch.zeros(3, 3, 4, 4), "soft")
    assert "margin" not in kept.meta and kept.meta["judge"] == "soft" and known.all()


def test_labelling_says_what_is_missing(tmp_path, capsys):
    assert labelling.main([str(tmp_path), "--judge", f"verdicts:{tmp_path}"]) == 2
    assert "error: " in capsys.readouterr().err
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,artifact\na.png,1\n")
    assert labelling.main([str(tmp_path), "--judge", f"verdicts:{tmp_path}"]) == 2
    assert "holds no trajectories" in capsys.readouterr().err
    assert labelling.main([str(tmp_path), "--judge", f"verdicts:{tmp_path}", "--bad-below", "1"]) == 2
    assert "bad_below cannot be used" in capsys.readouterr().err


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a pipeline, prompts and a judge."""
    tiny.stable_diffusion().save_pretrained(tmp_path / "pipeline")
    lines = [f"a thing called {name}" for name in "abcdefghijklmnopqrstuvwxyz"] + ["a \u732b"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "judge_of_own_tests.py").write_text(
        "def score(images, prompts):\n    return [sum(image.getpixel((3, 3))) for image in images]\n"
        "def more(prompts):\n    return {'negative_prompt': ['x'] * len(prompts)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(tmp_path / "work"))
    yield tmp_path
    sys.modules.pop("judge_of_own_tests", None)


def command(place: Path, *more: str) -> list[str]:
    given = ["--prompts", place / "prompts.txt", "--out", place / "out", "--batch", "4", "--checks", "3"]
    return [str(part) for part in [place / "pipeline", *given, "--device", "cpu", *more]]


JUDGED = ("--judge", "judge_of_own_tests:score", "--bad-below", "380")


def test_the_command_collects_and_says_what(place, capsys):
    more = ("--count", "train=9,validation=2,calibration=2,test=2", "--settings", "ddim:6,euler:5", *JUDGED)
    more += ("--guidance-scale", "2.5", "--arguments-for", "judge_of_own_tests:more", "--autocast", "bf16")
    assert training.own.collect.main(command(place, *more)) == 0
    told = capsys.readouterr().out
    assert "train: 9 images" in told and "duplicate" in told
    found = next(iter(iter_trajectories(place / "out" / "train", 99)))
    assert found.meta["guidance_scale"] == 2.5 and set(found.label.tolist()) <= {0.0, 1.0}
    assert json.loads((place / "out" / "collect.json").read_text())["judge"] == "judge_of_own_tests:score"
    assert not (place / "work").exists()


@pytest.mark.parametrize(("strict", "said"), [("-1", "clean"), ("9999", "bad"), ("380", "")])
def test_a_judge_that_finds_all_alike_is_told_of_early(place, capsys, monkeypatch, strict, said):
    monkeypatch.setattr(training.own.collect, "ONE_SIDED_AFTER", 6)
    judge = ("--judge", "judge_of_own_tests:score", "--bad-below", strict)
    assert training.own.collect.main(command(place, "--count", "train=12", "--settings", "own:5", *judge)) == 0
    told = capsys.readouterr().err
    assert told.count("WARNING") == bool(said)
    assert not said or f"WARNING: the judge finds all of the first 8 images {said};" in told  # two batches of four


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")  # about a cached version check inside diffusers
def test_the_denoiser_is_compiled_on_request_and_nothing_else_changes(place, monkeypatch, capsys):
    torch._dynamo.reset()
    more = ("--count", "train=12,test=4", "--settings", "own:5", "--autocast", "bf16", *JUDGED)
    assert training.own.collect.main(command(place, *more)) == 0
    plain = content(place / "out")
    shutil.rmtree(place / "out")
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:  # without a compiler, and equal to the last bit
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        training.own.collect, "compile_if_possible", lambda module, log: module.compile(backend=backend)
    )
    assert training.own.collect.main(command(place, *more, "--compile")) == 0
    assert len(graphs) == 2  # in bfloat16 and as users have it, whatever the number of batches
    found = content(place / "out")
    assert {name: value for name, value in found.items() if name != "collect.json"} == {
        name: value for name, value in plain.items() if name != "collect.json"
    }
    assert training.own.collect.main(command(place, *more)) == 2
    assert "compile=True, this run has None" in capsys.readouterr().err
    torch._dynamo.reset()


def test_the_command_without_a_judge_says_how_to_go_on(place, capsys):
    assert training.own.collect.main(command(place, "--count", "train=2", "--settings", "own:5")) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == f"label them: moe-artifacts label {place / 'out' / 'unlabelled'}"
    assert second.startswith("then: python -m training.own.label")
    assert load_file(place / "out/unlabelled/train/00000/latents.safetensors")["x0"].shape == (2, 3, 4, 8, 8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--judge", "judge_of_own_tests:nobody"), "there is no 'nobody'"),
        (("--shard", "2/2"), "shard must be i/n"),
        (("--settings", "nobody:5"), "scheduler must be one of"),
        (("--settings", "own:1"), "needs two steps"),
        (("--arguments", '{"prompt": "x"}'), "prompt cannot be given"),
    ],
)
def test_the_command_refuses_in_a_line(place, capsys, more, message):
    assert training.own.collect.main(command(place, "--count", "train=2", *more)) == 2
    assert message in capsys.readouterr().err and not (place / "out").exists()


def test_the_command_survives_a_full_disk(place, capsys, monkeypatch):
    more = ("--count", "train=8", "--settings", "own:5", *JUDGED)
    saves = itertools.count()
    save = Trajectory.save

    def full(self: Trajectory, folder: Any) -> None:
        if next(saves):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder)

    with monkeypatch.context() as patched:
        patched.setattr(Trajectory, "save", full)
        assert training.own.collect.main(command(place, *more)) == 2
    assert "No space left on device" in capsys.readouterr().err and count_of(place / "out") == {"train": 4}
    assert training.own.collect.main(command(place, *more)) == 0 and count_of(place / "out") == {"train": 8}


@pytest.mark.slow
def test_killed_ten_times_it_ends_as_if_nothing_had_happened(place):
    more = ("--count", "train=44,test=8", "--settings", "own:6,euler:4", "--keep-images", *JUDGED)
    assert training.own.collect.main(command(place, *more)) == 0
    whole = content(place / "out")
    shutil.rmtree(place / "out")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.own.collect", "diffusers.pipelines.stable_diffusion"])  # once for all
    rng = np.random.default_rng(0)

    def batches() -> int:
        # Of train and test: what is unfinished comes and goes.
        return len(list((place / "out").glob("t*/*/rejects.parquet")))

    for _ in range(10):
        process = context.Process(target=with_one_thread, args=(training.own.collect.main, command(place, *more)))
        process.start()
        finished = batches()
        while process.is_alive() and batches() <= finished:
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.2)))
        process.kill()
        process.join()
    assert training.own.collect.main(command(place, *more)) == 0
    found = content(place / "out")
    assert found.keys() == whole.keys() and [name for name in whole if found[name] != whole[name]] == []
