"""What the generator and the judges learn from: real pictures of some classes, and what prompts call those."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
