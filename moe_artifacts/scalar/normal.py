"""Scores on any scale to normal scores: each column through its own rising map, so that one Gaussian can hold them all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri

from moe_artifacts.errors import CalibrationError

NUM_KNOTS = 33  # quantiles that a map goes through
RESOLUTION = 1e-9  # of a column, relative
SMALLEST_SPREAD = 1e-100  # slopes stay far from the largest float
SHARES = (np.arange(NUM_KNOTS) + 0.5) / NUM_KNOTS
LIMIT = 8.0  # of a normal score: beyond the fitted scores the slope is a guess


@dataclass(frozen=True, slots=True, eq=False)
class NormalScores:
    """Rising, piecewise linear maps; beyond the ends they go on with the slope of the outermost eighth of the knots."""

    value: Float[np.ndarray, "column knot"]  # rising; a column of few different values repeats its last knot
    normal: Float[np.ndarray, "column knot"]

    @classmethod
    def fit(cls, columns: Float[np.ndarray, "image column"]) -> NormalScores:
        """Through the quantiles of each column, NaN left out.

        Raises:
            CalibrationError: If a column has one value only.
        """
        value, normal = np.empty((columns.shape[1], NUM_KNOTS)), np.empty((columns.shape[1], NUM_KNOTS))
        for k, column in enumerate(columns.T):
            quantiles = _quantiles(column)
            spread = quantiles[-1] - quantiles[0]
            if _is_constant(quantiles):
                raise CalibrationError(
                    f"column {k} of the scores is {quantiles[0]:g} in nearly all images and tells nothing: leave this step out"
                )
            # Knots that rounding alone tells apart count as equal: the slope between them would mean nothing.
            places = np.round((quantiles - quantiles[0]) / spread / RESOLUTION)
            _, first, where, count = np.unique(places, return_index=True, return_inverse=True, return_counts=True)
            knots = quantiles[first]
            last = np.minimum(np.arange(NUM_KNOTS), len(knots) - 1)
            value[k] = knots[last]
            normal[k] = (np.bincount(where, weights=ndtri(SHARES)) / count)[last]  # equal scores share their mean
        return cls(value, normal)

    def __call__(self, columns: Float[np.ndarray, "image column"]) -> Float[np.ndarray, "image column"]:
        """All columns, or the first ones; NaN stays NaN."""
        return np.stack([self.of_column(k, column) for k, column in enumerate(columns.T)], axis=1)

    def of_column(self, column: int, values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Normal scores of one column's values."""
        return np.clip(_rising(values, self.value[column], self.normal[column]), -LIMIT, LIMIT)

    def inverse(self, column: int, normal: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Normal scores of one column back to its own scale."""
        return _rising(normal, self.normal[column], self.value[column])


def tells_nothing(scores: Float[np.ndarray, " image"]) -> bool:
    """Whether a column has one value in nearly all images, so that ``NormalScores.fit`` refuses it; NaN left out."""
    return bool(np.isnan(scores).all()) or _is_constant(_quantiles(scores))


def _quantiles(column: Float[np.ndarray, " image"]) -> Float[np.ndarray, " knot"]:
    return np.quantile(column[~np.isnan(column)], SHARES)


def _is_constant(quantiles: Float[np.ndarray, " knot"]) -> bool:
    spread = quantiles[-1] - quantiles[0]
    return bool(spread <= max(RESOLUTION * np.abs(quantiles).max(), SMALLEST_SPREAD))


def _rising(x: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    count = len(np.unique(start))
    start, end = start[:count], end[:count]
    reach = max(count // 8, 1)  # a single piece would give a noisy slope
    low = (end[reach] - end[0]) / (start[reach] - start[0])
    high = (end[-1] - end[-1 - reach]) / (start[-1] - start[-1 - reach])
    inside = np.interp(x, start, end)
    return inside + low * np.minimum(x - start[0], 0) + high * np.maximum(x - start[-1], 0)
