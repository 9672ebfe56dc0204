"""The rules that benchmarks/policy.py compares, each fitted on the fitting prompts alone, its scored steps included.

A fitted rule gives path statistics: where it aborts is then a matter of one threshold, set in one way for all rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit

from benchmarks.prefixes import Posterior, Prefixes, Steps, batches, logistic
from moe_artifacts.accumulator import accumulate
from moe_artifacts.calibration.economic import choose_steps, fit_boundary
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.decision import clear_step, path_statistic
from moe_artifacts.policy import Run, apply_rule, matched_threshold
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.exit import fit_exit

LIMIT = 0.05  # share of clean images that may be aborted
MOST_STEPS = 5
GAIN = 0.0003  # that another step must bring, as a share of the unguarded cost
FOLDS = 2
TTSNAP_BATCH = 8  # it compares the images of a prompt, so it needs several, also where the other rules see one
FIRST_CALLS = 3  # the oracle, and perfect knowledge, decide at the first check after so many calls
EXIT_STEPS = 120  # of the optimiser
CLEAR_QUANTILES = (0.3, 0.5, 0.7, 0.85)  # of the mass decided clean at the first check, tried as clear thresholds

Paths = tuple[np.ndarray, np.ndarray | None]  # path statistics [row step], and after which step each row is not scored
# What a rule does at some steps, given the posterior and the images to fit whatever else it needs: paths of any images.
Fit = Callable[[Posterior, Steps, np.ndarray], Callable[[np.ndarray], Paths]]


@dataclass(frozen=True)
class Fitted:
    """A rule ready to be used: path statistics of any images, at its own scored steps."""

    name: str
    steps: Steps
    paths: Callable[[np.ndarray], Paths]
    check_cost: float
    threshold: float | None = None  # its own; None: it takes the one that keeps the limit


@dataclass(frozen=True)
class Part:
    """A posterior, the images it was fitted on, and images to try it on; as indices."""

    posterior: Posterior
    fitted: np.ndarray
    tried: np.ndarray


@dataclass(frozen=True)
class Task:
    """One label on one split."""

    runs: ScoredRuns
    bad: np.ndarray
    batch: int  # images of a prompt that run together
    posterior: Posterior
    fitting: np.ndarray  # images, as indices
    choosing: Part  # some of the fitting images, on which steps are chosen
    folds: tuple[Part, ...]  # the same, each fold tried with a posterior of the other prompts
    check_cost: float

    @classmethod
    def prepare(
        cls, runs: ScoredRuns, batch: int, fitting: np.ndarray, check_cost: float, images: int, seed: int
    ) -> Task:
        """Fit posteriors; steps are chosen on the first ``images`` of each fitting prompt."""
        prompt, bad = runs.prompt, runs.bad

        def fit(rows: np.ndarray) -> Posterior:
            return Posterior(Prefixes(runs, rows, batch), bad, rows)

        place = np.arange(len(prompt)) - np.unique(prompt, return_index=True)[1][prompt]
        some = fitting[place[fitting] < images]
        order = np.random.default_rng(seed).permutation(np.unique(prompt[fitting]))
        folds = []
        for fold in np.array_split(order, FOLDS):
            out = np.isin(prompt[some], fold)
            folds.append(Part(fit(some[~out]), some[~out], some[out]))
        posterior = fit(fitting)
        return cls(runs, bad, batch, posterior, fitting, Part(posterior, some, some), tuple(folds), check_cost)

    def run(self, steps: Steps, rows: np.ndarray, check_cost: float | None = None) -> Run:
        cost = self.check_cost if check_cost is None else check_cost
        return Run(self.bad[rows], self.runs.calls[list(steps)], cost, self.runs.total_calls)

    def matched_cost(self, steps: Steps, rows: np.ndarray, paths: Paths) -> float:
        """Cost per clean image on these images, at the limit."""
        run, (statistic, clear) = self.run(steps, rows), paths
        return apply_rule(run, statistic, matched_threshold(run, statistic, LIMIT, clear), clear).cost_per_clean

    def cost(self, fit: Fit, steps: Steps) -> float:
        """Of a rule at some steps: the mean of the cost where it was fitted and the cost on prompts it has not seen.

        With some fifty prompts either is noisy: the first flatters many steps, the second rests on half of the data.
        """
        whole = self.choosing
        inside = self.matched_cost(steps, whole.tried, fit(whole.posterior, steps, whole.fitted)(whole.tried))
        found = [fit(part.posterior, steps, part.fitted)(part.tried) for part in self.folds]
        statistic = np.concatenate([statistic for statistic, _ in found])
        clear = None if found[0][1] is None else np.concatenate([last for _, last in found if last is not None])
        rows = np.concatenate([part.tried for part in self.folds])
        return (inside + self.matched_cost(steps, rows, (statistic, clear))) / 2

    def choose(self, fit: Fit, most: int = MOST_STEPS) -> Steps:
        return choose_steps(lambda steps: self.cost(fit, steps), len(self.runs.calls), most=most, gain=GAIN)

    def fitted(self, name: str, fit: Fit, steps: Steps, threshold: float | None = None) -> Fitted:
        """At these steps, fitted on all fitting images."""
        return Fitted(name, steps, fit(self.posterior, steps, self.fitting), self.check_cost, threshold)

    def first_check(self) -> int:
        return int((self.runs.calls >= FIRST_CALLS).argmax())


def fit_rules(task: Task, seed: int) -> Iterator[Fitted]:
    """Every rule, one after the other."""
    yield prompt_only(task)
    yield chosen(task, "single", never_clearing(highest), most=1)
    yield chosen(task, "ttsnap", ranks(task))
    yield reference(task)
    posterior = chosen(task, "posterior", never_clearing(highest))
    yield posterior
    yield patience(task, posterior.steps)
    limited = chosen(task, "economic", boundary(task, LIMIT))
    yield limited
    yield task.fitted("economic-unlimited", boundary(task, None), limited.steps, threshold=0.5)
    yield cumulative(task, limited.steps, seed)
    yield from palbert(task, posterior.steps, seed)


def chosen(task: Task, name: str, fit: Fit, most: int = MOST_STEPS) -> Fitted:
    """A rule at the steps where it is cheapest."""
    return task.fitted(name, fit, task.choose(fit, most))


def prompt_only(task: Task) -> Fitted:
    """An oracle that knows how often a prompt goes wrong, and nothing of the image; it looks at nothing, so it pays nothing."""
    rate = np.bincount(task.runs.prompt, weights=task.bad) / np.bincount(task.runs.prompt)
    # Images of a prompt are tied: which of them are aborted is drawn by lot.
    lot = np.random.default_rng(0).random(len(task.bad)) * 1e-3
    statistic = ((rate[task.runs.prompt] + lot) / 1.001).astype(np.float32)
    return Fitted("prompt-only", (task.first_check(),), lambda rows: (statistic[rows, None], None), 0.0)


def highest(prob: np.ndarray) -> np.ndarray:
    """One threshold on the posterior, at all steps."""
    return np.maximum.accumulate(prob, axis=1)


def in_a_row(prob: np.ndarray, patience: int) -> np.ndarray:
    """The posterior of that many checks one after the other."""
    if prob.shape[1] < patience:
        return np.zeros_like(prob)
    lowest = np.lib.stride_tricks.sliding_window_view(prob, patience, axis=1).min(axis=2)
    return highest(np.concatenate([np.zeros_like(prob[:, : patience - 1]), lowest], axis=1))


def never_clearing(statistic: Callable[[np.ndarray], np.ndarray]) -> Fit:
    """A rule on the posteriors alone."""
    return lambda posterior, steps, _: lambda rows: (statistic(posterior(steps, rows)), None)


def patience(task: Task, steps: Steps) -> Fitted:
    """Two or three alarms in a row, at steps of its own or at those of the flat posterior."""
    fits = [never_clearing(lambda prob, k=k: in_a_row(prob, k)) for k in (2, 3)]  # type: ignore[misc]
    tried = [(fit, at) for fit in fits for at in (steps, task.choose(fit))]
    return task.fitted("patience", *min(tried, key=lambda rule: task.cost(*rule)))


def ranks(task: Task) -> Fit:
    """TTSnap-like: the same share of a prompt's images is kept at each check, by their rank in the batch."""
    scores = task.runs.scores
    group = batches(task.runs.prompt, max(task.batch, TTSNAP_BATCH))
    count = np.bincount(group)
    before = np.cumsum(count) - count  # images of the batches before
    rank = np.empty(scores.shape, dtype=np.float32)  # in [0, 1), the worst last
    for step, score in enumerate(scores.T):
        order = np.lexsort((-score, group))
        rank[order, step] = (np.arange(len(order)) - before[group[order]]) / count[group[order]]
    # Images of equal rank in different batches are tied: which of them goes first is drawn by lot.
    rank += (np.random.default_rng(0).random((len(rank), 1)) / count[group][:, None]).astype(np.float32)
    return lambda _posterior, steps, _rows: lambda rows: (highest(rank[rows][:, list(steps)]), None)


def reference(task: Task) -> Fitted:
    """The posterior that FACTS.md measured: every step, a logistic regression on the last four scores, one threshold."""
    scores, label = task.runs.scores, task.bad[task.fitting].astype(float)
    seen = [scores[:, max(0, t - 3) : t + 1] for t in range(scores.shape[1])]
    weights = [logistic(x[task.fitting], label) for x in seen]

    def paths(rows: np.ndarray) -> Paths:
        prob = [expit(w[0] + x[rows] @ w[1:]) for w, x in zip(weights, seen, strict=True)]
        return highest(np.stack(prob, axis=1).astype(np.float32)), None

    return Fitted("reference", tuple(range(scores.shape[1])), paths, task.check_cost)


def boundary(task: Task, limit: float | None) -> Fit:
    """The economic boundary, by backward induction."""

    def fit(posterior: Posterior, steps: Steps, rows: np.ndarray) -> Callable[[np.ndarray], Paths]:
        calls, total = task.runs.calls[list(steps)], task.runs.total_calls
        found = fit_boundary(
            posterior(steps, rows), task.bad[rows], calls, total, task.check_cost, max_false_aborts=limit
        )

        def paths(rows: np.ndarray) -> Paths:
            prob = posterior(steps, rows)
            return found.statistic(prob), found.clear_step(prob)

        return paths

    return fit


def cumulative(task: Task, steps: Steps, seed: int) -> Fitted:
    """C_t of an exit head trained with the economic loss; K_t clears, at the threshold that is cheapest on fitting prompts."""
    progress = task.runs.calls[list(steps)] / task.runs.total_calls
    head = _head(task, steps, progress, "economic", seed)

    def paths(rows: np.ndarray, config: ThresholdConfig) -> Paths:
        prob = task.posterior(steps, rows)
        acc = accumulate(torch.from_numpy(prob), torch.from_numpy(head.mass(prob, progress)))
        clear = None if config.clear_threshold is None else clear_step(config, acc).numpy()
        return path_statistic(config, torch.from_numpy(prob), acc).numpy(), clear

    rows = task.choosing.tried
    prob = task.posterior(steps, rows)
    first = accumulate(torch.from_numpy(prob), torch.from_numpy(head.mass(prob, progress))).cumulative_clean_prob[:, 0]
    clear_at = [None, *(float(first.quantile(share)) for share in CLEAR_QUANTILES)]
    configs = [ThresholdConfig(rule="cumulative", threshold=0.5, clear_threshold=at) for at in clear_at]
    best = min(configs, key=lambda config: task.matched_cost(steps, rows, paths(rows, config)))
    return Fitted("cumulative", steps, lambda rows: paths(rows, best), task.check_cost)


def palbert(task: Task, steps: Steps, seed: int) -> Iterator[Fitted]:
    """C_t, and the posterior once F_t > q, of an exit head trained with PALBERT's loss."""
    progress = task.runs.calls[list(steps)] / task.runs.total_calls
    head = _head(task, steps, progress, "palbert", seed)

    def paths(rows: np.ndarray, config: ThresholdConfig) -> Paths:
        prob = task.posterior(steps, rows)
        acc = accumulate(torch.from_numpy(prob), torch.from_numpy(head.mass(prob, progress)))
        return path_statistic(config, torch.from_numpy(prob), acc).numpy(), None

    cumulative_rule = ThresholdConfig(rule="cumulative", threshold=0.5)
    yield Fitted("cumulative-palbert", steps, lambda rows: paths(rows, cumulative_rule), task.check_cost)
    rows = task.choosing.tried
    configs = [ThresholdConfig(rule="q-exit", threshold=0.5, q=q) for q in (0.1, 0.3, 0.5)]
    best = min(configs, key=lambda config: task.matched_cost(steps, rows, paths(rows, config)))
    yield Fitted("q-exit", steps, lambda rows: paths(rows, best), task.check_cost)


def _head(task: Task, steps: Steps, progress: np.ndarray, loss, seed: int):  # type: ignore[no-untyped-def]
    rows = task.fitting
    label = task.bad[rows].astype(float)
    return fit_exit(task.posterior(steps, rows), progress, progress, label, loss=loss, seed=seed, steps=EXIT_STEPS)
