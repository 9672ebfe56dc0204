"""The CLIP backbones, all of the bundled scorer's architecture, each part seeing as many previews as every other.

All but the plain one learn from the same images, whatever they look at.

    plain        contrastive, on real images and prompts: it has never seen noise, as a downloaded CLIP
    prompts      then contrastive on previews and prompts
    verdicts     or on previews and prompts that say what the judge found: "a bag, broken"
    classified   then image and text tower and a head end to end on the label
    wise-ft      weights between the last two, chosen on validation

Steps are ``tower_samples`` over the batch. The learning rate goes with the square root of the batch, as usual with Adam (Malladi
et al., arXiv:2205.10287), so that the batch is not judged by a rate that was chosen for another one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ablation.designs import Tower
from benchmarks.ablation.inputs import Inputs
from benchmarks.ablation.pictures import build_preview
from benchmarks.ablation.samples import Embedded as EmbeddedRuns
from benchmarks.ablation.samples import count, embed_runs, embed_split, own_pictures
from moe_artifacts.config import EmbedderConfig
from moe_artifacts.embedder import ClipEmbedder
from moe_artifacts.files import atomic_path
from training.band_probe import Bands, Embedded, band_scores
from training.cached_contrastive import cached_backward, clip_loss
from training.clip import EMBED_DIM, MODEL_CONFIG, NUM_CLASSES, FinetuneHead, artifact_loss
from training.collect import LOG_SNR_RANGE
from training.data.prompts import prompts_of
from training.loop import StepBatch, TrainingLoop, linear_schedule
from training.noise_grids import parse_grids
from training.wise_ft import best_mix, interpolate, sweep

LR, LR_BATCH = 1e-3, 512
MICRO_BATCH = 512
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
PROBE_IMAGES = 4_000
GRID = "ddim:50"  # where noise is added to finished images


@dataclass(frozen=True)
class Cost:
    """Of training."""

    seconds: float = 0.0  # CPU time of all threads: wall-clock time would tell what else the machine did
    previews: int = 0  # seen, again and again

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.previews + other.previews)


@dataclass(frozen=True)
class Pool:
    """What a backbone learns from."""

    label: Tensor  # int64 [image], the class
    margin: Tensor | None  # [image]; None: not judged
    take: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]  # previews of some images, and their log-SNR


def build(weights: Path | None = None) -> ClipEmbedder:
    """The architecture of the bundled scorer."""
    embedder = ClipEmbedder(EmbedderConfig(model="custom", embed_dim=EMBED_DIM, model_config=MODEL_CONFIG))
    if weights is not None:
        embedder.load_state_dict(load_file(weights))
    return embedder.eval()


def train_tower(inputs: Inputs, tower: Tower, seed: int) -> tuple[Path, Cost]:
    """The weights of a backbone, and what they cost with all that went before."""
    if tower.tuning == "plain":
        tower = Tower(tuning="plain")  # whatever it will look at
    name = "-".join([tower.tuning, tower.view, tower.preview, str(tower.batch), str(seed)])
    path = inputs.folder / "towers" / f"{name}.safetensors"
    if not path.exists():
        embedder, cost = _trained(inputs, tower, seed)
        with atomic_path(path) as temporary:
            state = {k: v.detach().contiguous() for k, v in embedder.state_dict().items()}
            save_file(state, temporary, {"cost": json.dumps([cost.seconds, cost.previews])})
    with safe_open(path, framework="pt") as file:
        return path, Cost(*json.loads(file.metadata()["cost"]))


def _trained(inputs: Inputs, tower: Tower, seed: int) -> tuple[ClipEmbedder, Cost]:
    if tower.tuning == "plain":
        torch.manual_seed(seed)
        return _contrastive(inputs, build(), _real(inputs), tower, seed)
    if tower.tuning in ("prompts", "verdicts"):
        parent, before = train_tower(inputs, Tower(tuning="plain"), seed)
        pool, made = _previews(inputs, tower, seed)
        embedder, cost = _contrastive(inputs, build(parent), pool, tower, seed + 100)
        return embedder, before + made + cost
    parent, before = train_tower(inputs, replace(tower, tuning="verdicts"), seed)
    if tower.tuning == "classified":
        embedder, cost = _classified(inputs, build(parent), tower, seed + 200)
        return embedder, before + cost
    finetuned, before = train_tower(inputs, replace(tower, tuning="classified"), seed)
    return _mixed(inputs, parent, finetuned, tower, seed, before)


# --- what they learn from --------------------------------------------------------------------------------------------


def _real(inputs: Inputs) -> Pool:
    def take(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return inputs.real.rgb(rows), torch.full((len(rows),), torch.inf)

    return Pool(inputs.real.labels, None, take)


def _previews(inputs: Inputs, tower: Tower, seed: int) -> tuple[Pool, Cost]:
    """Previews of all noise levels, and what decoding them cost."""
    train, rows = inputs.split("train"), inputs.tower_rows(tower, seed)
    label, margin = train.label[rows], train.margin[rows]
    if tower.view == "x0":
        found, log_snr = own_pictures(inputs, tower, rows, seed), train.log_snr[rows]

        def of_runs(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            check = torch.multinomial((~log_snr[images].isnan()).float(), 1, generator=generator)[:, 0]
            return found.take(images, check), log_snr[images, check]

        return Pool(label, margin, of_runs), Cost(found.seconds)
    (grid,) = parse_grids(GRID, inputs.pipe.scheduler)
    alpha, sigma, levels = (
        torch.tensor([getattr(level, name) for level in grid.levels]) for name in ("alpha", "sigma", "log_snr")
    )
    preview, final = build_preview(inputs, tower.preview), train.final[rows]

    def of_noise(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        level = torch.randint(len(levels), (len(images),), generator=generator)
        noise = torch.randn((len(images), *final.shape[1:]), generator=generator)
        a, s = (values[level, None, None, None] for values in (alpha, sigma))
        with torch.no_grad():
            return preview(a * final[images].float() + s * noise), levels[level]

    return Pool(label, margin, of_noise), Cost()


# --- the parts -------------------------------------------------------------------------------------------------------


def _contrastive(
    inputs: Inputs, embedder: ClipEmbedder, pool: Pool, tower: Tower, seed: int
) -> tuple[ClipEmbedder, Cost]:
    """Radford et al., arXiv:2103.00020; pairs of one meaning are positives of each other (arXiv:2004.11362)."""
    verdicts = tower.tuning == "verdicts"
    kinds = (", clean", ", broken") if verdicts else ("",)
    captions = [[prompt + kind for prompt in prompts_of(k, "train")] for k in range(NUM_CLASSES) for kind in kinds]
    tokens = torch.stack([embedder.tokenizer(options) for options in captions])  # group option position
    bad = (pool.margin > 0).long() if verdicts and pool.margin is not None else torch.zeros_like(pool.label)
    group = len(kinds) * pool.label + bad
    clip = embedder.clip

    def loss_of(batch: StepBatch) -> Tensor:
        images, _ = pool.take(batch.rows, batch.generator)
        groups = group[batch.rows]
        words = tokens[groups, torch.randint(tokens.shape[1], (len(groups),), generator=batch.generator)]

        def loss(image: Tensor, text: Tensor) -> Tensor:
            return clip_loss(image, text, clip.logit_scale.exp().clamp(max=100), groups)

        if len(images) <= MICRO_BATCH:  # no need to run the towers twice
            value = loss(*_embed_pairs(embedder, images, words))
            value.backward()
            return value
        parts = list(zip(images.split(MICRO_BATCH), words.split(MICRO_BATCH), strict=True))
        return cached_backward(lambda part: _embed_pairs(embedder, *part), parts, loss)

    lr = LR * (tower.batch / LR_BATCH) ** 0.5
    return embedder, _train(inputs, {"embedder": embedder}, len(group), tower.batch, lr, seed, loss_of, backward=False)


def _embed_pairs(embedder: ClipEmbedder, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        image, text = embedder.embed_images(images), embedder.clip.encode_text(words)
    return image, F.normalize(text.float(), dim=-1)


def _classified(inputs: Inputs, embedder: ClipEmbedder, tower: Tower, seed: int) -> tuple[ClipEmbedder, Cost]:
    """As the second part of ``training.clip``."""
    torch.manual_seed(seed)
    head, (pool, _) = FinetuneHead(), _previews(inputs, tower, seed - 200)
    assert pool.margin is not None
    captions = torch.stack([embedder.tokenizer(prompts_of(k, "train")) for k in range(NUM_CLASSES)])
    margin = pool.margin

    def loss_of(batch: StepBatch) -> Tensor:
        images, log_snr = pool.take(batch.rows, batch.generator)
        option = torch.randint(captions.shape[1], (len(batch.rows),), generator=batch.generator)
        image, text = _embed_pairs(embedder, images, captions[pool.label[batch.rows], option])
        with torch.autocast("cpu", torch.bfloat16):
            logit, guess = head(image, text, log_snr)
        return artifact_loss(logit.float(), guess.float(), margin[batch.rows], 1.0)

    modules = {"embedder": embedder, "head": head}
    return embedder, _train(inputs, modules, len(margin), LR_BATCH, LR, seed, loss_of)


def _mixed(
    inputs: Inputs, tuned: Path, finetuned: Path, tower: Tower, seed: int, before: Cost
) -> tuple[ClipEmbedder, Cost]:
    start, seen = time.process_time(), 0
    rows = inputs.tower_rows(tower, seed)
    found = own_pictures(inputs, tower, rows, seed)
    rows, found = rows[:PROBE_IMAGES], replace(found, values=found.values[:PROBE_IMAGES])
    bands = Bands(5, LOG_SNR_RANGE)

    def measure(state: dict[str, Tensor]) -> Sequence[float]:
        nonlocal seen
        embedder = build()
        embedder.load_state_dict(state)
        train = embed_runs(embedder, found, inputs.split("train"), rows)
        validation = embed_split(inputs, embedder, tower, "validation", "x0")
        seen += count(train) + count(validation)
        return band_scores(_for_probe(train, bands), _for_probe(validation, bands), bands)

    parents = load_file(tuned), load_file(finetuned)
    embedder = build()
    embedder.load_state_dict(interpolate(*parents, best_mix(sweep(*parents, measure, MIXES))))
    return embedder, before + Cost(time.process_time() - start, seen)


def _for_probe(data: EmbeddedRuns, bands: Bands) -> Embedded:
    here = ~data.log_snr.isnan()
    image = data.embedding[here].float()
    row = here.nonzero()[:, 0]
    features = torch.cat([image, image * data.text[data.prompt[row]]], dim=1)
    columns = (features, data.margin[row] > 0, data.prompt_id[row], bands.of(data.log_snr[here]))
    return Embedded(*(column.numpy() for column in columns))


def _train(
    inputs: Inputs,
    modules: dict[str, torch.nn.Module],
    images: int,
    batch: int,
    lr: float,
    seed: int,
    loss_of: Callable[[StepBatch], Tensor],
    backward: bool = True,
) -> Cost:
    start = time.process_time()
    batch = min(batch, inputs.scale.tower_samples)
    steps = inputs.scale.tower_samples // batch
    parameters = [p for module in modules.values() for p in module.parameters()]
    loop = TrainingLoop(
        modules=modules,
        optimizer=torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05, betas=(0.9, 0.98)),
        steps=steps,
        seed=seed,
        name=f"batch {batch}",
        schedule=linear_schedule(steps, warmup=steps // 20),
    )
    loop(loss_of, lambda g: torch.randint(images, (batch,), generator=g), backward=backward)
    for module in modules.values():
        module.eval()
    return Cost(time.process_time() - start, steps * batch)
