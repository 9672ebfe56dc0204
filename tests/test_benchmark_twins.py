"""Twins share the first half of a run: with a deterministic sampler they are the image itself."""

from __future__ import annotations

import pytest
import torch

from benchmarks.twins import Setting


@pytest.mark.parametrize(("scheduler", "same"), [("ddim", True), ("euler-a", False)])
def test_twins_differ_only_by_what_is_drawn_later(scheduler, same):
    setting = Setting(scheduler, 4)
    prompts, seeds = ["a coat", "a bag"], [1, 2]
    own = setting.images(prompts, seeds)
    assert torch.equal(setting.images(prompts, seeds), own)
    assert torch.equal(setting.images(prompts, seeds, later=5), own) == same
    setting.half = 5  # after the end: nothing is drawn anew
    assert torch.equal(setting.images(prompts, seeds, later=5), own)
