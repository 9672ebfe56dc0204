"""Artifact labels without humans: how far a finished image is from the real images of its class.

    margin = log(mean distance to the k nearest real images of the class / threshold of the class)

in the features of a classifier that was trained on real images only. An image has artifacts where its margin is above 0;
the threshold of a class is the 95th percentile of held-out real images. The manifold of real images as a set of k-nearest
neighbour balls: Kynkaanniemi et al. 2019, arXiv:1904.06991. We differ in taking the mean distance to k neighbours, which is
smoother than membership in a ball, and in looking at one class at a time.

The features are the classifier's feature maps, not its last hidden layer: that one keeps what tells the classes apart and
forgets much of what a finished image looks like, so that two judges trained apart disagreed (docs/decisions/0010).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe_artifacts.errors import CheckpointError, InputError
from moe_artifacts.shapes import PerImage, Preview

GRID = 4  # the feature maps are averaged to so many cells a side: they tell what is where, but not to the pixel


class FeatureMaps(nn.Module):
    """The convolutions of a small classifier; the maps of the last two of its three stages are features.

    Args:
        width: Channels of the first stage; each of the others has twice as many as the one before.
        coloured: Look at the three colours, and not at their mean.
    """

    def __init__(self, width: int, coloured: bool = False) -> None:
        super().__init__()
        self.width, self.coloured = width, coloured
        stages = []
        channels = 3 if coloured else 1
        for out in (width, 2 * width, 4 * width):
            layers = [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
            stages.append(nn.Sequential(*layers))
            channels = out
        self.stages = nn.ModuleList(stages)
        self.dim = 6 * width * GRID**2

    def forward(self, images: Preview) -> tuple[Float[Tensor, "batch map"], Float[Tensor, "batch middle_and_last"]]:
        """The last map, and the last two averaged to ``GRID``, each flattened, of RGB images in [0, 1]."""
        first, middle, last = self.stages
        seen = images if self.coloured else images.mean(dim=1, keepdim=True)
        middle_map = middle(first(seen * 2 - 1))
        last_map = last(middle_map)
        pooled = [F.adaptive_avg_pool2d(m, GRID).flatten(1) for m in (middle_map, last_map)]
        return last_map.flatten(1), torch.cat(pooled, dim=1)


class ManifoldJudge(nn.Module):
    """Says how far finished images are from the real images of their class.

    Args:
        maps: Trained on real images only.
        projection: From the maps to the feature space: standardised principal components of real images.
        reference: Projected real images of each class; a class that has fewer than another is filled up with NaN.
        neighbours: The nearest real images that count.
        size: Pixels a side of the images that it looks at.
    """

    reference: Tensor  # class real feature
    log_threshold: Tensor  # class

    def __init__(
        self,
        maps: FeatureMaps,
        projection: nn.Linear,
        reference: Tensor,
        log_threshold: Tensor,
        neighbours: int,
        size: int = 32,
    ) -> None:
        super().__init__()
        self.maps, self.projection = maps.eval(), projection
        self.neighbours, self.size = neighbours, size
        self.register_buffer("reference", reference.float())
        self.register_buffer("log_threshold", log_threshold.float())

    @torch.no_grad()
    def features(self, images: Preview) -> Float[Tensor, "batch feature"]:
        """Where finished images lie in the feature space."""
        return self.projection(self.maps(images)[1])

    @torch.no_grad()
    def margin(self, images: Preview, labels: Int64[Tensor, " batch"]) -> PerImage:
        """Log of distance over threshold; above 0 the image counts as one with artifacts.

        Args:
            images: Finished images, RGB in [0, 1], of ``size`` x ``size`` pixels.
            labels: The class that the prompt asked for.
        Raises:
            InputError: If a label is not one of the judge's classes, or images and labels differ in number.
        """
        if len(images) != len(labels):
            raise InputError(f"images and labels must be as many, got {len(images)} and {len(labels)}")
        classes = len(self.reference)
        if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes):
            raise InputError(f"labels must be in [0, {classes - 1}], got {labels.min()} to {labels.max()}")
        features = self.features(images)
        distance = torch.empty(len(images))
        for label in labels.unique().tolist():
            rows = labels == label
            # NaN, with which a class is filled up, is farther than any number to topk.
            nearest = torch.cdist(features[rows], self.reference[label]).topk(self.neighbours, largest=False).values
            distance[rows] = nearest.mean(dim=-1)
        return distance.log() - self.log_threshold[labels]

    def tensors(self) -> dict[str, Tensor]:
        """What ``load_judge`` needs, in float16 where that is enough."""
        return {
            k: (v.half() if v.is_floating_point() and k != "log_threshold" else v).contiguous()
            for k, v in self.state_dict().items()
        }

    def metadata(self) -> dict[str, str]:
        """What ``load_judge`` needs beside the tensors."""
        facts = {"width": self.maps.width, "coloured": int(self.maps.coloured)}
        facts |= {"neighbours": self.neighbours, "size": self.size}
        return {name: str(value) for name, value in facts.items()}


def class_in(prompt: str, classes: Sequence[Sequence[str]]) -> int | None:
    """The class that a prompt asks for, by the longest name in it; None where there is none.

    Args:
        classes: The names of each class, in lower case.
    Example:
        >>> class_in("A leather boot", [["bag"], ["boot", "leather boot"], ["leather"]])
        1
    """
    text = f" {prompt.lower()} "
    found = [(len(name), k) for k, names in enumerate(classes) for name in names if f" {name} " in text]
    return max(found)[1] if found else None


def load_judge(path: Path) -> ManifoldJudge:
    """Load a judge written by ``training.judges``.

    Raises:
        CheckpointError: If the file is missing or is not such a judge.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        # The first judges were all grey and of 32 pixels, and their files do not say so.
        maps = FeatureMaps(int(metadata["width"]), coloured=bool(int(metadata.get("coloured", 0))))
        projection = nn.Linear(maps.dim, tensors["reference"].shape[-1])
        neighbours, size = int(metadata["neighbours"]), int(metadata.get("size", 32))
        judge = ManifoldJudge(maps, projection, tensors["reference"], tensors["log_threshold"], neighbours, size)
        judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable judge: {error}") from error
    return judge.eval()
