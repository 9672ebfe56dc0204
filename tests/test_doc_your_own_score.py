"""docs/your-own-score.md runs from top to bottom; the bundled pipeline and judge stand in for Stable Diffusion and ImageReward."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from moe_artifacts.cli import app

DOC = Path(__file__).parents[1] / "docs" / "your-own-score.md"
STAND_IN = """
import torch

from moe_artifacts import ArtifactScorer, bundled_pipeline
from moe_artifacts.bundled import bundled_judge, class_of

pipe, settings = bundled_pipeline("fashion")
settings["num_inference_steps"] = 6
preview = ArtifactScorer.from_pretrained("fashion").preview
judge = bundled_judge("fashion")


def score(previews, prompts):
    return -judge.margin(previews, torch.tensor([class_of(prompt) for prompt in prompts]))


words = ["a dress", "a coat", "an ankle boot", "a bag", "a shirt", "a sandal"]
prompts = [f"{word} number {number}" for number in range(24) for word in words]
batch_size = 48
"""


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "python", "python", "sh", "python", "python"]
    assert "from_pretrained" in blocks[0][1]  # the one that needs downloads
    names: dict[str, object] = {}
    for kind, block in [("python", STAND_IN), *blocks[1:]]:
        if kind == "python":
            exec(compile(block, DOC.name, "exec"), names)
            continue
        program, *arguments = shlex.split(block)
        assert program == "moe-artifacts"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "cost per clean image" in result.output
    assert re.search(
        r"false aborts <= 10 % \(90 % sure, over the calibration prompts, \w+, 6 steps", capsys.readouterr().out
    )
    scorer, trajectory = names["scorer"], names["trajectory"]
    assert scorer.config.threshold.rule == "posterior"  # type: ignore[attr-defined]
    assert trajectory.scores["score"].isfinite().all() and len(trajectory.step) == 6  # type: ignore[attr-defined]
    assert sorted(path.name for path in Path("my-scorer").iterdir()) == ["config.json", "model.safetensors"]
