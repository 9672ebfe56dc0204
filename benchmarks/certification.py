"""How often a certified threshold breaks its promise, on real score trajectories and on simulated ones of known truth.

``python -m benchmarks.certification`` writes ``benchmarks/results/certification.json``. Real: posteriors of every image are
cross-fitted by prompt and frozen; the prompts of the file are the whole population, so the truth is the rate over all of them,
and calibration prompts are drawn from it with replacement (a prompt drawn twice counts as two draws). Simulated: prompts are drawn
from a distribution whose rates are known by integration, and certified by the library's own ``certify``.

A draw that certifies nothing is an abstention, counted as such. ``per-prompt`` with unit ``image`` is what ``certify``
refuses: the threshold is the one of the per-image promise, judged by the per-prompt rate.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from benchmarks.results import write_results
from benchmarks.reward_data import CHECK_COST, Rewards, chosen_pairs, data_arguments, load_rewards, worst
from moe_artifacts.calibration.bounds import betting_p_value, binomial_p_value, is_small
from moe_artifacts.calibration.certify import certify, first_passing
from moe_artifacts.calibration.risks import Risk, RiskName, Unit
from moe_artifacts.errors import CalibrationError
from moe_artifacts.policy import Run, apply_rule
from moe_artifacts.scalar.posterior import ScalarPosterior

SETTINGS = ((0.1, 0.9, 30), (0.1, 0.9, 50), (0.1, 0.9, 100), (0.05, 0.95, 100), (0.05, 0.95, 200), (0.05, 0.95, 400))
PROMISES: tuple[tuple[str, Unit], ...] = (
    ("per-image", "prompt"),
    ("per-prompt", "prompt"),
    ("per-image", "image"),
    ("per-prompt", "image"),
)
CHECK_SHARES = (0.2, 0.35, 0.55)  # score the first step at or past each
BAD_SHARE, FOLDS = 0.2, 5


def posterior_statistic(rewards: Rewards, bad: np.ndarray, seed: int) -> tuple[np.ndarray, Run]:
    """Path statistics [image check] of the flat rule on posteriors fitted to other prompts, and the run they belong to."""
    columns = np.searchsorted((rewards.step + 1) / rewards.num_steps, CHECK_SHARES)
    columns = np.unique(columns.clip(max=len(rewards.step) - 1))  # another file may have other steps
    runs = rewards.runs(bad).steps(columns)
    fold = np.random.default_rng(seed).permutation(rewards.prompt.max() + 1)[rewards.prompt] % FOLDS
    prob = np.empty(runs.scores.shape)
    for k in range(FOLDS):
        prob[fold == k] = ScalarPosterior.fit(runs.rows(fold != k)).prob(runs.scores[fold == k])
    statistic = np.maximum.accumulate(prob, axis=1).astype(np.float32)
    return statistic, Run(bad, runs.calls, CHECK_COST, full_calls=runs.total_calls)


class Population:
    """All the prompts there are: what each threshold does to the clean images of each."""

    def __init__(self, statistic: np.ndarray, bad: np.ndarray, prompt: np.ndarray) -> None:
        groups = [np.sort(statistic[(prompt == p) & ~bad]) for p in np.unique(prompt)]
        values = np.unique(np.concatenate(groups))
        self.thresholds = np.nextafter(values, np.float32(np.inf))  # rising
        self.clean = np.array([len(group) for group in groups])
        self.aborted = np.stack(
            [len(g) - np.searchsorted(g, self.thresholds) for g in groups], axis=1
        )  # threshold prompt
        self.images_per_prompt = int(np.bincount(prompt).max())
        some = self.clean > 0
        self.rates = {
            "per-image": self.aborted.sum(axis=1) / self.clean.sum(),
            "per-prompt": (self.aborted[:, some] / self.clean[some]).mean(axis=1),
        }

    def certified(self, draw: np.ndarray, risk: str, unit: str, max_risk: float, confidence: float) -> int | None:
        """Place of the lowest certified threshold: ``certify`` for drawn prompts, with the images counted beforehand."""
        if risk == "per-prompt" and unit == "prompt":
            draw = draw[self.clean[draw] > 0]
        clean = self.clean[draw]

        def passes(place: int) -> bool:
            aborted = self.aborted[place, draw]
            if unit == "image":
                return is_small(binomial_p_value(aborted.sum(), clean.sum(), max_risk), 1 - confidence)
            allowed = max_risk * clean
            excess = (
                aborted / clean - max_risk if risk == "per-prompt" else (aborted - allowed) / self.images_per_prompt
            )
            return is_small(betting_p_value(excess, max_risk, confidence), 1 - confidence)

        last = len(self.thresholds) - 1
        place = first_passing(0, last, passes)
        return place if self.thresholds[place] <= 1 and (place < last or passes(last)) else None


def real_rows(rewards: Rewards, draws: int, seed: int) -> list[dict[str, Any]]:
    bad = worst(rewards.final, rewards.prompt, BAD_SHARE, "pooled")
    statistic, run = posterior_statistic(rewards, bad, seed)
    population = Population(statistic[:, run.last_saving], bad, rewards.prompt)
    rows = []
    for max_risk, confidence, num_prompts in SETTINGS:
        sets = np.random.default_rng([seed, num_prompts]).integers(len(population.clean), size=(draws, num_prompts))
        for risk, unit in PROMISES:
            on = "per-image" if unit == "image" else risk
            found = [population.certified(draw, on, unit, max_risk, confidence) for draw in sets]
            places, count = np.unique([place for place in found if place is not None], return_counts=True)
            row: dict[str, Any] = {
                "table": "real",
                "model": rewards.model,
                "reward": rewards.reward,
                "rule": "posterior",
            }
            truth = [None if place is None else population.rates[risk][place] for place in found]
            row |= promise(risk, unit, max_risk, confidence, num_prompts, truth)
            outcomes = [apply_rule(run, statistic, population.thresholds[place]) for place in places.astype(int)]
            for name in ("cost_per_clean", "cost_per_clean_unscored"):
                cost = [getattr(outcome, name) for outcome in outcomes]
                row[name] = np.average(cost, weights=count) if outcomes else None
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Simulation:
    """Prompts of normal difficulty d: harder ones have more bad images, and clean ones that look more like them."""

    images: int  # a prompt
    spread: float = 0.8  # of the clean images' scores, between prompts, in units of that within a prompt

    def bad_share(self, difficulty: np.ndarray) -> np.ndarray:
        return ndtr(1.2 * difficulty - 1.1)

    def draw(self, rng: np.random.Generator, num_prompts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Statistic, label and prompt of each image."""
        prompt = np.repeat(np.arange(num_prompts), self.images)
        difficulty = rng.normal(size=num_prompts)[prompt]
        label = (rng.random(len(prompt)) < self.bad_share(difficulty)).astype(float)
        score = self.spread * difficulty + 1.5 * label + rng.normal(size=len(prompt))
        return ndtr(score / 2), label, prompt

    def rate(self, threshold: float, risk: str) -> float:
        """Of all clean images, or mean over the prompts that have one: an integral over difficulty."""
        difficulty = np.linspace(-8, 8, 2_001)
        aborted = ndtr(self.spread * difficulty - 2 * ndtri(threshold))
        bad = self.bad_share(difficulty)
        weight = np.exp(-(difficulty**2) / 2) * (1 - bad if risk == "per-image" else 1 - bad**self.images)
        return float(np.average(aborted, weights=weight))


def simulated_rows(images: int, draws: int, seed: int) -> list[dict[str, Any]]:
    world = Simulation(images)
    names: dict[str, RiskName] = {"per-image": "false-aborts", "per-prompt": "false-aborts-per-prompt"}
    rows = []
    for max_risk, confidence, num_prompts in SETTINGS:
        for risk, unit in PROMISES:
            if images == 1 and risk == "per-prompt":
                continue  # the same as per image
            rng = np.random.default_rng([seed, num_prompts])
            promised = Risk(names["per-image" if unit == "image" else risk], max_risk)
            truth: list[float | None] = []
            for _ in range(draws):
                statistic, label, prompt = world.draw(rng, num_prompts)
                try:
                    found = certify(statistic, label, prompt, risks=promised, confidence=confidence, unit=unit)
                except CalibrationError:
                    truth.append(None)
                else:
                    truth.append(world.rate(found.threshold, risk))
            start = {"table": "simulated", "images_per_prompt": images}
            rows.append(start | promise(risk, unit, max_risk, confidence, num_prompts, truth))
    return rows


def promise(
    risk: str, unit: str, max_risk: float, confidence: float, num_prompts: int, truth: list[float | None]
) -> dict[str, Any]:
    """Columns: how often it was certified, kept and broken, and the true rates reached where it was certified."""
    draws = len(truth)
    rates = np.array([rate for rate in truth if rate is not None])
    broken = int((rates > max_risk).sum())
    level = 1 - confidence
    limit = level + 3 * np.sqrt(level * confidence / draws)
    return {
        "risk": risk,
        "unit": unit,
        "max_risk": max_risk,
        "confidence": confidence,
        "prompts": num_prompts,
        "draws": draws,
        "certified": len(rates) / draws,
        "abstained": 1 - len(rates) / draws,
        "rate_mean": rates.mean() if len(rates) else None,
        "rate_median": np.median(rates) if len(rates) else None,
        "kept": (len(rates) - broken) / draws,
        "violations": broken / draws,
        "violations_limit": limit,
        "within_limit": bool(broken / draws <= limit),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--draws", type=int, default=1_000, help="draws of calibration prompts per row")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = []
    for model, reward in chosen_pairs(args):
        rows += real_rows(load_rewards(args.data, model, reward), args.draws, args.seed)
    for images in (20, 1):
        rows += simulated_rows(images, args.draws, args.seed)
    write_results("certification", rows, seed=args.seed, out=args.out)


if __name__ == "__main__":
    main()
