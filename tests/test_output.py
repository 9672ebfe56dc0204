from __future__ import annotations

import pytest
import tiny
import torch

from moe_artifacts.config import ThresholdConfig
from moe_artifacts.guard.output import Setting, promise
from tests.guarded import guarded


def test_the_report_says_what_happened_and_what_is_promised():
    rule = ThresholdConfig(
        rule="cumulative",
        threshold=0.5,
        max_risk=0.05,
        confidence=0.95,
        scheduler="DDIMScheduler",
        num_inference_steps=6,
        guidance_scale=3.0,
        scored_steps=(0, 1, 2, 3, 4, 5),
    )
    scorer = tiny.ScriptedScorer({0: 1, 2: 3}, threshold=rule)
    assert guarded(scorer).report() == (
        "4 images: 2 kept, 2 aborted at steps 2 and 4 of 6; 6 of 24 denoiser steps not run\n"
        "false aborts <= 5 % (95 % sure, over the calibration prompts, DDIM, 6 steps, guidance 3)"
    )
    assert guarded(scorer, "euler", on_abort="record", num_inference_steps=7).report() == (
        "4 images: 4 kept, 2 would be aborted at steps 2 and 4 of 7; 8 of 28 denoiser steps would not be run\n"
        "threshold NOT certified in this setting: EulerDiscrete instead of DDIM, 7 steps instead of 6"
    )
    rejected = tiny.ScriptedScorer({0: 5})
    assert (
        guarded(rejected, latents=torch.full((4, 4, 8, 8), torch.nan))
        .report()
        .startswith(
            "4 images: 0 kept, 4 with non-finite latents or scores; 20 of 24 denoiser steps not run\nthreshold 0.5 promises nothing"
        )
    )
    assert "3 kept, 1 rejected at the last step; 0 of 24" in guarded(rejected).report()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (Setting("DDIMScheduler", 6, 3.0, (1, 5)), None),
        (Setting("PNDMScheduler", 6, 3.0, (1, 5)), "PNDM instead of DDIM"),
        (Setting("DDIMScheduler", 7, 3.0, (1, 6)), "7 steps instead of 6"),
        (Setting("DDIMScheduler", None, 3.0, (1, 5)), "timesteps of your own instead of 6"),
        (Setting("DDIMScheduler", 6, 1.0, (1, 5)), "guidance 1 instead of 3"),
        (Setting("DDIMScheduler", 6, 3.0, (0, 5)), "scored steps [0, 5] instead of [1, 5]"),
        (Setting("DDIMScheduler", 6, 3.0, (1, 5), 0.0, (16, 32), "abc"), None),
        (Setting("DDIMScheduler", 6, 3.0, (1, 5), 0.5, (16, 32), "abc"), "eta 0.5 instead of 0"),
        (Setting("DDIMScheduler", 6, 3.0, (1, 5), 0.0, (32, 32), "abc"), "size 32x32 instead of 16x32"),
        (Setting("DDIMScheduler", 6, 3.0, (1, 5), 0.0, (16, 32), "abd"), "another denoiser (weights or precision)"),
    ],
)
def test_a_promise_holds_only_where_it_was_certified(setting, told):
    rule = ThresholdConfig(
        rule="cumulative",
        threshold=0.5,
        max_risk=0.05,
        confidence=0.95,
        scheduler="DDIM",
        num_inference_steps=6,
        guidance_scale=3.0,
        scored_steps=(1, 5),
        eta=0.0,
        image_size=(16, 32),
        denoiser="abc",
    )
    text = promise(rule, setting)
    assert text.startswith("false aborts <= 5 %") if told is None else f"NOT certified in this setting: {told}" in text
