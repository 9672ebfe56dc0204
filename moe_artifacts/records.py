"""Recorded runs from files: what ``moe-artifacts calibrate`` reads, as :class:`Records`.

    a folder        a trajectory folder, or a folder of them (moe_artifacts/trajectory_files.py)
    .parquet .csv   long form, one row per image and scored step
    .npz            one array per column, or with ``key`` one [prompt image step] array of a published set of scores

The columns, whatever the file. An image has either one score of any scale, or the posterior of a scorer of ours:

    image      its id; in an npz optional                                        prompt   text or number
    step       0-based place in the denoising loop; npz: ``calls`` [step]        calls    denoiser calls by then; step + 1 if absent
    num_steps  calls of a run that is not stopped; npz: ``total_calls``          score    npz: ``scores`` [image step]; NaN: not scored
    label      of the finished image, in [0, 1]: 1 has artifacts; optional       final    score of the finished image, higher is better; optional
    split      optional: fit, calibrate or report                                artifact_prob, exit_cdf, cumulative_artifact_prob,
                                                                                 cumulative_clean_prob   what ``moe-artifacts score`` writes
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_artifacts.errors import CalibrationError, InputError
from moe_artifacts.recorded import ScoredRuns

POSTERIOR = "artifact_prob"
EXIT_COLUMNS = ("exit_cdf", "cumulative_artifact_prob", "cumulative_clean_prob")
PARTS = ("fit", "calibrate", "report")


@dataclass(kw_only=True)
class RawRecords:
    """What a reader found in a file, not yet judged."""

    scores: dict[str, Float[np.ndarray, "image step"]]
    prompt: list[str]  # of each image
    calls: Int[np.ndarray, " step"]
    total_calls: int
    image: list[str] | None = None  # ids, if the file has any
    label: Float[np.ndarray, " image"] | None = None
    final: Float[np.ndarray, " image"] | None = None
    split: list[str] | None = None
    log_snr: Float[np.ndarray, " step"] | None = None  # nats
    meta: dict[str, Any] = field(default_factory=dict)  # of trajectory folders: scheduler, guidance_scale, scorer, ...
    notes: list[str] = field(default_factory=list)
    not_numbers: list[str] = field(default_factory=list)  # columns that hold text, so no score


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Records:
    """Labelled runs of one setting, checked."""

    runs: ScoredRuns  # its scores are the posterior, or the scalar score
    kind: Literal["posterior", "score"]
    exits: dict[str, Float[np.ndarray, "image step"]]  # posterior only: those of EXIT_COLUMNS that the file has
    prompts: list[str]  # text of each prompt number of ``runs``
    part: Int[np.ndarray, " image"] | None  # place in PARTS, where the file says it
    log_snr: Float[np.ndarray, " step"] | None  # nats; of trajectory folders
    meta: dict[str, Any]
    notes: list[str]  # what was left out, in words

    def __len__(self) -> int:
        return len(self.runs)


def read_records(
    path: str | os.PathLike[str],
    *,
    score: str | None = None,
    key: str | None = None,
    label_from_final: float | None = None,
    label_within: Literal["pooled", "prompt"] = "pooled",
    num_steps: int | None = None,
    drop_incomplete: bool = False,
) -> Records:
    """Read and check labelled runs.

    Args:
        score: Column of a scalar score; by default ``artifact_prob`` with what belongs to it, or else ``score``.
        key: Array [prompt image step] of an npz; the last step of the array ``<key up to its last _>_base`` is the final
            score. Steps without scores, and exact repeats of an image within a prompt, are left out.
        label_from_final: Share of the images, those with the lowest final scores, that get the label 1, in place of a
            column ``label``. Without a column ``final``, the score after the last call is taken.
        label_within: Whether that share is taken of all images or of each prompt's.
        num_steps: Denoiser calls of a run that is not stopped, where the file does not say it.
        drop_incomplete: Leave out images whose posterior is missing at a step, in place of an error.
    Raises:
        InputError: If the file cannot be read, columns are missing, ids are doubled, a prompt is in two parts, a number is
            not finite or a label is outside [0, 1].
        CalibrationError: If all images are of one class.
    """
    from moe_artifacts.record_files import read_raw

    raw = read_raw(Path(path), key, num_steps)
    _check_ids(raw)
    kind, name = _which_score(raw, score)
    final = raw.final
    if kind == "score" and final is None and raw.calls[-1] == raw.total_calls:
        last = raw.scores[name][:, -1]
        final = last if np.isfinite(last).all() else None
    label = _label(raw, final, label_from_final, label_within)
    prompts, prompt = np.unique(np.array(raw.prompt), return_inverse=True)
    part = _part(raw.split, prompt, prompts)
    chosen = {name: raw.scores[name]}
    if kind == "posterior":
        chosen |= {n: raw.scores[n] for n in EXIT_COLUMNS if n in raw.scores}
        keep = _complete(chosen, drop_incomplete, raw.notes)
    else:
        keep = np.ones(len(label), dtype=bool)
    runs = ScoredRuns(
        scores=chosen[name][keep],
        label=label[keep],
        prompt=prompt[keep],
        calls=raw.calls,
        total_calls=raw.total_calls,
        final=None if final is None else final[keep],
    )
    if runs.bad.all() or not runs.bad.any():
        raise CalibrationError(
            f"the labels must hold both classes, but all {len(runs)} images are {'bad' if runs.bad.all() else 'clean'}: "
            "check the column label, or take the worst share of the final score with --label-from-final"
        )
    return Records(
        runs=runs,
        kind=kind,
        exits={n: values[keep] for n, values in chosen.items() if n != name},
        prompts=prompts.tolist(),
        part=None if part is None else part[keep],
        log_snr=raw.log_snr,
        meta=raw.meta,
        notes=raw.notes,
    )


def split_parts(records: Records, shares: tuple[float, float, float], seed: int) -> list[Bool[np.ndarray, " image"]]:
    """Images of the three parts, no prompt in two: those of the file, or random prompts.

    Args:
        shares: Of the prompts for fitting, calibration and report; they add up to 1, and the first may be 0.
    Returns:
        Three masks.
    Raises:
        InputError: If the shares are not that, or the calibration or the report is left without a prompt.
    """
    if records.part is not None:
        found = [records.part == k for k in range(len(PARTS))]
    else:
        if len(shares) != 3 or min(shares) < 0 or not np.isclose(sum(shares), 1):
            raise InputError(f"shares must be three numbers >= 0 that add up to 1, got {shares}")
        groups = np.unique(records.runs.prompt)
        order = np.random.default_rng(seed).permutation(groups)
        ends = np.round(np.cumsum(shares)[:2] * len(groups)).astype(int)
        found = [np.isin(records.runs.prompt, part) for part in np.split(order, ends)]
    for name, rows in zip(PARTS[1:], found[1:], strict=True):
        if not rows.any():
            raise InputError(
                f"no prompt is left for the part {name!r}: {len(records.prompts)} prompts cannot be shared out as "
                f"{'the column split says' if records.part is not None else shares}; record more prompts"
            )
    return found


def worst_share(
    final: Float[np.ndarray, " image"],
    prompt: Int[np.ndarray, " image"],
    share: float,
    within: Literal["pooled", "prompt"],
) -> Bool[np.ndarray, " image"]:
    """The lowest ``share`` of the final scores, of all images or of those of each prompt; at ties fewer, never more.

    Example:
        >>> worst_share(np.array([3.0, 1.0, 2.0, 4.0]), np.array([0, 0, 1, 1]), 0.5, "prompt")
        array([False,  True,  True, False])

    Raises:
        InputError: If that share is less than one image.
    """
    groups = [np.ones(len(final), dtype=bool)] if within == "pooled" else [prompt == p for p in np.unique(prompt)]
    bad = np.zeros(len(final), dtype=bool)
    most = 0
    for rows in groups:
        count = int(share * rows.sum() + 1e-9)  # 0.1 * 30 is a little less than 3
        bad[rows] = final[rows] < np.sort(final[rows])[count]
        most = max(most, count)
    if most == 0:
        of = "" if within == "pooled" else " of a prompt, or take the share of all images (pooled)"
        raise InputError(
            f"a share of {share:g} is less than one image: record at least {math.ceil(1 / share)} images{of}"
        )
    return bad


def _check_ids(raw: RawRecords) -> None:
    if raw.image is None:
        return
    names, counts = np.unique(np.array(raw.image), return_counts=True)
    if (counts > 1).any():
        raise InputError(
            f"{(counts > 1).sum()} images are there more than once, the first is {names[counts.argmax()]}: "
            "doubled images would count as evidence twice; keep one of each"
        )


def _which_score(raw: RawRecords, score: str | None) -> tuple[Literal["posterior", "score"], str]:
    if score is None and POSTERIOR in raw.scores:
        return "posterior", POSTERIOR
    name = score or "score"
    if name in raw.not_numbers:
        raise InputError(
            f"the column {name!r} holds text in some row, so it is no score: put in numbers, or leave cells empty"
        )
    if name not in raw.scores:
        raise InputError(
            f"there is no column {name!r}; the columns of scores are {sorted(raw.scores)}. Name one with --score, or "
            "score the trajectories with `moe-artifacts score` first"
        )
    return "score", name


def _label(
    raw: RawRecords, final: np.ndarray | None, share: float | None, within: Literal["pooled", "prompt"]
) -> np.ndarray:
    if share is None:
        if raw.label is None:
            raise InputError(
                "there is no column label: add one, 1 for an image with artifacts and 0 for a clean one, or take the worst "
                "share of the final score with --label-from-final 0.2"
            )
        if not ((raw.label >= 0) & (raw.label <= 1)).all():  # NaN fails too
            wrong = raw.label[~((raw.label >= 0) & (raw.label <= 1))]
            raise InputError(
                f"label must be in [0, 1], 1 for an image with artifacts, got {len(wrong)} others, the first is {wrong[0]}"
            )
        return raw.label
    if not 0 < share < 1:
        raise InputError(f"label_from_final must be a share between 0 and 1, both excluded, got {share}")
    if final is None:
        raise InputError(
            "labels from the final score need a column final, or a score after the last denoiser call of every image; "
            "there is neither"
        )
    if not np.isfinite(final).all():
        raise InputError(f"final must be finite, {(~np.isfinite(final)).sum()} of {len(final)} are not")
    _, prompt = np.unique(np.array(raw.prompt), return_inverse=True)
    return worst_share(final, prompt, share, within).astype(float)


def _part(split: list[str] | None, prompt: np.ndarray, prompts: np.ndarray) -> np.ndarray | None:
    if split is None:
        return None
    if unknown := sorted(set(split) - set(PARTS)):
        raise InputError(f"split must be one of {', '.join(PARTS)}, got {unknown[:5]}")
    part = np.array([PARTS.index(name) for name in split])
    pairs = np.unique(np.stack([prompt, part]), axis=1)
    places, counts = np.unique(pairs[0], return_counts=True)
    if (counts > 1).any():
        raise InputError(
            f"{(counts > 1).sum()} prompts are in more than one part of the column split, the first is "
            f"{str(prompts[places[counts.argmax()]])!r}: images of one prompt are alike, so each prompt belongs to one part"
        )
    return part


def _complete(chosen: dict[str, np.ndarray], drop: bool, notes: list[str]) -> np.ndarray:
    """Images whose posterior is there at every step."""
    for name, values in chosen.items():
        outside = (values < 0) | (values > 1)
        if outside.any():
            raise InputError(f"{name} must be in [0, 1], got {outside.sum()} others, the first is {values[outside][0]}")
    complete = ~np.asarray(np.isnan(np.stack(list(chosen.values()))).any(axis=(0, 2)))
    if complete.all():
        return complete
    if not drop:
        raise InputError(
            f"{(~complete).sum()} images lack a posterior at some step, the first is image {complete.argmin()}: they left the "
            'run early or were not finite. Record with on_abort="record", so that no image leaves; what is still not '
            "finite is left out with --drop-incomplete"
        )
    if not complete.any():
        raise InputError("no image has a posterior at every step")
    notes.append(f"{(~complete).sum()} images without a posterior at every step were left out")
    return complete
