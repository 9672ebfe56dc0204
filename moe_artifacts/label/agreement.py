"""How well two raters agree, beyond what chance would give: Cohen's kappa.

    kappa = (agreed - by_chance) / (1 - by_chance)      by_chance = p q + (1 - p) (1 - q)

with p and q the shares that each rater called bad. J. Cohen, A coefficient of agreement for nominal scales, 1960.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_artifacts.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Verdicts of two raters on the same images."""

    both_artifact: int
    only_first: int  # the first rater saw artifacts, the second none
    only_second: int
    both_clean: int

    @property
    def images(self) -> int:
        """That both have labelled."""
        return self.both_artifact + self.only_first + self.only_second + self.both_clean

    @property
    def share(self) -> float:
        """Of the images, those with the same verdict."""
        return (self.both_artifact + self.both_clean) / self.images

    @property
    def kappa(self) -> float | None:
        """1 for the same verdicts, 0 for no more than chance gives; None: both gave all images one and the same verdict."""
        first = (self.both_artifact + self.only_first) / self.images
        second = (self.both_artifact + self.only_second) / self.images
        if first == second and first in (0.0, 1.0):
            return None
        by_chance = first * second + (1 - first) * (1 - second)
        return (self.share - by_chance) / (1 - by_chance)

    def __str__(self) -> str:
        kappa = "not defined: all verdicts are the same" if self.kappa is None else f"{self.kappa:.2f}"
        return (
            f"agree on {100 * self.share:.1f} % of {self.images:,} images, Cohen's kappa {kappa} "
            f"(artifacts: both {self.both_artifact:,}, only the first {self.only_first:,}, only the second "
            f"{self.only_second:,})"
        )


def agreement(first: Mapping[str, int], second: Mapping[str, int]) -> Agreement:
    """Compare verdicts, 1 or 0, on the images that both have.

    Raises:
        InputError: If there is no such image.

    Example:
        >>> agreement({"a": 1, "b": 1, "c": 0, "d": 0}, {"a": 1, "b": 0, "c": 0, "d": 0, "e": 1}).kappa
        0.5
    """
    pairs = [(first[file], second[file]) for file in first.keys() & second.keys()]
    if not pairs:
        raise InputError("the two raters have labelled no image in common")
    return Agreement(
        both_artifact=pairs.count((1, 1)),
        only_first=pairs.count((1, 0)),
        only_second=pairs.count((0, 1)),
        both_clean=pairs.count((0, 0)),
    )


def rater_tables(folder: str | os.PathLike[str]) -> list[Path]:
    """The tables of all raters of a folder: ``labels.csv`` first, then ``labels-NAME.csv`` by name."""
    named = sorted(path for path in Path(folder).glob("labels-*.csv") if path.is_file())
    own = Path(folder) / "labels.csv"
    return [own, *named] if own.is_file() else named
