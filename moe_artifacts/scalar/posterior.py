"""P(the finished image is bad | scores so far), from scores on any scale.

The model of model.py says what is known of the final score f and of its part d that is the image's own. What the label means
in terms of the two is learned from finished images, and the two are put together:

    P(bad | f, d)          = sigmoid(offset + on_final f + on_within d)
    P(bad | scores so far) = Phi(m / sqrt(1.7^2 + v))      m, v: mean and variance of that logit, given the scores so far

with sigmoid(x) = Phi(x / 1.7) to 0.01 (MacKay, 1992, section 4). A label by a fixed level of the final score weighs f alone, one
relative to the images of the same prompt d alone; both kinds, and mixtures, come out of the fit. A last logistic regression a step, pulled
towards the identity, takes out what the Gaussian gets wrong (Platt, 1999).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.special import expit, log_ndtr

from moe_artifacts.errors import CalibrationError, CheckpointError
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.model import Groups, Prediction, ScoreModel, Scores
from moe_artifacts.scalar.normal import NUM_KNOTS, NormalScores

MIN_CLASS_WEIGHT = 10.0  # labels of the rarer class a fit needs
PROBIT = 1.7  # sigmoid(x) is nearly Phi(x / 1.7)
RIDGE = 1.0  # of the label's two slopes: a label that follows from the final score would make them infinite
PULL = 10.0  # of the logistic regression of each step, towards the identity


@dataclass(frozen=True, slots=True, eq=False)
class ScalarPosterior:
    """Calibrated posterior of scalar scores; made by :meth:`fit`."""

    model: ScoreModel
    label_weights: Float[np.ndarray, " weight"]  # offset, on_final, on_within
    scale: Float[np.ndarray, " step"]
    bias: Float[np.ndarray, " step"]

    @classmethod
    def fit(cls, runs: ScoredRuns, *, siblings: Groups | None = None) -> ScalarPosterior:
        """Fit to recorded, labelled runs.

        Without final scores each image's last score takes their place.

        Args:
            siblings: As :meth:`prob` will be used: groups of images of one prompt that see each other's scores.
        Raises:
            CalibrationError: If there are fewer than 10 labels of one class, or a step has one value only.
        """
        bad, clean = runs.label.sum(), (1 - runs.label).sum()
        if min(bad, clean) < MIN_CLASS_WEIGHT:
            raise CalibrationError(
                f"labels must hold at least {MIN_CLASS_WEIGHT:g} of each class to fit a posterior, "
                f"got {bad:g} bad and {clean:g} clean"
            )
        final = _last_scores(runs.scores) if runs.final is None else runs.final
        model = ScoreModel.fit(replace(runs, final=final))
        weights = _label_weights(model, final, runs)
        steps = model.num_steps
        plain = cls(model, weights, np.ones(steps), np.zeros(steps))
        logit = plain._logit(model.predict(runs.scores, siblings))
        fitted = [
            _logistic(np.column_stack([np.ones(len(x)), x]), runs.label, PULL, at=np.array([0.0, 1.0])) for x in logit.T
        ]
        bias, scale = np.array(fitted).T
        return replace(plain, scale=np.maximum(scale, 0.01), bias=bias)

    def prob(self, scores: Scores, siblings: Groups | None = None) -> Float[np.ndarray, "image step"]:
        """P(bad | scores so far) after each step, in (0, 1); arguments and errors as :meth:`ScoreModel.predict`."""
        known = self.model.predict(scores, siblings)
        steps = np.where(np.isnan(scores), 0, np.arange(1, self.model.num_steps + 1))
        return self._calibrated(known, np.maximum.accumulate(steps, axis=1))

    def prob_now(self, scores: Scores, siblings: Groups | None = None) -> Float[np.ndarray, " image"]:
        """P(bad | all the scores given); else as :meth:`prob`."""
        known = self.model.predict_now(scores, siblings)
        steps = np.where(np.isnan(scores), 0, np.arange(1, self.model.num_steps + 1))
        return self._calibrated(known, steps.max(axis=1))

    def arrays(self) -> dict[str, np.ndarray]:
        """All of its numbers by name, for a file."""
        model = self.model
        return {
            "value": model.marginals.value,
            "normal": model.marginals.normal,
            "mean": model.mean,
            "between": model.between,
            "within": model.within,
            "label_weights": self.label_weights,
            "scale": self.scale,
            "bias": self.bias,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], num_steps: int) -> ScalarPosterior:
        """From what :meth:`arrays` gave.

        Raises:
            CheckpointError: If an array is missing or has another shape than ``num_steps`` steps ask for.
        """
        size = num_steps + 1
        shapes = {"value": (size, NUM_KNOTS), "normal": (size, NUM_KNOTS), "mean": (size,), "label_weights": (3,)}
        shapes |= {"between": (size, size), "within": (size, size), "scale": (num_steps,), "bias": (num_steps,)}
        found = {name: np.shape(values) for name, values in arrays.items()}
        if found != shapes:
            raise CheckpointError(f"a posterior of {num_steps} steps has the arrays {shapes}, got {found}")
        marginals = NormalScores(arrays["value"], arrays["normal"])
        model = ScoreModel(marginals, arrays["mean"], arrays["between"], arrays["within"])
        return cls(model, arrays["label_weights"], arrays["scale"], arrays["bias"])

    def _calibrated(self, known: Prediction, steps: np.ndarray) -> np.ndarray:
        """By the regression of the last step an image was scored at, counted from 1; 0: none, and it is as it is."""
        scale, bias = np.append(1.0, self.scale)[steps], np.append(0.0, self.bias)[steps]
        return expit(scale * self._logit(known) + bias)

    def _logit(self, known: Prediction) -> np.ndarray:
        offset, on_final, on_within = self.label_weights
        mean = offset + on_final * known.mean + on_within * known.within_mean
        var = (on_final * known.std) ** 2 + (on_within * known.within_std) ** 2
        var = var + 2 * on_final * on_within * known.covariance
        x = mean / np.sqrt(PROBIT**2 + np.maximum(var, 0))
        return log_ndtr(x) - log_ndtr(-x)


def _last_scores(scores: Scores) -> Float[np.ndarray, " image"]:
    last = scores.shape[1] - 1 - (~np.isnan(scores[:, ::-1])).argmax(axis=1)
    return scores[np.arange(len(scores)), last]


def _label_weights(model: ScoreModel, final: np.ndarray, runs: ScoredRuns) -> np.ndarray:
    """Logistic regression of the label on the final score and its part within the prompt."""
    last = model.num_steps
    normal = model.marginals.of_column(last, final)
    _, group = np.unique(runs.prompt, return_inverse=True)
    count = np.bincount(group)
    level = np.bincount(group, weights=normal) / count - model.mean[last]
    noise = model.within[last, last] / count
    level *= model.between[last, last] / (
        model.between[last, last] + noise
    )  # the prompt's level, as far as it is known
    own = normal - model.mean[last] - level[group]
    return _logistic(np.column_stack([np.ones(len(own)), normal, own]), runs.label, RIDGE, at=np.zeros(3))


def _logistic(features: np.ndarray, label: np.ndarray, pull: float, at: np.ndarray) -> np.ndarray:
    """Weights of a logistic regression with soft labels, pulled towards ``at``, by Newton's method."""
    weights = at.copy()
    for _ in range(100):
        prob = expit(features @ weights)
        slope = features.T @ (prob - label) + pull * (weights - at)
        curvature = (features * (prob * (1 - prob))[:, None]).T @ features + pull * np.eye(len(at))
        step = np.linalg.solve(curvature, slope)
        size = np.abs(step).max()
        weights = weights - step / max(1.0, size)  # no longer than 1: far out the curvature says little
        if size < 1e-8:
            break
    return weights
