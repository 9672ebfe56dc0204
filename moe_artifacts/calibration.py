"""Logits to probabilities, and scores to thresholds that keep a promise.

Scale and bias per log-SNR band: Platt scaling (Platt, 1999) with soft labels as sample weights. The certified threshold
is an order statistic of the path statistics of clean held-out images: if k of n clean images lie above it, its true
false-abort rate exceeds ``max_risk`` with probability P(Binomial(n, max_risk) <= k) at most. That is exact at every n,
and holds where each image has its own independently drawn prompt; it was known as a tolerance limit (Wilks, 1941).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Real
from torch import Tensor, nn

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
    logits, labels, log_snr = _finite("logits", logits), _unit_interval("labels", labels), _finite("log_snr", log_snr)
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
    prob, label = _pairs(prob, label)
    return float(np.square(prob - label).mean())


def expected_calibration_error(prob: Samples, label: Samples, bins: int = 15) -> float:
    """Mean over images of |mean probability - mean label| of the image's bin, with bins of equal width.

    Example:
        >>> expected_calibration_error(np.array([0.25, 0.25, 0.75, 0.75]), np.array([0, 1, 1, 1]), bins=2)
        0.25
    """
    prob, label = _pairs(prob, label)
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

    statistic, labels = _pairs(statistic, labels, names=("statistic", "labels"))
    edge = 1 / (len(labels) + 2)  # the rule of succession: no finite sample shows a probability of exactly 0 or 1
    model = IsotonicRegression(y_min=edge, y_max=1 - edge, out_of_bounds="clip").fit(statistic, labels)
    return MonotoneMap(statistics=model.X_thresholds_, probs=model.y_thresholds_)


@dataclass(frozen=True, kw_only=True, slots=True)
class CertifiedThreshold:
    """P(false_abort_rate > max_risk) <= 1 - confidence, over the draw of the clean images it was found on."""

    threshold: float
    num_clean: int
    allowed_aborts: int  # so many of the clean images may lie at or above the threshold
    max_risk: float
    confidence: float
    unit: Literal["image"] = "image"


def certify_image_threshold(
    statistics: Float[np.ndarray, " image"], max_risk: float, confidence: float
) -> CertifiedThreshold:
    """Lowest threshold whose false-abort rate stays under ``max_risk`` with probability ``confidence``.

    Args:
        statistics: Path statistics of clean held-out images, each with its own independently drawn prompt, at the last
            step at which an abort saves a call. In [0, 1]; compared as float32, as the guard does.
        max_risk: Largest share of clean images that may be aborted, in (0, 1).
        confidence: In (0, 1).
    Returns:
        A threshold in (0, 1], to be used with >=.
    Raises:
        InputError: If there are no statistics, or one is NaN or outside [0, 1], or a rate is outside (0, 1).
        CalibrationError: If there are too few images, or so many statistics are exactly 1 that no threshold in [0, 1]
            keeps the promise.
    """
    for name, rate in (("max_risk", max_risk), ("confidence", confidence)):
        if not 0 < rate < 1:
            raise InputError(f"{name} must be between 0 and 1, both excluded, got {rate!r}")
    statistics = _unit_interval("statistics", statistics)
    num_clean = len(statistics)
    allowed = _allowed_aborts(num_clean, max_risk, confidence)
    if allowed < 0:
        needed = max(num_clean + 1, math.ceil(math.log(1 - confidence) / math.log(1 - max_risk)))  # max: rounding
        raise CalibrationError(
            f"max_risk={max_risk:g} at confidence={confidence:g} needs at least {needed} clean images, got {num_clean}"
        )
    single = np.sort(statistics.astype(np.float32))
    order_statistic = single[num_clean - 1 - allowed]  # at most `allowed` images lie above it
    if order_statistic == 1:
        raise CalibrationError(
            f"no threshold in [0, 1] keeps max_risk={max_risk:g}: {(single == 1).sum()} of {num_clean} clean images "
            f"reach the statistic 1 and would be aborted by any, {allowed} are allowed; use a rule that does not saturate"
        )
    # nextafter in the scores' own float32: a float64 step up is lost when torch compares it with a float32 score. And
    # never a subnormal number, which some devices read as 0, and 0 aborts everything.
    threshold = max(np.nextafter(order_statistic, np.float32(np.inf)), np.finfo(np.float32).tiny)
    return CertifiedThreshold(
        threshold=float(threshold),
        num_clean=num_clean,
        allowed_aborts=allowed,
        max_risk=max_risk,
        confidence=confidence,
    )


def _allowed_aborts(num_clean: int, max_risk: float, confidence: float) -> int:
    """Largest k with P(Binomial(num_clean, max_risk) <= k) <= 1 - confidence; -1 if there is none."""
    from scipy.stats import binom

    tail = binom.cdf(np.arange(num_clean), num_clean, max_risk)
    return int(np.searchsorted(tail, 1 - confidence, side="right")) - 1


def clopper_pearson(k: int, n: int, confidence: float) -> tuple[float, float]:
    """Exact two-sided interval of a rate of which ``k`` out of ``n`` were seen (Clopper and Pearson, 1934).

    Example:
        >>> low, high = clopper_pearson(0, 59, 0.9)
        >>> low, round(high, 4)
        (0.0, 0.0495)
    """
    from scipy.stats import beta

    if not (0 <= k <= n and n >= 1):
        raise InputError(f"k must be between 0 and n, and n at least 1, got k={k!r}, n={n!r}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, both excluded, got {confidence!r}")
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return low, high


def _pairs(
    first: np.ndarray, second: np.ndarray, names: tuple[str, str] = ("prob", "label")
) -> tuple[np.ndarray, np.ndarray]:
    if len(first) != len(second):
        raise InputError(f"{names[0]} and {names[1]} must be equally long, got {len(first)} and {len(second)}")
    return _unit_interval(names[0], first), _unit_interval(names[1], second)


def _unit_interval(name: str, values: np.ndarray) -> np.ndarray:
    values = _finite(name, values)
    if values.min() < 0 or values.max() > 1:
        raise InputError(f"{name} must be in [0, 1], got values from {values.min():g} to {values.max():g}")
    return values


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise InputError(f"{name} must be an array of one axis with at least one number, got shape {values.shape}")
    if bad := int((~np.isfinite(values)).sum()):
        raise InputError(f"{name} must hold finite numbers, got {bad} that are not, of {len(values)}")
    return values
