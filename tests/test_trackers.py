"""Which trackers may be named."""

from __future__ import annotations

import argparse

import pytest

from moe_artifacts.errors import InputError
from training.own import train as own_train
from training.trackers import add_tracker_option, chosen_tracker, open_tracker
from training.workspace import Stage


def test_a_tracker_is_that_of_the_option_else_of_the_environment_else_tensorboard(monkeypatch):
    monkeypatch.delenv("MOE_ARTIFACTS_TRACKER", raising=False)
    assert chosen_tracker() == "tensorboard"
    monkeypatch.setenv("MOE_ARTIFACTS_TRACKER", "none")
    assert chosen_tracker() == "none"
    assert chosen_tracker("tensorboard") == "tensorboard"
    parser = argparse.ArgumentParser()
    add_tracker_option(parser)
    assert parser.parse_args([]).tracker is None
    assert parser.parse_args(["--tracker", "wandb"]).tracker == "wandb"


def test_a_tracker_that_is_not_there_is_an_error_before_anything_is_done(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"tracker must be none or one of aim, .*trackio, wandb, got 'tensorbord'"):
        chosen_tracker("tensorbord")
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(InputError, match="the tracker wandb is not installed"):
        chosen_tracker("wandb")
    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(tmp_path))
    with pytest.raises(InputError, match="tracker must be none"):
        Stage("wrong", tracker="tensorbord")
    assert not (tmp_path / "wrong").exists()
    assert own_train.main([str(tmp_path), "--out", str(tmp_path / "heads"), "--tracker", "tensorbord"]) == 2
    assert "tracker must be none or one of" in capsys.readouterr().err
    assert not (tmp_path / "heads").exists()


def test_figures_reach_the_tracker(tmp_path):
    tracker = open_tracker("tensorboard", tmp_path)
    tracker.log({"loss": 0.25}, step=3)
    tracker.end_training()
    assert [path for path in tmp_path.rglob("events.out.tfevents.*") if path.stat().st_size > 0]
