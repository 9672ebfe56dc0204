"""A folder of images becomes a guarded pipeline with one command, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from moe_artifacts import ArtifactGuard, ArtifactScorer
from tests.class_folder import discs_and_bars
from training.own.images import main

# So short that all images look alike: those of one class are good, those of the other bad.
TINY = ["--generator=--steps 4 --vae-steps 4", "--judges=--steps 20"]


@pytest.mark.slow
def test_a_folder_becomes_a_guarded_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_ARTIFACTS_TRACKER", "none")
    images = discs_and_bars(tmp_path / "images", 200)
    work = tmp_path / "work"
    count = "train=400,validation=100,calibration=400,test=100"
    command = [str(images), "--out", str(work), "--count", count, "--classify-steps", "20", *TINY]
    assert main(command) == 0
    evaluation = json.loads((work / "own" / "scorer" / "evaluation.json").read_text())
    assert {row["table"] for row in evaluation["rows"]} >= {"quality", "rules"}
    pipe = DiffusionPipeline.from_pretrained(work / "pipeline")
    guard = ArtifactGuard(ArtifactScorer.from_pretrained(work / "own" / "scorer"))
    out = guard(pipe, ["a photo of a disc", "a bar"] * 2, num_inference_steps=50, guidance_scale=1.0)
    assert len(out.verdicts) == 4

    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    assert main(command) == 0  # finds everything done
    after = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    repeated = {path.relative_to(work).parts[:2] for path in after if after[path] != before.get(path)}
    assert repeated <= {("own", "scorer")}, repeated


def test_a_stage_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "work")]) == 1
    assert "error: python -m training.generator failed" in capsys.readouterr().err
