import dataclasses
import json
import re

import pytest
from PIL import Image

from moe_artifacts.guard.run_folder import read_run
from moe_artifacts.scorer import ArtifactScorer
from tests import tiny
from tests.commands import THRESHOLD, refused, run, tiny_bundle, use_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundled"))


@pytest.fixture(autouse=True)
def _bundled(bundle, monkeypatch):
    use_bundle(monkeypatch, bundle)


class Scorer(tiny.ScriptedScorer):
    """The second image of every batch is stopped at the first step."""

    def __init__(self):
        super().__init__(abort_at={1: 0}, threshold=dataclasses.replace(THRESHOLD, threshold=0.5))

    def to(self, device):
        self.device = device
        return self


@pytest.fixture
def scorer(monkeypatch):
    scorer = Scorer()
    scorer.asked_for = []
    monkeypatch.setattr(ArtifactScorer, "from_pretrained", lambda name: scorer.asked_for.append(name) or scorer)
    return scorer


def test_fills_a_folder_that_the_audit_reads(scorer, tmp_path):
    arguments = ("--prompt", "a bag", "--prompt", "a coat", "--images-per-prompt", 2, "--batch-size", 4, "--out")
    done = run("generate", *arguments, tmp_path / "run", "--audit-rate", 1, "--seed", 5)
    assert done.exit_code == 0 and done.stderr == ""
    assert scorer.asked_for == ["fashion"] and scorer.device.type == "cpu"
    assert "4 of 4 images in 5 attempts and 2 waves: 1 finished for the audit" in done.stdout
    record = read_run(tmp_path / "run")
    assert record.settings["call"] == {"num_inference_steps": 6, "guidance_scale": 1.5}  # the bundle's own
    assert record.settings["seed"] == 5 and record.settings["audit_rate"] == 1
    assert f"audited images: 1 in {tmp_path / 'run' / 'audited'}" in done.stdout
    with Image.open(tmp_path / "run" / "images" / "p00000-a0000.png") as picture:
        assert picture.text["prompt"] == "a bag" and picture.size == (32, 32)
    judged = run("audit", tmp_path / "run", "--judge", "fashion")
    assert judged.exit_code == 0
    assert "labels         1 of 1 audited images and 4 of 4 kept ones, from the judge 'fashion'" in judged.stdout

    again = run("generate", *arguments, tmp_path / "run", "--audit-rate", 1, "--seed", 5)
    assert again.stdout == done.stdout and len(read_run(tmp_path / "run").attempts) == 5  # nothing was made twice
    other = refused("generate", *arguments, tmp_path / "run", "--seed", 6)
    assert "other settings" in other and "seed 6 instead of 5" in other


def test_takes_prompts_from_a_file_and_settings_from_the_command(scorer, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa\u2028bag\n\n  ein Schuh f\u00fcr 5 \u20ac \r\n", encoding="utf-8")
    arguments = ["--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "run", "--batch-size", 2]
    limits = ["--steps", 4, "--guidance-scale", 3, "--max-attempts", 1, "--on-abort", "mask", "--dtype", "bfloat16"]
    done = run("generate", *arguments, *limits)
    assert done.exit_code == 0
    record = read_run(tmp_path / "run")
    assert record.settings["prompts"] == ["a\u2028bag", "ein Schuh f\u00fcr 5 \u20ac"]
    assert record.settings["call"] == {"num_inference_steps": 4, "guidance_scale": 3}
    assert record.settings["dtype"] == "bfloat16"
    assert "1 of 2 images in 2 attempts and 1 waves: 1 aborted" in done.stdout
    assert "8 denoiser steps run, 0 of 8 not run" in done.stdout  # mask
    assert "audited" not in done.stdout


@pytest.mark.parametrize(("steps", "told"), [(0, "at least 1, got 0"), (5000, "at most 1000, .* got 5000")])
def test_a_number_of_steps_that_no_run_can_take_leaves_no_folder(scorer, tmp_path, steps, told):
    arguments = ["--prompt", "a bag", "--out", tmp_path / "run"]
    assert re.search(told, refused("generate", *arguments, "--steps", steps))
    assert not (tmp_path / "run").exists()
    assert run("generate", *arguments, "--steps", 2).exit_code == 0


def test_stops_before_the_wave_that_would_cost_too_much(scorer, tmp_path):
    arguments = ["--prompt", "a bag", "--images-per-prompt", 4, "--batch-size", 2, "--out", tmp_path / "run"]
    done = run("generate", *arguments, "--max-denoiser-calls", 18)
    assert done.exit_code == 0 and "1 of 4 images in 2 attempts and 1 waves" in done.stdout
    assert sum(wave.steps_run for wave in read_run(tmp_path / "run").waves) == 7  # another two images may take 12


def test_a_pipeline_of_ones_own_is_read_from_its_folder(scorer, bundle, tmp_path):
    folder = bundle / "fashion" / "pipeline"
    arguments = ["--prompt", "a bag", "--steps", 3, "--pipeline", folder, "--out", tmp_path / "run"]
    assert "--scorer is needed" in refused("generate", *arguments)
    done = run("generate", *arguments, "--scorer", bundle / "fashion" / "scorer")
    assert done.exit_code == 0 and "1 of 1 images" in done.stdout
    assert scorer.asked_for == [str(bundle / "fashion" / "scorer")]
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["call"] == {"num_inference_steps": 3} and settings["pipeline"] == "StableDiffusionPipeline"


def test_the_real_scorer_of_the_bundle_goes_through(tmp_path):
    done = run("generate", "--prompt", "a bag", "--max-attempts", 1, "--out", tmp_path / "run")
    assert done.exit_code == 0 and "0 of 1 images in 1 attempts" in done.stdout  # any score reaches a threshold of 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give what to generate with --prompt, or a file of prompts with --prompts"),
        (["--prompt", "a bag", "--prompts", __file__], "one of the two"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "a bag", "--pipeline", "nothing"], "neither bundled, nor a folder, nor a Hub id"),
        (["--prompt", "a bag", "--pipeline", "../escape"], "neither bundled, nor a folder, nor a Hub id"),
        (["--prompt", "a bag", "--scorer", "nothing"], "no checkpoint 'nothing'"),
        (["--prompt", "a bag", "--images-per-prompt", 0], "images_per_prompt must be a whole number of at least 1"),
        (["--prompt", "a bag", "--batch-size", 0], "batch_size must be a whole number of at least 1"),
        (["--prompt", "a bag", "--max-attempts", 0], "max_attempts must be a whole number of at least 1"),
        (["--prompt", "a bag", "--audit-rate", 1.5], "audit_rate"),
        (["--prompt", "a bag", "--device", "abacus"], "device 'abacus' cannot be used here"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    assert message in refused("generate", *arguments, "--out", tmp_path / "run")


def test_files_without_prompts_and_folders_without_a_pipeline_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("f\u00fcr".encode("latin-1"))
    out = ["--out", tmp_path / "run"]
    assert "at least one prompt, one a line" in refused("generate", "--prompts", tmp_path / "empty.txt", *out)
    assert "in UTF-8" in refused("generate", "--prompts", tmp_path / "latin.txt", *out)
    assert "cannot be read" in refused(
        "generate", "--prompt", "a bag", "--pipeline", tmp_path, "--scorer", "fashion", *out
    )


def test_a_missing_scorer_is_said_before_the_pipeline_is_read_which_may_have_to_be_fetched(tmp_path):
    (tmp_path / "pipeline").mkdir()  # reading it would fail
    arguments = ["--prompt", "a bag", "--pipeline", tmp_path / "pipeline", "--out", tmp_path / "run"]
    assert "--scorer is needed" in refused("generate", *arguments)
    assert "no-scorer" in refused("generate", *arguments, "--scorer", tmp_path / "no-scorer")
