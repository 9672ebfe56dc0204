"""What only shows after many runs: run by ``make test-slow``."""

from __future__ import annotations

import gc

import pytest
import scorers
import tiny

from moe_artifacts import ArtifactGuard
from moe_artifacts.config import LatentSpaceConfig

pytestmark = pytest.mark.slow


def test_two_hundred_guarded_runs_leave_nothing_behind():
    pipe = tiny.stable_diffusion("dpm")
    space = LatentSpaceConfig(
        name="tiny",
        vae_class=type(pipe.vae).__name__,
        channels=pipe.vae.config.latent_channels,
        scaling_factor=pipe.vae.config.scaling_factor,
        downsampling=pipe.vae_scale_factor,
    )
    guard = ArtifactGuard(scorers.tiny_scorer(latent_space=space), threshold=0.2)
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int) -> None:
        out = guard(
            pipe, ["a coat", "a bag"], num_inference_steps=4, generator=tiny.generators(2), output_type="latent"
        )
        assert len(out.verdicts) == 2, seed

    def state() -> tuple[int, int, bool]:
        gc.collect()
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.unet.modules())
        return hooks, len(gc.get_objects()), "step" in vars(pipe.scheduler)

    run(0)
    before = state()
    for seed in range(200):
        run(seed)
    after = state()
    assert (after[0], after[2]) == (before[0], before[2]) == (0, False)
    assert (
        after[1] - before[1] < 2_000
    )  # caches settle; two hundred runs that leaked one object each would not hide here
