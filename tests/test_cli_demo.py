import dataclasses
import json

import pytest
import torch
from PIL import Image

import moe_artifacts.bundled
from moe_artifacts import demo
from moe_artifacts.judge import load_judge
from tests import tiny
from tests.commands import THRESHOLD, refused, run, tiny_bundle, use_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundled"))


@pytest.fixture(autouse=True)
def _bundled(bundle, monkeypatch):
    use_bundle(monkeypatch, bundle)


@pytest.fixture
def scripted(monkeypatch):
    """Batches of three; in each the second image is stopped at the first step and the third is cleared at the second."""
    scorer = tiny.ScriptedScorer(
        abort_at={1: 0}, clear_at={2: 1}, threshold=dataclasses.replace(THRESHOLD, threshold=0.5)
    )
    monkeypatch.setattr(demo.ArtifactScorer, "from_pretrained", lambda name: scorer)
    monkeypatch.setattr(demo, "BATCH", 3)


def test_the_demo_says_what_became_of_every_image(scripted, bundle, tmp_path):
    done = run("demo", "--prompt", "a bag", "--prompt", "a spaceship", "--images", 5, "--seed", 40, "--out", tmp_path)
    assert done.exit_code == 0 and done.stderr == ""
    results = json.loads((tmp_path / "results.json").read_text())
    images = results["images"]
    assert [image["status"] for image in images] == ["kept", "aborted", "cleared", "kept", "aborted"]
    assert [image["decided_after"] for image in images] == [None, 1, 2, None, 1]
    assert [image["prompt"] for image in images] == ["a bag"] * 3 + ["a spaceship"] * 2
    assert [image["seed"] for image in images] == [40, 41, 42, 43, 44]
    assert results["kept_indices"] == [0, 2, 3]
    assert results["denoiser_steps"] == {"guarded": 3 * 6 + 2 * 1, "unguarded": 5 * 6}
    assert results["max_difference"] <= 1e-5  # the rows of another batch size: float32, other orders of addition
    assert images[3]["judged"] == images[4]["judged"] == "unknown class" and images[3]["margin"] is None
    counted = {fate: sum(counts.values()) for fate, counts in results["truth_table"].items()}
    assert counted == {"aborted": 2, "kept": 3}
    assert results["truth_table"]["kept"]["unknown class"] == results["truth_table"]["aborted"]["unknown class"] == 1
    assert images[1]["curves"]["cumulative_artifact_prob"] == [pytest.approx(0.9)] + [None] * 5

    lines = done.stdout.splitlines()
    assert len([line for line in lines if "a bag" in line or "a spaceship" in line]) == 5
    assert "5 images: 3 kept, 2 aborted at step 1 of 6; 10 of 30 denoiser steps not run" in lines
    assert "denoiser steps: 20 with the guard, 30 without (-33.3%)" in lines
    for name in ("grid.png", "curves.png"):
        assert str(tmp_path / name) in lines
        Image.open(tmp_path / name).verify()


def test_the_judge_sees_what_the_same_seed_gives_without_the_guard(scripted, bundle):
    found = demo.run_demo(["a bag", "a coat"], [7, 8], steps=4)
    pipe, _ = moe_artifacts.bundled.bundled_pipeline()
    alone = pipe(
        "a coat",
        num_inference_steps=4,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(8),
        output_type="pt",
    ).images
    torch.testing.assert_close(found.finished[1], alone[0], atol=1e-4, rtol=0)  # float32 in batches of another size
    margin = load_judge(bundle / "fashion" / "judge.safetensors").margin(alone, torch.tensor([4])).item()
    assert found.margins[1] == pytest.approx(margin, abs=1e-4)
    assert found.judged[1] == ("artifacts" if margin > 0 else "clean")
    assert found.guarded.verdicts[1].status == "aborted"


def test_the_demo_runs_with_the_scorer_of_the_bundle_when_nothing_is_kept(tmp_path):
    done = run("demo", "--images", 3, "--out", tmp_path / "new" / "folder")  # any score reaches a threshold of 0.02
    assert done.exit_code == 0
    results = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert results["kept_indices"] == [] and results["max_difference"] is None
    assert "nothing to compare" in done.stdout
    assert results["promise"].startswith("false aborts <= 5 %")
    assert {image["status"] for image in results["images"]} == {"aborted"}


@pytest.mark.parametrize("scheduler", demo.SCHEDULERS)
def test_kept_images_equal_those_without_the_guard_for_every_scheduler(scripted, scheduler):
    found = demo.run_demo(["a bag", "a coat"], [1, 2], steps=5, scheduler=scheduler)
    assert found.guarded.setting.scheduler == demo.SCHEDULERS[scheduler]
    assert found.guarded.kept_indices == [0]
    assert found.max_difference <= 1e-4


def test_the_help_names_every_scheduler():
    words = run("demo", "--help").stdout.replace(",", " ").replace(".", " ").split()
    assert set(demo.SCHEDULERS) <= set(words)


def test_images_are_shared_out_over_all_ten_classes():
    for images in (10, 24, 100):
        prompts, seeds = demo.plan(None, images, seed=5)
        classes = [moe_artifacts.bundled.class_of(prompt) for prompt in prompts]
        assert set(classes) == set(range(10)) and classes == sorted(classes)
        assert seeds == list(range(5, 5 + images))
    assert all(moe_artifacts.bundled.class_of(prompt) == i // 2 for i, prompt in enumerate(demo.PROMPTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", 0], "images must be at least 1, got 0"),
        (["--steps", 0], "steps must be at least 1, got 0"),
        (["--steps", 1001], "steps must be at most 1000"),
        (["--seed", -1], "seed must be between 0 and"),
        (["--prompt", " "], "not empty"),
        (
            ["--prompt", "a bag", "--prompt", "a coat", "--images", 1],
            "images must be at least 2, one per prompt, got 1",
        ),
        (["--scheduler", "heun"], "ddim, ddpm, dpm, euler, euler-a, unipc, pndm, got 'heun'"),
        (["--out", __file__], "exists"),
    ],
)
def test_the_demo_refuses_bad_input_in_one_line(tmp_path, arguments, message):
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    assert message in refused("demo", *arguments, *out)


def test_an_empty_prompt_list_is_refused():
    with pytest.raises(moe_artifacts.InputError, match="at least one text"):
        demo.plan([], images=1, seed=0)


def test_a_damaged_bundle_is_named(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(moe_artifacts.bundled, "FOLDER", tmp_path)
    assert "nothing bundled is called 'fashion'" in refused("demo", "--out", tmp_path / "out")
