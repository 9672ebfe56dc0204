"""Scores to probabilities, and probabilities to thresholds that keep a promise.

probability.py   logits to calibrated probabilities, and how well they fit
bounds.py        what a sample says about a rate
risks.py         what can be promised, and its p-value at one threshold
certify.py       thresholds whose risk is bounded with a stated confidence
economic.py      the boundary on the posterior with the lowest cost per clean image
"""

from moe_artifacts.calibration.bounds import clopper_pearson, fewest_units
from moe_artifacts.calibration.certify import Certified, certify, certify_image_threshold
from moe_artifacts.calibration.probability import (
    MIN_CLASS_WEIGHT,
    MIN_SCALE,
    NUM_BANDS,
    Calibration,
    MonotoneMap,
    brier_score,
    expected_calibration_error,
    fit_monotone,
    fit_scale_bias,
)
from moe_artifacts.calibration.risks import Risk

__all__ = [
    "MIN_CLASS_WEIGHT",
    "MIN_SCALE",
    "NUM_BANDS",
    "Calibration",
    "Certified",
    "MonotoneMap",
    "Risk",
    "brier_score",
    "certify",
    "certify_image_threshold",
    "clopper_pearson",
    "expected_calibration_error",
    "fewest_units",
    "fit_monotone",
    "fit_scale_bias",
]
