"""Images that are finished although they reached the threshold, and previews of those that are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.guard.audit_draw import AuditDraw
from moe_artifacts.guard.guard import ArtifactGuard
from tests.guarded import ATOL, PROMPTS, guarded, settings, statuses, undisturbed, unwatched

ALL = {"audit_rate": 1.0}


@pytest.mark.parametrize("on_abort", ["drop", "mask"])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_audited_images_are_finished_and_handed_back_apart(on_abort, output_type):
    scorer = tiny.ScriptedScorer({0: 1, 2: 3})
    output = guarded(scorer, on_abort=on_abort, options=ALL, output_type=output_type)
    expected = unwatched(output_type=output_type)
    assert (output.kept_indices, output.audited_indices) == ([1, 3], [0, 2])
    assert statuses(output) == ["audited", "kept", "audited", "kept"]
    assert [(verdict.step, verdict.audited) for verdict in output.verdicts] == [
        (1, True),
        (None, False),
        (3, True),
        (None, False),
    ]
    assert [images for images, *_ in scorer.seen] == [[0, 1, 2, 3]] * 2 + [[1, 2, 3]] * 2 + [[1, 3]] * 2
    for images, indices in ((output.images, [1, 3]), (output.audited_images, [0, 2])):
        assert type(images) is type(expected)
        for found, i in zip(images, indices, strict=True):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected[i]))  # nothing ever left the batch
    assert output.steps_run == output.steps_full
    assert "2 kept, 2 finished for the audit; 0 of 24" in output.report()


def test_a_run_may_end_with_audited_images_alone():
    output = guarded(tiny.ScriptedScorer(dict.fromkeys(range(4), 2)), options=ALL)
    assert output.images.shape == (0, 3, 16, 16)
    assert torch.equal(output.audited_images, undisturbed())


def test_without_an_audit_there_are_no_audited_images():
    output = guarded(tiny.ScriptedScorer({0: 1}))
    assert output.audited_indices == []
    assert output.audited_images.shape == (0, 3, 16, 16)


def test_only_an_abort_is_audited_not_what_is_found_at_the_last_step():
    """A rejected image has had all its steps: it is no false abort that the promise counts."""
    output = guarded(tiny.ScriptedScorer({0: 5, 1: 4}), options=ALL)
    assert statuses(output) == ["rejected", "audited", "kept", "kept"]
    assert output.audited_indices == [1]


def test_an_audited_image_that_breaks_is_an_error_and_was_audited():
    def spoil(pipe, i, t, tensors):
        if i == 3:
            tensors["latents"][2] = torch.inf
        return tensors

    output = guarded(tiny.ScriptedScorer({2: 1}), options=ALL, callback_on_step_end=spoil)
    assert statuses(output) == ["kept", "kept", "error", "kept"]
    assert output.verdicts[2].audited
    assert output.audited_indices == []
    assert len(output.images) == 3


def test_some_are_audited_and_the_others_aborted():
    """Which ones follows from their seeds and prompts alone, and an unwatched run's random numbers are left alone."""
    draw = AuditDraw(rate=0.5, seed=5)
    expected = [i for i in range(4) if draw.takes(i, 100 + i, PROMPTS[i])]
    assert 0 < len(expected) < 4
    state = torch.get_rng_state()
    output = guarded(tiny.ScriptedScorer(dict.fromkeys(range(4), 2)), options={"audit_rate": 0.5, "audit_seed": 5})
    assert torch.equal(torch.get_rng_state(), state)
    assert output.audited_indices == expected
    assert statuses(output) == ["audited" if i in expected else "aborted" for i in range(4)]
    torch.testing.assert_close(output.audited_images, undisturbed()[expected], atol=ATOL, rtol=0)


# which ones


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**64 - 1), st.text())
def test_a_higher_rate_audits_more_and_the_same_ones(rate, other, seed, prompt):
    low, high = sorted((rate, other))
    assert AuditDraw(low, 0).takes(0, seed, prompt) <= AuditDraw(high, 0).takes(0, seed, prompt)
    assert AuditDraw(1.0, 0).takes(0, seed, prompt)
    assert not AuditDraw(0.0, 0).takes(0, seed, prompt)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 2**64 - 1))
def test_where_an_image_stands_in_its_batch_does_not_matter_once_it_has_a_seed(place, other, seed):
    draw = AuditDraw(0.5, 3)
    assert draw.takes(place, seed, "a shoe") == draw.takes(other, seed, "a shoe")


def test_the_share_is_the_rate_and_depends_on_each_part():
    draws = 20_000
    seeds = range(draws)

    def taken(rate=0.02, seed=0, prompt="a shoe", by_place=False):
        draw = AuditDraw(rate, seed)
        return np.array([draw.takes(i, None if by_place else i, prompt) for i in seeds])

    for found in (taken(), taken(seed=1), taken(prompt="a bag"), taken(by_place=True)):
        assert abs(found.mean() - 0.02) < 4 * math.sqrt(0.02 * 0.98 / draws)  # 4 standard errors
    for other in (taken(seed=1), taken(prompt="a bag"), taken(by_place=True)):
        assert (taken() & other).mean() < 0.005  # independent draws meet at 0.0004, the same draw at 0.02


# last previews


@pytest.mark.parametrize("on_abort", ["drop", "mask", "record"])
def test_an_aborted_image_keeps_its_last_preview(on_abort):
    scorer = tiny.ScriptedScorer({0: 1, 1: 1, 2: 3, 3: 5})
    output = guarded(scorer, on_abort=on_abort, options={"keep_last_preview": True})
    assert sorted(output.last_previews) == [0, 1, 2, 3]
    for image, step in scorer.abort_at.items():
        images, x0, *_ = scorer.seen[step]
        expected = scorer.preview(x0[[images.index(image)]])[0]
        assert torch.equal(output.last_previews[image], expected)
        assert expected.shape == (3, 8, 8)


def test_previews_are_kept_only_on_request_and_only_of_what_is_lost():
    scorer = tiny.ScriptedScorer({0: 1}, clear_at={1: 1})
    assert guarded(scorer).last_previews == {}
    assert list(guarded(scorer, options={"keep_last_preview": True}).last_previews) == [0]
    audited = ArtifactGuard(scorer, keep_last_preview=True, audit_rate=1.0)
    assert audited(tiny.stable_diffusion(), PROMPTS, **settings()).last_previews == {}
