from __future__ import annotations

import copy

import pytest
import tiny
import torch

from moe_artifacts.errors import GuardStateError
from moe_artifacts.guard.guard import ArtifactGuard
from tests.guarded import ATOL, PROMPTS, guarded, settings, undisturbed, unwatched


def test_a_callback_sees_the_living_rows_and_can_change_them():
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append(len(tensors["latents"]))
        return {"latents": tensors["latents"] * 0.99}

    def quiet(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * 0.99}

    expected = unwatched(callback_on_step_end=quiet)
    output = guarded(tiny.ScriptedScorer({0: 1, 2: 3}), callback_on_step_end=callback)
    assert seen == [4, 3, 3, 2, 2, 2]
    torch.testing.assert_close(output.images, expected[[1, 3]], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("on_abort", "hooks"), [("drop", 1), ("mask", 0), ("record", 0)])
def test_the_denoiser_is_touched_only_where_its_batch_may_shrink(on_abort, hooks):
    seen = []
    guarded(
        tiny.ScriptedScorer({0: 1}),
        on_abort=on_abort,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(len(pipe.unet._forward_pre_hooks)) or {},
    )
    assert seen == [hooks] * 6


def test_a_callback_that_switches_guidance_off_works_with_fewer_rows():
    def cutoff(pipe, i, t, tensors):
        if i != 3:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    changes = {"callback_on_step_end": cutoff, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = unwatched(**changes)
    output = guarded(tiny.ScriptedScorer({0: 1, 2: 4}), **changes)
    torch.testing.assert_close(output.images, expected[[1, 3]], atol=ATOL, rtol=0)


@pytest.mark.parametrize("on_abort", ["drop", "record"])
def test_a_callback_may_interrupt_the_run(on_abort):
    def stop(pipe, i, t, tensors):
        pipe._interrupt = i == 2
        return {}

    output = guarded(tiny.ScriptedScorer({0: 1}), on_abort=on_abort, callback_on_step_end=stop)
    assert output.steps_run == (11 if on_abort == "drop" else 12)
    assert output.trajectory.step == [0, 1, 2]
    assert len(output.images) == len(output.kept_indices)


# the pipeline afterwards


def test_the_flags_of_the_safety_checker_are_those_of_the_kept_images():
    def flag_image_1_and_2(image, device, dtype):
        """As StableDiffusionPipeline.run_safety_checker: image in [-1, 1]."""
        distance = (image[:, None] / 2 + 0.5 - undisturbed()).flatten(2).norm(dim=2)
        return image, [i in (1, 2) for i in distance.argmin(dim=1).tolist()]

    pipe = tiny.stable_diffusion()
    pipe.run_safety_checker = flag_image_1_and_2
    for options, of_audited in (({}, []), ({"audit_rate": 1.0}, [False, True])):
        output = ArtifactGuard(tiny.ScriptedScorer({0: 1, 2: 3}), **options)(pipe, PROMPTS, **settings())
        assert output.kept_indices == [1, 3]
        assert output.nsfw_content_detected == [True, False]
        assert output.audited_nsfw == of_audited
    assert guarded(tiny.ScriptedScorer()).nsfw_content_detected is None


@pytest.mark.parametrize("on_abort", ["drop", "record"])
def test_a_guarded_output_comes_back_whatever_return_dict_says(on_abort):
    scorer = tiny.ScriptedScorer({1: 2})
    expected = guarded(scorer, on_abort=on_abort)
    output = guarded(scorer, on_abort=on_abort, return_dict=False)
    assert torch.equal(output.images, expected.images)
    assert output.verdicts == expected.verdicts


def test_arguments_may_be_given_by_place():
    pipe = tiny.stable_diffusion()
    output = ArtifactGuard(tiny.ScriptedScorer({1: 2}))(
        pipe, PROMPTS, None, None, 6, guidance_scale=3.0, generator=tiny.generators(4), output_type="pt"
    )
    torch.testing.assert_close(output.images, undisturbed()[[0, 2, 3]], atol=ATOL, rtol=0)


class Interrupted(KeyboardInterrupt):
    """So that a test cannot mistake the user's own Ctrl-C for the one it makes."""


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@pytest.mark.parametrize("where", ["callback", "scorer"])
def test_after_an_error_everything_is_as_before(error, where, monkeypatch):
    pipe, freed = tiny.stable_diffusion("dpm"), []
    expected = undisturbed("dpm")
    before = set(vars(pipe.scheduler)), len(pipe.unet._forward_pre_hooks)

    def fail(*args, **kwargs):
        raise error

    scorer, changes = tiny.ScriptedScorer(), {}
    if where == "callback":
        changes = {"callback_on_step_end": fail}
    else:
        monkeypatch.setattr(tiny.ScriptedSession, "step", fail)
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    with pytest.raises(error):
        ArtifactGuard(scorer)(pipe, PROMPTS, **settings(**changes))
    assert (set(vars(pipe.scheduler)), len(pipe.unet._forward_pre_hooks)) == before
    assert freed == [True]
    assert torch.equal(pipe(PROMPTS, **settings()).images, expected)


@pytest.mark.parametrize("name", ["dpm", "pndm"])
@pytest.mark.parametrize("abort_at", [{0: 1, 2: 3}, dict.fromkeys(range(4), 2)], ids=["some", "all"])
def test_the_same_pipeline_can_be_used_again(name, abort_at):
    pipe, expected = tiny.stable_diffusion(name), undisturbed(name)
    guard = ArtifactGuard(tiny.ScriptedScorer(abort_at))
    first = guard(pipe, PROMPTS, **settings())
    again = guard(pipe, PROMPTS, **settings())
    assert again.verdicts == first.verdicts
    assert len(again.images) == len(first.images)
    assert torch.equal(torch.as_tensor(again.images), torch.as_tensor(first.images))
    assert torch.equal(pipe(PROMPTS, **settings()).images, expected)
    assert not pipe.unet._forward_pre_hooks
    copy.deepcopy(pipe.scheduler)


def test_one_guard_inside_another_is_refused():
    pipe, guard = tiny.stable_diffusion(), ArtifactGuard(tiny.ScriptedScorer())

    def again(pipe, i, t, tensors):
        guard(pipe, PROMPTS, **settings())
        return {}

    with pytest.raises(GuardStateError, match="watched already"):
        guard(pipe, PROMPTS, **settings(callback_on_step_end=again))
    assert len(guard(pipe, PROMPTS, **settings()).images) == 4
