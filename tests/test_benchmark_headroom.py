"""What could be reached at best is never worse than what is reached, and never better than perfect knowledge."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from benchmarks.headroom import LIMITS, economic, headroom, known_early
from moe_artifacts.policy import apply_rule, cheapest_threshold, perfect
from training.scored import Scored

CALLS = np.array([7, 12, 25, 50])
COST = 0.1


def scored(seed: int, images: int = 2_000) -> tuple[Scored, np.ndarray]:
    """Posteriors that get better with every check, and the evidence that they grow towards."""
    rng = np.random.default_rng(seed)
    evidence = rng.normal(size=images) - 1
    noise = rng.normal(size=(images, len(CALLS))) * np.array([1.5, 1.0, 0.5, 0.2])
    prob = torch.from_numpy(1 / (1 + np.exp(-2 * (evidence[:, None] + noise)))).float()
    at = torch.linspace(0.1, 1, len(CALLS)).expand(images, -1)
    zero = torch.zeros_like(prob)
    bad = torch.from_numpy((evidence > 0).astype(np.float32))
    return Scored(prob, zero, zero[..., None], at, zero, CALLS, 50, bad, np.zeros(images, dtype=np.int64)), evidence


def test_knowing_the_finished_image_early_is_what_perfect_knowledge_is_but_for_the_price_of_the_check() -> None:
    test, evidence = scored(0)
    run = test.run(COST)
    once, paths = known_early(evidence, run, 1)
    found = apply_rule(once, paths.statistic, cheapest_threshold(once, paths.statistic, 0.01))
    assert found.recall == 1 and found.false_abort_rate <= 0.01
    paid = COST / 50  # every image is looked at once, in full runs
    assert found.cost_per_clean == pytest.approx(perfect(run, 1).cost_per_clean + paid, abs=0.01)
    assert known_early(evidence * 3 - 7, run, 1)[1].statistic.tolist() == paths.statistic.tolist()  # its order counts


@pytest.mark.parametrize("limit", LIMITS)
def test_the_scorer_stays_within_the_limit(limit: float) -> None:
    (test, _), (held_out, _) = scored(0), scored(1)
    run, paths = economic(test, held_out, COST, limit)
    threshold = cheapest_threshold(run, paths.statistic, limit, clear=paths.clear)
    assert 0 < apply_rule(run, paths.statistic, threshold, paths.clear).false_abort_rate <= limit
    assert run.calls.tolist() == [7, 12, 25]  # after the last check an abort saves nothing


def test_rows_are_ordered_by_what_is_known_and_by_the_limit() -> None:
    (test, evidence), (held_out, _) = scored(0), scored(1)
    rows = headroom(test, evidence, held_out, COST)
    share = {(row["knowledge"], row["max_false_aborts"]): row["share_of_perfect"] for row in rows}
    assert len(share) == 3 * len(LIMITS)
    for limit in LIMITS:
        assert share["scorer", limit] < share["finished image", limit] <= share["second judge", limit] < 1
    for name in ("second judge", "finished image", "scorer"):
        values = [share[name, limit] for limit in LIMITS]
        assert all(wider >= narrow - 0.01 for narrow, wider in itertools.pairwise(values))
    for row in rows:
        assert row["share_of_perfect_low"] <= row["share_of_perfect"] <= row["share_of_perfect_high"]
        assert row["share_of_perfect"] == pytest.approx(row["cost_per_clean"] / row["perfect_cost_per_clean"])
