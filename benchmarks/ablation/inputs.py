"""Judged runs of the bundled pipeline at the checks where the table looks at them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation.designs import Samples, Scale, Tower, View
from benchmarks.ablation.noisy_runs import record_noisy
from training.collect import Recorded, load_pipeline, load_split
from training.data.fashion import LabelledImages, load_fashion
from training.workspace import work_folder

COLUMNS = (1, 3, 5, 7, 10)  # of what is recorded: after 14, 24, 34 and 50 % of the steps, and at the end
SHARES = (0.14, 0.24, 0.34, 0.50, 1.0)


@dataclass(frozen=True)
class Runs:
    """Some runs of a split; checks that a short run merged are missing."""

    x0: Tensor  # float16 [image check channel height width], predictions
    log_snr: Tensor  # [image check], NaN: no such check
    step: Tensor  # int64 [image check], -1: no such check
    num_steps: Tensor  # int64 [image]
    prompts: list[str]
    label: Tensor  # int64 [image], the class asked for
    margin: Tensor  # [image], above 0: artifacts
    seeds: Tensor
    final: Tensor  # float16 [image channel height width]

    @classmethod
    def of(cls, data: Recorded) -> Runs:
        columns = list(COLUMNS)
        checks = (data.x0[:, columns].clone(), data.log_snr[:, columns], data.step[:, columns])  # let go of the rest
        return cls(*checks, data.num_steps, data.prompts, data.label, data.margin, data.seeds, data.final)

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> Runs:
        """The first of them."""
        return replace(self, **{name: value[:count] for name, value in vars(self).items()})

    @property
    def bad(self) -> Tensor:
        """1.0 where the finished image has artifacts."""
        return (self.margin > 0).float()

    @property
    def spent(self) -> Tensor:
        """Share of the denoiser calls made by each check; 0 where it is missing."""
        return (self.step + 1) / self.num_steps[:, None]


class Inputs:
    """All that the designs share, each part read or made when it is first asked for."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.folder: Path = work_folder() / scale.folder
        self.split = cache(self._split)
        self.latents = cache(self._latents)

    @cached_property
    def pipe(self) -> Any:
        return load_pipeline()

    @cached_property
    def real(self) -> LabelledImages:
        """What the plain backbone has seen."""
        return load_fashion("train")

    def _split(self, name: str) -> Runs:
        """The first runs of a split."""
        limit = getattr(self.scale, name)
        data = Runs.of(load_split(name, limit))
        return data if limit is None else data.first(limit)

    def _latents(self, name: str, view: View) -> Tensor:
        """What is looked at in the runs of a split, float16 [image check channel height width]."""
        runs = self.split(name)
        if view == "x0":
            return runs.x0
        return record_noisy(
            self.pipe, runs.prompts, runs.seeds.tolist(), runs.step[0].tolist(), runs.final, self.folder / "x_t" / name
        )

    def head_rows(self, samples: Samples, seed: int) -> Tensor:
        """The finished images of ``train`` that a head learns from."""
        return self.rows(self.scale.images(samples), seed)

    def tower_rows(self, tower: Tower, seed: int) -> Tensor:
        """Those that a backbone learns from: the same for every kind of preview, none for a plain one."""
        return self.rows(self.scale.images(Samples()) if tower.tuned else 0, seed)

    def rows(self, images: int, seed: int) -> Tensor:
        """The first of a random order, one for each seed, so that fewer are a part of more."""
        order = torch.randperm(len(self.split("train")), generator=torch.Generator().manual_seed(seed))
        return order[:images]
