"""The scores of a run at all its steps and its final score, as one Gaussian in two levels: prompts, and images of a prompt.

    scores and final score of image i of prompt p, as normal scores:   v_pi = mean + b_p + d_pi
    b_p ~ N(0, between)  what the images of a prompt share             d_pi ~ N(0, within)  what is the image's own

Everything that is asked of it is a conditional Gaussian in closed form: the final score given the scores so far, whichever
steps were scored, and given those of the siblings, the images of the same prompt in the same batch, whatever is known of
each. An image alone is nothing special. With P_i the inverse of the within covariance of the steps that image i was scored
at, zeros elsewhere,

    E[b | all]         = between (1 + J between)^-1 h       J = sum of P_i, h = sum of P_i (v_i - mean) over the siblings
    E[final_i | b]     = mean + b + within[final, steps] P_i (v_i - mean - b)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from moe_artifacts.errors import InputError
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.normal import NormalScores
from moe_artifacts.scalar.variance import Covariance, variance_components

Scores = Float[np.ndarray, "image step"]
Groups = Int[np.ndarray, " image"]


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What is known of the final score, as a normal score: after each step [image step], or once [image]."""

    mean: np.ndarray
    std: np.ndarray
    within_mean: np.ndarray  # of the part that is the image's own: final score minus the level of its prompt
    within_std: np.ndarray
    covariance: np.ndarray  # of the final score and that part


@dataclass(frozen=True, slots=True, eq=False)
class ScoreModel:
    """The fitted Gaussian; made by :meth:`fit`. Columns are the scored steps and, last, the final score."""

    marginals: NormalScores
    mean: Float[np.ndarray, " column"]
    between: Covariance
    within: Covariance

    @classmethod
    def fit(cls, runs: ScoredRuns) -> ScoreModel:
        """Fit to recorded runs.

        With one image a prompt nothing tells prompts from images: then all is the image's own and siblings say nothing.

        Raises:
            InputError: If the runs have no final scores.
            CalibrationError: If a step has one value only, or two steps were never both scored in two images.
        """
        if runs.final is None:
            raise InputError("runs must have final scores to fit a ScoreModel; ScalarPosterior.fit works without")
        columns = np.column_stack([runs.scores, runs.final]).astype(np.float64)
        marginals = NormalScores.fit(columns)
        return cls(marginals, *variance_components(marginals(columns), runs.prompt))

    @property
    def num_steps(self) -> int:
        return len(self.mean) - 1

    def predict(self, scores: Scores, siblings: Groups | None = None) -> Prediction:
        """What is known of the final score after each step, from the scores up to that step.

        Args:
            scores: On the scale of the fitted ones; NaN where a step was not scored.
            siblings: Equal for images of one prompt that run in one batch and see each other's scores; None: each
                image is alone.
        Returns:
            Arrays [image step] in normal scores; :meth:`final_score` maps a mean back.
        Raises:
            InputError: If the number of steps is not the fitted one, a score is infinite, or siblings do not fit.
        """
        known = self._normal(scores)
        steps = np.arange(self.num_steps)
        after = [self._condition(np.where(steps <= t, known, np.nan), siblings) for t in steps]
        return Prediction(*(np.stack(values, axis=1) for values in zip(*after, strict=True)))

    def predict_now(self, scores: Scores, siblings: Groups | None = None) -> Prediction:
        """What is known of the final score from all the scores given; arrays [image]. Else as :meth:`predict`."""
        return Prediction(*self._condition(self._normal(scores), siblings))

    def final_score(self, normal: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Normal scores of the final column on the scale of the final scores."""
        return self.marginals.inverse(self.num_steps, normal)

    def _normal(self, scores: Scores) -> Scores:
        """Normal scores, minus their means."""
        scores = np.asarray(scores, dtype=np.float64)
        if scores.ndim != 2 or scores.shape[1] != self.num_steps:
            raise InputError(f"scores must be [image, {self.num_steps} steps] as fitted, got shape {scores.shape}")
        if np.isinf(scores).any():
            raise InputError(f"scores must be finite, or NaN where not scored; {np.isinf(scores).sum()} are infinite")
        return self.marginals(scores) - self.mean[:-1]

    def _condition(self, known: Scores, siblings: Groups | None) -> tuple[np.ndarray, ...]:
        """The fields of a :class:`Prediction`."""
        images, last = known.shape
        if siblings is not None and np.shape(siblings) != (images,):
            raise InputError(f"siblings must be {images} group ids, one per image, got shape {np.shape(siblings)}")
        between, within = self.between, self.within
        seen = ~np.isnan(known)
        pattern, precision = _precisions(seen, within[:last, :last])
        evidence = np.empty((images, last))  # P_i (v_i - mean)
        for k, matrix in enumerate(precision):
            rows = pattern == k
            evidence[rows] = np.where(seen[rows], known[rows], 0.0) @ matrix

        # What the prompt's images share. Groups whose members were scored at the same steps share these matrices.
        group = np.arange(images) if siblings is None else np.unique(siblings, return_inverse=True)[1]
        kind, members = _kinds(group, pattern)
        total = np.stack([precision[m].sum(axis=0) for m in members])  # J: kind step step
        inner = np.eye(last) + between[:last, :last] @ total
        gain = np.linalg.solve(inner, np.broadcast_to(between[:last], (len(inner), last, last + 1)))  # kind step column
        left = between - between[:, :last] @ total @ gain  # covariance of b that is left: kind column column
        summed = np.zeros((len(kind), last))
        np.add.at(summed, group, evidence)
        shared = np.einsum("gs,gsc->gc", summed, gain[kind])[group]  # E[b | all]: image column

        # What is the image's own.
        own = precision @ within[:last, last]  # weight of each of its scores: pattern step
        within_mean = evidence @ within[:last, last] - (own[pattern] * shared[:, :last]).sum(axis=1)
        mean = self.mean[last] + shared[:, last] + within_mean

        both, which = _distinct_rows(np.stack([pattern, kind[group]], axis=1))
        weight, unsure = own[both[:, 0]], left[both[:, 1]]
        own_var = within[last, last] - weight @ within[:last, last]
        within_var = own_var + np.einsum("ps,pst,pt->p", weight, unsure[:, :last, :last], weight)
        mixed = np.einsum("ps,ps->p", weight, unsure[:, :last, last])
        var = within_var - 2 * mixed + unsure[:, last, last]
        spread = np.sqrt(np.maximum(var, 0)), np.sqrt(np.maximum(within_var, 0)), within_var - mixed
        std, within_std, covariance = (value[which] for value in spread)
        return mean, std, within_mean, within_std, covariance


def _precisions(
    seen: Bool[np.ndarray, "image step"], within: Float[np.ndarray, "step step"]
) -> tuple[Groups, Float[np.ndarray, "pattern step step"]]:
    """At which steps each image was scored, as a number, and the inverses of their covariances, zeros elsewhere."""
    packed, pattern = _distinct_rows(np.packbits(seen, axis=1))
    distinct = np.unpackbits(packed, axis=1, count=seen.shape[1]).astype(bool)
    precision = np.zeros((len(distinct), *within.shape))
    for k, steps in enumerate(distinct):
        where = np.ix_(steps, steps)
        precision[k][where] = np.linalg.inv(within[where])
    return pattern, precision


def _kinds(group: Groups, pattern: Groups) -> tuple[Int[np.ndarray, " group"], list[np.ndarray]]:
    """The kind of each group, and the patterns of the members of each kind."""
    order = np.lexsort((pattern, group))
    size = np.bincount(group)
    start = np.cumsum(size) - size
    table = np.full((len(size), size.max()), -1)
    table[group[order], np.arange(len(group)) - np.repeat(start, size)] = pattern[order]
    rows, kind = _distinct_rows(table)
    return kind, [row[row >= 0] for row in rows]


def _distinct_rows(
    table: Integer[np.ndarray, "row column"],
) -> tuple[Integer[np.ndarray, "kind column"], Int[np.ndarray, " row"]]:
    """``np.unique`` of rows of numbers >= -1, with the inverse; ten times as fast."""
    number = np.zeros(len(table), dtype=np.int64)
    for column in table.T.astype(np.int64):
        number = np.unique(number * (column.max() + 2) + column + 1, return_inverse=True)[1]
    return table[np.unique(number, return_index=True)[1]], number
