"""Twins share the first half of a run: with a deterministic sampler they are the image itself."""

from __future__ import annotations

import math

import pytest
import torch

import benchmarks.twins
from benchmarks.sources import source_hashes
from benchmarks.twins import Setting, measured


@pytest.mark.parametrize(("scheduler", "same"), [("ddim", True), ("euler-a", False)])
def test_twins_differ_only_by_what_is_drawn_later(scheduler, same):
    setting = Setting(scheduler, 4)
    prompts, seeds = ["a coat", "a bag"], [1, 2]
    own = setting.images(prompts, seeds)
    assert torch.equal(setting.images(prompts, seeds), own)
    assert torch.equal(setting.images(prompts, seeds, later=5), own) == same
    setting.half = 5  # after the end: nothing is drawn anew
    assert torch.equal(setting.images(prompts, seeds, later=5), own)


def test_a_row_is_measured_once_and_again_when_the_program_is_another(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(tmp_path))
    calls = []
    monkeypatch.setattr(
        benchmarks.twins, "measure", lambda *case: calls.append(case) or {"steps": case[1], "auroc": math.nan}
    )
    cases = [("ddim", 4, 2, 1), ("ddim", 4, 2, 1), ("ddim", 6, 2, 1)]
    assert [measured(*case) for case in cases] == [{"steps": case[1], "auroc": None} for case in cases]
    assert calls == cases[1:]
    monkeypatch.setattr(benchmarks.twins, "source_hashes", lambda path: {path: "another"})
    measured(*cases[0])
    assert calls == [*cases[1:], cases[0]]


def test_the_program_is_the_scorer_and_the_guard_too():
    names = source_hashes("benchmarks/twins.py")
    assert {"moe_artifacts/scorer.py", "moe_artifacts/guard/guard.py", "moe_artifacts/experts.py"} <= names.keys()
