"""Weights between a pretrained and a fine-tuned model (WiSE-FT, Wortsman et al., arXiv:2109.01903)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def interpolate(pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], mix: float) -> dict[str, Tensor]:
    """``(1 - mix) * pretrained + mix * finetuned`` in float32; the ends are bit-identical to the parents.

    Tensors that are not floating point are taken from ``finetuned``, or from ``pretrained`` at ``mix=0``.

    Raises:
        ValueError: If the two differ in keys or shapes, hold NaN, or ``mix`` is outside [0, 1].

    Example:
        >>> interpolate({"w": torch.zeros(1)}, {"w": torch.ones(1)}, 0.25)
        {'w': tensor([0.2500])}
    """
    if not 0 <= mix <= 1:
        raise ValueError(f"mix must be in [0, 1], got {mix}")
    if different := sorted(pretrained.keys() ^ finetuned.keys()):
        raise ValueError(f"the two models differ in keys: {different[:5]} ({len(different)} in all)")
    mixed = {}
    for key, first in pretrained.items():
        second = finetuned[key]
        if first.shape != second.shape:
            raise ValueError(f"{key} has the shapes {tuple(first.shape)} and {tuple(second.shape)}")
        if not first.is_floating_point():
            mixed[key] = (first if mix == 0 else second).clone()
            continue
        if not (first.isfinite().all() and second.isfinite().all()):
            raise ValueError(f"{key} holds NaN or infinity")
        if mix in (0, 1):  # lerp turns -0.0 into 0.0, and gives NaN where the difference overflows
            mixed[key] = (first if mix == 0 else second).clone()
        else:
            mixed[key] = torch.lerp(first.float(), second.float(), mix).to(first.dtype)
    return mixed
