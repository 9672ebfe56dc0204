"""Every pipeline family: watching changes no bit, dropping rows changes no other row, and what must not be forgotten shows.

``python -m benchmarks.compatibility`` runs the whole table; here each family runs with its own scheduler and a few others, and
Stable Diffusion with one of each class. That SPECS holds no other pipelines than these is tested in test_pipelines.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect

import more_pipelines
import pytest
import torch
from tiny_pipelines import CASES

from benchmarks.compatibility import ATOL, Script, compare_runs, leavings, script_config, seeded, watched
from moe_artifacts.errors import UnsupportedPipelineError
from moe_artifacts.guard import conditioning
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.pipelines import spec_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers, about its own parts
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # diffusers 0.42 with numpy 2
    pytest.mark.filterwarnings("ignore::moe_artifacts.errors.ReproducibilityWarning"),  # DPM SDE has its own noise
]

IMAGES = 4
REFUSED_CASES = ("sd-inpaint-blended", "sdxl-controlnet-union")
SUPPORTED = [name for name in CASES if name not in REFUSED_CASES]
MORE = {case.name: case for case in more_pipelines.CASES}
ALL_CASES = CASES | MORE
ALL_SUPPORTED = [*SUPPORTED, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
WEAKER = [(name, guidance) for name in SUPPORTED for guidance in list(CASES[name].guidance)[:-1]]
OTHERS = [(name, scheduler) for name in SUPPORTED for scheduler in CASES[name].default_suite[1:]]
OTHERS += [
    pytest.param("sd", scheduler, marks=pytest.mark.slow)
    for scheduler in CASES["sd"].schedulers
    if scheduler not in CASES["sd"].default_suite
]


@functools.cache
def tiny_pipe(name):
    """One for all tests: a guarded run leaves it as it was."""
    return ALL_CASES[name].pipe()


def with_scheduler(name, scheduler=None):
    pipe, schedulers = tiny_pipe(name), ALL_CASES[name].schedulers
    pipe.scheduler = schedulers[scheduler or next(iter(schedulers))]()
    return pipe


def arguments(name, guidance=None, images=IMAGES, **changes):
    """By default with the last way of guiding, the one with most inputs."""
    return ALL_CASES[name].call(images, guidance or list(ALL_CASES[name].guidance)[-1], **changes)


def assert_drop_is_equal(name, **call):
    """From four rows to three and to one."""
    pipe, abort_at = with_scheduler(name), leavings(IMAGES, steps=4)["to one"]
    full = seeded(lambda: pipe(**arguments(name, **call)).images)
    output = seeded(watched, pipe, "drop", abort_at, arguments(name, **call))
    assert output.kept_indices == [2]
    torch.testing.assert_close(output.images, full[[2]], atol=ATOL, rtol=0)


# what is equal


@pytest.mark.parametrize("name", SUPPORTED)
def test_record_changes_no_bit_and_drop_no_other_row(name):
    row = compare_runs(with_scheduler(name), functools.partial(arguments, name), ways=("to half", "to none"))
    assert (row["record"], row["drop"]) == ("equal", "equal"), row["why"]


@pytest.mark.parametrize(("name", "scheduler"), OTHERS)
def test_so_with_other_schedulers(name, scheduler):
    row = compare_runs(with_scheduler(name, scheduler), functools.partial(arguments, name), ways=("to one",))
    assert (row["record"], row["drop"]) == ("equal", "equal"), row["why"]


@pytest.mark.parametrize(("name", "guidance"), WEAKER)
def test_drop_is_equal_with_other_guidance(name, guidance):
    assert_drop_is_equal(name, guidance=guidance)


@pytest.mark.parametrize("name", [name for name in SUPPORTED if CASES[name].images_per_prompt])
def test_drop_is_equal_with_several_images_per_prompt(name):
    assert_drop_is_equal(name, images=IMAGES // 2, num_images_per_prompt=2)


# what would show


def short(name):
    """A call of about three steps."""
    return arguments(name, num_inference_steps=(ALL_CASES[name].steps + 1) // 2)


@contextlib.contextmanager
def calls(modules):
    """The inputs of each call of these modules by name, as they come out of the hooks of the guard."""
    found = []

    def record(module, args, kwargs):
        found.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    with contextlib.ExitStack() as handles:
        for module in modules:
            handles.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield found


def rows_of(call):
    return len(next(iter(call.values())))  # of the latents


@functools.cache
def undisturbed(name):
    """The images of the short call, the rows of the denoiser's last call, and the inputs that are to be cut."""
    pipe = with_scheduler(name)
    spec = spec_of(pipe)
    denoiser, *also = spec.modules(pipe)
    with calls([denoiser]) as denoised, calls(also) as others:
        images = torch.as_tensor(seeded(lambda: pipe(**short(name)).images))  # one hands back numpy when asked for "pt"
    given = set()
    for call in denoised[:1] + others[:1]:
        for input_name, value in call.items():
            members = value.items() if isinstance(value, dict) else [("", value)]
            given |= {f"{input_name}.{member}".rstrip(".") for member, entry in members if entry is not None}
    return images, rows_of(denoised[-1]), sorted(given & spec.batched)


def is_noticed(name, abort_at):
    """Whether the run raises, or its images or the number of rows computed are not those of an honest one."""
    full, full_rows, _ = undisturbed(name)
    pipe = with_scheduler(name)
    kept = [i for i in range(IMAGES) if i not in abort_at]
    with calls(spec_of(pipe).modules(pipe)[:1]) as denoised:
        try:
            output = seeded(watched, pipe, "drop", abort_at, short(name))
        except Exception:
            return True
    if output.kept_indices != kept or (torch.as_tensor(output.images) - full[kept]).abs().max() > 10 * ATOL:
        return True
    return rows_of(denoised[-1]) * IMAGES != full_rows * len(kept)


TO_THREE, TO_TWO, TO_ONE = {1: 0}, {1: 0, 3: 0}, {0: 0, 1: 0, 3: 0}  # torch would broadcast a single row
# The pipeline repeats the embedding of one image for all: the wrong rows are the right ones, if only their number fits.
ALIKE = ("added_cond_kwargs.image_embeds", "joint_attention_kwargs.ip_adapter_image_embeds")


@pytest.mark.parametrize("name", ALL_SUPPORTED)
def test_forgetting_all_of_the_conditioning_shows(name, monkeypatch):
    assert not is_noticed(name, TO_TWO)
    assert not is_noticed(name, TO_ONE)
    monkeypatch.setattr("moe_artifacts.guard.guard.conditioning_follows", lambda *args: contextlib.nullcontext())
    assert is_noticed(name, TO_TWO)
    assert is_noticed(name, TO_ONE)


@pytest.mark.parametrize("name", ALL_SUPPORTED)
def test_forgetting_any_single_input_shows(name, monkeypatch):
    spec, inputs = spec_of(tiny_pipe(name)), undisturbed(name)[-1]
    assert inputs
    for forgotten in inputs:
        sabotaged = dataclasses.replace(
            spec,
            batched=spec.batched - {forgotten},
            listed=spec.listed - {forgotten},
            shared=spec.shared | {forgotten},
        )
        monkeypatch.setattr("moe_artifacts.guard.guard.spec_of", lambda pipe, sabotaged=sabotaged: sabotaged)
        for abort_at in (TO_THREE,) if forgotten in ALIKE else (TO_TWO, TO_ONE):
            assert is_noticed(name, abort_at), f"{forgotten} is not cut, and nothing shows"


# The loop of these keeps its batch: their latents are cut at the same places, and the outputs are put back there.
KEEPING = ("sd-inpaint", "z-image", "z-image-img2img")


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in KEEPING])
def test_the_conditioning_of_another_image_shows(name, monkeypatch):
    right = conditioning._Cut._places
    monkeypatch.setattr(conditioning._Cut, "_places", lambda cut: right(cut).unflatten(0, (-1, 2)).flip(1).flatten())
    assert is_noticed(name, TO_TWO)


@pytest.mark.parametrize("name", REFUSED_CASES)
def test_what_is_refused_is_refused_before_the_first_step(name):
    pipe = with_scheduler(name)
    guard = ArtifactGuard(Script(script_config(pipe), {}), "record")
    with calls([pipe.unet]) as found, pytest.raises(UnsupportedPipelineError, match="the guard cannot watch a"):
        guard(pipe, **arguments(name))
    assert not found
