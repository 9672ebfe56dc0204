"""benchmarks/siblings.py and posterior.py on a small made-up file of the published format."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks import posterior as posterior_benchmark
from benchmarks import siblings
from moe_artifacts.decision import abort_step
from moe_artifacts.policy import Run, outcome
from moe_artifacts.scalar.posterior import ScalarPosterior


@pytest.fixture
def data(tmp_path):
    """30 prompts of 12 images: final score = level of the prompt + the image's own, seen through noise that shrinks."""
    rng = np.random.default_rng(0)
    final = 2 * rng.normal(size=(30, 1, 1)) + rng.normal(size=(30, 12, 1))
    scores = final + rng.normal(size=(30, 12, 20)) * np.linspace(1, 0.05, 20)
    scores[:, :, 19:] = final
    scores = scores.astype(np.float32)
    path = tmp_path / "scores.npz"
    np.savez(path, flux_imr_base=scores, flux_imr_naft=np.where(np.arange(20) < 15, scores, np.nan))
    return path


def test_siblings_gain_within_prompts(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "siblings.json"
    arguments = f"--data {data} --model flux --reward imr --splits 3 --out {out}"
    monkeypatch.setattr(sys, "argv", ["siblings", *arguments.split()])
    siblings.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(r["label"], r["batch"]) for r in rows] == [(x, n) for x in ("within", "pooled") for n in (1, 2, 4, 8)]
    alone, eight = rows[0], rows[3]
    assert eight["auroc_pooled"] > alone["auroc_pooled"] + 0.1  # the level of the prompt is known, and taken off
    assert eight["cost_per_clean_minus_alone"] < 0
    assert "auroc_within_low" not in alone and eight["auroc_within_low"] < eight["auroc_within_high"]
    assert all(r["false_abort_rate"] <= 0.05 for r in rows)


def test_posterior_against_the_reference(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "posterior.json"
    arguments = f"--data {data} --model flux --reward imr --splits 2 --out {out}"
    monkeypatch.setattr(sys, "argv", ["posterior", *arguments.split()])
    posterior_benchmark.main()
    rows = json.loads(out.read_text())["rows"]
    assert [r["method"] for r in rows] == ["last-four", "ours", "no-final"] * 2
    for row in rows:
        assert 0.5 < row["auroc_pooled"] < 1 and 0 < row["log_loss"] < 0.7


def test_batches_are_images_of_one_prompt():
    prompt = np.repeat([3, 7], [10, 5])
    group = siblings.batches(prompt, 4, np.random.default_rng(0))
    for name in np.unique(group):
        assert len(np.unique(prompt[group == name])) == 1
    assert sorted(np.unique(group, return_counts=True)[1].tolist()) == [1, 2, 4, 4, 4]
    assert len(np.unique(siblings.batches(prompt, 1, np.random.default_rng(0)))) == 15


def test_simulation_without_siblings_is_the_plain_rule(data):
    from benchmarks.reward_data import load_rewards, worst

    rewards = load_rewards(data, "flux", "imr")
    runs = rewards.runs(worst(rewards.final, rewards.prompt, 0.2, "pooled"))
    runs = runs.steps(np.isin(runs.calls, siblings.CALLS))
    fitted = ScalarPosterior.fit(runs)
    import torch

    statistic = torch.from_numpy(np.maximum.accumulate(fitted.prob(runs.scores), axis=1))
    found = siblings.simulate(fitted, runs, np.arange(len(runs)), 0.4)
    np.testing.assert_array_equal(found, abort_step(statistic, 0.4))
    run = Run(runs.bad, runs.calls, 0.1, runs.total_calls)
    assert siblings.matched(
        lambda t: siblings.simulate(fitted, runs, np.arange(len(runs)), t), run
    ).false_abort_rate == (pytest.approx(0.05, abs=1.5 / (~runs.bad).sum()))
    assert outcome(run, found).recall > 0.3


def test_aurocs_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    prompt, bad = np.repeat(np.arange(6), 20), rng.random(120) < 0.3
    bad[:20] = True  # a prompt of one class has no pairs
    prob = np.round(rng.random(120), 1)  # with ties
    pooled, within = siblings.aurocs(prob, bad, prompt)
    assert pooled == pytest.approx(roc_auc_score(bad, prob))
    parts = [
        (roc_auc_score(bad[r], prob[r]), bad[r].sum() * (~bad[r]).sum()) for r in (prompt == p for p in range(1, 6))
    ]
    assert within == pytest.approx(np.average([a for a, _ in parts], weights=[n for _, n in parts]))
