from __future__ import annotations

import dataclasses
import inspect

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline

from moe_artifacts.config import LatentSpaceConfig
from moe_artifacts.errors import ConfigError, InputError, LatentSpaceError, UnsupportedPipelineError
from moe_artifacts.guard.guard import ArtifactGuard
from tests.guarded import PROMPTS, CountedCalls, guarded, settings, statuses
from tests.scorers import EVERY_RULE


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"prompt": []}, InputError, "prompt is an empty list"),
        ({"prompt": ("a shoe",)}, InputError, "prompt must be a string or a list of strings, got tuple"),
        ({"prompt": ["a shoe", 3, "a", "b"]}, InputError, "prompt must be a string or a list of strings"),
        ({"prompt": None}, InputError, "either prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(4, 8, 16)}, InputError, "either prompt or prompt_embeds"),
        ({"prompts": PROMPTS}, InputError, "with prompt, leave it out"),
        ({"generator": tiny.generators(3)}, InputError, "generator is a list of 3, expected 4: one per image"),
        ({"generator": tuple(tiny.generators(4))}, InputError, "generator must be a torch.Generator or a list"),
        ({"num_images_per_prompt": 0}, InputError, "num_images_per_prompt must be a whole number of at least 1"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, InputError, "latents has 1 rows, expected 4"),
        ({"output_type": "numpy"}, UnsupportedPipelineError, "output_type must be one of pil, np, pt, latent"),
        ({"cross_attention_kwargs": {"gligen": {}}}, UnsupportedPipelineError, r"\['gligen'\]"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(changes, error, told):
    pipe = tiny.stable_diffusion()
    counted = CountedCalls(pipe)
    given = {"prompt": PROMPTS, **settings(), **changes}
    with pytest.raises(error, match=told):
        ArtifactGuard(tiny.ScriptedScorer())(pipe, **given)
    assert counted.denoiser == []
    assert "step" not in vars(pipe.scheduler)


class MyPipeline(StableDiffusionPipeline):
    pass


class MyScheduler(DDIMScheduler):
    pass


def test_pipelines_and_schedulers_that_nobody_has_looked_at_are_refused_by_name():
    pipe, guard = tiny.stable_diffusion(), ArtifactGuard(tiny.ScriptedScorer())
    mine = MyPipeline(**pipe.components, requires_safety_checker=False)
    for other in (mine, DiffusionPipeline()):
        with pytest.raises(UnsupportedPipelineError, match=type(other).__name__):
            guard(other, PROMPTS)
    pipe.scheduler = MyScheduler()
    with pytest.raises(UnsupportedPipelineError, match="scheduler MyScheduler is not supported"):
        guard(pipe, PROMPTS)


def test_a_second_scheduler_is_refused():
    pipe = tiny.stable_diffusion()
    pipe.low_res_scheduler = DDIMScheduler()
    with pytest.raises(UnsupportedPipelineError, match="StableDiffusionPipeline has scheduler, low_res_scheduler"):
        ArtifactGuard(tiny.ScriptedScorer())(pipe, PROMPTS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"channels": 16}, "channels 4 instead of 16"),
        ({"scaling_factor": 0.13025}, "scaling_factor 0.18215 instead of 0.13025"),
        ({"shift_factor": 0.1}, "shift_factor 0.0 instead of 0.1"),
        ({"downsampling": 8}, "downsampling 2 instead of 8"),
        ({"vae_class": "AutoencoderTiny"}, "vae_class 'AutoencoderKL' instead of 'AutoencoderTiny'"),
    ],
)
def test_another_latent_space_is_refused(changes, told):
    space = {"name": "other", "vae_class": "AutoencoderKL", "channels": 4, "scaling_factor": 0.18215, "downsampling": 2}
    scorer = tiny.ScriptedScorer(latent_space=LatentSpaceConfig(**space | changes))
    with pytest.raises(LatentSpaceError, match=told):
        guarded(scorer)


def test_a_guard_is_refused_without_a_threshold_or_with_an_impossible_one():
    bare = tiny.ScriptedScorer(threshold=None)
    with pytest.raises(ConfigError, match="on_abort='drop' needs a threshold"):
        ArtifactGuard(bare)
    with pytest.raises(ConfigError, match=r"threshold must be in \[0, 1\], got 1.5"):
        ArtifactGuard(tiny.ScriptedScorer(), threshold=1.5)
    with pytest.raises(ConfigError, match="on_abort='mask' needs a threshold"):
        ArtifactGuard(bare, on_abort="mask")
    with pytest.raises(InputError, match="on_abort must be 'drop', 'mask' or 'record', got 'stop'"):
        ArtifactGuard(bare, on_abort="stop")
    output = guarded(bare, on_abort="record")
    assert statuses(output) == ["kept"] * 4
    assert "nothing was decided" in output.report()


@pytest.mark.parametrize(
    ("on_abort", "options", "error", "told"),
    [
        ("mask", {"drop_sizes": (2, 1)}, ConfigError, "drop_sizes goes with on_abort='drop', got on_abort='mask'"),
        ("drop", {"drop_sizes": ()}, InputError, r"drop_sizes must be whole numbers .* got \(\)"),
        ("drop", {"drop_sizes": (4, 0)}, InputError, r"drop_sizes must be whole numbers .* got \(4, 0\)"),
        ("drop", {"drop_sizes": (2.0,)}, InputError, "drop_sizes must be whole numbers"),
        ("drop", {"audit_rate": 1.5}, InputError, r"audit_rate must be in \[0, 1\], got 1.5"),
        ("drop", {"audit_rate": float("nan")}, InputError, "audit_rate must be in"),
        ("record", {"audit_rate": 0.1}, ConfigError, "audit_rate has no use with on_abort='record'"),
    ],
)
def test_options_that_make_no_sense_are_refused(on_abort, options, error, told):
    with pytest.raises(error, match=told):
        ArtifactGuard(tiny.ScriptedScorer(), on_abort, **options)


def test_a_last_preview_needs_a_scorer_that_has_previews(monkeypatch):
    monkeypatch.delattr(tiny.ScriptedScorer, "preview")
    with pytest.raises(ConfigError, match="keep_last_preview=True needs a scorer with a preview, 'scripted' has none"):
        ArtifactGuard(tiny.ScriptedScorer(), keep_last_preview=True)


@pytest.mark.parametrize("own", EVERY_RULE, ids=lambda rule: rule.rule)
def test_a_number_as_threshold_keeps_the_rule_but_not_its_promise(own):
    certified = dataclasses.replace(own, max_risk=0.05, confidence=0.95, scheduler="DDIMScheduler")
    guard = ArtifactGuard(tiny.ScriptedScorer(threshold=certified), threshold=0.7)
    assert guard.rule == dataclasses.replace(own, threshold=0.7)


def test_without_a_number_the_threshold_is_the_scorers_own():
    assert ArtifactGuard(tiny.ScriptedScorer()).rule == tiny.scorer_config().threshold
    assert ArtifactGuard(tiny.ScriptedScorer(threshold=None), threshold=0.7).rule.rule == "cumulative"


def test_the_guard_reads_every_argument_of_the_pipeline_it_knows():
    """A new argument of a later diffusers may hold one entry per image: look at it, then add it here."""
    known = set(inspect.signature(StableDiffusionPipeline.__call__).parameters)
    assert known == {
        *("self", "prompt", "height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale"),
        *("negative_prompt", "num_images_per_prompt", "eta", "generator", "latents", "prompt_embeds"),
        *("negative_prompt_embeds", "ip_adapter_image", "ip_adapter_image_embeds", "output_type", "return_dict"),
        *("cross_attention_kwargs", "guidance_rescale", "clip_skip", "callback_on_step_end"),
        *("callback_on_step_end_tensor_inputs", "kwargs"),
    }
