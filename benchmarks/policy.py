"""Decision rules on published FLUX and SDXL trajectories, scoring included: which is the cheapest way to clean images?

``python -m benchmarks.policy`` writes ``benchmarks/results/policy.json``: one row per model, reward, label, share of bad images,
batch, setting and rule, each a mean over random splits of the prompts into fitting, calibration and test prompts.

``matched``: the threshold at which exactly 5 % of the clean test images are aborted, for every rule alike. ``deployed``: the one
from the calibration prompts, certified by prompt where there are enough of them, otherwise the one at which 5 % of their clean
images are aborted. The differences ``minus_single`` and ``minus_posterior`` are paired by split; their 95 % intervals are
those of Nadeau and Bengio (Machine Learning 52, 2003), who count that splits share prompts. Labels are the worst
share of the final scores, of all images or of each prompt. A single image hardly shows how it compares with the others of its prompt,
so the latter have eight of them in a batch (``--within-batch``), and every rule but ``reference`` looks at its siblings.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.results import table, write_results
from benchmarks.reward_data import (
    CHECK_COST,
    Rewards,
    chosen_pairs,
    data_arguments,
    load_rewards,
    prompt_splits,
    worst,
)
from benchmarks.rules import LIMIT, Fitted, Task, fit_rules
from moe_artifacts.calibration.certify import certify
from moe_artifacts.calibration.risks import Risk
from moe_artifacts.errors import CalibrationError
from moe_artifacts.policy import abort_columns, by_prompt, last_statistic, matched_threshold, outcome, perfect, spending

SHARES = (0.6, 0.2, 0.2)  # of the prompts: fitting, calibration, test
LABELS = (("pooled", 0.2), ("pooled", 0.5), ("within", 0.2), ("within", 0.5))
CONFIDENCE = 0.95
CHOOSING_IMAGES = 80  # of each fitting prompt, on which steps are chosen
UNDER_THE_LIMIT = (
    "posterior",
    "patience",
    "economic",
    "cumulative",
    "cumulative-palbert",
    "q-exit",
    "ttsnap",
    "reference",
)

Measures = dict[str, float | str]


def split_measures(
    data: Rewards, label: str, batch: int, share: float, splits: int, seed: int
) -> Iterator[tuple[str, str, Measures]]:
    """Setting, rule and figures of every rule on every split."""
    bad = worst(data.final, data.prompt, share, label)
    runs = data.runs(bad)
    for number, parts in enumerate(prompt_splits(data.prompt, splits, SHARES, seed)):
        fitting, calibration, test = (np.flatnonzero(part) for part in parts)
        task = Task.prepare(runs, batch, fitting, CHECK_COST, CHOOSING_IMAGES, seed + number)
        for rule in fit_rules(task, seed + number):
            for setting in ("matched", "deployed"):
                yield setting, rule.name, measure(task, rule, setting, calibration, test)


def measure(task: Task, rule: Fitted, setting: str, calibration: np.ndarray, test: np.ndarray) -> Measures:
    """What one rule does to the test images of one split."""
    run, (statistic, clear) = task.run(rule.steps, test, rule.check_cost), rule.paths(test)
    if rule.threshold is not None:
        threshold, origin = rule.threshold, "none"
    elif setting == "matched":
        threshold, origin = matched_threshold(run, statistic, LIMIT, clear), "test"
    else:
        threshold, origin = deployed_threshold(task, rule, calibration)
    column, rejected = abort_columns(run, statistic, threshold, clear)
    found = outcome(run, column, rejected, clear)
    prompts = by_prompt(run, column, task.runs.prompt[test], clear)
    first = task.first_check()
    best = perfect(task.run((first,), test), 0).cost_per_clean
    row = found.row()
    del row["rejected"]
    return {
        **row,
        "threshold_from": origin,
        "checks": float(spending(run, column, clear)[1].mean()) if rule.check_cost else 0.0,
        "steps_scored": float(len(rule.steps)) if rule.check_cost else 0.0,
        "cost_per_clean_prompt_mean": prompts.cost_per_clean,
        "prompts_left_empty": prompts.empty,
        "first_check": float(task.runs.calls[first]),
        "perfect_cost_per_clean": best,
        "share_of_perfect": found.cost_per_clean / best,
    }


def deployed_threshold(task: Task, rule: Fitted, rows: np.ndarray) -> tuple[float, str]:
    """From calibration prompts: certified by prompt, or without a promise where they are too few for one."""
    run, (statistic, clear) = task.run(rule.steps, rows, rule.check_cost), rule.paths(rows)
    try:
        found = certify(
            last_statistic(run, statistic, clear),
            run.bad.astype(float),
            task.runs.prompt[rows],
            risks=Risk("false-aborts", LIMIT),
            confidence=CONFIDENCE,
            unit="prompt",
        )
    except CalibrationError:
        return matched_threshold(run, statistic, LIMIT, clear), "empirical"
    return found.threshold, "certified"


def corrected_interval(differences: np.ndarray, test_share: float) -> tuple[float, float]:
    """95 % interval of a mean over random splits.

    Two splits have that share of their test prompts in common, on average, and so that correlation: the variance of the mean
    does not fall to 0 with the number of splits, but to test_share / (1 - test_share) times the variance between splits.
    """
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        return float("nan"), float("nan")
    spread = np.sqrt((1 / count + test_share / (1 - test_share)) * differences.var(ddof=1)) * t.ppf(0.975, count - 1)
    return float(differences.mean() - spread), float(differences.mean() + spread)


def case_rows(data: Rewards, label: str, batch: int, share: float, splits: int, seed: int) -> list[dict[str, Any]]:
    """The rows of one label: means over splits, and differences by split."""
    found: dict[tuple[str, str], list[Measures]] = defaultdict(list)
    for setting, rule, measures in split_measures(data, label, batch, share, splits, seed):
        found[setting, rule].append(measures)
    rows = []
    for (setting, rule), by_split in found.items():
        row: dict[str, Any] = {"model": data.model, "reward": data.reward, "label": label, "worst": share}
        row |= {"batch": batch, "setting": setting, "rule": rule, "splits": len(by_split)}
        for name in by_split[0]:
            values: list[Any] = [measures[name] for measures in by_split]
            row[name] = "/".join(sorted(set(values))) if isinstance(values[0], str) else float(np.mean(values))
        for other in ("single", "posterior"):
            pairs = zip(by_split, found[setting, other], strict=True)
            difference = np.array([mine["cost_per_clean"] - its["cost_per_clean"] for mine, its in pairs])  # type: ignore[operator]
            low, high = corrected_interval(difference, SHARES[2])
            row |= {f"minus_{other}": float(difference.mean()), f"{other}_low": low, f"{other}_high": high}
        rows.append(row)
    return rows


def print_verdict(rows: list[dict[str, Any]]) -> None:
    """Whether the goal is met, case by case, and which rule is the best: the candidates are those that keep to the limit."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["rule"] in UNDER_THE_LIMIT:
            cases[tuple(row[name] for name in ("setting", "label", "worst", "model", "reward"))].append(row)
    verdicts, wins = [], defaultdict(list)
    for case, candidates in cases.items():
        best = min(candidates, key=lambda row: row["cost_per_clean"])
        wins[case[0]].append(best["rule"])
        columns = ("rule", "minus_single", "single_low", "single_high", "minus_posterior")
        verdict = {"case": " ".join(map(str, case))} | {name: best[name] for name in columns}
        met = "significantly" if best["single_high"] < 0 else best["minus_single"] < 0
        verdicts.append(verdict | {"cheaper_than_single": met})
    print(table(verdicts))
    totals = []
    for setting, best_rules in wins.items():
        for rule in UNDER_THE_LIMIT:
            mine = [row for row in rows if (row["setting"], row["rule"]) == (setting, rule)]
            total = {"setting": setting, "rule": rule, "cases": len(mine), "best_in": best_rules.count(rule)}
            total["minus_single"] = float(np.mean([row["minus_single"] for row in mine]))
            total["ahead_of_single"] = sum(row["single_high"] < 0 for row in mine)
            total["behind_single"] = sum(row["single_low"] > 0 for row in mine)
            totals.append(total)
    print(table(totals))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--splits", type=int, default=60)
    parser.add_argument(
        "--within-batch", type=int, default=8, help="images of a prompt that run together, within prompt"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model, reward in chosen_pairs(args):
        data = load_rewards(args.data, model, reward)
        for label, share in LABELS:
            batch = 1 if label == "pooled" else args.within_batch
            rows += case_rows(data, label, batch, share, args.splits, args.seed)
    write_results("policy", rows, seed=args.seed, out=args.out)
    print_verdict(rows)


if __name__ == "__main__":
    main()
