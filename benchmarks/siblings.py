"""What the scores of the images of the same prompt in the same batch are worth, on published reward trajectories.

Batches are random groups of 1, 2, 4 or 8 images of a prompt. The posterior of moe_artifacts/scalar is fitted on half of the
prompts and evaluated on the other half. An image that is aborted is scored no more: from then on its siblings know its scores up to
there and nothing later, so each threshold is simulated as a guard would run it. `matched`: the threshold at which 5 % of the
clean evaluated images are aborted. The AUROCs are those of the last check with nobody aborted. Prints the table and writes benchmarks/results/siblings.json.

`python -m benchmarks.siblings [--model flux] [--reward imr]`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from scipy.stats import t as student

from benchmarks.results import write_results
from benchmarks.reward_data import CHECK_COST, chosen_pairs, data_arguments, load_rewards, prompt_splits, worst
from moe_artifacts.policy import Outcome, Run, outcome
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.posterior import ScalarPosterior

CALLS = (4, 7, 10, 13)  # the checks, fixed: the same for every batch size
SIZES = (1, 2, 4, 8)
FALSE_ABORTS = 0.05
SHARE_BAD = 0.2
COMPARED = ("auroc_within", "auroc_pooled", "cost_per_clean", "cost_per_clean_unscored")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    data_arguments(parser)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for model, reward in chosen_pairs(args):
        data = load_rewards(args.data, model, reward)
        for label in ("within", "pooled"):
            runs = data.runs(worst(data.final, data.prompt, SHARE_BAD, label))
            runs = runs.steps(np.isin(runs.calls, CALLS))
            found: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
            for number, (fit, test) in enumerate(prompt_splits(data.prompt, args.splits, (0.5, 0.5), args.seed)):
                for size in SIZES:
                    found[size].append(evaluate(runs.rows(fit), runs.rows(test), size, seed=number))
            for size in SIZES:
                row = {"model": model, "reward": reward, "label": label, "setting": "matched", "batch": size}
                rows.append(row | summary(found[size], found[1], COMPARED, "alone"))
    write_results("siblings", rows, seed=args.seed, out=args.out)


def evaluate(fit: ScoredRuns, test: ScoredRuns, size: int, seed: int) -> dict[str, float]:
    """One split at one batch size."""
    rng = np.random.default_rng([seed, size])
    posterior = ScalarPosterior.fit(fit, siblings=batches(fit.prompt, size, rng))
    group = batches(test.prompt, size, rng)
    run = Run(test.bad, test.calls, CHECK_COST, test.total_calls)
    result = matched(lambda threshold: simulate(posterior, test, group, threshold), run)
    pooled, within = aurocs(posterior.prob(test.scores, group)[:, -1], test.bad, test.prompt)
    return {"auroc_within": within, "auroc_pooled": pooled, **result.row()}


def batches(prompt: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Group of each image: ``size`` images of one prompt, at random; the last group of a prompt may be smaller."""
    group = np.empty(len(prompt), dtype=np.int64)
    for rows in (np.flatnonzero(prompt == p) for p in np.unique(prompt)):
        group[rng.permutation(rows)] = prompt[rows[0]] * len(prompt) + np.arange(len(rows)) // size
    return group


def simulate(posterior: ScalarPosterior, runs: ScoredRuns, group: np.ndarray, threshold: float) -> np.ndarray:
    """Column at which each image is aborted, the number of columns where never; an aborted image is scored no more."""
    never = len(runs.calls)
    column = np.full(len(runs), never)
    seen = np.full(runs.scores.shape, np.nan)
    for step in range(never):
        alive = column == never
        seen[alive, step] = runs.scores[alive, step]
        column[alive & (posterior.prob_now(seen, group) >= threshold)] = step
    return column


def matched(aborted_at: Callable[[float], np.ndarray], run: Run) -> Outcome:
    """The outcome at the lowest threshold at which at most 5 % of the clean images are aborted, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        if outcome(run, aborted_at(middle)).false_abort_rate > FALSE_ABORTS:
            low = middle
        else:
            high = middle
    return outcome(run, aborted_at(high))


def aurocs(prob: np.ndarray, bad: np.ndarray, prompt: np.ndarray) -> tuple[float, float]:
    """Over all pairs of a bad and a clean image, and over those within one prompt."""
    wins, pairs = 0.0, 0.0
    for rows in (prompt == p for p in np.unique(prompt)):
        won, number = _wins(prob[rows], bad[rows])
        wins, pairs = wins + won, pairs + number
    won, number = _wins(prob, bad)
    return won / number, wins / pairs


def summary(
    found: list[dict[str, float]], reference: list[dict[str, float]], compared: tuple[str, ...], name: str
) -> dict[str, float]:
    """Means over splits, and differences from the reference of that name with their 95 % intervals.

    The prompts of the splits overlap: the variance of the mean is that of Nadeau and Bengio (2003), which allows for it.
    """
    row = {column: float(np.mean([f[column] for f in found])) for column in found[0]}
    if found is reference:
        return row
    reach = student.ppf(0.975, len(found) - 1) * np.sqrt(1 / len(found) + 1)  # + 1: as many test as fitting prompts
    for column in compared:
        gain = np.array([f[column] - r[column] for f, r in zip(found, reference, strict=True)])
        row[f"{column}_minus_{name}"] = float(gain.mean())
        low, high = (float(gain.mean() + sign * reach * gain.std(ddof=1)) for sign in (-1, 1))
        row |= {f"{column}_low": low, f"{column}_high": high}
    return row


def _wins(prob: np.ndarray, bad: np.ndarray) -> tuple[float, float]:
    """Pairs of a bad and a clean image in which the bad one has the higher probability (half if equal), and all pairs."""
    clean = np.sort(prob[~bad])
    below = np.searchsorted(clean, prob[bad], side="left") + np.searchsorted(clean, prob[bad], side="right")
    return float(below.sum() / 2), float(bad.sum() * len(clean))


if __name__ == "__main__":
    main()
