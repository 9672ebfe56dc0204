from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.certification import SETTINGS, Population, Simulation, main, promise
from moe_artifacts.calibration import Risk, certify
from moe_artifacts.errors import CalibrationError

NAMES: dict[str, Any] = {"per-image": "false-aborts", "per-prompt": "false-aborts-per-prompt"}


@pytest.fixture
def prompts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(30), 12)
    bad = rng.random(360) < np.linspace(0, 1, 30)[prompt]  # the last prompts have few clean images or none
    return np.round(rng.random(360), 2).astype(np.float32), bad, prompt


@pytest.mark.parametrize(("risk", "unit"), [("per-image", "prompt"), ("per-prompt", "prompt"), ("per-image", "image")])
@pytest.mark.parametrize("seed", range(6))
def test_the_counted_population_certifies_as_the_library_does(
    prompts: tuple[np.ndarray, np.ndarray, np.ndarray], risk: str, unit: Any, seed: int
) -> None:
    statistic, bad, prompt = prompts
    population = Population(statistic, bad, prompt)
    draw = np.random.default_rng(seed).integers(30, size=60)
    rows = np.concatenate([np.flatnonzero(prompt == p) for p in draw])
    copies = np.repeat(np.arange(60), 12)  # a prompt drawn twice is two draws
    order = np.random.default_rng(0).permutation(60)  # in which certify bets on them
    place = population.certified(draw[np.argsort(order)], risk, unit, 0.2, 0.8)
    try:
        found = certify(
            statistic[rows],
            bad[rows].astype(float),
            copies,
            risks=Risk(NAMES[risk], 0.2),
            confidence=0.8,
            unit=unit,
            images_per_prompt=12,
        )
    except CalibrationError:
        assert place is None
        return
    assert place is not None
    # The population knows of statistics that the draw does not hold: its threshold may be lower, and aborts the same.
    lower, aborted = population.thresholds[place], np.isin(prompt, draw) & ~bad
    assert lower <= found.threshold
    assert (statistic[aborted] >= lower).sum() == (statistic[aborted] >= np.float32(found.threshold)).sum()


def test_the_truth_is_the_rate_over_all_prompts(prompts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    statistic, bad, prompt = prompts
    population = Population(statistic, bad, prompt)
    place = int(np.searchsorted(population.thresholds, 0.5))
    aborted = statistic >= population.thresholds[place]
    some = [p for p in range(30) if (~bad[prompt == p]).any()]
    assert len(some) < 30
    assert population.rates["per-image"][place] == pytest.approx(aborted[~bad].mean())
    assert population.rates["per-prompt"][place] == pytest.approx(
        np.mean([aborted[(prompt == p) & ~bad].mean() for p in some])
    )


@pytest.mark.parametrize("images", [1, 4])
def test_simulated_rates_are_what_many_prompts_show(images: int) -> None:
    world = Simulation(images)
    statistic, label, prompt = world.draw(np.random.default_rng(0), 200_000 // images)
    aborted, clean = statistic >= 0.6, label == 0
    count = np.bincount(prompt, weights=clean)
    fraction = np.bincount(prompt, weights=clean & aborted)[count > 0] / count[count > 0]
    assert world.rate(0.6, "per-image") == pytest.approx(aborted[clean].mean(), abs=0.005)  # 3 standard errors
    assert world.rate(0.6, "per-prompt") == pytest.approx(fraction.mean(), abs=0.005)


def test_an_abstention_is_neither_kept_nor_broken() -> None:
    row = promise("per-image", "prompt", 0.1, 0.9, 30, [None, 0.05, 0.1, 0.11])
    assert (row["certified"], row["abstained"], row["kept"], row["violations"]) == (0.75, 0.25, 0.5, 0.25)
    assert row["rate_median"] == 0.1 and row["violations_limit"] == pytest.approx(0.1 + 3 * 0.15)
    nothing = promise("per-image", "prompt", 0.1, 0.9, 30, [None])
    assert nothing["rate_mean"] is None and nothing["within_limit"]


def test_runs_on_any_file_of_the_format(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    final = rng.normal(size=(25, 1)) + rng.normal(size=(25, 16))
    noise = np.linspace(1.5, 0, 20) * rng.normal(size=(25, 16, 20))
    scores = (final[..., None] + noise).astype(np.float32)
    np.savez(tmp_path / "data.npz", flux_imr_base=scores, flux_imr_naft=scores)
    arguments = ["--data", str(tmp_path / "data.npz"), "--model", "flux", "--reward", "imr", "--draws", "3"]
    main([*arguments, "--out", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    real = [row for row in rows if row["table"] == "real"]
    assert len(real) == 4 * len(SETTINGS) and {row["unit"] for row in rows} == {"image", "prompt"}
    assert all(row["certified"] + row["abstained"] == pytest.approx(1) and row["draws"] == 3 for row in rows)
    assert all(row["cost_per_clean"] is not None for row in real if row["certified"])
