"""Embeddings and trajectories in which bad images can be told, more surely at every check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_artifacts.noise import noise_levels
from moe_artifacts.trajectory import Trajectory
from tests import tiny
from training.embed import COLUMNS
from training.row_jobs import RowJob, ShardRows, run_job

EMBED_DIM = 8
LEVELS = (-4.0, -1.0, 2.0, 5.0)  # log-SNR of the checks
STEPS = (1, 3, 5, 7)
NUM_STEPS = 8
SETTING = '{"scheduler": "DDIMScheduler", "num_inference_steps": 8, "guidance_scale": 1.5}'


@dataclass(frozen=True, kw_only=True)
class Made:
    """How embeddings are made up."""

    images: int = 400
    prompts: int = 100
    bad_rate: float = 0.3
    seed: int = 0
    levels: Sequence[float] = LEVELS
    setting: str = SETTING
    margins: bool = True
    label: Tensor | None = None  # in place of those drawn; NaN: not known
    embedder: str = "one"
    shards: int = 2


def truth(made: Made) -> Tensor:
    """The labels."""
    if made.label is not None:
        return made.label
    generator = torch.Generator().manual_seed(made.seed)
    return (torch.rand(made.images, generator=generator) < made.bad_rate).float()


def write_embedded(folder: Path, made: Made | None = None) -> Path:
    """A folder as ``training.embed`` writes it: one direction of the embedding tells bad images, under noise."""
    made = made or Made()
    generator = torch.Generator().manual_seed(1_000 + made.seed)
    label, checks = truth(made), len(made.levels)
    towards = F.one_hot(torch.tensor(0), EMBED_DIM).float()
    noise = torch.randn(len(label), checks, EMBED_DIM, generator=generator)
    strength = torch.linspace(0.6, 1.8, checks)[None, :, None]
    sign = 2 * label.nan_to_num(0.5)[:, None, None] - 1
    embedding = F.normalize(noise + 1.2 * strength * sign * towards, dim=-1).half()
    texts = F.normalize(torch.randn(made.prompts, EMBED_DIM, generator=generator), dim=-1).half()
    per_shard = -(-len(label) // made.shards)

    def shard(number: int) -> ShardRows:
        rows = ShardRows(COLUMNS)
        images = range(number * per_shard, min((number + 1) * per_shard, len(label)))
        for i in images:
            known = not math.isnan(label[i])
            rows.add(
                key=f"{made.seed}/{i}",
                prompt=f"prompt {i % made.prompts} of {made.seed}",
                label=label[i].item() if known else None,
                margin=(label[i].item() - 0.5) * 0.3 if made.margins and known else None,
                setting=made.setting,
                num_steps=NUM_STEPS,
            )
        part = slice(images.start, images.stop)
        rows.add_tensor("embedding", embedding[part])
        rows.add_tensor("log_snr", torch.tensor(made.levels).expand(len(images), -1).contiguous())
        rows.add_tensor("step", torch.tensor(STEPS[:checks], dtype=torch.int32).expand(len(images), -1).contiguous())
        rows.add_tensor("text", texts)
        rows.add_tensor("prompt", torch.tensor([i % made.prompts for i in images], dtype=torch.int32))
        return rows

    facts: dict[str, Any] = {"embed_dim": EMBED_DIM, "checks": checks, "shows": "x0", "source": {}}
    facts |= {"embedder_sha256": made.embedder, "preview_sha256": made.embedder}
    run_job(RowJob(name="made up", folder=folder, shards=made.shards, facts=facts, shard=shard))
    return folder


def write_trajectories(
    folder: Path, images: int, seed: int = 0, *, prompts: int = 1_000, steps: int = NUM_STEPS, labelled: bool = True
) -> Path:
    """Trajectories of the tiny Stable Diffusion pipeline's latents, in two batches; bad images have one channel too high."""
    scheduler = tiny.SCHEDULERS["ddim"]()
    scheduler.set_timesteps(steps)
    levels = [level.log_snr for level in noise_levels(scheduler)]
    recorded = sorted({1, steps // 2, steps - 2, steps - 1})
    generator = torch.Generator().manual_seed(seed)
    label = (torch.rand(images, generator=generator) < 0.3).float()
    x0 = torch.randn(images, len(recorded), 4, 8, 8, generator=generator)
    height = (2 * label - 1)[:, None] * torch.linspace(0.4, 1.2, len(recorded))
    x0[:, :, 0] += (height + torch.randn(images, len(recorded), generator=generator))[..., None, None]
    for number, rows in enumerate(torch.arange(images).split(-(-images // 2))):
        Trajectory(
            prompts=[f"a coat number {i % prompts} of {seed}" for i in rows.tolist()],
            seeds=[10_000 * seed + i for i in rows.tolist()],
            step=recorded,
            log_snr=torch.tensor([levels[step] for step in recorded]),
            scores={},
            num_steps=steps,
            x0=x0[rows].half(),
            label=label[rows] if labelled else None,
            meta={"setting": {"scheduler": "DDIMScheduler", "num_inference_steps": steps, "guidance_scale": 1.5}},
        ).save(folder / f"{number:05d}")
    return folder
