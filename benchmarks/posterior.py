"""The posterior of moe_artifacts/scalar against a logistic regression on the last four scores, one per step.

Published reward trajectories, the first 60 images of each prompt; "bad" is the worst fifth. Fitted on half of the prompts,
evaluated on the other half, means over all scored steps.
`no-final` is fitted without the scores of the finished images. Prints the table and writes benchmarks/results/posterior.json.

`python -m benchmarks.posterior [--model flux] [--reward imr]`
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.results import write_results
from benchmarks.reward_data import chosen_pairs, data_arguments, load_rewards, prompt_splits, worst
from benchmarks.siblings import aurocs, summary
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.posterior import ScalarPosterior

METHODS = ("last-four", "ours", "no-final")
COMPARED = ("log_loss", "auroc_within", "auroc_pooled")
SHARE_BAD = 0.2
IMAGES = 60  # of a prompt: more do not make more prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    data_arguments(parser)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for model, reward in chosen_pairs(args):
        data = load_rewards(args.data, model, reward)
        place = np.arange(len(data.prompt)) - np.searchsorted(data.prompt, data.prompt)
        for label in ("pooled", "within"):
            runs = data.runs(worst(data.final, data.prompt, SHARE_BAD, label)).rows(place < IMAGES)
            found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
            for fit, test in prompt_splits(runs.prompt, args.splits, (0.5, 0.5), args.seed):
                for method in METHODS:
                    found[method].append(measures(posterior(method, runs.rows(fit), runs.rows(test)), runs.rows(test)))
            for method in METHODS:
                row = {"model": model, "reward": reward, "label": label, "method": method}
                rows.append(row | summary(found[method], found["last-four"], COMPARED, "reference"))
    write_results("posterior", rows, seed=args.seed, out=args.out)


def posterior(method: str, fit: ScoredRuns, test: ScoredRuns) -> np.ndarray:
    """P(bad) after each step, [image step]."""
    if method == "last-four":
        return np.stack([_last_four(fit, test, step) for step in range(len(fit.calls))], axis=1)
    return ScalarPosterior.fit(fit if method == "ours" else replace(fit, final=None)).prob(test.scores)


def measures(prob: np.ndarray, runs: ScoredRuns) -> dict[str, float]:
    """Means over steps."""
    by_step = [(log_loss(runs.bad, p), *aurocs(p, runs.bad, runs.prompt)) for p in prob.T]
    loss, pooled, within = np.mean(by_step, axis=0).tolist()
    return {"log_loss": loss, "auroc_within": within, "auroc_pooled": pooled}


def _last_four(fit: ScoredRuns, test: ScoredRuns, step: int) -> np.ndarray:
    columns = slice(max(0, step - 3), step + 1)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(fit.scores[:, columns], fit.bad)
    return model.predict_proba(test.scores[:, columns])[:, 1]


if __name__ == "__main__":
    main()
