"""The bundled default as a user gets it: files, loading, and a short guarded run."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch

from moe_artifacts import ArtifactGuard, ArtifactScorer, bundled_pipeline
from moe_artifacts.bundled import FOLDER, bundled_judge, class_of
from moe_artifacts.errors import CheckpointError, InputError, LatentSpaceError
from moe_artifacts.files import read_json
from moe_artifacts.trajectory import Trajectory
from tests.commands import run

PROMPTS = ["an ankle boot", "a pullover", "a photo of the handbag on black", "one plain dress"]


@pytest.fixture(scope="module")
def pipeline():
    return bundled_pipeline("fashion")


@pytest.fixture(scope="module")
def scorer():
    return ArtifactScorer.from_pretrained("fashion")


def generators(count=4):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_only_safetensors_and_text_under_25_megabytes():
    files = [p for p in (FOLDER / "fashion").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt"}
    assert sum(p.stat().st_size for p in files) < 25e6


def test_the_threshold_is_certified_for_the_default_sampling(pipeline, scorer):
    _, defaults = pipeline
    rule = scorer.config.threshold
    assert (rule.max_risk, rule.confidence, rule.unit) == (0.05, 0.95, "image")
    assert rule.num_inference_steps == defaults["num_inference_steps"]
    assert rule.guidance_scale == defaults["guidance_scale"]
    assert rule.num_clean > 4_000


def test_the_commands_and_arguments_of_the_readme_take_the_bundled_scorer(scorer, tmp_path):
    channels = scorer.config.latent_space.channels
    x0 = torch.randn(3, 2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    Trajectory(PROMPTS[:3], [1, 2, 3], [7, 49], torch.tensor([-3.0, 6.0]), {}, 50, x0=x0).save(tmp_path / "run")
    done = run("score", tmp_path / "run", "--scorer", "fashion", "--out", tmp_path / "scored")
    assert done.exit_code == 0 and "3 images, mean final artifact_prob" in done.stdout
    assert ArtifactGuard(scorer, threshold=0.6).rule.boundary == scorer.config.threshold.boundary


def test_the_promise_is_taken_back_where_the_sampling_is_another(pipeline, scorer):
    pipe, defaults = pipeline
    guard = ArtifactGuard(scorer, on_abort="record")

    def told(**changes):
        return guard(pipe, PROMPTS[:1], generator=generators(1), **{**defaults, **changes}).report().splitlines()[1]

    assert told().startswith("false aborts <= 5 % (95 % sure")
    assert told(eta=1.0).endswith("NOT certified in this setting: eta 1 instead of 0")
    assert told(height=64, width=32).endswith("NOT certified in this setting: size 64x32 instead of 32x32")
    changed = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        changed.conv_out.bias += 0.01
    pipe = type(pipe)(**{**pipe.components, "unet": changed}, requires_safety_checker=False)
    assert told().endswith("NOT certified in this setting: another denoiser (weights or precision)")


def test_record_leaves_images_bit_identical_and_drop_keeps_the_rows(pipeline, scorer):
    pipe, defaults = pipeline
    settings = {**defaults, "num_inference_steps": 8, "output_type": "pt"}
    plain = pipe(PROMPTS, generator=generators(), **settings).images
    recorded = ArtifactGuard(scorer, on_abort="record")(pipe, PROMPTS, generator=generators(), **settings)
    assert torch.equal(recorded.images, plain)
    # A threshold that two of the four images pass before the last step: they go, the others must not notice.
    scores = recorded.trajectory.scores["artifact_prob"][:, :-1].amax(dim=1).sort().values
    certified = dataclasses.replace(scorer.config.threshold, rule="posterior", boundary=None)
    rule = dataclasses.replace(certified, threshold=scores[1:3].mean().item())
    dropped = ArtifactGuard(scorer, threshold=rule)(pipe, PROMPTS, generator=generators(), **settings)
    assert len(dropped.kept_indices) == 2
    torch.testing.assert_close(dropped.images, plain[dropped.kept_indices], atol=1e-4, rtol=0)
    assert dropped.steps_run < dropped.steps_full == 32
    assert "NOT certified" in dropped.report()


def test_the_default_setting_is_reported_as_certified(pipeline, scorer):
    pipe, defaults = pipeline
    out = ArtifactGuard(scorer)(pipe, PROMPTS[:2], generator=generators(2), **defaults)
    assert re.search(r"false aborts <= 5 % \(95 % sure", out.report())
    assert len(out.verdicts) == 2 and len(out.images) == len(out.kept_indices)


def test_guidance_works_and_changes_the_images(pipeline):
    pipe, _ = pipeline
    images = [
        pipe(PROMPTS[:1], generator=generators(1), num_inference_steps=4, guidance_scale=g, output_type="pt").images
        for g in (1.0, 3.0)
    ]
    assert images[0].isfinite().all() and not torch.allclose(*images)


def test_a_prompt_of_other_words_is_drawn_and_has_no_class(pipeline):
    pipe, _ = pipeline
    image = pipe("zebra, 4k!", num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert image.shape == (1, 3, 32, 32)
    assert class_of("zebra, 4k!") is None
    assert (class_of("an ankle boot"), class_of("a t-shirt"), class_of("a button shirt")) == (9, 0, 6)


def test_an_image_is_near_to_the_real_images_of_its_class(pipeline):
    pipe, _ = pipeline
    judge = bundled_judge("fashion")
    classes = [words[0] for words in read_json(FOLDER / "fashion" / "classes.json")]
    settings = {"num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "pt"}
    images = pipe([f"a {name}" for name in classes], generator=generators(10), **settings).images
    margins = torch.stack([judge.margin(images, torch.full((10,), label)) for label in range(10)], dim=1)
    nearest = margins.argmin(dim=1).tolist()
    alike = ({0, 3, 6}, {2, 4, 6}, {5, 7, 9})  # upper garments, with sleeves, and shoes: some look like one another
    assert all(found == k or any({found, k} <= group for group in alike) for k, found in enumerate(nearest))
    assert sum(found == k for k, found in enumerate(nearest)) >= 8
    assert (margins.diagonal() <= 0).all()  # guidance makes images that are hardly ever bad


def test_nothing_else_is_bundled():
    with pytest.raises(CheckpointError, match=r"nothing bundled is called 'nope'; there is: fashion"):
        bundled_pipeline("nope")


def test_foreign_latents_and_an_empty_list_are_refused_before_the_first_step(pipeline, scorer):
    pipe, defaults = pipeline
    guard = ArtifactGuard(scorer)
    with pytest.raises(InputError):
        guard(pipe, [], **defaults)
    scale = pipe.vae.config.scaling_factor
    pipe.vae.register_to_config(scaling_factor=0.18215)
    try:
        with pytest.raises(LatentSpaceError, match="scaling"):
            guard(pipe, PROMPTS, **defaults)
    finally:
        pipe.vae.register_to_config(scaling_factor=scale)
