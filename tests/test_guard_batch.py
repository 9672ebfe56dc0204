"""Batches that keep their size ("mask"), or shrink to some sizes only (``drop_sizes``)."""

from __future__ import annotations

import pytest
import tiny
import torch

from moe_artifacts.guard.guard import ArtifactGuard
from tests.guarded import ATOL, PROMPTS, CountedCalls, guarded, settings, statuses, undisturbed, unwatched


def watched(scorer, on_abort="mask", name="ddim", options=None, **changes):
    """A guarded run without guidance, and the batch sizes it was made with."""
    pipe = tiny.stable_diffusion(name)
    counted = CountedCalls(pipe)
    guard = ArtifactGuard(scorer, on_abort, **options or {})
    return guard(pipe, PROMPTS, **settings(guidance_scale=1.0, **changes)), counted


# mask


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_masked_run_keeps_the_same_bits_until_it_is_decoded(name, guidance_scale):
    output = guarded(
        tiny.ScriptedScorer({0: 1, 2: 3}), name, on_abort="mask", guidance_scale=guidance_scale, output_type="latent"
    )
    assert output.kept_indices == [1, 3]
    assert torch.equal(output.images, unwatched(name, guidance_scale=guidance_scale, output_type="latent")[[1, 3]])


def test_a_masked_image_runs_on_unscored_and_is_not_decoded():
    scorer = tiny.ScriptedScorer({0: 1, 2: 3}, clear_at={3: 2})
    output, counted = watched(scorer)
    assert counted.denoiser == [4] * 6
    assert counted.decoder == [2]
    assert [images for images, *_ in scorer.seen] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], [1, 2], [1], [1]]
    assert statuses(output) == ["aborted", "kept", "aborted", "cleared"]
    assert [verdict.step for verdict in output.verdicts] == [1, None, 3, 2]
    assert output.steps_run == output.steps_full == 24
    assert "2 kept, 2 aborted at steps 2 and 4 of 6; 0 of 24 denoiser steps not run" in output.report()
    torch.testing.assert_close(output.images, undisturbed(guidance_scale=1.0)[[1, 3]], atol=ATOL, rtol=0)


def test_verdicts_are_those_of_a_run_that_drops():
    scorer = tiny.ScriptedScorer({0: 1, 2: 3, 3: 5}, clear_at={1: 2})
    assert guarded(scorer, on_abort="mask").verdicts == guarded(scorer).verdicts


def test_a_masked_run_ends_once_no_image_is_left():
    output, counted = watched(tiny.ScriptedScorer({0: 1, 1: 3, 2: 2, 3: 2}))
    assert counted.denoiser == [4] * 4
    assert counted.decoder == []
    assert output.images.shape == (0, 3, 16, 16)
    assert (output.steps_run, output.steps_full) == (16, 24)


@pytest.mark.parametrize("on_abort", ["mask", "drop"])
def test_a_row_that_is_not_finite_may_run_on_without_harm(on_abort):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    broken = latents.clone()
    broken[1, 0, 0, 0] = torch.nan
    options = {"drop_sizes": (1,)} if on_abort == "drop" else {}
    for name in ("euler-a", "unipc", "pndm"):
        output = guarded(tiny.ScriptedScorer({2: 3}), name, on_abort=on_abort, options=options, latents=broken)
        assert statuses(output) == ["kept", "error", "aborted", "kept"]
        torch.testing.assert_close(output.images, unwatched(name, latents=latents)[[0, 3]], atol=ATOL, rtol=0)


# drop_sizes


@pytest.mark.parametrize(
    ("abort_at", "sizes", "batches", "decoded"),
    [
        ({0: 0, 1: 1, 3: 2}, (4, 2, 1), [4, 4, 2, 1, 1, 1], 1),
        ({0: 0, 1: 1, 3: 2}, (2,), [4, 4, 2, 2, 2, 2], 1),
        ({0: 0, 1: 1, 3: 2}, (1, 3), [4, 3, 3, 1, 1, 1], 1),  # in any order
        ({0: 0, 1: 0}, (3,), [4, 3, 3, 3, 3, 3], 2),
        ({0: 0}, (8, 2), [4] * 6, 3),
        (dict.fromkeys(range(4), 2), (2, 1), [4] * 3, 0),
    ],
)
def test_the_batch_takes_the_given_sizes_only(abort_at, sizes, batches, decoded):
    output, counted = watched(tiny.ScriptedScorer(abort_at), "drop", options={"drop_sizes": sizes})
    assert counted.denoiser == batches
    assert counted.decoder == [decoded] * bool(decoded)
    assert output.steps_run == sum(batches)
    assert output.kept_indices == [i for i in range(4) if i not in abort_at]
    expected = undisturbed(guidance_scale=1.0)[output.kept_indices]
    torch.testing.assert_close(output.images, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_kept_images_equal_those_of_the_undisturbed_run_whatever_the_sizes(name):
    for sizes in ((3,), (2, 1)):
        output = guarded(tiny.ScriptedScorer({0: 1, 1: 1, 3: 3}), name, options={"drop_sizes": sizes})
        torch.testing.assert_close(output.images, undisturbed(name)[[2]], atol=ATOL, rtol=0)


# what the caller sees of rows that run on


@pytest.mark.parametrize(("on_abort", "options"), [("mask", {}), ("drop", {"drop_sizes": (3,)})])
def test_a_callback_sees_the_running_rows_and_at_the_end_the_kept_ones(on_abort, options):
    seen = []
    watched(
        tiny.ScriptedScorer({0: 1, 2: 3}),
        on_abort,
        options=options,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(len(tensors["latents"])) or {},
    )
    assert seen == ([4] * 5 + [2] if on_abort == "mask" else [4, 3, 3, 3, 3, 2])


@pytest.mark.parametrize(("on_abort", "options"), [("mask", {}), ("drop", {"drop_sizes": (3,)})])
def test_only_kept_images_come_back_from_a_run_that_a_callback_interrupts(on_abort, options):
    def stop(pipe, i, t, tensors):
        pipe._interrupt = i == 2
        return {}

    everything = unwatched(callback_on_step_end=stop, guidance_scale=1.0)
    output, _ = watched(tiny.ScriptedScorer({0: 0, 2: 1}), on_abort, options=options, callback_on_step_end=stop)
    assert output.kept_indices == [1, 3] and output.interrupted
    assert (
        output.report().splitlines()[0].endswith("INTERRUPTED before the last step, so what was kept is not finished")
    )
    torch.testing.assert_close(output.images, everything[[1, 3]], atol=ATOL, rtol=0)
