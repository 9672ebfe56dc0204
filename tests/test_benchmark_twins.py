"""Twins share the first half of a run: with a deterministic sampler they are the image itself."""

from __future__ import annotations

import pytest
import torch

import benchmarks.twins
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
    monkeypatch.setattr(benchmarks.twins, "measure", lambda *case: calls.append(case) or {"case": list(case)})
    cases = [("ddim", 4, 2, 1), ("ddim", 4, 2, 1), ("ddim", 6, 2, 1)]
    assert [measured(*case) for case in cases] == [{"case": list(case)} for case in cases]
    assert calls == cases[1:]
    monkeypatch.setattr(benchmarks.twins, "source_hashes", lambda path: {path: "another"})
    measured(*cases[0])
    assert calls == [*cases[1:], cases[0]]
