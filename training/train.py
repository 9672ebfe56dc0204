"""Gate and experts of the bundled scorer on cached embeddings: the posterior. The exit head comes after it, in calibrate.py.

``python -m training.train`` writes ``heads/<name>.safetensors`` for the scorer and, with ``--ablations``, for every variant
that the evaluation compares. For data of one's own: ``python -m training.own.train``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_artifacts.files import atomic_path
from moe_artifacts.scorer import ArtifactScorer
from moe_artifacts.shapes import Embedding, PerImage, Rows, StepIndex, StepValues
from training import heads, posterior
from training.clip import EMBED_DIM, MARGIN_SCALE, PreviewClip, embed_recorded, train_clip
from training.collect import LOG_SNR_RANGE, RECORD_SHARES, Recorded, load_split
from training.embedded import EmbeddedBatch
from training.heads import HeadRecipe, Heads, HeadSpace
from training.workspace import Stage, work_folder

SPACE = HeadSpace(embed_dim=EMBED_DIM, log_snr_range=LOG_SNR_RANGE)
TARGETS = posterior.Targets(positive_weight=1.0, margin_scale=MARGIN_SCALE)


@dataclass(frozen=True, eq=False)
class Embedded:
    """A split after the frozen embedder, in memory: everything the heads need."""

    embedding: Float[Tensor, "batch check embed"]  # float16
    text: Embedding
    log_snr: StepValues  # NaN: no such check
    spent: StepValues  # share of the denoiser calls spent by this check
    margin: PerImage  # of the judge; above 0: bad
    prompt_id: StepIndex  # the class asked for

    @property
    def label(self) -> PerImage:
        return (self.margin > 0).float()

    @property
    def embed_dim(self) -> int:
        return self.embedding.shape[-1]

    @property
    def checks(self) -> int:
        return self.log_snr.shape[1]

    def __len__(self) -> int:
        return len(self.margin)

    def take(self, rows: Rows) -> EmbeddedBatch:
        return EmbeddedBatch(
            embedding=self.embedding[rows],
            log_snr=self.log_snr[rows],
            spent=self.spent[rows],
            text=self.text[rows],
            label=self.label[rows],
            margin=self.margin[rows],
        )


def embed_split(name: str) -> Embedded:
    """Embeddings of a split, computed once and kept beside its trajectories."""
    path = work_folder() / "embedded" / f"{name}.safetensors"
    data = load_split(name)
    if path.exists():
        cached = load_file(path)
    else:
        model = PreviewClip()
        model.load_state_dict(load_file(train_clip()))
        embedding, prompt = embed_recorded(model, data)
        cached = {"embedding": embedding, "prompt": prompt}
        with atomic_path(path) as temporary:
            save_file(cached, temporary)
    return _embedded(cached["embedding"], cached["prompt"], data)


def embed_with(scorer: ArtifactScorer, data: Recorded) -> Embedded:
    """The same from a finished scorer, for trajectories that no stage has embedded."""
    flat = data.x0.flatten(0, 1)
    with torch.no_grad():
        parts = [scorer.embed(part.float()).half() for part in flat.split(1_000)]
    embedding = torch.cat(parts).unflatten(0, data.x0.shape[:2])
    prompt = scorer.embed_prompts(data.prompts, len(data.prompts))
    assert prompt is not None
    return _embedded(embedding, prompt, data)


def _embedded(embedding: Tensor, text: Tensor, data: Recorded) -> Embedded:
    spent = (data.step + 1) / data.num_steps[:, None]
    return Embedded(embedding, text, data.log_snr, spent, data.margin, data.label)


def train_posterior(recipe: HeadRecipe, data: Embedded, validation: Embedded) -> Path:
    """Gate and experts; keeps the weights with the best mean within-class AUROC on validation."""
    stage = Stage("heads")
    path = stage.folder / f"{recipe.name}.safetensors"
    return posterior.train_posterior(recipe, SPACE, data, validation, path, targets=TARGETS, track=stage.track)


def load_heads(recipe: HeadRecipe, path: Path) -> Heads:
    """The heads of a recipe from their file."""
    return heads.load_heads(recipe, SPACE, path)


MAIN = HeadRecipe(name="soft-40")
ABLATIONS = tuple(
    HeadRecipe(name=f"{variant}-{seed}", variant=variant, seed=seed)
    for seed in (40, 41, 42)
    for variant in ("soft", "hard", "single-head")
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablations", action="store_true", help="also train the variants that the evaluation compares")
    args = parser.parse_args()
    assert len(RECORD_SHARES) >= 3
    data, validation = embed_split("train"), embed_split("validation")
    for recipe in ABLATIONS if args.ablations else (MAIN,):
        print(train_posterior(recipe, data, validation))


if __name__ == "__main__":
    main()
