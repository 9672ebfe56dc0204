"""Rows of an evaluation: how well each check tells, and what each rule does, with intervals over images or prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from moe_artifacts.calibration import brier_score, clopper_pearson, expected_calibration_error
from moe_artifacts.policy import Run, abort_columns, apply_rule
from training.metrics import Measure, Resample, auroc, auroc_within, over_images
from training.rules import Paths
from training.scored import Scored

Row = dict[str, Any]


def quality(
    scored: Scored,
    columns: Sequence[int],
    base_rate: float,
    prompt_rate: Float[np.ndarray, " image"],
    resample: Resample = over_images,
) -> list[Row]:
    """AUROC, ECE and Brier score at some checks, with 95 % bootstrap intervals.

    Args:
        base_rate: Of bad images, as training saw it: what can be said without looking.
        prompt_rate: All that the prompt of each image alone can say; NaN: unknown.
    """
    bad, prompt, truth = scored.bad, scored.prompt, scored.label.numpy().astype(float)
    base = np.full(len(bad), base_rate)

    def measures_of(prob: np.ndarray) -> dict[str, Measure]:
        return {
            "auroc_within": lambda i, group: auroc_within(prob[i], bad[i], group),
            "auroc_pooled": lambda i, group: auroc(prob[i], bad[i]),
            "auroc_prompt_only": lambda i, group: _known_auroc(prompt_rate[i], bad[i]),
            "ece": lambda i, group: expected_calibration_error(prob[i], truth[i]),
            "ece_base_rate": lambda i, group: expected_calibration_error(base[i], truth[i]),
            "brier": lambda i, group: brier_score(prob[i], truth[i]),
            "brier_base_rate": lambda i, group: brier_score(base[i], truth[i]),
        }

    return [
        {
            "table": "quality",
            "share": float(scored.calls[column] / scored.total_calls),
            **with_intervals(measures_of(scored.prob[:, column].numpy()), prompt, resample),
        }
        for column in columns
    ]


def with_intervals(
    measures: Mapping[str, Measure], group: Int[np.ndarray, " image"], resample: Resample
) -> dict[str, float]:
    """Each measure of all images, and as ``<name>_low`` and ``<name>_high`` the ends of its interval."""
    found = {}
    for name, measure in measures.items():
        found[name] = measure(np.arange(len(group)), group)
        found[f"{name}_low"], found[f"{name}_high"] = resample(measure, group)
    return found


def rule_row(
    name: str,
    run: Run,
    paths: Paths,
    threshold: float,
    setting: str,
    prompt: Int[np.ndarray, " image"] | None = None,
    resample: Resample = over_images,
) -> Row:
    """What a rule does at a threshold.

    Args:
        prompt: Where images of one prompt are alike: the interval of the false-abort rate is then over prompts too, by
            ``resample``; without it the exact one of independent images.
    """
    found = apply_rule(run, paths.statistic, threshold, paths.clear)
    column, _ = abort_columns(run, paths.statistic, threshold, paths.clear)
    aborted, images = column < len(run.calls), np.arange(len(run.bad))

    def cost(rows: np.ndarray, group: np.ndarray) -> float:
        part, kept = dataclasses.replace(run, bad=run.bad[rows]), paths.rows(rows)
        if part.bad.all():
            return float("nan")
        return apply_rule(part, kept.statistic, threshold, kept.clear).cost_per_clean

    if prompt is None:
        clean = int((~run.bad).sum())
        false_low, false_high = clopper_pearson(round(found.false_abort_rate * clean), clean, 0.95)
    else:
        false_low, false_high = resample(lambda i, group: _mean(aborted[i][~run.bad[i]]), prompt)
    low, high = resample(cost, images if prompt is None else prompt)
    return {
        "table": "rules",
        "rule": name,
        "setting": setting,
        "threshold": threshold,
        **found.row(),
        "false_abort_rate_low": false_low,
        "false_abort_rate_high": false_high,
        "cost_per_clean_low": low,
        "cost_per_clean_high": high,
    }


def halves_rate(label: Shaped[np.ndarray, " image"], prompt: Int[np.ndarray, " image"]) -> Float[np.ndarray, " image"]:
    """Share of bad images of the same prompt, in the half of its images that an image is not in.

    What a prompt alone tells, where it has several images here and was never seen in training; NaN where an image is the only
    one of its prompt. An image's own label takes no part, or a prompt-only score would know it.

    Example:
        >>> halves_rate(np.array([1, 0, 1, 0, 1]), np.array([7, 7, 7, 7, 8])).tolist()
        [0.0, 1.0, 0.0, 1.0, nan]
    """
    place = np.unique(prompt, return_inverse=True)[1]
    order = np.argsort(place, kind="stable")
    first = np.r_[True, np.diff(place[order]) != 0]
    number = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    half = np.empty(len(order), dtype=int)
    half[order] = number % 2
    cell = 2 * place + half
    bad = np.bincount(cell, weights=label, minlength=2 * (place.max() + 1))
    count = np.bincount(cell, minlength=len(bad))
    other = cell ^ 1
    return np.where(count[other] > 0, bad[other] / np.maximum(count[other], 1), np.nan)


def _known_auroc(score: np.ndarray, bad: np.ndarray) -> float:
    known = ~np.isnan(score)
    return auroc(score[known], bad[known]) if known.any() else float("nan")


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
