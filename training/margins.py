"""The judge's margin as an auxiliary target: it says how bad an image is where the label says only whether."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_artifacts.shapes import PerImage

LARGEST_MARGIN = 4.0  # of the target: how far beyond the border it is does not matter any more


def margin_scale(margin: PerImage) -> float:
    """Typical spread of the margins of a training set, which makes the target of order one; 1 where none is known.

    Example:
        >>> margin_scale(torch.tensor([-2.0, 2.0, float("nan")]))
        1.3599999999999999
    """
    known = margin[~margin.isnan()]
    if len(known) < 2:
        return 1.0
    low, high = np.quantile(known.numpy(), [0.16, 0.84])  # two standard deviations apart, whatever the tails
    return max(float(high - low) / 2, 1e-6)


def margin_loss(said: PerImage, margin: PerImage, scale: float) -> Tensor:
    """Mean distance of what an auxiliary head says to the margins, 0 for each that is not known.

    Args:
        margin: NaN: not known.
        scale: Of :func:`margin_scale`.
    """
    known = ~margin.isnan()
    target = (margin / scale).clamp(-LARGEST_MARGIN, LARGEST_MARGIN)
    distance = F.smooth_l1_loss(said, torch.where(known, target, said.detach()), reduction="sum")
    return distance / len(margin)
