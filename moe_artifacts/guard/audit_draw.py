"""Which of the images that would be aborted are finished, to learn how often that would have been wrong."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class AuditDraw:
    """Draws a share of images. The same image is drawn in every run; nothing is taken from a random number generator.

    Example:
        >>> draw = AuditDraw(rate=0.1, seed=0)
        >>> sum(draw.takes(image=0, seed=seed, prompt="a shoe") for seed in range(10_000))
        984
    """

    rate: float  # in [0, 1]
    seed: int

    def takes(self, image: int, seed: int | None, prompt: str) -> bool:
        """Whether this image is drawn: by its seed, or by its place in the batch where it has none, and its prompt."""
        which = ["image", image] if seed is None else ["seed", seed]
        digest = hashlib.sha256(json.dumps([self.seed, *which, prompt]).encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.rate * 2**64
