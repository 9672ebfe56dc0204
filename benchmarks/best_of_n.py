"""Reward reached by best-of-N at a fixed compute budget per prompt: plain, TTSnap's schedule, and our race.

    python -m benchmarks.best_of_n --data FILE.npz [--model flux|sdxl] [--reward imr|pic|hps] [--out FILE]

The reward is the score of the chosen finished image by the public reward model. The same accounting for every method: step
s costs s + 1 denoiser calls to reach, every scored step and the final score of every finished image a check. All see the
same scores (noise-aware where published, else those of the public model: on SDXL with PickScore and HPSv2 that is so at
TTSnap's first check) and the same candidates in the same random orders; repeats of a trajectory are left out, so there are
at most as many candidates as distinct ones. Plans and models are fitted on other prompts than those raced.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.results import write_results
from benchmarks.reward_data import CALL_TFLOPS, CHECK_COST, chosen_pairs, data_arguments, load_rewards
from moe_artifacts.racing import RaceCost, RacePlan, RecordedRaces, draw_orders, plan_race
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.model import ScoreModel

BUDGETS = (400, 1000, 2000, 4000)  # TFLOPs per prompt
TTSNAP_STEPS, TTSNAP_KEEP = (2, 6, 11), (0.4, 0.4, 0.5)  # kept after these step indices
NUM_FOLDS = 4
NUM_ORDERS = 32  # of the candidates of each prompt: averages over which of them a method happened to start
NUM_RESAMPLES = 10_000
SEED = 0

Row = dict[str, float | str | int]


def load_runs(path: Path, model: str, reward: str) -> ScoredRuns:
    """Scores before the last step, noise-aware where published; the label is not used."""
    base = load_rewards(path, model, reward, "base")
    aware = load_rewards(path, model, reward, "naft")
    scores = base.scores.copy()
    scores[:, np.searchsorted(base.step, aware.step)] = aware.scores
    early = base.step < base.num_steps - 1
    return ScoredRuns(
        scores=scores[:, early],
        label=np.zeros(len(scores)),
        prompt=base.prompt,
        calls=base.step[early] + 1,
        total_calls=base.num_steps,
        final=base.final,
    )


def best_of_n_plan(cost: RaceCost, budget: float, most: int) -> RacePlan:
    """As many full runs as the budget pays for."""
    return RacePlan((), (min(int((budget + 1e-9) // cost.waves(())[0]), most),))


def ttsnap_plan(cost: RaceCost, budget: float, most: int) -> RacePlan:
    """The largest start that the budget and the candidates allow; counts rounded as TTSnap's code rounds them."""
    checks = tuple(cost.calls.index(step + 1) for step in TTSNAP_STEPS)
    plans = []
    for start in range(1, most + 1):
        counts = [start]
        for keep in TTSNAP_KEEP:
            counts.append(max(1, round(counts[-1] * keep)))
        plans.append(RacePlan(checks, tuple(counts)))
    return max((plan for plan in plans if plan.cost(cost) <= budget + 1e-9), key=lambda plan: plan.counts[0])


def pruned_by_score(runs: ScoredRuns, order: np.ndarray, plan: RacePlan) -> np.ndarray:
    """Final reward [prompt order] where every check keeps the highest scores of that step alone."""
    assert runs.final is not None
    alive = order[..., : plan.counts[0]]
    for check, count in zip(plan.checks, plan.counts[1:], strict=True):
        kept = np.argsort(-runs.scores[alive, check], axis=-1, kind="stable")[..., :count]
        alive = np.take_along_axis(alive, kept, axis=-1)
    return runs.final[alive].max(axis=-1)


def interval(difference: np.ndarray, seed: int = SEED) -> dict[str, float]:
    """Mean over prompts with a 95 % bootstrap interval."""
    draws = np.random.default_rng(seed).integers(len(difference), size=(NUM_RESAMPLES, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), (0.025, 0.975))
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high)}


def rows_of(path: Path, model: str, reward: str, *, num_orders: int, num_changes: int, seed: int) -> list[Row]:
    """The rows of one model and reward: every budget, every method."""
    runs = load_runs(path, model, reward)
    cost = RaceCost(tuple(runs.calls.tolist()), runs.total_calls, CHECK_COST)
    order = draw_orders(runs, num_orders, seed)
    prompts = np.unique(runs.prompt)
    fold = np.random.default_rng([seed, 2]).permutation(np.arange(len(prompts)) % NUM_FOLDS)
    fitting = [runs.rows(np.isin(runs.prompt, prompts[fold != k])) for k in range(NUM_FOLDS)]
    models = [ScoreModel.fit(part) for part in fitting]

    rows: list[Row] = []
    for budget in BUDGETS:
        calls = budget / CALL_TFLOPS
        most = order.shape[2]
        plain = pruned_by_score(runs, order, best_of_n_plan(cost, calls, most)).mean(axis=1)
        snap = pruned_by_score(runs, order, ttsnap_plan(cost, calls, most)).mean(axis=1)
        ours = np.empty(len(prompts))
        for k in range(NUM_FOLDS):
            plan = plan_race(
                models[k], fitting[k], budget=calls, check_cost=CHECK_COST, num_changes=num_changes, seed=seed
            )
            best, spent = RecordedRaces(models[k], runs, order[fold == k]).raced(plan, cost, budget=calls)
            assert spent.max() <= calls * (1 + 1e-9)
            ours[fold == k] = best.mean(axis=1)
        head: Row = {"model": model, "reward": reward, "budget": budget}
        rows.append({**head, "method": "best-of-n", "value": plain.mean()})
        rows.append({**head, "method": "ttsnap", "value": snap.mean()})
        ahead, above = interval(ours - snap), interval(ours - plain)
        rows.append(
            {
                **head,
                "method": "ours",
                "value": ours.mean(),
                "minus_ttsnap": ahead["mean"],
                "low": ahead["low"],
                "high": ahead["high"],
                "minus_best_of_n": above["mean"],
                "best_of_n_low": above["low"],
                "best_of_n_high": above["high"],
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data_arguments(parser)
    parser.add_argument("--orders", type=int, default=NUM_ORDERS, help="of the candidates of each prompt")
    parser.add_argument("--changes", type=int, default=1200, help="tried in the search for a plan")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    rows = []
    for model, reward in chosen_pairs(args):
        start = time.perf_counter()
        rows += rows_of(args.data, model, reward, num_orders=args.orders, num_changes=args.changes, seed=args.seed)
        print(f"{model} {reward}: {time.perf_counter() - start:.0f} s", flush=True)
    write_results("best_of_n", rows, seed=args.seed, out=args.out)


if __name__ == "__main__":
    main()
