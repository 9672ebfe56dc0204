"""docs/generate.md runs from top to bottom on the bundled pipeline, with fewer steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from moe_artifacts.cli import app

DOC = Path(__file__).parents[1] / "docs" / "generate.md"


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "sh", "python", "python", "python"]
    names: dict = {}
    for number, (kind, block) in enumerate(blocks):
        if kind == "sh":
            program, *arguments = shlex.split(block)
            assert program == "moe-artifacts"
            result = CliRunner().invoke(app, [*arguments, "--steps", "10"])
            assert result.exit_code == 0, result.output
            assert "4 of 4 images" in result.output
            continue
        if number == 0:
            setup, rest = block.split("\nrun = ", 1)
            exec(compile(setup, DOC.name, "exec"), names)
            names["settings"]["num_inference_steps"] = 10
            block = f"run = {rest}"
        exec(compile(block, DOC.name, "exec"), names)
        if "again =" in block:
            pixels = [np.asarray(image, dtype=int) for image in (names["again"], names["run"].images[0].image)]
            assert np.abs(pixels[0] - pixels[1]).max() <= 1  # the other side of a rounding
    printed = capsys.readouterr().out
    assert "12 of 12 images in" in printed and "denoiser steps run" in printed
    assert "12 images 0.05" in printed
    assert printed.splitlines()[-1] == "(32, 32)"
    assert "again" in names
