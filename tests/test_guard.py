from __future__ import annotations

import contextlib

import numpy as np
import pytest
import tiny
import torch

from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.rows import LiveRows
from tests.guarded import ATOL, PROMPTS, CountedCalls, guarded, settings, statuses, undisturbed, unwatched


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_record_changes_no_bit(name, guidance_scale):
    scorer = tiny.ScriptedScorer(abort_at={0: 1, 2: 3}, clear_at={1: 2})
    output = guarded(scorer, name, on_abort="record", guidance_scale=guidance_scale)
    assert torch.equal(output.images, undisturbed(name, guidance_scale))
    assert output.kept_indices == [0, 1, 2, 3]
    assert statuses(output) == ["aborted", "cleared", "aborted", "kept"]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_images_come_as_the_output_type_says(output_type):
    expected = unwatched(output_type=output_type)
    for on_abort, kept in (("record", [0, 1, 2, 3]), ("drop", [0, 2])):
        scorer = tiny.ScriptedScorer(abort_at={1: 5, 3: 5})
        output = guarded(scorer, on_abort=on_abort, output_type=output_type)
        assert output.kept_indices == kept
        assert type(output.images) is type(expected)
        for found, i in zip(output.images, kept, strict=True):
            found, image = np.asarray(found, dtype=float), np.asarray(expected[i], dtype=float)
            # The denoiser always ran on the full batch here; only the decoder saw fewer rows, or PIL the other side of
            # a rounding.
            np.testing.assert_allclose(
                found, image, atol={"drop": 1 if output_type == "pil" else ATOL, "record": 0}[on_abort]
            )


def test_record_leaves_the_random_state_of_torch_as_an_unwatched_run_does():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected, after = unwatched("euler-a", generator=None), torch.get_rng_state()
        torch.manual_seed(5)
        output = guarded(tiny.ScriptedScorer(abort_at={0: 1}), "euler-a", on_abort="record", generator=None)
        assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(output.images, expected)


def test_record_goes_on_scoring_what_was_decided():
    scorer = tiny.ScriptedScorer(abort_at={0: 1}, clear_at={1: 2})
    output = guarded(scorer, on_abort="record")
    assert all(images == [0, 1, 2, 3] for images, *_ in scorer.seen)
    assert output.trajectory.scores["artifact_prob"].isfinite().all()
    assert output.verdicts[0].step == 1
    assert output.steps_run == output.steps_full == 24


# drop


@pytest.mark.parametrize(
    ("name", "guidance_scale", "abort_at"),
    [
        *((name, guidance, {0: 1, 2: 1, 3: 3}) for name in tiny.SCHEDULERS for guidance in (1.0, 3.0)),  # 4 to 2 to 1
        *((name, 3.0, {0: 0, 1: 0, 2: 0, 3: 4}) for name in ("ddpm", "pndm")),  # to 1 at the first step, then to 0
        *((name, 3.0, {3: 4}) for name in ("dpm", "unipc")),  # at the last step but one
    ],
)
def test_kept_images_equal_those_of_the_undisturbed_run(name, guidance_scale, abort_at):
    expected = undisturbed(name, guidance_scale)
    output = guarded(tiny.ScriptedScorer(abort_at), name, guidance_scale=guidance_scale)
    assert output.kept_indices == [i for i in range(4) if i not in abort_at]
    if output.kept_indices:
        torch.testing.assert_close(output.images, expected[output.kept_indices], atol=ATOL, rtol=0)
    assert statuses(output) == ["aborted" if i in abort_at else "kept" for i in range(4)]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ["a shoe", "a bag"], "num_images_per_prompt": 2},
        {"prompt": "a shoe", "num_images_per_prompt": 4},
        {"guidance_rescale": 0.7},
        {"negative_prompt": ["coat", "shirt", "a bag", "a shoe"]},
        {"eta": 1.0},
        {"generator": "one"},
        {"generator": "one", "eta": 1.0},
        {"generator": None, "eta": 1.0},
        {"latents": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9))},
        {"timesteps": [900, 700, 500, 300, 100, 5], "scheduler": "ddpm"},
        {"height": 16, "width": 32},
    ],
    ids=lambda changes: "-".join(changes),
)
@pytest.mark.filterwarnings("ignore::moe_artifacts.errors.ReproducibilityWarning")
def test_kept_images_equal_those_of_the_undisturbed_run_for_every_argument(changes):
    def arguments():
        given = settings(**{k: v for k, v in changes.items() if k not in ("prompt", "scheduler")})
        if given["generator"] == "one":
            given["generator"] = torch.Generator().manual_seed(1)
        return given

    prompt, name = changes.get("prompt", PROMPTS), changes.get("scheduler", "ddim")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        expected = tiny.stable_diffusion(name)(prompt, **arguments()).images
        torch.manual_seed(2)
        scorer = tiny.ScriptedScorer({0: 1, 1: 2, 3: 2})
        output = ArtifactGuard(scorer)(tiny.stable_diffusion(name), prompt, **arguments())
    assert output.kept_indices == [2]
    torch.testing.assert_close(output.images, expected[2:3], atol=ATOL, rtol=0)


def test_guidance_embedded_in_the_denoiser_is_cut_too():
    """An LCM-distilled U-Net gets one guidance embedding per image, and no second half of the batch."""
    expected = tiny.stable_diffusion(time_cond_proj_dim=8)(PROMPTS, **settings()).images
    pipe = tiny.stable_diffusion(time_cond_proj_dim=8)
    output = ArtifactGuard(tiny.ScriptedScorer({0: 1, 2: 3}))(pipe, PROMPTS, **settings())
    torch.testing.assert_close(output.images, expected[[1, 3]], atol=ATOL, rtol=0)


def test_prompts_and_seeds_matter_enough_for_these_tests_to_see_a_mistaken_row():
    images = undisturbed()
    others = unwatched(prompt=PROMPTS[1:] + PROMPTS[:1])
    assert (images - others).abs().amax(dim=(1, 2, 3)).min() > 10 * ATOL  # a row with its neighbour's prompt
    assert (images[1:] - images[:-1]).abs().amax(dim=(1, 2, 3)).min() > 10 * ATOL  # a row with its neighbour's noise


@pytest.mark.parametrize("part", ["conditioning", "padding"])
def test_a_row_that_is_taken_from_the_wrong_place_shows(part, monkeypatch):
    """Sabotage: each of the two mechanisms, off by one row."""
    if part == "conditioning":
        monkeypatch.setattr("moe_artifacts.guard.guard.conditioning_follows", lambda *args: contextlib.nullcontext())
        with pytest.raises(RuntimeError):  # two living rows, four rows of embeddings
            guarded(tiny.ScriptedScorer({0: 1, 2: 1}))
        return
    right = LiveRows.pad
    monkeypatch.setattr(LiveRows, "pad", lambda self, x: right(self, x).roll(int(not self.complete), 0))
    expected = undisturbed("dpm")
    output = guarded(tiny.ScriptedScorer({0: 1, 2: 1}), "dpm")
    assert (output.images - expected[output.kept_indices]).abs().max() > 10 * ATOL


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_once_no_row_is_left_nothing_more_is_computed(name, guidance_scale):
    pipe = tiny.stable_diffusion(name)
    counted, freed, seen = CountedCalls(pipe), [], []
    pipe.maybe_free_model_hooks = lambda: freed.append(True)
    output = ArtifactGuard(tiny.ScriptedScorer({0: 1, 1: 1, 2: 2, 3: 2}))(
        pipe,
        PROMPTS,
        **settings(guidance_scale=guidance_scale),
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(len(tensors["latents"])) or {},
    )
    half = 2 if guidance_scale > 1 else 1
    # The script counts scored steps; PNDM's half-step, the second call, is not one.
    expected = [4, 4, 4, 2] if name == "pndm" else [4, 4, 2]
    assert counted.denoiser == [half * rows for rows in expected]
    assert counted.decoder == []
    assert freed
    assert output.images.shape == (0, 3, 16, 16)
    assert output.kept_indices == []
    assert statuses(output) == ["aborted"] * 4
    assert output.steps_run == sum(expected)
    assert 0 not in seen
    assert output.steps_full == 4 * (7 if name == "pndm" else 6)


def test_the_steps_of_rows_that_left_are_really_not_run():
    pipe = tiny.stable_diffusion()
    counted = CountedCalls(pipe)
    output = ArtifactGuard(tiny.ScriptedScorer({0: 0, 1: 2, 2: 2}))(pipe, PROMPTS, **settings(guidance_scale=1.0))
    assert counted.denoiser == [4, 3, 3, 1, 1, 1]
    assert counted.decoder == [1]
    assert (output.steps_run, output.steps_full) == (13, 24)
    assert [verdict.step for verdict in output.verdicts] == [0, 2, 2, None]


def test_an_image_caught_at_the_last_step_is_rejected_and_not_decoded():
    pipe = tiny.stable_diffusion()
    counted = CountedCalls(pipe)
    output = ArtifactGuard(tiny.ScriptedScorer({1: 5, 2: 4}))(pipe, PROMPTS, **settings())
    assert statuses(output) == ["kept", "rejected", "aborted", "kept"]
    assert output.kept_indices == [0, 3]
    assert counted.decoder == [2]
    assert output.steps_run == 23  # only the abort at step 4 of 0 to 5 saved one
    assert len(guarded(tiny.ScriptedScorer(dict.fromkeys(range(4), 5))).images) == 0


def test_cleared_images_finish_without_being_scored():
    scorer = tiny.ScriptedScorer(abort_at={0: 2, 1: 4}, clear_at={1: 1, 3: 3})
    expected = undisturbed()
    output = guarded(scorer)
    assert [images for images, *_ in scorer.seen] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 2, 3],
        [2, 3],
        [2],
        [2],
    ]
    assert statuses(output) == ["aborted", "cleared", "kept", "cleared"]
    torch.testing.assert_close(output.images, expected[[1, 2, 3]], atol=ATOL, rtol=0)
    seen = output.trajectory.scores["artifact_prob"].isfinite().sum(dim=1).tolist()
    assert seen == [3, 2, 6, 4]


def test_all_cleared_at_once_scores_no_more():
    scorer = tiny.ScriptedScorer(clear_at=dict.fromkeys(range(4), 1))
    output = guarded(scorer)
    assert len(scorer.seen) == 2
    assert statuses(output) == ["cleared"] * 4
    assert output.trajectory.step == [0, 1]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_no_images_are_a_batch_of_the_same_kind(output_type):
    some = guarded(tiny.ScriptedScorer({0: 1}), output_type=output_type, height=16, width=32).images
    none = guarded(tiny.ScriptedScorer(dict.fromkeys(range(4), 0)), output_type=output_type, height=16, width=32).images
    assert type(none) is type(some)
    assert len(none) == 0
    if output_type != "pil":
        assert none.shape[1:] == some.shape[1:]
        assert none.dtype == some.dtype
