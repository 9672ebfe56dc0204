"""Against MAPIE's risk control, where both apply: images as units, one threshold, labels of 0 or 1."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from mapie.risk_control import BinaryClassificationController

from moe_artifacts.calibration import Risk, certify
from moe_artifacts.errors import CalibrationError

OURS = {"fpr": "false-aborts", "recall": "miss", "precision": "wrong-aborts"}
GRID = np.linspace(0.95, 0.05, 91)  # from the safest threshold down


def draw(rng: np.random.Generator, images: int) -> tuple[np.ndarray, np.ndarray]:
    label = (rng.random(images) < 0.4).astype(int)
    # As float32, which both then compare exactly: MAPIE would compare float64.
    return np.clip(rng.normal(0.35 + 0.3 * label, 0.12), 0.001, 0.999).astype(np.float32).astype(float), label


def mapie_thresholds(
    statistic: np.ndarray,
    label: np.ndarray,
    risk: Any,
    level: Any,
    fwer: Any,
    grid: np.ndarray,
    confidence: float = 0.9,
) -> np.ndarray:
    """All that it certifies."""

    def predict_proba(x: np.ndarray) -> np.ndarray:
        return np.stack([1 - x, x], axis=1)

    controller = BinaryClassificationController(
        predict_proba, risk, level, confidence, list_predict_params=grid, fwer_method=fwer
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No predict parameters were found")
        return controller.calibrate(statistic, label).valid_predict_params


@pytest.mark.parametrize("seed", range(8))
def test_false_aborts_agree_with_its_fixed_sequence_over_the_same_thresholds(seed: int) -> None:
    statistic, label = draw(np.random.default_rng(seed), 200 + 50 * seed)
    every = np.nextafter(np.unique(statistic[label == 0]).astype(np.float32), np.float32(1))[::-1].astype(float)
    theirs = mapie_thresholds(statistic, label, "fpr", 0.1, "fixed_sequence", every).min()
    ours = certify(statistic, label, risks=Risk("false-aborts", 0.1), confidence=0.9, unit="image").threshold
    # Its binomial tail takes ceil(n * (k / n)), one too many where the product is rounded up: at most one order statistic.
    assert ours in (theirs, every[min(len(every) - 1, int(np.flatnonzero(every == theirs)[0]) + 1)])
    default = mapie_thresholds(statistic, label, "fpr", 0.1, "bonferroni_holm", GRID)
    assert ours <= default.min()  # a grid, and a price for each of its points


@pytest.mark.parametrize("seed", range(4))
def test_misses_agree_with_its_fixed_sequence_over_the_same_thresholds(seed: int) -> None:
    statistic, label = draw(np.random.default_rng(seed), 400)
    every = np.unique(statistic[label == 1])
    theirs = mapie_thresholds(statistic, label, "recall", 0.8, "fixed_sequence", every).max()
    ours = certify(statistic, label, risks=Risk("miss", 1 - 0.8), confidence=0.9, unit="image").threshold
    assert ours in (theirs, every[int(np.flatnonzero(every == theirs)[0]) + 1])  # the same rounding


def test_wrong_aborts_agree_with_its_fixed_sequence_where_the_data_show_it_the_order() -> None:
    rng = np.random.default_rng(0)
    statistic = np.repeat(np.linspace(0.025, 0.975, 20), 50).astype(np.float32).astype(float)
    label = (rng.random(1_000) < statistic).astype(int)  # the share of wrong aborts rises as the threshold falls
    grid = np.linspace(0.8, 0.05, 16)
    theirs = mapie_thresholds(statistic, label, "precision", 0.6, "fixed_sequence", grid).min()
    ours = certify(
        statistic, label, risks=Risk("wrong-aborts", 0.4), confidence=0.9, unit="image", candidates=grid
    ).threshold
    assert ours == theirs


@pytest.mark.parametrize("seed", range(4))
def test_two_promises_at_once_are_at_least_as_tight_as_its_holm_correction(seed: int) -> None:
    statistic, label = draw(np.random.default_rng(seed), 1_000)
    theirs = mapie_thresholds(statistic, label, ["fpr", "recall"], [0.15, 0.8], "bonferroni_holm", GRID)
    ours = certify(
        statistic, label, risks=[Risk("false-aborts", 0.15), Risk("miss", 0.2)], confidence=0.9, unit="image"
    ).threshold
    assert ours <= theirs.min(initial=1.0)  # for one of these draws it certifies nothing


@pytest.mark.parametrize("risk", ["fpr", "recall", "precision"])
def test_both_keep_the_promise_on_the_same_draws(risk: str) -> None:
    rng = np.random.default_rng(0)
    statistic, label = draw(rng, 400_000)  # its rates stand for the truth: within 0.002
    level, grid = (
        (0.1, GRID) if risk == "fpr" else (0.7, GRID[::-1] if risk == "recall" else np.linspace(0.55, 0.25, 31))
    )
    max_risk = level if risk == "fpr" else 1 - level

    def true_rate(threshold: float) -> float:
        aborted = statistic >= np.float32(threshold)
        if risk == "fpr":
            return float(aborted[label == 0].mean())
        return float(1 - aborted[label == 1].mean() if risk == "recall" else 1 - label[aborted].mean())

    broken = np.zeros(2)
    for _ in range(150):
        rows = rng.integers(0, len(label), 300)
        theirs = mapie_thresholds(statistic[rows], label[rows], risk, level, "bonferroni_holm", grid)
        if len(theirs):
            broken[0] += true_rate(theirs.max() if risk == "recall" else theirs.min()) > max_risk
        try:
            ours = certify(
                statistic[rows],
                label[rows],
                risks=Risk(OURS[risk], max_risk),  # type: ignore[arg-type]
                confidence=0.9,
                unit="image",
                candidates=grid if risk == "precision" else None,
            ).threshold
        except CalibrationError:
            continue
        broken[1] += true_rate(ours) > max_risk
    assert (broken / 150 <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 150)).all()
