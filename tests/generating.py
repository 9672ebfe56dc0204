"""Runs of generate_clean on the tiny pipeline, with a scorer that finds about half of its images bad."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor

from moe_artifacts.guard.clean_run import CleanImage, CleanRun
from moe_artifacts.guard.generate import generate_clean
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.run_folder import Attempt

PROMPTS = ["a shoe", "a bag", "shirt"]
STEPS = 4
ALL_BAD, ALL_GOOD = -math.inf, math.inf
HALF_BAD = {"ddim": 0.5, "euler-a": 2.0, "dpm": 2.0, "heun": 2.0}  # limits, for the tiny pipeline with that scheduler


class ContentScorer:
    """Finds images bad whose first channel is brighter than ``limit`` at the first check; stops them at ``abort_at``.

    What it says of an image depends on that image alone, as with a real scorer.
    """

    def __init__(self, limit: float = HALF_BAD["ddim"], abort_at: int = 1, **config: Any) -> None:
        self.config = tiny.scorer_config(**config)
        self.limit, self.abort_at, self.sessions = limit, abort_at, 0
        self.levels: list[float] = []  # of all images seen: what ``limit`` is compared with

    def session(self, batch_size: int, prompts: list[str] | None = None) -> ContentSession:
        self.sessions += 1
        return ContentSession(self)


class ContentSession:
    def __init__(self, scorer: ContentScorer) -> None:
        self.scorer, self.bad, self.calls = scorer, torch.empty(0), 0

    def step(self, *, x0: Tensor, log_snr: float, latents: Tensor | None = None) -> tiny.Score:
        sys.audit("test.step")  # a point at which tests can kill the process
        if self.calls == 0:
            level = x0[:, 0].mean(dim=(1, 2))
            self.scorer.levels += level.tolist()
            self.bad = level > self.scorer.limit
        stop = self.bad & (self.calls >= self.scorer.abort_at)
        self.calls += 1
        artifact, half = torch.where(stop, 0.9, 0.1), torch.full((len(x0),), 0.5)
        finite = x0.isfinite().flatten(1).all(dim=1)
        return tiny.Score(artifact, half, half, artifact, torch.zeros_like(half), half[:, None], finite)

    def keep(self, rows: Tensor) -> None:
        self.bad = self.bad[rows]


def generate(
    prompts: Any = PROMPTS,
    images_per_prompt: int = 2,
    *,
    pipe: Any = None,
    scorer: ContentScorer | None = None,
    guard: ArtifactGuard | None = None,
    **changes: Any,
) -> CleanRun:
    settings = {
        "batch_size": 4,
        "max_attempts": 12,
        "progress": False,
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        **changes,
    }
    if settings.get("folder") is None:
        settings.setdefault("output_type", "pt")
    return generate_clean(
        tiny.stable_diffusion() if pipe is None else pipe,
        prompts,
        images_per_prompt,
        guard=guard or ArtifactGuard(scorer or ContentScorer()),
        **settings,
    )


def place(made: Attempt | CleanImage) -> tuple[int, int]:
    return made.prompt_index, made.attempt


def files(folder: Any) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
