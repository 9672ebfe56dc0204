"""Nothing is left behind by many runs, and runs at the same time do not meet."""

from __future__ import annotations

import gc
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import scorers
import tiny
import torch
from guarded import ATOL, PROMPTS, settings, undisturbed
from torch import nn

from moe_artifacts import ArtifactGuard
from moe_artifacts.guard.space import latent_space_of

# Python objects: caches of torch and diffusers still settle a little. A leak would be of one object a run at least.
OBJECTS_PER_RUN = 0.5
RESIDENT_BYTES = 4 * 2**20  # of a thousand runs: 4 kB each, less than the latents and scores of one


@dataclass
class Snapshot:
    """What a guarded run could leave behind."""

    hooks: dict[str, int]  # name of a module -> hooks on it
    attributes: dict[str, frozenset[str]]  # of the instances, where patches are put
    methods: dict[str, Any]  # of the classes
    threads: int
    objects: int
    resident: int | None  # bytes; None where the system does not tell


def snapshot(pipe: Any) -> Snapshot:
    gc.collect()
    parts = {name: part for name, part in pipe.components.items() if part is not None} | {"pipe": pipe}
    modules = {
        f"{part}.{name}": module
        for part, value in parts.items()
        if isinstance(value, nn.Module)
        for name, module in value.named_modules()
    }
    return Snapshot(
        hooks={name: count for name, module in modules.items() if (count := _hooks(module))},
        attributes={name: frozenset(vars(part)) for name, part in parts.items()},
        methods={f"{name}.{key}": value for name, part in parts.items() for key, value in vars(type(part)).items()},
        threads=threading.active_count(),
        objects=len(gc.get_objects()),
        resident=_resident(),
    )


def _hooks(module: nn.Module) -> int:
    return sum(len(value) for name, value in vars(module).items() if name.endswith("_hooks") and value)


def _resident() -> int | None:
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else None


def guarded_runs(pipe: Any, count: int) -> None:
    """Runs of every kind in turn: rows dropped, masked, recorded, none left, broken off, and with a scorer that computes."""

    def broken_off(*args: Any) -> None:
        raise KeyboardInterrupt

    space = latent_space_of(pipe, "tiny")
    some = tiny.ScriptedScorer({0: 1}, latent_space=space)
    real = scorers.tiny_scorer(latent_space=space)
    kinds = [
        (ArtifactGuard(some), {}),
        (ArtifactGuard(some, "mask"), {}),
        (ArtifactGuard(some, "record"), {}),
        (ArtifactGuard(tiny.ScriptedScorer({0: 1, 1: 2}, latent_space=space)), {}),
        (ArtifactGuard(some), {"callback_on_step_end": broken_off}),
        (ArtifactGuard(real, threshold=0.2), {}),
    ]
    for guard, changes in itertools.islice(itertools.cycle(kinds), count):
        asked = settings(num_inference_steps=4, generator=tiny.generators(2), **changes)
        try:
            assert len(guard(pipe, PROMPTS[:2], **asked).verdicts) == 2
        except KeyboardInterrupt:
            assert changes


def check_runs_leave_nothing(count: int) -> None:
    pipe = tiny.stable_diffusion("dpm")
    pipe(PROMPTS, **settings(num_inference_steps=4))
    unwatched = snapshot(pipe)
    guarded_runs(pipe, 24)  # warm-up: what is made once and kept
    before = snapshot(pipe)
    guarded_runs(pipe, count)
    after = snapshot(pipe)
    assert after.hooks == unwatched.hooks == {}
    assert after.attributes == unwatched.attributes
    assert after.methods == unwatched.methods
    assert after.threads == unwatched.threads
    assert after.objects - before.objects <= OBJECTS_PER_RUN * count
    if before.resident is not None and after.resident is not None:
        assert after.resident - before.resident <= RESIDENT_BYTES


def test_thirty_guarded_runs_leave_nothing_behind():
    check_runs_leave_nothing(30)


@pytest.mark.slow
def test_a_thousand_guarded_runs_leave_nothing_behind():
    check_runs_leave_nothing(1000)


@pytest.mark.parametrize("kind", ["hook", "attribute", "object"])
def test_the_snapshot_sees_what_a_run_leaves_behind(kind):
    """A hook that stays, a method that is not put back, one object a run."""
    pipe, left = tiny.stable_diffusion("dpm"), []
    before = snapshot(pipe)
    if kind == "hook":
        pipe.unet.mid_block.register_forward_pre_hook(lambda module, args: None)
        assert snapshot(pipe).hooks == before.hooks | {"unet.mid_block": 1}
    elif kind == "attribute":
        pipe.scheduler.step = pipe.scheduler.step
        assert snapshot(pipe).attributes["scheduler"] - before.attributes["scheduler"] == {"step"}
    else:
        left += [torch.zeros(1) for _ in range(100)]
        assert snapshot(pipe).objects - before.objects >= OBJECTS_PER_RUN * 100


# at the same time


@pytest.mark.parametrize("shared", [False, True], ids=["two guards", "one guard"])
def test_two_pipelines_in_two_threads_do_not_meet(shared):
    schedulers, aborts = ("dpm", "euler-a"), ({0: 1, 2: 3}, {0: 1, 2: 3} if shared else {1: 0, 2: 4, 3: 4})
    guards = [ArtifactGuard(tiny.ScriptedScorer(abort_at)) for abort_at in aborts]
    pipes = [tiny.stable_diffusion(name) for name in schedulers]
    together = threading.Barrier(2, timeout=60)

    def in_step(*args: Any) -> dict[str, Any]:
        together.wait()  # both are in the middle of their runs, after every step
        return {}

    def run(i: int) -> Any:
        return guards[0 if shared else i](pipes[i], PROMPTS, **settings(callback_on_step_end=in_step))

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(run, range(2)))
    for name, abort_at, output in zip(schedulers, aborts, outputs, strict=True):
        kept = [i for i in range(4) if i not in abort_at]
        assert output.kept_indices == kept
        assert {v.index: v.step for v in output.verdicts if v.status == "aborted"} == abort_at
        torch.testing.assert_close(output.images, undisturbed(name)[kept], atol=ATOL, rtol=0)
