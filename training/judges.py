"""Train the judge of finished images, and a second, independent one that shows the ceiling.

    python -m training.judges                                   of Fashion-MNIST
    python -m training.judges --images FOLDER --out WORK        of any pictures, a sub-folder for each class

Both write ``judges/first.safetensors`` and ``judges/second.safetensors``, the second also ``classes.json``, by which
``training.judging`` finds the class that a prompt asks for. Each judge trains its classifier on one part of the real training
images and keeps another part as reference, so that reference and held-out features are alike; thresholds come from one half
of the held-out images and are confirmed on the other half.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from moe_artifacts.errors import ConfigError, InputError, MoeArtifactsError
from moe_artifacts.files import atomic_path, read_json, write_json
from moe_artifacts.judge import FeatureMaps, ManifoldJudge
from training.data.class_images import ClassImages, fashion_classes
from training.data.fashion import LabelledImages
from training.data.folder import SIZES, folder_classes
from training.state import step_generator
from training.workspace import Stage, progress, work_folder

REFERENCE_ROWS = 50_000  # whose feature maps are held in memory at once, 12 KB each


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
    reference_per_class: int = 1_500  # at most
    neighbours: int = 5
    quantile: float = 0.95
    # numpy's name of it. Of few images "linear" leaves too many above, 9 % of others where 20 set the threshold; "weibull" does
    # not, but gives the bundled judges other thresholds.
    quantile_method: Literal["linear", "weibull"] = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr must be positive, got {self.lr}")
        if not 0 < self.quantile < 1:
            raise ConfigError(f"quantile must be between 0 and 1, got {self.quantile}")


FIRST = JudgeRecipe(name="first", seed=10)
SECOND = JudgeRecipe(name="second", seed=20, width=28)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to two pixels and blur a share of the images: the VAE's softness alone is no artifact."""
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    images = torch.roll(images, shift, dims=(-2, -1))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1)), 3, stride=1)
    amount = torch.rand(len(images), 1, 1, 1, generator=generator)
    return torch.lerp(images, blurred, amount)


def train_maps(recipe: JudgeRecipe, data: LabelledImages, stage: Stage) -> tuple[FeatureMaps, nn.Sequential]:
    """Feature maps and the classifier on top of them, by cross entropy on real images only."""
    torch.manual_seed(recipe.seed)
    maps = FeatureMaps(recipe.width, data.coloured).to(memory_format=torch.channels_last)
    cells = (data.size // 8) ** 2  # of the last map
    classes = int(data.labels.max()) + 1
    head = nn.Sequential(
        nn.Linear(4 * recipe.width * cells, recipe.hidden), nn.ReLU(), nn.Linear(recipe.hidden, classes)
    )
    both = nn.ModuleList([maps, head])
    optimizer = torch.optim.AdamW(both.parameters(), lr=recipe.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps)
    with progress(recipe.steps, 0, f"judge {recipe.name}") as bar:
        for step in range(recipe.steps):
            generator = step_generator(recipe.seed, step)
            rows = torch.randint(len(data), (recipe.batch,), generator=generator)
            images = _augment(data.rgb(rows), generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = head(maps(images)[0])
            loss = F.cross_entropy(logits.float(), data.labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(both.parameters(), math.inf)  # clips nothing
            for what, value in (("loss", loss), ("gradient", norm)):
                if not value.isfinite():
                    raise ConfigError(
                        f"the {what} became {value.item()} at step {step}: start again with --lr below {recipe.lr}"
                    )
            optimizer.step()
            schedule.step()
            bar.update()
            if (step + 1) % 400 == 0:
                stage.track(step + 1, loss=loss.item())
    return maps.eval(), head.eval()


@torch.no_grad()
def _maps_of(maps: FeatureMaps, data: LabelledImages, rows: Tensor) -> Tensor:
    return torch.cat([maps(data.rgb(part))[1] for part in rows.split(1000)])


def principal_components(features: Tensor, dim: int) -> nn.Linear:
    """Standardise, then project onto the ``dim`` directions of largest variance, as one linear map."""
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    scaled = (features - mean) / std
    # In double precision: of fewer images than features many eigenvalues are zero, and in single LAPACK then gives up.
    directions = torch.linalg.eigh((scaled.T @ scaled).double()).eigenvectors.float()  # of rising eigenvalues
    weight = directions.flip(-1)[:, :dim].T / std
    projection = nn.Linear(features.shape[-1], dim).requires_grad_(False)
    projection.weight.copy_(weight)
    projection.bias.copy_(-weight @ mean)
    return projection


def build_judge(recipe: JudgeRecipe, data: ClassImages, stage: Stage) -> tuple[ManifoldJudge, dict[str, object]]:
    """Train a classifier, pick the references, set the thresholds; returns the judge and what was measured.

    Raises:
        InputError: If a class has too few images to be a reference.
        ConfigError: If the loss or its gradient stops being a number.
    """
    train, test, classes = data.train, data.held_out, len(data.names)
    order = torch.randperm(len(train), generator=step_generator(recipe.seed, 0))
    for_reference, for_classifier = _enough_references(order, train.labels, 2 * recipe.neighbours)
    maps, head = train_maps(recipe, train.subset(for_classifier), stage)

    if len(for_reference) > REFERENCE_ROWS:
        for_reference = _first_of_each(for_reference, train.labels, REFERENCE_ROWS // classes)
    seen = _maps_of(maps, train, for_reference)
    projection = principal_components(seen, recipe.feature_dim)
    labels = train.labels[for_reference]
    reference = []
    for label in range(classes):
        rows = (labels == label).nonzero().flatten()[: recipe.reference_per_class]
        if len(rows) < 2 * recipe.neighbours:
            raise InputError(
                f"the class {data.names[label][0]!r} has {len(rows)} reference images, {2 * recipe.neighbours} are needed: "
                "a third of the images are references, so add images of that class"
            )
        reference.append(projection(seen[rows]).half())
    judge = ManifoldJudge(
        maps,
        projection,
        pad_sequence(reference, batch_first=True, padding_value=torch.nan),
        torch.zeros(classes),
        recipe.neighbours,
        data.size,
    )

    # Even rows set the thresholds, odd rows confirm them.
    margins = torch.cat([judge.margin(test.rgb(rows), test.labels[rows]) for rows in _parts(len(test))])
    first_half = torch.arange(len(test)) % 2 == 0
    for label in range(classes):
        values = margins[first_half & (test.labels == label)].numpy()
        judge.log_threshold[label] = float(np.quantile(values, recipe.quantile, method=recipe.quantile_method))
    margins = margins - judge.log_threshold[test.labels]
    with torch.no_grad():
        logits = torch.cat([head(maps(test.rgb(rows))[0]) for rows in _parts(len(test))])
    report: dict[str, object] = {
        "accuracy": (logits.argmax(-1) == test.labels).float().mean().item(),
        "real_rate_threshold_half": (margins[first_half] > 0).float().mean().item(),
        "real_rate_other_half": (margins[~first_half] > 0).float().mean().item(),
        "real_rate_other_half_by_class": [
            (margins[~first_half & (test.labels == k)] > 0).float().mean().item() for k in range(classes)
        ],
    }
    return judge, report


def _enough_references(order: Tensor, labels: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """A third of the rows, and more of each small class until it has ``least`` or half of its rows; and the rest of the rows."""
    first, rest = order[: len(order) // 3], order[len(order) // 3 :]
    missing = (labels.bincount() // 2).clamp(max=least) - labels[first].bincount(minlength=int(labels.max()) + 1)
    more = torch.zeros(len(rest), dtype=torch.bool)
    for label in (missing > 0).nonzero().flatten().tolist():
        more[(labels[rest] == label).nonzero().flatten()[: int(missing[label])]] = True
    return torch.cat([first, rest[more]]), rest[~more]


def _parts(count: int) -> list[slice]:
    return [slice(start, start + 1000) for start in range(0, count, 1000)]


def _first_of_each(rows: Tensor, labels: Tensor, count: int) -> Tensor:
    """The first ``count`` rows of each label, one label after another."""
    of_rows = labels[rows]
    return torch.cat([rows[of_rows == label][:count] for label in of_rows.unique()])


def train_judges(
    data: ClassImages | None = None, recipes: tuple[JudgeRecipe, JudgeRecipe] = (FIRST, SECOND)
) -> tuple[Path, Path]:
    """Both judges, of Fashion-MNIST where no data are given; returns their files.

    Raises:
        ConfigError: If one was trained before, with another recipe; and as :func:`build_judge`.
    """
    stage = Stage("judges")
    paths = []
    for recipe in recipes:
        path = stage.folder / f"{recipe.name}.safetensors"
        paths.append(path)
        if path.exists():
            _require_recipe(path, recipe)
            continue
        data = data or fashion_classes()
        judge, report = build_judge(recipe, data, stage)
        stage.log.info("%s %s", recipe.name, report)
        write_json(path.with_suffix(".json"), report | {"recipe": asdict(recipe)})
        with atomic_path(path) as temporary:
            save_file(judge.tensors(), temporary, judge.metadata())
    return paths[0], paths[1]


def _require_recipe(path: Path, recipe: JudgeRecipe) -> None:
    """Refuse a judge of another recipe; the first ones did not say, and were those of Fashion-MNIST."""
    report = path.with_suffix(".json")
    before = read_json(report).get("recipe", {}) if report.exists() else {}
    before = asdict(FIRST if recipe.name == FIRST.name else SECOND) | before
    for name, value in asdict(recipe).items():
        if before.get(name, value) != value:
            raise ConfigError(
                f"{path} was trained with {name}={before[name]!r}, and {value!r} is asked for now: use another folder (--out), "
                "or delete it"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with a sub-folder of images for each class")
    parser.add_argument("--out", type=Path, help="work folder; without it MOE_ARTIFACTS_WORK or ~/.cache/moe-artifacts")
    parser.add_argument(
        "--size", type=int, choices=SIZES, help=f"pixels a side, of --images (the generator's, or {SIZES[0]})"
    )
    parser.add_argument("--steps", type=int, default=JudgeRecipe.steps, help="of each classifier (%(default)s)")
    parser.add_argument("--lr", type=float, default=JudgeRecipe.lr, help="learning rate (%(default)s)")
    parser.add_argument(
        "--quantile",
        type=float,
        default=JudgeRecipe.quantile,
        help="share of the real images that pass: the lower, the stricter (%(default)s)",
    )
    args = parser.parse_args(arguments)
    if args.images is None and args.size is not None:
        parser.error("--size belongs to --images")
    if args.out is not None:
        os.environ["MOE_ARTIFACTS_WORK"] = str(args.out)
    try:
        given = {name: getattr(args, name) for name in ("steps", "lr", "quantile")}
        recipes = replace(FIRST, **given), replace(SECOND, **given)
        data = None
        if args.images is not None:
            recipes = replace(recipes[0], quantile_method="weibull"), replace(recipes[1], quantile_method="weibull")
            work = work_folder()
            data = folder_classes(args.images, work / "images", args.size)
            write_json(work / "classes.json", [list(names) for names in data.names])
        for path in train_judges(data, recipes):
            print(path)
    except (MoeArtifactsError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
