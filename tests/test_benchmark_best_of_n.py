from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import best_of_n
from benchmarks.reward_data import CALL_TFLOPS, CHECK_COST, CHECK_TFLOPS
from moe_artifacts.racing import RaceCost, RacePlan

STEPS = 20
COST = RaceCost(tuple(range(1, STEPS)), STEPS, CHECK_COST)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scores that approach the final one; each image twice; noise-aware scores at steps 3 to 14 only."""
    rng = np.random.default_rng(0)
    final = rng.normal(size=(12, 1, 1)) + rng.normal(size=(12, 20, 1))
    left = 1 - np.arange(1, STEPS + 1) / STEPS
    base, aware = (np.float32(final + size * left * rng.normal(size=(12, 20, STEPS))) for size in (2.0, 1.0))
    aware[..., [0, 1, 2, *range(15, STEPS)]] = np.nan
    path = tmp_path_factory.mktemp("rewards") / "rewards.npz"
    np.savez(path, sdxl_pic_base=np.tile(base, (1, 2, 1)), sdxl_pic_naft=np.tile(aware, (1, 2, 1)))
    return path, base, aware


def test_scores_are_noise_aware_where_published_and_repeats_are_left_out(data):
    path, base, aware = data
    runs = best_of_n.load_runs(path, "sdxl", "pic")
    assert runs.scores.shape == (12 * 20, STEPS - 1)  # the last step is the final score, not a check
    np.testing.assert_array_equal(runs.final, base[..., -1].ravel())
    np.testing.assert_array_equal(runs.scores[:, 3:15], aware[..., 3:15].reshape(-1, 12))
    np.testing.assert_array_equal(runs.scores[:, [0, 2, 15, 18]], base[..., [0, 2, 15, 18]].reshape(-1, 4))


@pytest.mark.parametrize(("tflops", "runs", "starts"), [(400, 2, 6), (1000, 5, 16), (2000, 10, 33), (4000, 20, 65)])
def test_the_baselines_start_as_many_as_the_budget_pays_for(tflops, runs, starts):
    budget = tflops / CALL_TFLOPS
    assert best_of_n.best_of_n_plan(COST, budget, 200).counts == (runs,)
    assert runs * (20 * 9.9 + 1.2) <= tflops < (runs + 1) * (20 * 9.9 + 1.2)

    plan = best_of_n.ttsnap_plan(COST, budget, 200)
    a, b, c, d = plan.counts
    assert (a, b, c, d) == (starts, round(0.4 * a), round(0.4 * b), max(1, round(0.5 * c)))
    # Steps 2, 6, 11 and 19 come after 3, 7, 12 and 20 calls.
    spent = a * (3 * 9.9 + 1.2) + b * (4 * 9.9 + 1.2) + c * (5 * 9.9 + 1.2) + d * (8 * 9.9 + 1.2)
    assert plan.cost(COST) * CALL_TFLOPS == pytest.approx(spent)
    assert spent <= tflops < spent + 3 * 9.9 + CHECK_TFLOPS + 4 * 9.9 + CHECK_TFLOPS + 5 * 9.9 + 1.2 + 8 * 9.9 + 1.2
    assert best_of_n.ttsnap_plan(COST, budget, 5).counts[0] == 5  # no more than there are


def test_pruning_by_score_agrees_with_the_loop(data):
    runs = best_of_n.load_runs(data[0], "sdxl", "pic")
    order = best_of_n.draw_orders(runs, 2, seed=3)
    plan = RacePlan((2, 6, 11), (12, 5, 2, 1))
    found = best_of_n.pruned_by_score(runs, order, plan)
    for prompt, number in np.ndindex(12, 2):
        alive = list(order[prompt, number, :12])
        for check, count in ((2, 5), (6, 2), (11, 1)):
            alive = sorted(alive, key=lambda image: -runs.scores[image, check])[:count]
        assert found[prompt, number] == runs.final[alive[0]]


def test_it_writes_a_row_for_every_budget_and_method(data, tmp_path):
    out = tmp_path / "best_of_n.json"
    arguments = ["--data", str(data[0]), "--model", "sdxl", "--reward", "pic", "--orders", "2", "--changes", "6"]
    best_of_n.main([*arguments, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["budget"], row["method"]) for row in rows] == [
        (budget, method) for budget in (400, 1000, 2000, 4000) for method in ("best-of-n", "ttsnap", "ours")
    ]
    for plain, snap, ours in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert ours["minus_ttsnap"] == pytest.approx(ours["value"] - snap["value"])
        assert ours["minus_best_of_n"] == pytest.approx(ours["value"] - plain["value"])
        assert ours["low"] <= ours["minus_ttsnap"] <= ours["high"]


def test_the_interval_is_that_of_a_mean_over_prompts():
    difference = np.random.default_rng(1).normal(0.3, 1, size=400)
    found = best_of_n.interval(difference)
    error = 1.96 * difference.std() / 20
    assert found["mean"] == pytest.approx(difference.mean())
    assert [found["low"], found["high"]] == pytest.approx(
        [difference.mean() - error, difference.mean() + error], abs=0.01
    )
