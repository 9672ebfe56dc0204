"""Guarded runs under other torch modes and dtypes, with compiled denoisers, caches, and in several threads."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch
from diffusers import FirstBlockCacheConfig

from moe_artifacts.config import PreviewConfig
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.space import latent_space_of
from tests.guarded import ATOL, PROMPTS, guarded, settings, undisturbed
from tests.tiny_pipelines import CASES


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("on_abort", ["drop", "mask"])
def test_a_run_under_another_grad_mode_is_the_same(mode, on_abort):
    with mode():
        output = guarded(tiny.ScriptedScorer({0: 1, 2: 3}), "dpm", on_abort=on_abort)
    assert output.kept_indices == [1, 3]
    torch.testing.assert_close(output.images, undisturbed("dpm")[[1, 3]], atol=ATOL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "dpm", "euler"])
def test_half_precision_is_scored_in_float32_and_keeps_its_rows(dtype, name):
    def pipeline():
        return tiny.stable_diffusion(name).to(dtype)

    def call():
        return settings(output_type="latent", guidance_scale=1.0)

    expected = pipeline()(PROMPTS, **call()).images
    recorded = ArtifactGuard(tiny.ScriptedScorer({0: 1}), "record")(pipeline(), PROMPTS, **call())
    assert torch.equal(recorded.images, expected)
    scorer = tiny.ScriptedScorer({0: 1, 2: 3})
    output = ArtifactGuard(scorer, keep_last_preview=True)(pipeline(), PROMPTS, **call())
    assert output.images.dtype is dtype
    assert {x0.dtype for _, x0, *_ in scorer.seen} == {torch.float32}
    assert output.last_previews[0].dtype is torch.float32
    # Rounding differs with the batch size, and each step rounds again: a few units in the last place of numbers up to 4.
    tolerance = 4 * 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.images.float(), expected[[1, 3]].float(), atol=tolerance, rtol=0)
    nothing = ArtifactGuard(tiny.ScriptedScorer(dict.fromkeys(range(4), 0)))(pipeline(), PROMPTS, **call())
    assert (nothing.images.dtype, nothing.images.shape) == (dtype, (0, 4, 8, 8))


def test_two_pipelines_in_two_threads_are_each_right():
    names, found = ("dpm", "unipc"), {}
    guard = ArtifactGuard(tiny.ScriptedScorer())  # one guard holds no state of a run
    pipes = {name: tiny.stable_diffusion(name) for name in names}
    start = threading.Barrier(2)

    def run(name, abort_at):
        scorer = tiny.ScriptedScorer(abort_at)
        start.wait()
        found[name] = [ArtifactGuard(scorer)(pipes[name], PROMPTS, **settings()) for _ in range(2)]
        found[name].append(guard(pipes[name], PROMPTS, **settings()))

    expected = {name: undisturbed(name) for name in names}
    threads = [
        threading.Thread(target=run, args=(name, abort_at))
        for name, abort_at in zip(names, ({0: 1, 2: 3}, {1: 2}), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        for output in found[name]:
            torch.testing.assert_close(output.images, expected[name][output.kept_indices], atol=ATOL, rtol=0)
        assert len(found[name][-1].images) == 4


def test_a_cache_forgets_the_rows_that_left(monkeypatch):
    """It keeps residuals of the whole batch; without the reset, their addition to fewer rows fails."""
    case = CASES["flux"]
    pipe = case.pipe()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # so high that every later step uses the cache
    space = latent_space_of(pipe, "tiny")
    preview = PreviewConfig(kind="linear", channels=space.channels)
    scorer = tiny.ScriptedScorer({0: 1, 2: 1}, latent_space=space, preview=preview)
    output = ArtifactGuard(scorer)(pipe, **case.call(4, next(iter(case.guidance))))
    assert output.kept_indices == [1, 3]
    assert output.images.isfinite().all()
    monkeypatch.setattr("moe_artifacts.guard.guard._forget_caches", lambda modules: None)
    with pytest.raises(RuntimeError, match="size of tensor"):
        ArtifactGuard(scorer)(pipe, **case.call(4, next(iter(case.guidance))))
