"""For the tests of the command line: how a command is run, and a bundle it can use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

import moe_artifacts.bundled
import moe_artifacts.checkpoint
from moe_artifacts.cli import app
from moe_artifacts.config import LatentSpaceConfig, ThresholdConfig
from moe_artifacts.judge import FeatureMaps, ManifoldJudge
from tests import tiny
from tests.scorers import tiny_scorer
from training.data.prompts import SYNONYMS

THRESHOLD = ThresholdConfig(
    rule="cumulative",
    threshold=0.02,
    clear_threshold=0.9,
    max_risk=0.05,
    confidence=0.95,
    unit="image",
    num_clean=3210,
    scheduler="DDIMScheduler",
    num_inference_steps=6,
    guidance_scale=1.5,
)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def refused(*arguments: Any) -> str:
    """The single line on stderr."""
    done = run(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def tiny_bundle(folder: Path) -> Path:
    """A bundle of the shape of the real one: random weights, 32x32 images."""
    (folder / "fashion").mkdir()
    tiny.stable_diffusion(sample_size=16).save_pretrained(folder / "fashion" / "pipeline")
    space = LatentSpaceConfig(
        name="tiny", vae_class="AutoencoderKL", channels=4, scaling_factor=0.18215, downsampling=2
    )
    scorer = tiny_scorer(latent_space=space, threshold=THRESHOLD, provenance={"commit": "abc123"})
    scorer.save_pretrained(folder / "fashion" / "scorer")
    torch.manual_seed(0)
    maps = FeatureMaps(2)
    judge = ManifoldJudge(maps, torch.nn.Linear(maps.dim, 4), torch.randn(10, 20, 4), torch.zeros(10), neighbours=3)
    metadata = {"width": "2", "neighbours": "3"}
    save_file(judge.tensors(), folder / "fashion" / "judge.safetensors", metadata)
    (folder / "fashion" / "classes.json").write_text(json.dumps(SYNONYMS))
    settings = {"num_inference_steps": 6, "guidance_scale": 1.5}
    (folder / "fashion" / "defaults.json").write_text(json.dumps(settings))
    return folder


def use_bundle(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What is found under the bundled names is from ``folder``."""
    monkeypatch.setattr(moe_artifacts.bundled, "FOLDER", folder)
    monkeypatch.setattr(moe_artifacts.checkpoint, "BUNDLED", folder)
