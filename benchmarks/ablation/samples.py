"""Labelled previews through a frozen backbone: of finished images with noise added, or of runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.ablation.designs import Samples, Tower, View
from benchmarks.ablation.inputs import Inputs, Runs
from benchmarks.ablation.pictures import Pictures, build_preview, pictures
from moe_artifacts.embedder import ClipEmbedder
from training.embedded import EmbeddedBatch
from training.forward_chain import add_noise, draw_levels
from training.noise_grids import NoiseGrid, parse_grids
from training.state import step_generator

CHUNK = 500  # images at once


@dataclass(frozen=True)
class Embedded:
    """Images through a frozen backbone, in memory, to be read as ``training.embedded.EmbeddedRows`` is."""

    embedding: Tensor  # float16 [image check embed]
    log_snr: Tensor  # [image check], NaN: no such check
    spent: Tensor  # [image check], share of the denoiser calls
    text: Tensor  # [prompt embed]
    prompt: Tensor  # int64 [image], row of ``text``
    prompt_id: Tensor  # int64 [image], the class: prompts of one class differ in their words alone
    margin: Tensor  # [image]

    def __len__(self) -> int:
        return len(self.margin)

    @property
    def label(self) -> Tensor:
        return (self.margin > 0).float()

    @property
    def checks(self) -> int:
        return self.log_snr.shape[1]

    @property
    def embed_dim(self) -> int:
        return self.embedding.shape[2]

    def take(self, rows: Tensor) -> EmbeddedBatch:
        """Some images, float32."""
        return EmbeddedBatch(
            embedding=self.embedding[rows].float(),
            log_snr=self.log_snr[rows],
            spent=self.spent[rows],
            text=self.text[self.prompt[rows]],
            label=self.label[rows],
            margin=self.margin[rows],
        )

    def singly(self) -> Embedded:
        """Each check as an image of its own; all must be there."""
        checks = self.checks
        columns = {name: getattr(self, name).repeat_interleave(checks) for name in ("prompt", "prompt_id", "margin")}
        flat = {name: getattr(self, name).flatten(0, 1)[:, None] for name in ("embedding", "log_snr", "spent")}
        return replace(self, **columns, **flat)


def own_pictures(inputs: Inputs, tower: Tower, rows: Tensor, seed: int) -> Pictures:
    """Previews of the x0 predictions of some runs of ``train``; ``rows`` are the first ones of the seed."""
    return pictures(inputs, tower.preview, inputs.split("train").x0[rows], f"train-{len(rows)}-{seed}")


def embed_samples(inputs: Inputs, embedder: ClipEmbedder, tower: Tower, samples: Samples, seed: int) -> Embedded:
    """What a head learns from."""
    train, rows = inputs.split("train"), inputs.head_rows(samples, seed)
    if samples.view == "x0":
        return embed_runs(embedder, own_pictures(inputs, tower, rows, seed), train, rows)
    preview = build_preview(inputs, tower.preview)
    embeddings, log_snr, spent = [], [], []
    for latents, levels, share in noised(inputs, samples, rows, seed):
        embeddings.append(_embed(embedder, preview(latents.flatten(0, 1))).unflatten(0, latents.shape[:2]))
        log_snr.append(levels)
        spent.append(share)
    return _with_texts(embedder, train, rows, torch.cat(embeddings), torch.cat(log_snr), torch.cat(spent))


def embed_split(inputs: Inputs, embedder: ClipEmbedder, tower: Tower, name: str, view: View) -> Embedded:
    """What a scorer sees of the runs of a split that it is tuned or measured on."""
    runs = inputs.split(name)
    found = pictures(inputs, tower.preview, inputs.latents(name, view), f"{name}-{view}")
    return embed_runs(embedder, found, runs, torch.arange(len(runs)))


def noised(inputs: Inputs, samples: Samples, rows: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Finished latents with noise [image level ...], its log-SNR and the share of a run done [image level]; in chunks.

    What is drawn for an image depends on the seed and on the image alone.
    """
    final, grids = inputs.split("train").final, parse_grids(samples.schedulers, inputs.pipe.scheduler)
    for part in rows.split(CHUNK):
        drawn = []
        for row in part.tolist():
            generator = step_generator(seed, row)
            grid, places = _one_level(grids[0]) if samples.one_level else draw_levels(grids, samples.levels, generator)
            levels = [grid.levels[i] for i in places]
            spent = [(grid.steps[i] + 1) / (grid.steps[-1] + 1) for i in places]
            drawn.append(
                (add_noise(final[row].float(), levels, samples.noise, generator), [v.log_snr for v in levels], spent)
            )
        latents, log_snr, share = zip(*drawn, strict=True)
        yield torch.stack(latents), torch.tensor(log_snr), torch.tensor(share)


def _one_level(grid: NoiseGrid) -> tuple[NoiseGrid, list[int]]:
    """Half of the steps, as the ancestor had it: step 10 of 20."""
    return grid, [len(grid.levels) // 2]


def embed_runs(embedder: ClipEmbedder, found: Pictures, runs: Runs, rows: Tensor) -> Embedded:
    """Some runs of a split, of which these are the previews."""
    checks = runs.x0.shape[1]
    every = torch.arange(checks)
    parts = []
    for part in torch.arange(len(rows)).split(CHUNK):
        images, columns = part.repeat_interleave(checks), every.repeat(len(part))
        parts.append(_embed(embedder, found.take(images, columns)).unflatten(0, (len(part), checks)))
    embedding = torch.cat(parts)
    embedding[runs.log_snr[rows].isnan()] = 0
    return _with_texts(embedder, runs, rows, embedding, runs.log_snr[rows], runs.spent[rows])


@torch.no_grad()
def _embed(embedder: ClipEmbedder, previews: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([embedder.embed_images(part) for part in previews.split(CHUNK)]).half()


@torch.no_grad()
def _with_texts(
    embedder: ClipEmbedder, runs: Runs, rows: Tensor, embedding: Tensor, log_snr: Tensor, spent: Tensor
) -> Embedded:
    distinct = {prompt: i for i, prompt in enumerate(sorted(set(runs.prompts)))}
    prompt = torch.tensor([distinct[runs.prompts[i]] for i in rows.tolist()])
    text = embedder.embed_texts(list(distinct))
    return Embedded(embedding, log_snr, spent, text, prompt, runs.label[rows], runs.margin[rows])


def count(data: Embedded) -> int:
    """Previews, without those that a short run lacks."""
    return int((~data.log_snr.isnan()).sum())
