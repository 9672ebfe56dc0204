"""generate_clean: images, waves, accounts, limits and what it refuses. Kills and resuming: test_generate_resumed.py."""

from __future__ import annotations

import inspect
import io
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from diffusers import HeunDiscreteScheduler
from generating import ALL_BAD, ALL_GOOD, HALF_BAD, PROMPTS, STEPS, ContentScorer, generate, place

from moe_artifacts.errors import InputError, UnsupportedPipelineError
from moe_artifacts.guard.guard import ArtifactGuard

ATOL = 1e-4  # float32 images: a smaller batch sums in another order


def alone(image, pipe=None, **changes):
    """The image that the pipeline makes of the same prompt and seed by itself, without a guard."""
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt"} | changes
    generator = torch.Generator().manual_seed(image.seed)
    return (pipe or tiny.stable_diffusion())(image.prompt, generator=generator, **settings).images[0]


def count_denoiser_rows(pipe):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


# images


def test_every_prompt_gets_its_images_in_order():
    run = generate()
    assert [image.prompt for image in run.images] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [place(i) for i in run.images] == sorted(place(i) for i in run.images)
    assert (run.unfilled, run.wanted) == ([], 6)
    assert Counter(a.status for a in run.attempts) == {"kept": 6, "aborted": len(run.attempts) - 6}
    assert 3 <= len(run.attempts) - 6 <= 20, "the tests below need images that are aborted, and some that are not"


@pytest.mark.parametrize(("scheduler", "on_abort"), [("ddim", "drop"), ("euler-a", "drop"), ("dpm", "mask")])
def test_an_image_is_what_its_prompt_and_seed_give_alone(scheduler, on_abort):
    pipe = tiny.stable_diffusion(scheduler)
    run = generate(pipe=pipe, guard=ArtifactGuard(ContentScorer(HALF_BAD[scheduler]), on_abort=on_abort))
    assert len(run.images) == 6 and len(run.attempts) > 6
    for image in run.images:
        torch.testing.assert_close(image.image, alone(image, pipe), atol=ATOL, rtol=0)


def test_neither_attempts_nor_images_depend_on_the_batch_size():
    runs = [generate(batch_size=batch_size) for batch_size in (4, 1, 64)]
    expected = {place(a): (a.seed, a.status, a.step) for a in runs[0].attempts}
    for run in runs[1:]:
        assert {place(a): (a.seed, a.status, a.step) for a in run.attempts} == expected
        for image, other in zip(run.images, runs[0].images, strict=True):
            torch.testing.assert_close(image.image, other.image, atol=ATOL, rtol=0)


def test_a_prompt_that_is_there_twice_gets_other_images():
    run = generate(["a bag", "a bag"])
    assert [image.prompt_index for image in run.images] == [0, 0, 1, 1]
    assert len({image.seed for image in run.images}) == 4
    assert (run.images[0].image - run.images[2].image).abs().max() > 10 * ATOL


def test_one_prompt_may_be_given_as_a_text():
    assert [image.prompt for image in generate("a bag", 1).images] == ["a bag"]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_without_a_folder_images_come_as_the_output_type_says(output_type):
    pipe = tiny.stable_diffusion()
    for image in generate(["a bag"], pipe=pipe, output_type=output_type).images:
        expected = alone(image, pipe, output_type=output_type)
        assert type(image.image) is type(expected) and image.path is None
        found, expected = np.asarray(image.image, dtype=float), np.asarray(expected, dtype=float)
        # PIL: the other side of a rounding.
        np.testing.assert_allclose(found, expected, atol=1 if output_type == "pil" else ATOL)


def test_audited_images_are_handed_back_apart_and_attempted_again():
    pipe, plain = tiny.stable_diffusion(), generate()
    run = generate(pipe=pipe, guard=ArtifactGuard(ContentScorer(), audit_rate=1.0))
    assert [place(a) for a in run.attempts] == [place(a) for a in plain.attempts]
    assert [place(i) for i in run.images] == [place(i) for i in plain.images]
    assert [place(i) for i in run.audited] == sorted(place(a) for a in plain.attempts if a.status == "aborted")
    assert all(a.audited == (a.status == "audited") for a in run.attempts)
    assert run.steps_run == run.steps_full == STEPS * len(run.attempts)
    for image in run.audited:
        torch.testing.assert_close(image.image, alone(image, pipe), atol=ATOL, rtol=0)


def test_an_image_that_breaks_is_attempted_again():
    pipe, calls = tiny.stable_diffusion(), []
    right = pipe.scheduler.step

    def step(model_output, timestep, sample, *args, **kwargs):
        result = right(model_output, timestep, sample, *args, **kwargs)
        calls.append(timestep)
        if len(calls) == 2:
            result[0][1] = torch.nan
        return result

    step.__signature__ = inspect.signature(right)  # pipelines look at it
    pipe.scheduler.step = step
    run = generate(pipe=pipe, scorer=ContentScorer(ALL_GOOD))
    assert [place(a) for a in run.attempts if a.status == "error"] == [(0, 1)]
    assert [place(i) for i in run.images] == [(0, 0), (0, 3), (1, 0), (1, 1), (2, 0), (2, 1)]


# arguments


def test_a_negative_prompt_is_that_of_every_image():
    pipe = tiny.stable_diffusion()
    run = generate(["a bag"], pipe=pipe, negative_prompt="shirt", guidance_scale=3.0)
    for image in run.images:
        expected = alone(image, pipe, negative_prompt="shirt", guidance_scale=3.0)
        torch.testing.assert_close(image.image, expected, atol=ATOL, rtol=0)
        assert (image.image - alone(image, pipe, guidance_scale=3.0)).abs().max() > 10 * ATOL


def test_arguments_that_differ_between_prompts_come_from_a_function():
    pipe = tiny.stable_diffusion()
    asked = []

    def embeds(prompts):
        asked.append(prompts)
        return {"prompt_embeds": pipe.encode_prompt(prompts, "cpu", 1, False)[0]}

    run, plain = generate(pipe=pipe, arguments_for=embeds), generate(pipe=pipe)
    assert asked == [[a.prompt for a in wave.attempts] for wave in run.waves]
    assert run.attempts == plain.attempts
    for image, expected in zip(run.images, plain.images, strict=True):
        torch.testing.assert_close(image.image, expected.image, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts must be at least one text"),
        ({"prompts": ["a bag", 3]}, "prompts must be at least one text"),
        ({"images_per_prompt": 0}, "images_per_prompt must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be a whole number of at least 1, got 2.0"),
        ({"max_attempts": True}, "max_attempts must be a whole number"),
        ({"max_denoiser_calls": 0}, "max_denoiser_calls must be a whole number of at least 1, got 0"),
        ({"seed": "7"}, "seed must be a whole number, got '7'"),
        ({"prompt": "a bag"}, "prompt cannot be given to generate_clean: give prompts"),
        ({"num_images_per_prompt": 2}, "give images_per_prompt"),
        ({"generator": torch.Generator()}, "every image has a generator of its own, made from seed"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "every image has noise of its own"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must be the same for all images.*Give arguments_for"),
        ({"prompt_embeds": torch.zeros(1, 4, 16)}, "prompt_embeds must be the same for all images, a text, got Tensor"),
        ({"arguments_for": lambda prompts: {"generator": None}}, "arguments_for returned generator: every image has"),
        ({"arguments_for": lambda p: {"guidance_scale": 2.0}}, "returned guidance_scale: it is given for all images"),
        ({"folder": "never-made", "output_type": "pt"}, "output_type must be 'pil' where a folder is given"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_work_is_refused_before_the_first_step(changes, message):
    scorer = ContentScorer()
    with pytest.raises(InputError, match=message):
        generate(scorer=scorer, **changes)
    assert scorer.sessions == 0


def test_a_guard_that_only_records_is_refused():
    with pytest.raises(InputError, match="on_abort='drop' or 'mask', got 'record'"):
        generate(guard=ArtifactGuard(ContentScorer(), on_abort="record"))


def test_what_the_guard_refuses_is_refused():
    with pytest.raises(UnsupportedPipelineError):
        generate(pipe=torch.nn.Identity())


# waves, accounts and limits


def test_every_call_of_the_denoiser_is_accounted_for():
    pipe = tiny.stable_diffusion()
    rows = count_denoiser_rows(pipe)
    run = generate(pipe=pipe)
    assert run.steps_run == sum(rows)
    assert run.steps_full == STEPS * len(run.attempts)
    # Found at the second of four steps, so two of four were not run.
    assert run.steps_full - run.steps_run == 2 * sum(a.status == "aborted" for a in run.attempts) > 0


def test_a_wave_holds_what_the_last_one_lost_and_the_next_first_ones():
    run = generate(batch_size=4)
    first, second = ([place(a) for a in wave.attempts] for wave in run.waves[:2])
    assert first == [(0, 0), (0, 1), (1, 0), (1, 1)]
    lost = [(a.prompt_index, a.attempt + 2) for a in run.waves[0].attempts if not a.kept]
    assert second == [*sorted(lost), (2, 0), (2, 1)][:4]


def test_no_image_is_attempted_more_often_than_max_attempts():
    run = generate(scorer=ContentScorer(ALL_BAD), max_attempts=3)
    assert run.images == [] and len(run.attempts) == 3 * 6
    assert [(u.prompt, u.out_of_attempts, u.out_of_budget) for u in run.unfilled] == [(p, 2, 0) for p in PROMPTS]
    assert run.report().splitlines() == [
        "0 of 6 images in 18 attempts and 6 waves: 18 aborted",
        "36 denoiser steps run, 36 of 72 not run (50.0%)",
        "3 prompts lack 6 images:",
        "  0  'a shoe': 2 after max_attempts",
        "  1  'a bag': 2 after max_attempts",
        "  2  'shirt': 2 after max_attempts",
        "threshold 0.5 promises nothing: it does not come from a calibration",
    ]


@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_the_budget_is_never_passed_and_used_as_far_as_waves_go(scheduler):
    pipe = tiny.stable_diffusion()
    if scheduler == "heun":
        pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    steps = 2 * STEPS - 1 if scheduler == "heun" else STEPS  # Heun calls the denoiser twice a step, but for the last
    rows = count_denoiser_rows(pipe)
    scorer = ContentScorer(HALF_BAD[scheduler])
    whole = generate(pipe=pipe, scorer=scorer, batch_size=3)
    spent = 0
    for number, wave in enumerate(whole.waves[:2]):
        needed = spent + steps * len(wave.attempts)  # if it aborted nothing
        for budget in (needed - 1, needed):
            rows.clear()
            run = generate(pipe=pipe, scorer=scorer, batch_size=3, max_denoiser_calls=budget)
            assert run.waves == whole.waves[: len(run.waves)]
            assert sum(rows) == run.steps_run <= budget
            # What a wave did not spend may pay for the next one too.
            assert len(run.waves) == number if budget < needed else len(run.waves) > number
        spent += wave.steps_run


def test_prompts_that_the_budget_left_unfilled_are_named():
    pipe = tiny.stable_diffusion()
    rows = count_denoiser_rows(pipe)
    run = generate([f"a bag {letter}" for letter in "abcdefghijkl"], pipe=pipe, max_denoiser_calls=4 * STEPS - 1)
    assert (run.waves, run.steps_run, rows) == ([], 0, [])
    assert [(u.prompt_index, u.missing, u.out_of_budget) for u in run.unfilled] == [(i, 2, 2) for i in range(12)]
    assert run.report().splitlines() == [
        "0 of 24 images in 0 attempts and 0 waves",
        "0 denoiser steps run, 0 of 0 not run",
        "12 prompts lack 24 images:",
        *(f"  {i}  'a bag {x}': 2 as the next wave could pass max_denoiser_calls" for i, x in enumerate("abcdefghij")),
        "  and 2 more",
    ]


def test_a_budget_hook_is_taken_off_again():
    pipe = tiny.stable_diffusion()
    generate(pipe=pipe, max_denoiser_calls=40)
    assert not pipe.unet._forward_pre_hooks and "step" not in vars(pipe.scheduler)


# progress


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_shows_images_kept_and_steps_saved(progress, monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    run = generate(progress=progress)
    shown = stderr.getvalue()
    if not progress:
        assert shown == ""
        return
    saved = 1 - run.steps_run / run.steps_full
    assert "6/6" in shown and f"{saved:.1%} of steps saved" in shown
    assert f"{sum(a.kept for a in run.waves[0].attempts)}/6" in shown
