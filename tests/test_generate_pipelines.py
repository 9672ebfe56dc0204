"""generate_clean around other pipelines than Stable Diffusion, with prompt embeddings in place of prompts."""

from __future__ import annotations

import statistics

import pytest
import torch
from generating import ALL_GOOD, ContentScorer, generate
from tiny_pipelines import CASES

from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.space import latent_space_of

PROMPTS = ["a shoe", "a bag"]
# One of each kind: with a second prompt embedding, with packed latents, without callback and known number of steps, with
# a run that is shorter than num_inference_steps.
NAMES = ("sdxl", "flux", "pixart-sigma", "sd-img2img")


def rows_of(case, prompts):
    """The call's arguments with one row per prompt, and the same row wherever the same prompt is."""
    places = [PROMPTS.index(prompt) for prompt in prompts]
    given = case.arguments(len(PROMPTS)).items()
    return {n: v[places] if isinstance(v, torch.Tensor) and len(v) == len(PROMPTS) else v for n, v in given}


@pytest.mark.parametrize("name", NAMES)
def test_images_equal_those_made_alone_and_the_budget_is_exact(name):
    case = CASES[name]
    pipe = case.pipe()
    given = case.arguments(len(PROMPTS))
    varying = {n for n, v in given.items() if isinstance(v, torch.Tensor)}
    shared = {n: v for n, v in given.items() if n not in varying} | dict(next(iter(case.guidance.values())))
    shared["num_inference_steps"] = case.steps

    def made(limit, **changes):
        scorer = ContentScorer(limit, latent_space=latent_space_of(pipe, name))
        run = generate(
            PROMPTS,
            3,
            pipe=pipe,
            guard=ArtifactGuard(scorer),
            arguments_for=lambda prompts: {n: v for n, v in rows_of(case, prompts).items() if n in varying},
            **shared | changes,
        )
        return run, scorer

    half_bad = statistics.median(made(ALL_GOOD)[1].levels)
    run, _ = made(half_bad)
    assert len(run.images) == 6 and len(run.attempts) > 6
    for image in run.images[::2]:
        generator = torch.Generator().manual_seed(image.seed)
        alone = pipe(**rows_of(case, [image.prompt]) | shared, generator=generator, output_type="pt").images[0]
        torch.testing.assert_close(image.image, alone, atol=1e-4, rtol=0)  # a smaller batch sums in another order

    first = run.waves[0]
    assert made(half_bad, max_denoiser_calls=first.steps_full - 1)[0].waves == []
    assert made(half_bad, max_denoiser_calls=first.steps_full)[0].waves[:1] == [first]
