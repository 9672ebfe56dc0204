"""Train the judge of finished images, and a second, independent one that shows the ceiling.

``python -m training.judges`` writes ``judges/first.safetensors`` and ``judges/second.safetensors``. Each judge trains its
classifier on one part of the real training images and keeps another part as reference, so that reference and held-out
features are alike; thresholds come from one half of the held-out images and are confirmed on the other half.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_artifacts.files import atomic_path, write_json
from moe_artifacts.judge import FeatureMaps, ManifoldJudge
from training.data.fashion import SIZE, LabelledImages, load_fashion, to_rgb
from training.data.prompts import CLASS_NAMES
from training.state import step_generator
from training.workspace import Stage, progress

NUM_CLASSES = len(CLASS_NAMES)


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """One judge. The two differ in seed, width and the images they see."""

    name: str
    seed: int
    width: int = 32
    hidden: int = 64  # of the classifier
    feature_dim: int = 64
    steps: int = 1_500
    batch: int = 128
    lr: float = 2e-3
    reference_per_class: int = 1_500
    neighbours: int = 5
    quantile: float = 0.95


FIRST = JudgeRecipe(name="first", seed=10)
SECOND = JudgeRecipe(name="second", seed=20, width=28)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to two pixels and blur a share of the images: the VAE's softness alone is no artifact."""
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    images = torch.roll(images, shift, dims=(-2, -1))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1)), 3, stride=1)
    amount = torch.rand(len(images), 1, 1, 1, generator=generator)
    return torch.lerp(images, blurred, amount)


def train_maps(recipe: JudgeRecipe, data: LabelledImages, stage: Stage) -> tuple[FeatureMaps, nn.Module]:
    """Feature maps and the classifier on top of them, by cross entropy on real images only."""
    torch.manual_seed(recipe.seed)
    maps = FeatureMaps(recipe.width).to(memory_format=torch.channels_last)
    cells = (SIZE // 8) ** 2  # of the last map
    head = nn.Sequential(
        nn.Linear(4 * recipe.width * cells, recipe.hidden), nn.ReLU(), nn.Linear(recipe.hidden, NUM_CLASSES)
    )
    both = nn.ModuleList([maps, head])
    optimizer = torch.optim.AdamW(both.parameters(), lr=recipe.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps)
    with progress(recipe.steps, 0, f"judge {recipe.name}") as bar:
        for step in range(recipe.steps):
            generator = step_generator(recipe.seed, step)
            rows = torch.randint(len(data), (recipe.batch,), generator=generator)
            images = _augment(to_rgb(data.images[rows]), generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = head(maps(images)[0])
            loss = F.cross_entropy(logits.float(), data.labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if (step + 1) % 400 == 0:
                stage.track(step + 1, loss=loss.item())
    return maps.eval(), head.eval()


@torch.no_grad()
def _maps_of(maps: FeatureMaps, images: Tensor) -> Tensor:
    return torch.cat([maps(to_rgb(part))[1] for part in images.split(1000)])


def principal_components(features: Tensor, dim: int) -> nn.Linear:
    """Standardise, then project onto the ``dim`` directions of largest variance, as one linear map."""
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    scaled = (features - mean) / std
    directions = torch.linalg.eigh(scaled.T @ scaled).eigenvectors  # of rising eigenvalues
    weight = directions.flip(-1)[:, :dim].T / std
    projection = nn.Linear(features.shape[-1], dim).requires_grad_(False)
    projection.weight.copy_(weight)
    projection.bias.copy_(-weight @ mean)
    return projection


def build_judge(recipe: JudgeRecipe, stage: Stage) -> tuple[ManifoldJudge, dict[str, object]]:
    """Train a classifier, pick the references, set the thresholds; returns the judge and what was measured."""
    train, test = load_fashion("train"), load_fashion("test")
    order = torch.randperm(len(train), generator=step_generator(recipe.seed, 0))
    for_reference, for_classifier = order[: len(order) // 3], order[len(order) // 3 :]
    maps, head = train_maps(recipe, LabelledImages(train.images[for_classifier], train.labels[for_classifier]), stage)

    seen = _maps_of(maps, train.images[for_reference])
    projection = principal_components(seen, recipe.feature_dim)
    labels = train.labels[for_reference]
    reference = []
    for label in range(NUM_CLASSES):
        rows = (labels == label).nonzero().flatten()[: recipe.reference_per_class]
        if len(rows) < recipe.reference_per_class:
            raise ValueError(f"class {label} has {len(rows)} reference images, {recipe.reference_per_class} are needed")
        reference.append(projection(seen[rows]).half())
    judge = ManifoldJudge(maps, projection, torch.stack(reference), torch.zeros(NUM_CLASSES), recipe.neighbours)

    # Even rows set the thresholds, odd rows confirm them.
    margins = torch.cat(
        [judge.margin(to_rgb(i), k) for i, k in zip(test.images.split(1000), test.labels.split(1000), strict=True)]
    )
    first_half = torch.arange(len(test)) % 2 == 0
    for label in range(NUM_CLASSES):
        values = margins[first_half & (test.labels == label)].numpy()
        judge.log_threshold[label] = float(np.quantile(values, recipe.quantile))
    margins = margins - judge.log_threshold[test.labels]
    with torch.no_grad():
        logits = torch.cat([head(maps(to_rgb(part))[0]) for part in test.images.split(1000)])
    report: dict[str, object] = {
        "accuracy": (logits.argmax(-1) == test.labels).float().mean().item(),
        "real_rate_threshold_half": (margins[first_half] > 0).float().mean().item(),
        "real_rate_other_half": (margins[~first_half] > 0).float().mean().item(),
        "real_rate_other_half_by_class": [
            (margins[~first_half & (test.labels == k)] > 0).float().mean().item() for k in range(NUM_CLASSES)
        ],
    }
    return judge, report


def train_judges() -> tuple[Path, Path]:
    """Both judges; returns their files."""
    stage = Stage("judges")
    paths = []
    for recipe in (FIRST, SECOND):
        path = stage.folder / f"{recipe.name}.safetensors"
        paths.append(path)
        if path.exists():
            continue
        judge, report = build_judge(recipe, stage)
        stage.log.info("%s %s", recipe.name, report)
        write_json(path.with_suffix(".json"), report)
        metadata = {
            "width": str(recipe.width),
            "neighbours": str(recipe.neighbours),
        }
        with atomic_path(path) as temporary:
            save_file(judge.tensors(), temporary, metadata)
    return paths[0], paths[1]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in train_judges():
        print(path)


if __name__ == "__main__":
    main()
