"""Recorded trajectories scored after the fact, folder by folder, a few images in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_artifacts.accumulator import Accumulated
from moe_artifacts.config import ScorerConfig
from moe_artifacts.decision import decide
from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path, read_json, sha256_file
from moe_artifacts.noise import progress
from moe_artifacts.scorer import ArtifactScorer
from moe_artifacts.trajectory import Trajectory, join_trajectories
from moe_artifacts.trajectory_files import LATENTS_NAME, META_NAME, TABLE_NAME, iter_trajectories, trajectory_folders

IMAGES_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class FolderSummary:
    """One scored trajectory folder in a few numbers."""

    folder: Path
    images: int
    errors: int  # images that were not finite at some step; the other numbers leave them out
    artifact_prob: float  # mean over images at the last scored step; NaN where there is none
    aborted: int | None  # by the scorer's threshold, before the last step; None: the scorer has no threshold
    rejected: int | None  # the same at the last step, which saves nothing
    resumed: bool  # it had been scored before


def score_folders(
    path: str | os.PathLike[str], scorer: ArtifactScorer, out: str | os.PathLike[str], keep_latents: bool = False
) -> Iterator[FolderSummary]:
    """Score a trajectory folder into ``out``, or each trajectory folder in a folder into one of its name in ``out``.

    Folders that this scorer has finished before are not scored again, so a run that was killed goes on.

    Args:
        path: Its trajectories must hold x0.
        keep_latents: Copy the latents too.
    Raises:
        InputError: If there are no trajectories, or none with latents, or ``out`` holds others.
        LatentSpaceError: If the latents are of another space than the scorer's.
    """
    path, out = Path(path), Path(out)
    if out.resolve() == path.resolve():
        raise InputError(f"out must not be the folder that is scored, got {out} for both")
    identity = scorer.identity()
    for source in trajectory_folders(path):
        target = out if source == path else out / source.name
        origin = _origin(source)
        resumed = _is_finished(target, identity, origin, keep_latents)
        parts = iter_trajectories(target if resumed else source, IMAGES_AT_ONCE)
        if not resumed:
            parts = (scorer.score(part) for part in parts)
        scored = join_trajectories([replace(part, x0=None, latents=None) for part in parts])
        if not resumed:
            replace(scored, meta={**scored.meta, "scorer": identity, "scored_from": origin}).save(target)
            if keep_latents:
                with atomic_path(target / LATENTS_NAME) as temporary:
                    shutil.copyfile(source / LATENTS_NAME, temporary)
        yield summarise(target, scored, scorer.config, resumed)


def summarise(folder: Path, scored: Trajectory, config: ScorerConfig, resumed: bool = False) -> FolderSummary:
    """Count what the scorer's rule would do with the images of a scored trajectory."""
    scores, rule = scored.scores, config.threshold
    finite = torch.stack([scores[name] for name in ("artifact_prob", "exit_cdf")]).isfinite().all(dim=0).all(dim=-1)
    prob, cdf = scores["artifact_prob"][finite], scores["exit_cdf"][finite]
    aborted = rejected = None
    if rule is not None:
        accumulated = Accumulated(
            exit_prob=scores["exit_prob"][finite],
            exit_pdf=cdf.diff(dim=-1, prepend=torch.zeros_like(cdf[:, :1])),
            exit_cdf=cdf,
            cumulative_artifact_prob=scores["cumulative_artifact_prob"][finite],
            cumulative_clean_prob=scores["cumulative_clean_prob"][finite],
        )
        where = decide(rule, prob, accumulated, progress(scored.log_snr, config.log_snr_range)).abort_step.tolist()
        stops = [scored.step[k] for k in where if k < len(scored.step)]
        rejected = stops.count(scored.num_steps - 1)
        aborted = len(stops) - rejected
    return FolderSummary(
        folder=folder,
        images=len(finite),
        errors=int((~finite).sum()),
        artifact_prob=prob[:, -1].mean().item(),
        aborted=aborted,
        rejected=rejected,
        resumed=resumed,
    )


def _origin(source: Path) -> dict[str, Any]:
    """What a folder of this name held when it was scored."""
    table, latents = source / TABLE_NAME, source / LATENTS_NAME
    return {
        "sha256": sha256_file(table) if table.exists() else None,
        "latents_bytes": latents.stat().st_size if latents.exists() else None,  # gigabytes: not hashed
    }


def _is_finished(target: Path, identity: dict[str, str], origin: dict[str, Any], keep_latents: bool) -> bool:
    """Whether ``target`` was scored to its end by this scorer, from this source.

    Raises:
        InputError: If it holds a trajectory of another origin, which must not be overwritten.
    """
    if not (target / META_NAME).exists():
        return False
    meta = read_json(target / META_NAME)
    found = meta.get("scorer") if isinstance(meta, dict) else None
    if found != identity:
        by = f"was scored by {found}" if found else "was not scored here"
        raise InputError(f"out already holds {target}, which {by}; this is {identity}: name another folder")
    if meta.get("scored_from") != origin:
        raise InputError(
            f"out already holds {target}, the scores of other trajectories, or of the same before they were changed: name "
            "another folder, or remove it"
        )
    return not keep_latents or (target / LATENTS_NAME).exists()
