"""Logits to probabilities, and how well they fit.

Scale and bias per log-SNR band: Platt scaling (Platt, 1999) with soft labels as sample weights. A statistic that is no
probability becomes one through a monotone map (isotonic regression).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Real
from torch import Tensor, nn

from moe_artifacts.calibration.checks import finite, pairs, unit_interval
from moe_artifacts.errors import CalibrationError, InputError

NUM_BANDS = 8
MIN_CLASS_WEIGHT = 10.0  # labels of the rarer class a fit needs
MIN_SCALE = 0.01  # above 0, so that calibration never turns a ranking around

Samples = Real[np.ndarray, " sample"]


class Calibration(nn.Module):
    """Artifact logits to probabilities; the identity before the sigmoid until :meth:`set` is called.

    Scale and bias belong to the centres of equal bands of log-SNR; between centres they are interpolated linearly.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, log_snr_range: tuple[float, float], num_bands: int = NUM_BANDS) -> None:
        super().__init__()
        self.log_snr_range = log_snr_range
        self.register_buffer("scale", torch.ones(num_bands))
        self.register_buffer("bias", torch.zeros(num_bands))

    def set(self, scale: Samples, bias: Samples) -> None:
        """Take what :func:`fit_scale_bias` found.

        Raises:
            InputError: If there is not one finite number per band, or a scale is not above 0.
        """
        for name, value in (("scale", scale), ("bias", bias)):
            if value.shape != self.scale.shape or not np.isfinite(value).all():
                raise InputError(f"{name} must be {len(self.scale)} finite numbers, one per band, got {value}")
        if (scale <= 0).any():
            raise InputError(f"scale must be above 0, or it would turn the ranking around, got {scale}")
        self.scale.copy_(torch.as_tensor(scale))
        self.bias.copy_(torch.as_tensor(bias))

    def forward(self, logit: Float[Tensor, "*shape"], log_snr: Float[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
        """P(final image has artifacts | seen so far), with log-SNR in nats, clamped to the range."""
        last = len(self.scale) - 1
        low, high = self.log_snr_range
        # In bands, 0 at the first centre.
        position = ((log_snr.float() - low) / (high - low) * (last + 1) - 0.5).clamp(0, last)
        left = position.nan_to_num(0).floor().long()  # as an integer, NaN would be an index out of bounds
        right = (left + 1).clamp(max=last)
        share = position - left
        scale = torch.lerp(self.scale[left], self.scale[right], share)
        bias = torch.lerp(self.bias[left], self.bias[right], share)
        return torch.sigmoid(scale * logit.float() + bias)


def fit_scale_bias(
    logits: Samples, labels: Samples, log_snr: Samples, log_snr_range: tuple[float, float], num_bands: int = NUM_BANDS
) -> tuple[Float[np.ndarray, " band"], Float[np.ndarray, " band"]]:
    """Scale and bias of ``P(y = 1) = sigmoid(scale * logit + bias)``, fitted as :class:`Calibration` interpolates them.

    One logistic regression whose features are the logit and 1, for all bands together (nearly free) and times each
    band's share (pulled towards 0): a band with few images stays close to what all images say.

    Args:
        logits: One per image and step.
        labels: In [0, 1]; soft labels are the share of raters who saw artifacts.
        log_snr: Nats; clamped to the range.
    Returns:
        Float64, one per band, scale at least ``MIN_SCALE``.
    Raises:
        InputError: If the arrays differ in length or hold anything but finite numbers, or labels leave [0, 1].
        CalibrationError: If there are too few images of one class, or the logits fall where the labels rise.
    """
    from sklearn.linear_model import LogisticRegression  # 0.9 s to import, and only a calibration run needs it

    if not len(logits) == len(labels) == len(log_snr):
        raise InputError(
            f"logits, labels and log_snr must be equally long, got {len(logits)}, {len(labels)}, {len(log_snr)}"
        )
    logits, labels, log_snr = finite("logits", logits), unit_interval("labels", labels), finite("log_snr", log_snr)
    artifacts, clean = labels.sum(), (1 - labels).sum()
    if min(artifacts, clean) < MIN_CLASS_WEIGHT:
        raise CalibrationError(
            f"labels must hold at least {MIN_CLASS_WEIGHT:g} of each class to fit scale and bias, "
            f"got {artifacts:g} with artifacts and {clean:g} clean"
        )
    low, high = log_snr_range
    position = np.clip((log_snr - low) / (high - low) * num_bands - 0.5, 0, num_bands - 1)
    share = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(num_bands)))  # sample band; rows sum to 1
    common = 30.0  # the common logit enters so many times as large, hence is pulled to 0 only 1/900 as much
    features = np.concatenate([common * logits[:, None], share * logits[:, None], share], axis=1)
    # A soft label is the two hard ones, weighted. 1/C = 10 outweighs a band of fewer than about 50 images.
    weights = np.concatenate([labels, 1 - labels])
    used = weights > 0
    model = LogisticRegression(C=0.1, solver="newton-cholesky").fit(
        np.concatenate([features, features])[used], np.repeat([1, 0], len(labels))[used], sample_weight=weights[used]
    )
    weight = model.coef_[0]
    scale = common * weight[0] + weight[1 : num_bands + 1]
    if scale.max() <= 0:
        raise CalibrationError(
            f"logits must rise with the labels, got scales from {scale.min():.3g} to {scale.max():.3g}"
        )
    return np.maximum(scale, MIN_SCALE), model.intercept_[0] + weight[num_bands + 1 :]


def brier_score(prob: Samples, label: Samples) -> float:
    """Mean squared difference between probability and label, both in [0, 1]."""
    prob, label = pairs(prob, label)
    return float(np.square(prob - label).mean())


def expected_calibration_error(prob: Samples, label: Samples, bins: int = 15) -> float:
    """Mean over images of |mean probability - mean label| of the image's bin, with bins of equal width.

    Example:
        >>> expected_calibration_error(np.array([0.25, 0.25, 0.75, 0.75]), np.array([0, 1, 1, 1]), bins=2)
        0.25
    """
    prob, label = pairs(prob, label)
    which = np.minimum((prob * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(which, weights=prob - label, minlength=bins)).sum() / len(prob))


@dataclass(frozen=True, slots=True)
class MonotoneMap:
    """A rising, piecewise linear map from a statistic to P(y = 1); constant outside the points."""

    statistics: Float[np.ndarray, " point"]
    probs: Float[np.ndarray, " point"]

    def __call__(self, statistic: Real[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        return np.interp(statistic, self.statistics, self.probs)


def fit_monotone(statistic: Samples, labels: Samples) -> MonotoneMap:
    """Isotonic regression, so that a statistic such as ``cumulative_artifact_prob`` can be shown as a probability.

    Raises:
        InputError: If the arrays differ in length, are empty or leave [0, 1].
    """
    from sklearn.isotonic import IsotonicRegression

    statistic, labels = pairs(statistic, labels, names=("statistic", "labels"))
    edge = 1 / (len(labels) + 2)  # the rule of succession: no finite sample shows a probability of exactly 0 or 1
    model = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(statistic, labels)
    return MonotoneMap(statistics=model.X_thresholds_, probs=model.y_thresholds_)
