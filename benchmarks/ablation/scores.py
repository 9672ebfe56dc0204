"""One design of one seed: backbone, samples, head, threshold, and what all that says of the test runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.ablation.designs import Design, Samples, Tower, View
from benchmarks.ablation.figures import CONFIDENCE, MAX_RISK, Measured, Result, bootstrap_draws, figures
from benchmarks.ablation.inputs import Inputs
from benchmarks.ablation.pictures import preview_seconds
from benchmarks.ablation.price import check_price
from benchmarks.ablation.samples import Embedded, count, embed_samples, embed_split
from benchmarks.ablation.towers import Cost, build, train_tower
from moe_artifacts.calibration import Calibration, certify_image_threshold
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.embedder import ClipEmbedder
from moe_artifacts.errors import CalibrationError
from moe_artifacts.files import atomic_path, read_json, write_json
from moe_artifacts.policy import Run, last_statistic
from training import rules
from training.clip import EMBED_DIM
from training.collect import DEFAULT, LOG_SNR_RANGE
from training.exit_head import ExitData, ExitRecipe, exit_data, train_exit
from training.heads import HeadRecipe, Heads, HeadSpace, load_heads
from training.posterior import train_posterior
from training.rules import Candidate, Paths

SPACE = HeadSpace(embed_dim=EMBED_DIM, log_snr_range=LOG_SNR_RANGE)
SPLITS = ("validation", "calibration", "test")


class Bench:
    """The designs of one seed. Embeddings stay in memory as long as they may be used again."""

    def __init__(self, inputs: Inputs, seed: int) -> None:
        self.inputs, self.seed = inputs, seed
        self._embedded: dict[tuple[Tower, str, View], Embedded] = {}
        self._samples: tuple[tuple[Tower, Samples], Embedded, float] | None = None
        self._tower: tuple[Tower, ClipEmbedder] | None = None

    def path(self, design: Design) -> Path:
        """Where the result is kept."""
        return self.inputs.folder / "results" / f"{design.key}-{self.seed}.safetensors"

    def result(self, design: Design) -> Result:
        """What the design comes to; made only once."""
        path = self.path(design)
        if not path.exists():
            made = self._measure(design)
            tensors = {"point": torch.from_numpy(made.point), "draws": torch.from_numpy(made.draws)}
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, {"facts": json.dumps(made.facts)})
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
        return Result(tensors["point"].numpy(), tensors["draws"].numpy(), facts)

    def _measure(self, design: Design) -> Result:
        _, cost = train_tower(self.inputs, design.tower, self.seed)
        cost += Cost(preview_seconds(self.inputs, design.tower.preview))
        heads, facts = self._heads(design)
        start = time.process_time()
        price = check_price(self.inputs, design.tower.preview)
        measured = self._test(design, heads, price, facts["bad_rate"])
        if design.rule.startswith("cumulative"):  # of the exit heads; other rules have nothing more to learn
            cost += Cost(time.process_time() - start)
        told = {
            "samples": facts["samples"],
            **self._images(design),
            "train_seconds": cost.seconds + facts["seconds"],
            "previews_seen": cost.previews + facts["samples"],
            "check_cost": price,
        }
        return Result(figures(measured, np.arange(len(measured.group))), bootstrap_draws(measured), told)

    def _images(self, design: Design) -> dict[str, float]:
        """How many finished images of the pipeline backbone and head learned from, and from how many labels."""
        head = self.inputs.head_rows(design.samples, self.seed)
        backbone = self.inputs.tower_rows(design.tower, self.seed)
        judged = backbone if design.tower.judged else backbone[:0]
        return {
            "images": len(torch.cat([head, backbone]).unique()),
            "labels": len(torch.cat([head, judged]).unique()),
            "backbone_labels": len(judged),
        }

    # --- the posterior -----------------------------------------------------------------------------------------------

    def _heads(self, design: Design) -> tuple[Heads, dict[str, float]]:
        """Trained heads, and what they were trained on; shared by designs that differ only in what comes after."""
        design = replace(design, rule="posterior", tested_on=design.samples.view)
        scale = self.inputs.scale
        path = self.inputs.folder / "heads" / f"{design.key}-{self.seed}.safetensors"
        facts = path.with_suffix(".json")
        recipe = HeadRecipe(
            name=path.stem,
            seed=self.seed,
            variant=design.head,
            steps=scale.head_steps,
            batch=scale.head_batch if design.alone else scale.head_batch // design.samples.levels,
            evaluate_every=min(100, scale.head_steps),
        )
        if not facts.exists():
            for unfinished in (path, path.with_suffix(".state.safetensors")):  # anew, so that its time is all of it
                unfinished.unlink(missing_ok=True)
            data, seconds = self._train_samples(design)
            validation = self._seen(design, "validation")
            start = time.process_time()
            train_posterior(recipe, SPACE, data.singly() if design.alone else data, validation, path)
            seconds += time.process_time() - start
            bad_rate = data.label.mean().item()
            write_json(facts, {"samples": count(data), "seconds": seconds, "bad_rate": bad_rate})
        return load_heads(recipe, SPACE, path), read_json(facts)

    def _train_samples(self, design: Design) -> tuple[Embedded, float]:
        """What the head learns from, and the CPU time of embedding it. The last one is kept."""
        key = (design.tower, design.samples)
        if self._samples is None or self._samples[0] != key:
            self._samples = None  # before the next one is made
            embedder = self._embedder(design.tower)
            start = time.process_time()
            data = embed_samples(self.inputs, embedder, design.tower, design.samples, self.seed)
            self._samples = (key, data, time.process_time() - start)
        return self._samples[1:]

    def _seen(self, design: Design, split: str) -> Embedded:
        """What the scorer sees of a split."""
        key = (design.tower, split, design.tested_on)
        if key not in self._embedded:
            self._embedded[key] = embed_split(self.inputs, self._embedder(design.tower), *key)
        found = self._embedded[key]
        return found.singly() if design.alone else found

    def _embedder(self, tower: Tower) -> ClipEmbedder:
        """The trained backbone. The last one is kept."""
        if self._tower is None or self._tower[0] != tower:
            self._tower = (tower, build(train_tower(self.inputs, tower, self.seed)[0]))
        return self._tower[1]

    # --- what follows from it ----------------------------------------------------------------------------------------

    def _test(self, design: Design, heads: Heads, price: float, bad_rate: float) -> Measured:
        calibration = _calibration(heads, self._seen(design, "validation"))

        def told(data: Embedded) -> ExitData:
            return exit_data(heads, calibration, data, torch.arange(data.checks))

        seen = {split: told(self._seen(design, split)) for split in SPLITS}
        runs = {split: self._run(split, price) for split in SPLITS}
        prob = {split: data.prob.reshape(len(runs[split].bad), -1).numpy() for split, data in seen.items()}
        paths, shown = {split: np.maximum.accumulate(values, axis=1) for split, values in prob.items()}, prob["test"]
        if design.rule == "one-check":
            paths, runs = _one_check(prob, runs)
        elif design.rule != "posterior":
            train = told(self._train_samples(design)[0])
            best = self._best_exit(design, train, seen["validation"], runs["validation"], bad_rate)
            paths = {split: rules.paths_of(best, data).statistic for split, data in seen.items()}
            shown = paths["test"]
        group = self.inputs.split("test").label.numpy()
        return Measured(shown, paths["test"], _threshold(paths, runs), runs["test"], group)

    def _run(self, split: str, price: float) -> Run:
        runs = self.inputs.split(split)
        return Run(runs.bad.numpy().astype(bool), (runs.step[0] + 1).numpy(), price, DEFAULT.steps)

    def _best_exit(self, design: Design, train: ExitData, tuning: ExitData, run: Run, bad_rate: float) -> Candidate:
        """The exit head, of those with several prices of a clean image the one that is cheapest on validation."""
        recipes = [
            ExitRecipe(name=f"economic-{factor}", seed=self.seed, price=factor / (1 - bad_rate))
            for factor in rules.PRICE_FACTORS
        ]
        if design.rule == "cumulative-palbert":
            recipes = [ExitRecipe(name="palbert", seed=self.seed, loss="palbert")]
        recipes = [replace(recipe, steps=min(recipe.steps, self.inputs.scale.head_steps)) for recipe in recipes]
        rule = ThresholdConfig(rule="cumulative", threshold=0.5)
        found = [Candidate(design.rule, rule, train_exit(recipe, train)) for recipe in recipes]
        return rules.best_of_each(found, tuning, run, MAX_RISK)[design.rule][0]


def _calibration(heads: Heads, validation: Embedded) -> Calibration:
    try:
        return rules.fit_calibration(heads, validation)
    except CalibrationError:  # heads that tell nothing of what they are shown are a result too
        return Calibration(LOG_SNR_RANGE)


def _one_check(prob: Mapping[str, np.ndarray], runs: Mapping[str, Run]) -> tuple[dict[str, np.ndarray], dict[str, Run]]:
    """A single look, at the check that is cheapest on validation."""

    def at(column: int) -> tuple[dict[str, np.ndarray], dict[str, Run]]:
        paths = {split: values[:, [column]] for split, values in prob.items()}
        return paths, {split: replace(run, calls=run.calls[[column]]) for split, run in runs.items()}

    def cost(column: int) -> float:
        paths, run = at(column)
        return rules.cheapest(run["validation"], Paths(paths["validation"], None), MAX_RISK)

    return at(min(range(runs["validation"].last_saving + 1), key=cost))


def _threshold(paths: Mapping[str, np.ndarray], runs: Mapping[str, Run]) -> float:
    """The certified one of the calibration runs; that of the validation runs where it is higher and hence cheaper."""
    run = runs["calibration"]
    clean = last_statistic(run, paths["calibration"])[~run.bad]
    floor = rules.floor_of(runs["validation"], Paths(paths["validation"], None), MAX_RISK)
    return max(certify_image_threshold(clean, MAX_RISK, CONFIDENCE).threshold, floor)
