"""Recorded runs to a threshold that keeps its promise: the job of ``moe-artifacts calibrate``.

    records (records.py) -> posterior at every step: the scorer's own, or fitted to scalar scores (scalar/)
                         -> path statistic of the rule (decision.py) -> threshold (calibration/certify.py) -> report

Three parts of the prompts, none in two of them: on the first, whatever is fitted; on the second, the threshold; on the third,
what is reported.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from moe_artifacts.accumulator import Accumulated, accumulate
from moe_artifacts.calibrated import RISK_WORDS, RISKS, Calibrated, Fitted, Request
from moe_artifacts.calibration import expected_calibration_error
from moe_artifacts.calibration.certify import Certified, certify
from moe_artifacts.calibration.economic import choose_steps, fit_boundary
from moe_artifacts.calibration.risks import Risk
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.decision import clear_step, path_statistic
from moe_artifacts.errors import CalibrationError, InputError
from moe_artifacts.held_back import BINS, reliability, risk_rates, threshold_curve
from moe_artifacts.policy import Run, abort_columns, apply_rule, by_prompt, cheapest_threshold, last_statistic
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.records import EXIT_COLUMNS, PARTS, Records, split_parts
from moe_artifacts.scalar.exit import fit_exit
from moe_artifacts.scalar.normal import tells_nothing
from moe_artifacts.scalar.posterior import ScalarPosterior

FALSE_ABORTS = ("per-image", "per-prompt")
IMAGES_TO_CHOOSE = 3_000  # of the fitting part, at most, to choose steps on: some fifty posteriors are fitted
SMALLEST_GAIN = 0.002  # full runs per clean image that another step has to save


def calibrate(records: Records, request: Request) -> Calibrated:
    """Fit, certify and report.

    Raises:
        InputError: If the records do not hold what the rule needs, or the parts cannot be made.
        CalibrationError: If there are too few images or prompts for a fit or for the promise; it says how many are needed.
    """
    parts = fit, held_out, report = split_parts(records, request.shares, request.seed)
    if not fit.any() and (records.kind == "score" or request.rule == "economic"):
        what = "the posterior of scalar scores" if records.kind == "score" else "the economic rule"
        raise InputError(f"{what} needs prompts to be fitted on: the first of shares must be above 0")
    for name, part in zip(PARTS, parts, strict=True):
        if part.any() and len(np.unique(records.runs.bad[part])) == 1:
            which = "bad" if records.runs.bad[part].all() else "clean"
            raise CalibrationError(
                f"all {part.sum()} images of the part {name!r} are {which}: record more prompts, or share them out otherwise"
            )
    records = _at_the_steps_used(records, request, fit)
    runs = records.runs
    notes = [*records.notes, *_warnings(records, request)]
    run = Run(runs.bad, runs.calls, request.check_cost, runs.total_calls)
    fitted = _posterior(records, request, fit)
    rule = _rule(fitted.prob, request, run, fit)
    statistic, clear = _statistic(rule, fitted, runs.calls / runs.total_calls)
    certified = _certify(records, request, last_statistic(run, statistic, clear), fit, held_out)
    cheapest = None
    if fit.any() and request.risk in FALSE_ABORTS:
        # At a higher threshold fewer clean images are aborted, so the promise holds there too, as long as it was not chosen
        # on the certifying part.
        fitting = dataclasses.replace(run, bad=run.bad[fit])
        cheapest = 0.5 if rule.rule == "economic" else _cheapest(fitting, statistic[fit], request.max_risk)
    threshold = max(certified.threshold, cheapest or 0.0)
    final = dataclasses.replace(run, bad=run.bad[report])
    there = None if clear is None else clear[report]
    outcome = apply_rule(final, statistic[report], threshold, there)
    column, _ = abort_columns(final, statistic[report], threshold, there)
    saving = slice(0, run.last_saving + 1)
    prob, label = fitted.prob[report][:, saving], runs.label[report]
    label = np.repeat(label[:, None], prob.shape[1], axis=1)
    return Calibrated(
        request=request,
        rule=_with_provenance(rule, threshold, certified, request, records),
        certified=certified,
        cheapest=cheapest,
        images=tuple(int(part.sum()) for part in parts),  # type: ignore[arg-type]
        prompts=tuple(len(np.unique(runs.prompt[part])) for part in parts),  # type: ignore[arg-type]
        outcome=outcome,
        prompt_outcome=by_prompt(final, column, runs.prompt[report], there),
        risks=risk_rates(runs.label[report], runs.prompt[report], column < len(runs.calls)),
        reliability=reliability(prob.ravel(), label.ravel()),
        ece=expected_calibration_error(prob.ravel(), label.ravel(), BINS),
        curve=threshold_curve(final, statistic[report], there),
        fitted=fitted,
        records=records,
        notes=notes,
    )


def _warnings(records: Records, request: Request) -> list[str]:
    repeated = len(records.runs) - len(records.prompts)
    if request.unit == "image" and repeated:
        return [
            f'the unit "image" promises nothing here: {len(records.runs)} images share {len(records.prompts)} prompts, and images '
            'of one prompt are alike; use the unit "prompt"'
        ]
    return []


def _posterior(records: Records, request: Request, fit: Bool[np.ndarray, " image"]) -> Fitted:
    runs = records.runs
    uses_exits = request.rule in ("cumulative", "q-exit")
    if records.kind == "posterior":
        if missing := [name for name in EXIT_COLUMNS[:2] if uses_exits and name not in records.exits]:
            raise InputError(
                f"the {request.rule} rule needs the columns {missing} beside artifact_prob; write them with `moe-artifacts "
                "score`, or give --score artifact_prob to take it as a plain score and fit the rest"
            )
        prob = runs.scores.astype(np.float32)
        found = {name: torch.from_numpy(values.astype(np.float32)) for name, values in records.exits.items()}
        cdf, total, clean = (found.get(name, torch.zeros(prob.shape)) for name in EXIT_COLUMNS)
        nothing = torch.zeros(prob.shape)  # no rule looks at these two
        return Fitted(prob=prob, acc=Accumulated(nothing, nothing, cdf, total, clean))
    groups = _siblings(runs.prompt, request.siblings)
    posterior = ScalarPosterior.fit(runs.rows(fit), siblings=None if groups is None else groups[fit])
    prob = posterior.prob(runs.scores, groups).astype(np.float32)
    spent = runs.calls / runs.total_calls
    head = None
    mass = np.zeros(prob.shape, dtype=np.float32)
    if uses_exits:
        loss: Literal["economic", "palbert"] = "economic" if request.rule == "cumulative" else "palbert"
        head = fit_exit(prob[fit], spent, spent, runs.label[fit], loss=loss, seed=request.seed)
        mass = head.mass(prob, spent)
    acc = accumulate(torch.from_numpy(prob), torch.from_numpy(mass))
    return Fitted(prob=prob, acc=acc, posterior=posterior, exit_head=head)


def _at_the_steps_used(records: Records, request: Request, fit: np.ndarray) -> Records:
    """Scalar scores: without the score of the finished image, which comes too late, and at the chosen steps only."""
    if records.kind == "posterior":
        if request.siblings > 1:
            raise InputError("siblings are for scalar scores only: a scorer of ours looks at each image alone")
        if request.choose_steps:
            raise InputError(
                "steps can be chosen for scalar scores only: a scorer of ours looks at those of its config"
            )
        return records
    runs = records.runs
    used = np.flatnonzero(runs.calls < runs.total_calls)
    # A face detector sees nothing in noise: on the fitting part alone, so that the promise holds.
    silent = [int(k) for k in used if tells_nothing(runs.scores[fit][:, k])]
    used = np.setdiff1d(used, silent)
    if len(used) == 0:
        raise InputError("the scores before the last call are the same in nearly all images: they tell nothing")
    notes = list(records.notes)
    if silent:
        calls = ", ".join(str(runs.calls[k]) for k in silent)
        notes.append(f"not looked at: the scores after {calls} calls, which are the same in nearly all images")
    gaps = bool(np.isnan(runs.scores[:, used]).any())
    if request.choose_steps and gaps:
        raise InputError("steps can be chosen only where every image has a score at every step; here are gaps")
    if request.choose_steps or (request.choose_steps is None and not gaps):
        used = used[_cheapest_steps(runs.rows(fit).steps(used), request)]
    log_snr = None if records.log_snr is None else records.log_snr[used]
    return dataclasses.replace(records, runs=runs.steps(used), log_snr=log_snr, notes=notes)


def _cheapest_steps(runs: ScoredRuns, request: Request) -> np.ndarray:
    """Columns to look at, judged by the economic boundary, whatever the rule."""
    runs = runs.rows(np.random.default_rng(request.seed).permutation(len(runs))[:IMAGES_TO_CHOOSE])

    def cost(columns: tuple[int, ...]) -> float:
        part = runs.steps(np.array(columns))
        groups = _siblings(part.prompt, request.siblings)
        prob = ScalarPosterior.fit(part, siblings=groups).prob(part.scores, groups)
        limit = request.max_risk if request.risk in FALSE_ABORTS else None
        found = fit_boundary(prob, part.bad, part.calls, part.total_calls, request.check_cost, max_false_aborts=limit)
        return found.cost_per_clean / part.total_calls

    return np.array(choose_steps(cost, len(runs.calls), gain=SMALLEST_GAIN))


def _siblings(prompt: np.ndarray, size: int) -> np.ndarray | None:
    """Which images see each other's scores: ``size`` of a prompt at a time, in their order; None: each is alone.

    Example:
        >>> _siblings(np.array([7, 7, 7, 5, 5]), 2)
        array([1, 1, 2, 0, 0])
    """
    if size == 1:
        return None
    place = np.zeros(len(prompt), dtype=int)
    for group in np.unique(prompt):
        rows = np.flatnonzero(prompt == group)
        place[rows] = np.arange(len(rows)) // size
    return np.unique(np.stack([prompt, place]), axis=1, return_inverse=True)[1]


def _rule(prob: np.ndarray, request: Request, run: Run, fit: np.ndarray) -> ThresholdConfig:
    """The rule, its threshold still open."""
    if request.rule == "economic":
        saving = slice(0, run.last_saving + 1)
        limit = request.max_risk if request.risk in FALSE_ABORTS else None
        return fit_boundary(
            prob[fit][:, saving],
            run.bad[fit],
            run.calls[saving],
            run.total_calls,
            request.check_cost,
            max_false_aborts=limit,
        ).rule()
    return ThresholdConfig(
        rule=request.rule,
        threshold=0.5,
        q=request.q if request.rule == "q-exit" else None,
        patience=request.patience if request.rule == "patience" else None,
    )


def _statistic(
    rule: ThresholdConfig, fitted: Fitted, progress: Float[np.ndarray, " step"]
) -> tuple[Float[np.ndarray, "image step"], Int[np.ndarray, " image"] | None]:
    """Path statistic, and where each image is cleared."""
    prob = torch.from_numpy(fitted.prob)
    at = torch.from_numpy(progress.astype(np.float32)).expand_as(prob)
    statistic = path_statistic(rule, prob, fitted.acc, at).numpy()
    return statistic, clear_step(rule, fitted.acc, prob, at).numpy() if rule.rule == "economic" else None


def _certify(records: Records, request: Request, statistic: np.ndarray, fit: np.ndarray, part: np.ndarray) -> Certified:
    """On the second part; where it is too small, the error says how it came to be."""
    runs, risk = records.runs, Risk(RISKS[request.risk], request.max_risk)
    candidates = None
    if request.risk == "wrong-aborts" and fit.any():
        unit = runs.prompt if request.unit == "prompt" else np.arange(len(runs))
        candidates = _candidates(statistic[fit], runs.label[fit], unit[fit], request.max_risk)
    try:
        return certify(
            statistic[part],
            runs.label[part],
            runs.prompt[part],
            risks=risk,
            confidence=request.confidence,
            unit=request.unit,
            seed=request.seed,
            candidates=candidates,
        )
    except CalibrationError as error:
        prompts = len(np.unique(runs.prompt[part]))
        raise CalibrationError(
            f"{error}. Thresholds come from {prompts} of the {len(records.prompts)} prompts here, {int(part.sum())} images"
            + ("" if records.part is not None else f": a share of {request.shares[1]:g}, see --shares")
        ) from error


def _candidates(
    statistic: np.ndarray, label: np.ndarray, unit: np.ndarray, max_risk: float, points: int = 40
) -> np.ndarray | None:
    """Thresholds in the order in which wrong aborts are tested: down from where the fitting part is surest to pass.

    The share of wrong aborts is not monotone: at the top too few images are aborted to see it, further down too many
    wrongly. None: no threshold passes even there.
    """
    if not (statistic > 0).any():
        return None  # the rule never aborts
    tried = np.unique(np.quantile(statistic[statistic > 0], np.linspace(0.5, 1, points)))[::-1]
    group = np.unique(unit, return_inverse=True)[1]
    room = [np.bincount(group, weights=(statistic >= t) * (max_risk - (1 - label))) for t in tried]
    # In standard errors, up to a factor: what certify bets on is that the mean over units is above 0.
    margin = np.array([values.sum() / np.sqrt(np.square(values).sum()) for values in room])
    return tried[margin.argmax() :] if margin.max() > 0 else None


def _cheapest(run: Run, statistic: np.ndarray, limit: float) -> float:
    return min(1.0, cheapest_threshold(run, statistic, limit))


def _with_provenance(
    rule: ThresholdConfig, threshold: float, certified: Certified, request: Request, records: Records
) -> ThresholdConfig:
    meta = records.meta
    return dataclasses.replace(
        rule,
        threshold=threshold,
        risk=RISK_WORDS[request.risk],
        max_risk=request.max_risk,
        confidence=request.confidence,
        unit=request.unit,
        num_clean=certified.num_units,
        scheduler=meta.get("scheduler"),
        num_inference_steps=meta.get("num_inference_steps", records.runs.total_calls),
        guidance_scale=meta.get("guidance_scale"),
        eta=meta.get("eta"),
        image_size=None if meta.get("image_size") is None else tuple(meta["image_size"]),
        denoiser=meta.get("denoiser"),
        scored_steps=tuple(int(calls) - 1 for calls in records.runs.calls),
    )
