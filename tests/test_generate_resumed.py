"""generate_clean into a folder: whatever ends the process, and wherever, the next one goes on without repeating an image."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from generating import PROMPTS, ContentScorer, files, generate, place
from PIL import Image

from moe_artifacts.errors import GuardStateError, InputError
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.run_folder import read_run

TESTS = Path(__file__).parent


def guard(**changes):
    return ArtifactGuard(ContentScorer(), audit_rate=0.3, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = generate(guard=guard(), folder=folder)
    assert {a.status for a in run.attempts} == {"kept", "aborted", "audited"} and len(run.waves) > 3
    return run, files(folder)


def copy_of(whole, folder):
    return shutil.copytree(whole[0].images[0].path.parents[1], folder / "run")


def check(folder, whole):
    """Every image exactly once, and nothing else: the folder is that of the undisturbed run, byte by byte."""
    run, expected = whole
    assert files(folder) == expected
    record = read_run(folder)
    assert [place(a) for a in record.attempts] == [place(a) for a in run.attempts]
    found = sorted(name for name in expected if name.endswith(".png"))
    assert found == sorted(a.file for a in record.attempts if a.file is not None)


# the folder


def test_what_is_handed_back_is_what_lies_in_the_folder(whole, tmp_path):
    run = generate(guard=guard(), folder=tmp_path)
    check(tmp_path, whole)
    in_memory = generate(guard=guard(), output_type="pil")
    for kind in ("images", "audited"):
        for image, other in zip(getattr(run, kind), getattr(in_memory, kind), strict=True):
            assert (place(image), image.seed) == (place(other), other.seed)
            np.testing.assert_array_equal(np.asarray(image.image), np.asarray(other.image))
    assert [dataclasses.replace(a, file=None) for a in run.attempts] == in_memory.attempts
    assert (run.steps_run, run.steps_full, run.report()) == (
        in_memory.steps_run,
        in_memory.steps_full,
        in_memory.report(),
    )


def test_a_file_alone_is_enough_to_make_its_image_again(tmp_path):
    pipe = tiny.stable_diffusion("euler-a")
    run = generate(pipe=pipe, scorer=ContentScorer(2.0), folder=tmp_path, eta=0.0, negative_prompt="shirt")
    with Image.open(run.images[3].path) as image:
        text, pixels = image.text, np.asarray(image, dtype=int)
    call = json.loads(text["settings"])["call"]
    again = pipe(text["prompt"], generator=torch.Generator().manual_seed(int(text["seed"])), **call).images[0]
    assert np.abs(np.asarray(again, dtype=int) - pixels).max() <= 1  # the other side of a rounding
    assert text["prompt"] == PROMPTS[1] and call["negative_prompt"] == "shirt"


def test_a_finished_run_is_handed_back_without_a_call_of_the_pipeline(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    pipe = tiny.stable_diffusion()
    pipe.unet.register_forward_pre_hook(lambda module, args: pytest.fail("the denoiser was called"))
    run = generate(pipe=pipe, guard=guard(), folder=folder)
    check(folder, whole)
    assert run.waves == whole[0].waves and run.report() == whole[0].report()


def test_a_run_that_the_budget_stopped_goes_on_with_a_larger_one(whole, tmp_path):
    stopped = generate(guard=guard(), folder=tmp_path, max_denoiser_calls=40)
    assert 0 < len(stopped.waves) < len(whole[0].waves) and stopped.unfilled
    assert generate(guard=guard(), folder=tmp_path, max_denoiser_calls=41).waves == stopped.waves
    resumed = generate(guard=guard(), folder=tmp_path)
    assert resumed.unfilled == [] and resumed.steps_run == whole[0].steps_run
    check(tmp_path, whole)


def test_a_run_may_go_on_with_another_batch_size(whole, tmp_path):
    generate(guard=guard(), folder=tmp_path, max_denoiser_calls=40)
    resumed = generate(guard=guard(), folder=tmp_path, batch_size=1)
    assert [place(i) for i in resumed.images] == [place(i) for i in whole[0].images]
    assert sorted(map(place, resumed.attempts)) == sorted(map(place, whole[0].attempts))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_inference_steps": 5}, "call.num_inference_steps 5 instead of 4"),
        ({"prompts": PROMPTS[:2]}, r"prompts\[2\] not given instead of 'shirt'"),
        ({"images_per_prompt": 3}, "images_per_prompt 3 instead of 2"),
        ({"seed": 1}, "seed 1 instead of 0"),
        ({"guard": ArtifactGuard(ContentScorer(), threshold=0.4, audit_rate=0.3)}, "rule.threshold 0.4 instead of 0.5"),
        ({"guard": ArtifactGuard(ContentScorer())}, r"audit_rate 0.0 instead of 0.3"),
        ({"scheduler": "euler"}, "scheduler._class_name 'EulerDiscreteScheduler' instead of 'DDIM"),
        ({"timesteps": torch.tensor([900, 5])}, r"call.timesteps 'Tensor \(2,\) int64 "),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_run_with_other_settings_is_refused(whole, tmp_path, changes, named):
    folder = copy_of(whole, tmp_path)
    pipe = tiny.stable_diffusion(changes.get("scheduler", "ddim"))
    given = {name: value for name, value in changes.items() if name != "scheduler"}
    with pytest.raises(InputError, match=f"holds a run with other settings: .*{named}"):
        generate(pipe=pipe, folder=folder, **{"guard": guard()} | given)
    check(folder, whole)


def test_a_run_of_another_model_under_the_same_name_is_refused(whole, tmp_path):
    folder, pipe = copy_of(whole, tmp_path), tiny.stable_diffusion()
    pipe = type(pipe)(**pipe.components | {"unet": copy.deepcopy(pipe.unet)}, requires_safety_checker=False)
    with torch.no_grad():
        pipe.unet.conv_out.weight *= 1.05
    with pytest.raises(InputError, match="holds a run of another denoiser"):
        generate(pipe=pipe, guard=guard(), folder=folder)
    check(folder, whole)


@pytest.mark.parametrize("into_folder", [False, True])
def test_a_wave_that_the_pipeline_interrupts_is_made_again(whole, tmp_path, into_folder):
    calls = []

    def stop(pipe, i, t, tensors):
        calls.append(i)
        pipe._interrupt = len(calls) == 6  # in the second wave
        return {}

    folder = tmp_path / "run" if into_folder else None
    run = generate(guard=guard(), folder=folder, callback_on_step_end=stop)
    assert run.interrupted and len(run.waves) == 1 and len(calls) == 6
    assert "as the run was interrupted" in run.report()
    if into_folder:
        assert len(read_run(folder).waves) == 1
        assert sum(len(a.name) > 0 for a in (folder / "images").iterdir()) == len(run.images)


def test_what_is_ours_to_give_may_be_none(tmp_path):
    first = generate(["a bag"], 1, folder=tmp_path / "run", generator=None, latents=None, num_images_per_prompt=None)
    again = generate(["a bag"], 1, folder=tmp_path / "run")
    assert [a.seed for a in again.attempts] == [a.seed for a in first.attempts]
    with pytest.raises(InputError, match=r"call\.eta 0\.5 instead of not given"):
        generate(["a bag"], 1, folder=tmp_path / "run", eta=0.5)
    with pytest.raises(InputError, match="texts that UTF-8 can hold"):
        generate(["a \udcff bag"], 1, folder=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_error_in_a_wave_leaves_a_folder_that_can_go_on(whole, tmp_path):
    pipe, calls = tiny.stable_diffusion(), []

    def interrupt(module, args):
        calls.append(len(args[0]))
        if len(calls) == 7:
            raise KeyboardInterrupt

    handle = pipe.unet.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe=pipe, guard=guard(), folder=tmp_path)
    handle.remove()
    assert len(read_run(tmp_path).waves) == 1
    generate(pipe=pipe, guard=guard(), folder=tmp_path)
    check(tmp_path, whole)


def test_a_folder_in_use_is_refused(tmp_path):
    def nested(prompts):
        with pytest.raises(GuardStateError, match="being written by another run"):
            generate(folder=tmp_path)
        return {}

    generate(["a bag"], folder=tmp_path, arguments_for=nested)


# kill -9


def in_a_child(act):
    """Run ``act`` in a forked process; the signal that killed it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)  # an error: never back into pytest
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def count_points(folder, at=None, report=None):
    """Count what a run does to files, and its scored steps: points in time. At number ``at``, the process kills itself."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        in_folder = any(str(folder) in str(value) for value in arguments)
        if event == "test.step" or (in_folder and event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod")):
            count += 1
            if report is not None:
                report.write_text(str(count))
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)  # for the life of the process, so only ever in a child


def generate_until_killed(folder, at):
    def act():
        count_points(folder, at)
        generate(guard=guard(), folder=folder)

    return in_a_child(act)


@pytest.fixture(scope="module")
def num_points(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")

    def act():
        count_points(folder / "run", report=folder / "count")
        generate(guard=guard(), folder=folder / "run")

    assert in_a_child(act) == 0
    return int((folder / "count").read_text())


@pytest.mark.parametrize("number", range(5))
def test_a_run_killed_anywhere_goes_on_to_the_same_files(whole, num_points, tmp_path, number):
    # One point in each fifth of the run.
    at = random.Random(number).randrange(number * num_points // 5, (number + 1) * num_points // 5) + 1
    assert generate_until_killed(tmp_path / "run", at) == signal.SIGKILL
    with contextlib.suppress(InputError):  # killed before there was a run
        assert read_run(tmp_path / "run").waves == whole[0].waves[: len(read_run(tmp_path / "run").waves)]
    resumed = generate(guard=guard(), folder=tmp_path / "run")
    check(tmp_path / "run", whole)
    assert resumed.waves == whole[0].waves and resumed.report() == whole[0].report()


def test_a_run_killed_again_and_again_goes_on_to_the_same_files(whole, num_points, tmp_path):
    points, kills = random.Random(0), 0
    # Resuming touches files too, so these are more points than a wave has: each time at least one wave is finished.
    while generate_until_killed(tmp_path / "run", points.randrange(num_points // 4, num_points // 2)):
        kills += 1
    assert kills >= 2
    check(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_killed_at_twenty_points_goes_on_to_the_same_files(whole, num_points, tmp_path):
    for at in random.Random(1).sample(range(1, num_points + 1), 20):
        folder = tmp_path / str(at)
        assert generate_until_killed(folder, at) == signal.SIGKILL
        generate(guard=guard(), folder=folder)
        check(folder, whole)


CLIENT = """
import sys, time
import torch
from generating import generate
from test_generate_resumed import guard
torch.set_num_threads(1)
print("ready", flush=True)
began = time.perf_counter()
generate(guard=guard(), folder=sys.argv[1])
print(time.perf_counter() - began)
"""


@pytest.mark.slow
def test_ten_kills_at_random_moments_of_processes_of_their_own(whole, tmp_path):
    def start(folder):
        command = [sys.executable, "-c", CLIENT, str(folder)]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(TESTS)}, stdout=-1, text=True)
        assert process.stdout.readline() == "ready\n"
        return process

    undisturbed = start(tmp_path / "run")
    seconds = float(undisturbed.communicate()[0])
    check(tmp_path / "run", whole)
    moments, waves = random.Random(0), []
    for number in range(10):
        folder = tmp_path / str(number)
        process = start(folder)
        time.sleep(moments.uniform(0, seconds))
        process.kill()
        process.communicate()
        waves.append(len(list(folder.glob("waves/0*.json"))))
        generate(guard=guard(), folder=folder)
        check(folder, whole)
    assert len(set(waves)) > 2, "the moments were not spread over the run"
