"""A folder of images becomes a guarded pipeline with one command, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from moe_artifacts import ArtifactGuard, ArtifactScorer
from training.own.images import main

TINY = ["--generator=--steps 40 --vae-steps 40", "--judges=--steps 60"]


def discs_and_bars(folder: Path, count: int) -> Path:
    """Two classes of coloured pictures of several shapes and formats."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:36j, -1:1:40j]
    for number in range(count):
        middle, size = rng.uniform(-0.3, 0.3, 2), rng.uniform(0.3, 0.6)
        disc = np.hypot(x - middle[0], y - middle[1]) < size
        bar = abs(x - middle[0]) < size / 2
        for name, shape in (("disc", disc), ("bar", bar)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            colours = rng.integers(0, 256, (2, 3), dtype=np.uint8)
            picture = Image.fromarray(np.where(shape[..., None], colours[0], colours[1]).astype(np.uint8))
            picture.save(folder / name / f"{number:03d}.{'jpg' if number % 2 else 'png'}")
    return folder


@pytest.mark.slow
def test_a_folder_becomes_a_guarded_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_ARTIFACTS_TRACKER", "none")
    images = discs_and_bars(tmp_path / "images", 200)
    work = tmp_path / "work"
    count = "train=400,validation=100,calibration=400,test=100"
    command = [str(images), "--out", str(work), "--count", count, "--classify-steps", "20", *TINY]
    assert main(command) == 0
    evaluation = json.loads((work / "own" / "scorer" / "evaluation.json").read_text())
    assert evaluation["results"]
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
