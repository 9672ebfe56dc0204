"""Between and within covariance of scores in two levels, prompts and images of a prompt; scores may be missing.

Unbiased moment estimates, a one-way analysis of variance of every pair of columns (Searle, Casella and McCulloch, Variance
Components, 1992, chapter 3). With n_a images of a prompt scored in column a and n_ab in both a and b, the products of the
deviations from the prompt's means sum to within_ab n_ab (1 - 1/n_a - 1/n_b + n_ab / (n_a n_b)) on average, which is n - 1
where nothing is missing, and the prompts' means have the covariance between_ab + within_ab n_ab / (n_a n_b).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from moe_artifacts.errors import CalibrationError

SMALLEST_SHARE = (
    1e-4  # of the mean variance: no direction of the within covariance has less, so that it can be inverted
)

Columns = Float[np.ndarray, "image column"]
Covariance = Float[np.ndarray, "column column"]


def variance_components(
    columns: Columns, prompt: Int[np.ndarray, " image"]
) -> tuple[Float[np.ndarray, " column"], Covariance, Covariance]:
    """Mean over prompts, between and within covariance.

    Each is pulled towards its share of the total covariance, which is known best, as if as many degrees of freedom as
    there are columns had shown that. With one image a prompt, or one prompt, the two cannot be told apart: all is within.

    Args:
        columns: NaN where an image has no score.
    Raises:
        CalibrationError: If two columns were never both seen in two images.
    """
    seen = ~np.isnan(columns)
    pairs = seen.astype(float).T @ seen.astype(float)
    if (pairs < 2).any():
        a, b = np.argwhere(pairs < 2)[0]
        raise CalibrationError(
            f"columns {a} and {b} of the scores were both seen in {pairs[a, b]:g} images, at least 2 are needed; "
            "leave one of these steps out"
        )
    prompts, group = np.unique(prompt, return_inverse=True)
    size = columns.shape[1]

    def per_prompt(rows: np.ndarray) -> np.ndarray:
        sums = np.zeros((len(prompts), rows.shape[1]))
        np.add.at(sums, group, rows)
        return sums

    count = per_prompt(seen.astype(float))
    level = per_prompt(np.where(seen, columns, 0.0)) / np.maximum(count, 1)  # means; nonsense where the count is 0
    has = count > 0
    one_over = has / np.maximum(count, 1)
    mean = (level * has).sum(axis=0) / has.sum(axis=0)

    freedom, noise = np.empty((size, size)), np.empty((size, size))
    for a in range(size):
        both = per_prompt((seen & seen[:, [a]]).astype(float))
        overlap = both * one_over * one_over[:, [a]]  # n_ab / (n_a n_b)
        freedom[a] = (both * (1 - one_over - one_over[:, [a]] + overlap)).sum(axis=0)
        noise[a] = overlap.sum(axis=0)
    if len(prompts) == 1 or (freedom < 0.5).any():
        own = np.where(seen, columns - mean, 0.0)
        return mean, np.zeros((size, size)), _at_least(own.T @ own / (pairs - 1), SMALLEST_SHARE)

    own, apart = np.where(seen, columns - level[group], 0.0), np.where(has, level - mean, 0.0)
    both_known = np.maximum(has.astype(float).T @ has.astype(float), 2)
    within = own.T @ own / freedom
    between = _at_least(apart.T @ apart / (both_known - 1) - within * noise / both_known, 0.0)
    within = _at_least(within, 0.0)
    total = between + within
    share = np.trace(within) / np.trace(total)
    between = _pulled(between, (1 - share) * total, len(prompts) - 1)
    return mean, between, _at_least(_pulled(within, share * total, len(columns) - len(prompts)), SMALLEST_SHARE)


def _pulled(covariance: Covariance, target: Covariance, freedom: int) -> Covariance:
    weight = len(covariance) / (len(covariance) + freedom)
    return (1 - weight) * covariance + weight * target


def _at_least(covariance: Covariance, share: float) -> Covariance:
    """The nearest covariance whose eigenvalues are at least that share of the mean variance."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.maximum(values, share * np.trace(covariance) / len(covariance))) @ vectors.T
