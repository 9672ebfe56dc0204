import pytest
import torch

from moe_artifacts.trajectory import Trajectory
from tests.commands import refused, run, tiny_bundle, use_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundled"))


@pytest.fixture(autouse=True)
def _bundled(bundle, monkeypatch):
    use_bundle(monkeypatch, bundle)


def test_score_writes_scores_and_counts_aborts(bundle, tmp_path):
    trajectory = Trajectory(
        prompts=["a bag", "a coat"],
        seeds=[1, 2],
        step=[2, 9],
        log_snr=torch.tensor([-1.0, 5.0]),
        scores={},
        num_steps=10,
        x0=torch.randn(2, 2, 4, 16, 16),
    )
    trajectory.save(tmp_path / "runs" / "a")
    done = run("score", tmp_path / "runs", "--scorer", "fashion", "--out", tmp_path / "out")
    assert done.exit_code == 0
    (line,) = done.stdout.splitlines()
    scored = Trajectory.load(tmp_path / "out" / "a")
    mean = scored.scores["artifact_prob"][:, -1].mean().item()
    assert line == f"{tmp_path / 'out' / 'a'}: 2 images, mean final artifact_prob {mean:.3f}, 2 would be aborted"
    again = run("score", tmp_path / "runs", "--scorer", "fashion", "--out", tmp_path / "out")
    assert again.stdout == f"{line}, scored before\n"
    assert "not a trajectory folder" in refused("score", tmp_path, "--scorer", "fashion", "--out", tmp_path / "new")
