"""What the generator and the judges learn from: real pictures of some classes, and what prompts call those."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from moe_artifacts.shapes import Rows
from training.data.fashion import LabelledImages, load_fashion
from training.data.prompts import SYNONYMS


@dataclass(frozen=True)
class ClassImages:
    """Labels are places in ``names``."""

    train: LabelledImages
    held_out: LabelledImages
    names: tuple[tuple[str, ...], ...]  # of each class, in lower case; the first is the main one

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.train.size


def fashion_classes(source: Path | str | None = None) -> ClassImages:
    """Fashion-MNIST; for ``source`` and what is raised see :func:`training.data.fashion.load_fashion`."""
    return ClassImages(load_fashion("train", source), load_fashion("test", source), SYNONYMS)


class EvenClasses:
    """Draws rows such that every class comes as often as the others, however few pictures it has: prompts will ask for them alike."""

    def __init__(self, labels: Int[Tensor, " image"]) -> None:
        self.order, self.counts = labels.argsort(stable=True), labels.bincount()
        self.counts = self.counts[self.counts > 0]
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self, count: int, generator: torch.Generator) -> Rows:
        """Indices of images; of classes of one size, as if there were none."""
        if self.counts.min() == self.counts.max():
            return torch.randint(len(self.order), (count,), generator=generator)
        chosen = torch.randint(len(self.counts), (count,), generator=generator)
        place = torch.rand(count, generator=generator, dtype=torch.float64) * self.counts[chosen]
        return self.order[self.starts[chosen] + place.long()]
