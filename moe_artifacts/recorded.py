"""Recorded runs as plain numbers: a scalar score per image and step, and what became of the image.

This is what calibration and the decision rules work on, whoever made the scores: our own scorer, ImageReward on previews, an
attention probe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int, Shaped

from moe_artifacts.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ScoredRuns:
    """Images of one setting, scored at the same steps.

    Raises:
        InputError: If shapes do not fit, labels leave [0, 1], a number is infinite, calls do not rise from 1 to at most
            ``total_calls``, or an image has no score at all.
    """

    scores: Float[np.ndarray, "image step"]  # any scale; NaN where a step of this image was not scored
    label: Float[np.ndarray, " image"]  # in [0, 1]: 1 has artifacts; between: the share of raters who saw them
    prompt: Int[np.ndarray, " image"]  # equal for images of the same prompt
    calls: Int[np.ndarray, " step"]  # denoiser calls spent on an image by then, rising
    total_calls: int  # of a run that is not stopped
    final: Float[np.ndarray, " image"] | None = None  # score of the finished image, where there is one

    def __post_init__(self) -> None:
        scores, label, prompt, calls = (np.asarray(v) for v in (self.scores, self.label, self.prompt, self.calls))
        if scores.ndim != 2 or 0 in scores.shape:
            raise InputError(f"scores must be [image step] with at least one of each, got shape {scores.shape}")
        images, steps = scores.shape
        for name, value, length in (("label", label, images), ("prompt", prompt, images), ("calls", calls, steps)):
            if value.shape != (length,):
                raise InputError(f"{name} must have shape ({length},) to fit scores {scores.shape}, got {value.shape}")
        if np.isinf(scores).any():
            raise InputError(f"scores must be finite, or NaN where not scored; {np.isinf(scores).sum()} are infinite")
        if (empty := np.isnan(scores).all(axis=1)).any():
            raise InputError(f"{empty.sum()} images have no score at any step, the first is image {empty.argmax()}")
        if not ((label >= 0) & (label <= 1)).all():  # NaN fails too
            raise InputError(f"label must be in [0, 1], got values from {label.min()} to {label.max()}")
        if calls[0] < 1 or (np.diff(calls) <= 0).any() or calls[-1] > self.total_calls:
            raise InputError(f"calls must rise from 1 to at most total_calls={self.total_calls}, got {calls.tolist()}")
        if self.final is not None and (self.final.shape != (images,) or not np.isfinite(self.final).all()):
            raise InputError(f"final must be {images} finite numbers, got shape {self.final.shape}")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def bad(self) -> np.ndarray:
        """Bool [image]: more than half of the label says artifacts."""
        return self.label > 0.5

    def rows(self, which: Shaped[np.ndarray, " row"]) -> ScoredRuns:
        """Some of the images: indices or a mask."""
        final = None if self.final is None else self.final[which]
        return replace(self, scores=self.scores[which], label=self.label[which], prompt=self.prompt[which], final=final)

    def steps(self, which: Shaped[np.ndarray, " column"]) -> ScoredRuns:
        """Some of the scored steps, as column indices or a mask."""
        return replace(self, scores=self.scores[:, which], calls=self.calls[which])
