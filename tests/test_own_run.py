"""Every stage with one command: which stages, with which arguments, and how long they took."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from training.own import run as own_run

WORDS = ["fashion", "--prompts", "prompts.txt", "--judge", "module:score --bad-below 1", "--model", "ViT-B-32"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run; ``failing`` among their words: that one fails."""
    commands: list[list[str]] = []

    def pretend(command: list[str], check: bool) -> None:
        commands.append(command[1:])
        if "failing" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(own_run.subprocess, "run", pretend)
    return commands


def test_stages_follow_one_another_and_take_their_own_arguments(started: Any, tmp_path: Path) -> None:
    more = [
        "--out",
        str(tmp_path),
        "--device",
        "cuda",
        "--tune=--batch 64",
        "--calibrate=--max-risk 0.1",
        "--pretrained",
        "tag",
    ]
    assert own_run.main([*WORDS, *more]) == 0
    modules = [command[1] for command in started]
    assert modules == [f"training.{name}" for name in (
        "own.collect", "fit_preview", "clip_tune", "embed", "embed", "embed", "own.train", "own.calibrate", "own.evaluate"
    )]  # fmt: skip
    by_name = {command[1]: command[2:] for command in started}
    assert by_name["training.clip_tune"][-2:] == ["--batch", "64"] and "tag" in by_name["training.clip_tune"]
    assert by_name["training.own.calibrate"][-2:] == ["--max-risk", "0.1"]
    assert all("cuda" in words for name, words in by_name.items() if name != "training.own.evaluate")
    for module in modules:  # as python -m finds them
        assert hasattr(importlib.import_module(module), "main")


def test_time_is_counted_over_all_runs_and_a_failure_is_named(
    started: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(own_run.time, "perf_counter", lambda: float(next(clock)))
    out = ["--out", str(tmp_path)]
    assert own_run.main([*WORDS, *out, "--train", "failing"]) == 1
    assert "python -m training.own.train failed" in capsys.readouterr().err
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert len(seconds) == 7 and set(seconds.values()) == {1.0}  # the one that failed took its time, too
    monkeypatch.setattr(own_run.OwnRun, "_has_preview", lambda self, path: True)  # it was made: one stage less
    assert own_run.main([*WORDS, *out]) == 0
    again = json.loads((tmp_path / "seconds.json").read_text())
    assert {name: again[name] for name in seconds} == dict.fromkeys(seconds, 2.0) | {"training.fit_preview 1": 1.0}
    assert {name for name in again if name not in seconds} == {"training.own.calibrate 1", "training.own.evaluate 1"}
