"""Which features the manifold judge should measure distances in: decided by two judges trained apart, not by a scorer.

``python -m benchmarks.judge_features`` trains the classifiers of both judges again, and for each choice of features makes two
judges that share no weights and no reference images. A good choice lets them agree on the finished images of the test
trajectories, calls uniform noise bad whatever the class, and keeps its threshold's promise on real images held out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import cohen_kappa_score
from torch import Tensor, nn

from benchmarks.results import write_results
from moe_artifacts.judge import GRID, FeatureMaps
from training.collect import SPLITS, decode, load_pipeline
from training.data.fashion import LabelledImages, load_fashion, to_rgb
from training.data.prompts import CLASS_NAMES
from training.judges import FIRST, SECOND, JudgeRecipe, principal_components, train_maps
from training.metrics import auroc_within
from training.scored import ensure_split
from training.state import step_generator
from training.workspace import Stage

SEED = 0
NOISE_IMAGES = 200


@dataclass(frozen=True)
class Choice:
    """Maps of some stages (0 to 2) averaged to ``cells`` a side and projected; no stages: the classifier's hidden layer."""

    name: str
    stages: tuple[int, ...]
    cells: int = GRID
    components: int | None = 64  # None: the features as they are


CHOICES = (
    Choice("hidden layer", (), components=None),
    Choice("last map, one cell", (2,), cells=1, components=None),
    Choice("last map", (2,)),
    Choice("last two maps", (1, 2)),  # the judge's
    Choice("last two maps, 128 components", (1, 2), components=128),
    Choice("all three maps", (0, 1, 2)),
    Choice("second map", (1,)),
    Choice("first map", (0,)),
)


@dataclass(frozen=True)
class Classifier:
    """One judge's classifier and the real images that it may use as references: those it was not trained on."""

    maps: FeatureMaps
    head: nn.Sequential
    reference: LabelledImages
    recipe: JudgeRecipe

    @torch.no_grad()
    def features(self, choice: Choice, images: Tensor) -> Tensor:
        """Features [image feature] of RGB images in [0, 1], before the projection."""
        parts = []
        for part in images.split(500):
            out = part.mean(dim=1, keepdim=True) * 2 - 1
            maps = []
            for stage in self.maps.stages:
                out = stage(out)
                maps.append(F.adaptive_avg_pool2d(out, choice.cells).flatten(1))
            hidden = self.head[:2](out.flatten(1))
            parts.append(torch.cat([maps[i] for i in choice.stages], dim=1) if choice.stages else hidden)
        return torch.cat(parts)


def train_classifier(recipe: JudgeRecipe, stage: Stage) -> Classifier:
    """As training.judges does it."""
    data = load_fashion("train")
    order = torch.randperm(len(data), generator=step_generator(recipe.seed, 0))
    kept, seen = order[: len(order) // 3], order[len(order) // 3 :]
    maps, head = train_maps(recipe, LabelledImages(data.images[seen], data.labels[seen]), stage)
    return Classifier(maps, head, LabelledImages(data.images[kept], data.labels[kept]), recipe)


def judge_with(classifier: Classifier, choice: Choice) -> Callable[[Tensor, Tensor], Tensor]:
    """The log distance of images to the real ones of their classes, in the features of ``choice``."""
    recipe, real = classifier.recipe, classifier.reference
    features = classifier.features(choice, to_rgb(real.images))
    project: Callable[[Tensor], Tensor] = nn.Identity()
    if choice.components is not None:
        project = principal_components(features, choice.components)
    projected = project(features).detach()
    references = [projected[real.labels == k][: recipe.reference_per_class] for k in range(len(CLASS_NAMES))]

    def log_distance(images: Tensor, labels: Tensor) -> Tensor:
        at = project(classifier.features(choice, images)).detach()
        out = torch.empty(len(images))
        for label in labels.unique().tolist():
            rows = labels == label
            near = torch.cdist(at[rows], references[label]).topk(recipe.neighbours, largest=False).values
            out[rows] = near.mean(dim=1).log()
        return out

    return log_distance


def compare(classifiers: list[Classifier], choice: Choice, images: Tensor, labels: Tensor) -> dict[str, object]:
    """Two judges of one choice on the same finished images."""
    test = load_fashion("test")
    noise = torch.rand(NOISE_IMAGES, 1, 32, 32, generator=torch.Generator().manual_seed(SEED)).expand(-1, 3, -1, -1)
    first_half = torch.arange(len(test)) % 2 == 0
    margins, noise_bad, real_rate = [], [], []
    for classifier in classifiers:
        distance = judge_with(classifier, choice)
        real = distance(to_rgb(test.images), test.labels)
        threshold = torch.tensor(
            [
                float(np.quantile(real[first_half & (test.labels == k)].numpy(), classifier.recipe.quantile))
                for k in range(len(CLASS_NAMES))
            ]
        )
        margins.append(distance(images, labels) - threshold[labels])
        real_rate.append((real - threshold[test.labels] > 0)[~first_half].float().mean().item())
        of_class = [
            (distance(noise, torch.full((NOISE_IMAGES,), k)) > threshold[k]).float().mean().item()
            for k in range(len(CLASS_NAMES))
        ]
        noise_bad.append(min(of_class))
    bad = [(margin > 0).numpy() for margin in margins]
    within = [auroc_within(margins[1 - i].numpy(), bad[i].astype(np.float32), labels.numpy()) for i in (0, 1)]
    return {
        "features": choice.name,
        "bad_rate": float(bad[0].mean()),
        "bad_rate_second": float(bad[1].mean()),
        "kappa": float(cohen_kappa_score(*bad)),
        "auroc_within": float(np.mean(within)),  # of one judge's margin for the other's verdicts
        "noise_bad": min(noise_bad),  # worst class of the worse judge
        "real_rate": float(np.mean(real_rate)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000, help="finished images of the test split (%(default)s)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = ensure_split(next(split for split in SPLITS if split.name == "test"))
    images = decode(load_pipeline(), data.final[: args.images])
    stage = Stage("judge-features", tracker="none")
    classifiers = [train_classifier(recipe, stage) for recipe in (FIRST, SECOND)]
    rows = [compare(classifiers, choice, images, data.label[: args.images]) for choice in CHOICES]
    write_results("judge_features", rows, seed=SEED, out=args.out)


if __name__ == "__main__":
    main()
