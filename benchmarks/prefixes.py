"""Posteriors of recorded runs at any choice of scored steps, fast enough to try hundreds of choices.

The model of moe_artifacts/scalar is fitted once to all steps. At a choice of steps what it knows of the final score is linear
in the normal scores seen so far, so that a posterior is one product and one logistic regression on a single number.

Siblings, the images of a prompt that run in one batch, are looked at through their scores at the first chosen step only: all
of them are still running then, so the posteriors, and the path statistics, do not depend on who is stopped later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.model import ScoreModel

Steps = tuple[int, ...]


def batches(prompt: np.ndarray, size: int) -> np.ndarray:
    """Number of the batch of each image: ``size`` images of one prompt, in order; the last of a prompt may be smaller."""
    first, group = np.unique(prompt, return_index=True, return_inverse=True)[1:]
    place = np.arange(len(prompt)) - first[group]  # images of a prompt follow each other
    return np.unique(np.stack([group, place // size]), axis=1, return_inverse=True)[1].reshape(-1)


class Prefixes:
    """What is known of the final score of every image, by a model fitted to some of them.

    Args:
        runs: With final scores; images of a prompt one after the other.
        fitted: Indices of the images the model is fitted to.
        batch: Images of a prompt that run together.
    """

    def __init__(self, runs: ScoredRuns, fitted: np.ndarray, batch: int) -> None:
        assert runs.final is not None
        self.model = ScoreModel.fit(runs.rows(fitted))
        normal = self.model.marginals(np.column_stack([runs.scores, runs.final])) - self.model.mean
        self.scores, self.final = normal[:, :-1], normal[:, -1]
        group = batches(runs.prompt, batch)
        self.size = np.bincount(group)[group]
        summed = np.stack([np.bincount(group, weights=column)[group] for column in self.scores.T], axis=1)
        self.others = summed - self.scores  # sum over the siblings
        count = np.bincount(runs.prompt)
        self.level = (np.bincount(runs.prompt, weights=self.final) / count)[runs.prompt]

    def known(self, steps: Steps, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Expected final score, and its part within the prompt, once these steps were scored; each [row]."""
        total, within = np.empty(len(rows)), np.empty(len(rows))
        for size in np.unique(self.size[rows]):
            some = self.size[rows] == size
            own, others = self._weights(steps, int(size))
            seen = self.scores[rows[some]][:, list(steps)] @ own + np.outer(self.others[rows[some], steps[0]], others)
            within[some], total[some] = seen.T
        return total, within

    def _weights(self, steps: Steps, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the own scores [step 2] and of the siblings' sum [2], for the part within the prompt and the total.

        The conditional Gaussian of moe_artifacts/scalar/model.py, with one pattern for the image and one for its siblings.
        """
        between, cov, last, at = self.model.between, self.model.within, len(self.model.mean) - 1, list(steps)
        precision = np.linalg.inv(cov[np.ix_(at, at)])
        theirs = np.zeros(len(at))
        theirs[0] = 1 / cov[at[0], at[0]]
        spread = np.eye(len(at)) + (precision + (size - 1) * np.diag(theirs)) @ between[np.ix_(at, at)]
        level = np.linalg.solve(spread.T, between[at]).T  # column step: of the prompt's level, given the evidence
        gain = precision @ cov[at, last]
        both = np.stack([-gain @ level[at], level[last] - gain @ level[at]])  # through the prompt's level
        return (precision @ both.T) + gain[:, None], both @ theirs


class Posterior:
    """P(bad | scores so far) for one label, at any choice of steps."""

    def __init__(self, prefixes: Prefixes, bad: np.ndarray, fitted: np.ndarray) -> None:
        self.prefixes, self.fitted, self.label = prefixes, fitted, bad[fitted].astype(float)
        # What the label means: how much it goes by the final score, and by its part within the prompt.
        final, own = prefixes.final[fitted], (prefixes.final - prefixes.level)[fitted]
        self.meaning = logistic(np.column_stack([final, own]), self.label)[1:]
        self._fits: dict[Steps, tuple[float, float]] = {}
        self._found: dict[tuple[Steps, int], np.ndarray] = {}
        self._rows: dict[int, np.ndarray] = {}  # kept, so that their ids stay theirs

    def __call__(self, steps: Sequence[int], rows: np.ndarray) -> np.ndarray:
        """[row step], float32: after each of the steps, from the scores up to it. The same array of rows is done once."""
        self._rows[id(rows)] = rows
        for k in range(len(steps)):
            prefix = tuple(steps[: k + 1])
            if (prefix, id(rows)) not in self._found:
                self._found[prefix, id(rows)] = self._at(prefix, rows)
        return np.stack([self._found[tuple(steps[: k + 1]), id(rows)] for k in range(len(steps))], axis=1)

    def _at(self, steps: Steps, rows: np.ndarray) -> np.ndarray:
        if steps not in self._fits:
            offset, slope = logistic(self._value(steps, self.fitted)[:, None], self.label)
            self._fits[steps] = float(offset), float(slope)
        offset, slope = self._fits[steps]
        return expit(offset + slope * self._value(steps, rows)).astype(np.float32)

    def _value(self, steps: Steps, rows: np.ndarray) -> np.ndarray:
        total, within = self.prefixes.known(steps, rows)
        return self.meaning[0] * total + self.meaning[1] * within


def logistic(features: np.ndarray, label: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Offset and slopes of a logistic regression, by Newton's method; ``ridge`` on the slopes of standardised features."""
    centre, scale = features.mean(axis=0), features.std(axis=0) + 1e-12
    x = np.column_stack([np.ones(len(features)), (features - centre) / scale])
    pull = np.diag(np.append(0.0, np.full(features.shape[1], ridge)))
    weights = np.zeros(x.shape[1])
    for _ in range(50):
        prob = expit(x @ weights)
        step = np.linalg.solve((x * (prob * (1 - prob))[:, None]).T @ x + pull, x.T @ (prob - label) + pull @ weights)
        size = np.abs(step).max()
        weights -= step / max(1.0, size)  # no longer than 1: far out the curvature says little
        if size < 1e-6:
            break
    slopes = weights[1:] / scale
    return np.append(weights[0] - slopes @ centre, slopes)
