from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student

from benchmarks import policy, rules, scale_policy
from benchmarks.prefixes import batches, logistic
from benchmarks.reward_data import load_rewards, worst
from benchmarks.rules import LIMIT, Task, boundary, chosen, highest, in_a_row, never_clearing, prompt_only, ranks
from moe_artifacts.policy import apply_rule, matched_threshold

PROMPTS, IMAGES, STEPS = 20, 16, 8


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores that close in on the final one, in the published format; the last two steps are not scored."""
    rng = np.random.default_rng(0)
    final = rng.normal(size=(PROMPTS, 1, 1)) + rng.normal(size=(PROMPTS, IMAGES, 1))
    base = final + rng.normal(size=(PROMPTS, IMAGES, STEPS)) * np.linspace(1.5, 0, STEPS)
    naft = base.copy()
    naft[:, :, -2:] = np.nan
    path = tmp_path_factory.mktemp("data") / "rewards.npz"
    np.savez(path, flux_imr_naft=naft.astype(np.float32), flux_imr_base=base.astype(np.float32))
    return path


@pytest.fixture(scope="module")
def task(data_file: Path) -> Task:
    return make_task(data_file, "within", batch=4)


def make_task(data_file: Path, label: str, batch: int) -> Task:
    data = load_rewards(data_file, "flux", "imr")
    runs = data.runs(worst(data.final, data.prompt, 0.3, label))
    return Task.prepare(runs, batch, np.flatnonzero(data.prompt < 12), check_cost=0.12, images=12, seed=0)


# --- posteriors at a choice of steps ---------------------------------------------------------------------------------


def test_batches_hold_images_of_one_prompt_in_order() -> None:
    assert batches(np.array([0, 0, 0, 1, 1, 1, 1]), 2).tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert batches(np.array([5, 5, 9]), 1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("batch", [1, 3, 16])  # 3: the last batch of a prompt is smaller
def test_what_is_known_is_what_the_model_predicts(data_file: Path, batch: int) -> None:
    task = make_task(data_file, "pooled", batch)
    prefixes, steps, rows = task.posterior.prefixes, (1, 3, 4), np.arange(192, 320)
    total, within = prefixes.known(steps, rows)
    group = batches(task.runs.prompt, batch)[rows]
    for place in (0, 7, 63):
        # The image itself at all of the steps, its siblings at the first.
        seen = np.full((len(rows), task.runs.scores.shape[1]), np.nan)
        seen[:, steps[0]] = task.runs.scores[rows, steps[0]]
        seen[place, list(steps)] = task.runs.scores[rows[place], list(steps)]
        expected = prefixes.model.predict_now(seen, group)
        assert total[place] == pytest.approx(expected.mean[place] - prefixes.model.mean[-1], abs=1e-9)
        assert within[place] == pytest.approx(expected.within_mean[place], abs=1e-9)


def test_posteriors_look_at_the_steps_so_far_and_are_the_same_alone(task: Task) -> None:
    rows = np.arange(192, 320)
    prob = task.posterior((1, 3, 5), rows)
    assert prob.dtype == np.float32 and ((prob > 0) & (prob < 1)).all()
    assert (task.posterior((1, 3), rows) == prob[:, :2]).all()
    assert (task.posterior((1, 3, 5), rows[:10]) == prob[:10]).all()
    assert prob[task.bad[rows], 2].mean() > prob[~task.bad[rows], 2].mean()


def test_the_logistic_regression_is_that_of_sklearn() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 2))
    label = (x @ [1.0, -2.0] + rng.normal(size=300) > 0.5).astype(float)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    expected = LogisticRegression(C=1.0, tol=1e-8).fit(x, label)
    found = logistic(5 + 3 * x, label)  # the ridge is on standardised features
    assert found[1:] * 3 == pytest.approx(expected.coef_[0], abs=1e-4)
    assert found[0] + 5 * found[1:].sum() == pytest.approx(expected.intercept_[0], abs=1e-4)


# --- rules -----------------------------------------------------------------------------------------------------------


def test_in_a_row_is_the_largest_of_the_smallest_of_neighbours() -> None:
    prob = np.array([[0.9, 0.5, 0.6, 0.8, 0.1]])
    assert in_a_row(prob, 2).tolist() == [[0, 0.5, 0.5, 0.6, 0.6]]
    assert in_a_row(prob, 6).tolist() == [[0] * 5]
    assert highest(prob).tolist() == [[0.9] * 5]


def test_ttsnap_goes_by_the_rank_in_the_batch(task: Task) -> None:
    rows = np.arange(320)
    statistic = ranks(task)(task.posterior, (2,), rows)(rows)[0]
    group, scores = batches(task.runs.prompt, rules.TTSNAP_BATCH), task.runs.scores[:, 2]
    for row in (0, 37, 200):
        better = (scores[group == group[row]] > scores[row]).sum()
        assert better / 8 <= statistic[row, 0] <= (better + 1) / 8 + 1e-6  # float32


def test_the_oracle_aborts_hard_prompts_first_and_pays_nothing(data_file: Path) -> None:
    task = make_task(data_file, "pooled", 1)
    rule = prompt_only(task)
    rows = np.arange(320)
    statistic, clear = rule.paths(rows)
    rate = np.bincount(task.runs.prompt, weights=task.bad) / IMAGES
    assert rule.check_cost == 0 and clear is None
    assert task.runs.calls[rule.steps[0]] == rules.FIRST_CALLS
    apart = np.abs(rate[task.runs.prompt][:, None] - rate[task.runs.prompt]) > 0.01
    higher = rate[task.runs.prompt][:, None] > rate[task.runs.prompt]
    assert ((statistic > statistic.T) == higher)[apart].all()


def test_the_folds_share_out_the_fitting_prompts(task: Task) -> None:
    prompt = task.runs.prompt
    assert set(prompt[task.fitting]) == set(range(12)) and len(task.fitting) == 12 * IMAGES
    assert (np.bincount(prompt[task.choosing.tried]) == 12).all()
    tried = np.concatenate([part.tried for part in task.folds])
    assert sorted(tried) == sorted(task.choosing.tried)
    for part in task.folds:
        assert not set(prompt[part.fitted]) & set(prompt[part.tried])
        assert part.posterior.label.shape == part.fitted.shape


def test_the_cost_of_a_choice_is_half_seen_and_half_unseen(task: Task) -> None:
    fit = never_clearing(highest)
    inside = task.matched_cost(
        (1, 4), task.choosing.tried, fit(task.posterior, (1, 4), task.fitting)(task.choosing.tried)
    )
    unseen = np.concatenate([highest(part.posterior((1, 4), part.tried)) for part in task.folds])
    rows = np.concatenate([part.tried for part in task.folds])
    assert task.cost(fit, (1, 4)) == pytest.approx((inside + task.matched_cost((1, 4), rows, (unseen, None))) / 2)


def test_a_chosen_rule_is_the_cheapest_of_those_one_step_away(data_file: Path) -> None:
    task = make_task(data_file, "pooled", 1)
    for fit in (never_clearing(highest), boundary(task, LIMIT)):
        rule = chosen(task, "some", fit)
        cost = task.cost(fit, rule.steps)
        assert all(
            cost <= task.cost(fit, tuple(s for s in rule.steps if s != out)) for out in rule.steps if rule.steps[1:]
        )
        assert cost <= min(task.cost(fit, (step,)) for step in range(STEPS - 2))
        run, (statistic, clear) = task.run(rule.steps, task.fitting), rule.paths(task.fitting)
        threshold = matched_threshold(run, statistic, LIMIT, clear)
        assert apply_rule(run, statistic, threshold, clear).false_abort_rate <= LIMIT


# --- the whole -------------------------------------------------------------------------------------------------------


def test_the_interval_counts_that_splits_share_prompts() -> None:
    values = np.array([1.0, 2.0, 4.0])
    low, high = policy.corrected_interval(values, 0.25)
    half = student.ppf(0.975, 2) * math.sqrt(7 / 3 * (1 / 3 + 0.25 / 0.75))  # variance 7/3
    assert (low, high) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert all(math.isnan(end) for end in policy.corrected_interval(values[:1], 0.25))


def test_the_interval_covers_the_mean_over_all_prompts_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        values = rng.normal(size=100)  # what each prompt would show; the truth is 0
        means = np.array([rng.choice(values, 30, replace=False).mean() for _ in range(20)])
        low, high = policy.corrected_interval(means, 0.3)
        covered += low <= 0 <= high
    assert covered / 300 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300)  # 3 standard errors
    assert covered < 300


def test_the_benchmark_writes_a_row_per_setting_and_rule(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "policy.json"
    monkeypatch.setattr(rules, "EXIT_STEPS", 5)
    monkeypatch.setattr(policy, "LABELS", (("pooled", 0.3), ("within", 0.3)))
    arguments = f"policy --data {data_file} --model flux --reward imr --splits 2 --within-batch 4 --out {out}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    policy.main()
    rows = json.loads(out.read_text())["rows"]
    names = [
        *("prompt-only", "single", "ttsnap", "reference", "posterior", "patience"),
        *("economic", "economic-unlimited", "cumulative", "cumulative-palbert", "q-exit"),
    ]
    assert len(rows) == 2 * 2 * len(names)
    for label, batch in (("pooled", 1), ("within", 4)):
        for setting in ("matched", "deployed"):
            some = {row["rule"]: row for row in rows if (row["label"], row["setting"]) == (label, setting)}
            assert sorted(some) == sorted(names)
            assert all(row["batch"] == batch and row["splits"] == 2 and row["worst"] == 0.3 for row in some.values())
            assert some["single"]["minus_single"] == 0 and some["posterior"]["minus_posterior"] == 0
            assert {row["threshold_from"] for row in some.values()} == {
                "none",
                "test" if setting == "matched" else "empirical",  # no 59 prompts to certify on
            }
            for row in some.values():
                assert row["single_low"] <= row["minus_single"] <= row["single_high"]
                if setting == "matched" and row["rule"] != "economic-unlimited":
                    assert row["false_abort_rate"] <= 0.05
                assert row["perfect_cost_per_clean"] < 0 < row["first_check"]
            assert some["prompt-only"]["cost_per_clean"] == some["prompt-only"]["cost_per_clean_unscored"]
            assert some["single"]["checks"] == 1
            assert some["economic"]["checks"] <= some["economic"]["steps_scored"]
    assert "cheaper_than_single" in capsys.readouterr().out


def test_scale_measures_time_and_memory_of_both_stages() -> None:
    stages = {"certify": ((1_000, 2_000), 6), "boundary": ((500, 1_000), 4)}
    rows = scale_policy.measure(stages, 0, run=scale_policy.measured)
    assert [(row["stage"], row["images"], row["steps"]) for row in rows] == [
        ("certify", 1_000, 6),
        ("certify", 2_000, 6),
        ("boundary", 500, 4),
        ("boundary", 1_000, 4),
    ]
    assert all(row["seconds"] > 0 and row["peak_mb"] >= 0 for row in rows)
    assert [("time_exponent" in row) for row in rows] == [False, True, False, True]


def test_simulated_posteriors_are_what_they_say() -> None:
    prob, bad = (np.concatenate(values) for values in zip(*scale_policy.simulated(50_000, 6, seed=1), strict=True))
    for step in (0, 5):
        for low in (0.1, 0.4, 0.7):
            inside = (prob[:, step] >= low) & (prob[:, step] < low + 0.1)
            error = prob[inside, step].mean() - bad[inside].mean()
            assert abs(error) < 4 * math.sqrt(0.25 / inside.sum())  # 4 standard errors
