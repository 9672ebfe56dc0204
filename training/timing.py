"""Prices as ratios measured in one run: a check against the denoiser call that it watches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moe_artifacts.scorer import ArtifactScorer


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def check_cost(pipe: Any, scorer: ArtifactScorer, batch: int = 48, guidance: bool = False, repeats: int = 40) -> float:
    """Time of scoring one step of a batch (by default the demo's), as a share of its denoiser call; median of paired runs.

    Measured alternately, so that a machine that slows down slows both.
    """
    size = pipe.unet.config.sample_size
    latents = torch.randn(batch, pipe.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    doubled = torch.cat([latents, latents]) if guidance else latents
    states = torch.randn(len(doubled), 16, pipe.unet.config.cross_attention_dim)
    session = scorer.session(batch, ["a coat"] * batch)

    def denoise() -> object:
        return pipe.unet(doubled, torch.tensor(500), encoder_hidden_states=states, return_dict=False)

    def check() -> object:
        return session.step(x0=latents, log_snr=0.0)

    for _ in range(5):
        denoise(), check()
    return statistics.median(seconds(check) / seconds(denoise) for _ in range(repeats))
