"""The evaluation's tables on trajectories whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import readme
from moe_artifacts.config import ThresholdConfig
from training import metrics, tables
from training.scored import Scored

COUNT = 400
CALLS = np.array([7, 12, 17, 25, 50])


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    monkeypatch.setattr(tables, "shipped_rules", lambda: {"bad_rate": 0.25, "class_rate": [0.1, 0.4]})
    for module in (tables, metrics):
        monkeypatch.setattr(module, "bootstrap", lambda measure, count, **_: (measure(np.arange(count)),) * 2)


def scored(prob_of_bad: float, prob_of_clean: float) -> Scored:
    """Every fourth image is bad; the posterior knows, more or less, and all mass exits at the first check."""
    bad = torch.arange(COUNT) % 4 == 0
    label = torch.arange(COUNT) // 4 % 2
    prob = torch.where(bad, prob_of_bad, prob_of_clean)[:, None].expand(-1, len(CALLS)).clone()
    at = torch.linspace(0.2, 1.0, len(CALLS)).expand(COUNT, -1)
    before = torch.cat([torch.zeros(COUNT, 1), at[:, :-1]], dim=1)
    return Scored(
        prob=prob,
        mass=torch.full_like(prob, 30.0),
        state=torch.zeros(COUNT, len(CALLS), 3),
        at=at,
        before=before,
        calls=CALLS,
        total_calls=50,
        label=bad.float(),
        prompt=label.numpy(),
    )


def test_a_scorer_that_knows_has_perfect_figures():
    rows = tables.quality(scored(1.0, 0.0))
    assert [row["share"] for row in rows] == pytest.approx([0.14, 0.24, 0.34, 0.5, 1.0])
    for row in rows:
        assert (row["auroc_within"], row["auroc_pooled"], row["ece"], row["brier"]) == (1.0, 1.0, 0.0, 0.0)
        assert row["auroc_prompt_only"] == 0.5  # both classes have the same share of bad images here
        assert row["ece_base_rate"] == pytest.approx(0.0, abs=1e-9)
        assert row["brier_base_rate"] == pytest.approx(0.25 * 0.75)


def test_a_scorer_that_is_too_sure_is_not_calibrated():
    (row, *_) = tables.quality(scored(0.9, 0.3))
    assert row["auroc_within"] == 1.0
    assert row["ece"] == pytest.approx(0.25 * 0.1 + 0.75 * 0.3, abs=1e-6)


def test_transfer_states_what_the_threshold_does():
    rule = ThresholdConfig(rule="posterior", threshold=0.5)
    row = tables.transfer(scored(0.9, 0.1), rule, "dpm", 25, reference=0.99, promise="nothing")
    assert (row["recall"], row["false_abort_rate"]) == (1.0, 0.0)
    assert row["auroc_drop"] == pytest.approx(-0.01)
    assert row["steps_saved"] == pytest.approx(0.25 * 43 / 50)
    assert 0 < row["false_abort_rate_high"] < 0.02  # no abort among 300 clean images


def test_readme_tables_are_filled_between_their_marks_only(monkeypatch):
    monkeypatch.setattr(readme, "TABLES", {"savings": lambda: "| new |"})
    page = "before\n<!-- savings -->\n| old |\n<!-- /savings -->\nafter"
    assert readme.filled(page) == "before\n<!-- savings -->\n| new |\n<!-- /savings -->\nafter"
    assert readme.filled("nothing here") == "nothing here"
