"""How many candidates each wave of a race takes, decided anew after every check.

Candidates that stand at the same check differ in what is known of their final score by their posterior means alone, so a
wave takes the best means, and only how many is left to decide. With means m_i, and waves ahead that will add the variances
v_1, v_2, ... to what is known of a final score, the means move as

    m_i + s (sqrt(v_1) z_i1 + sqrt(v_2) z_i2 + ...)        z ~ N(0, 1),  s: spread of this prompt relative to the fitted ones

and the last of them is the final score. A continuation (counts of the waves ahead that the rest of the budget pays for) is
worth the expected best of those that it finishes; another one replaces the planned one where it is clearly worth more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from moe_artifacts.errors import InputError
from moe_artifacts.racing.plan import RaceCost, RacePlan, affordable, topped_up
from moe_artifacts.scalar.model import ScoreModel

TILTS = (0.0, -0.6, -0.3, 0.3, 0.6)  # log factor on the next count of a continuation, its negative on the last one
MOST_SIMULATED = 16  # with more candidates left, a few more or less in a wave hardly matter
CLEARLY = 1.0  # standard errors by which a continuation must beat the planned one over the scenarios
PRIOR_SPREAD = 4.0  # weight of the fitted spread, in squared innovations of this prompt


class Course:
    """How many candidates each wave takes, decided from posterior means; who they are is the caller's to know.

    Args:
        model: Of the final score, at the scored steps that ``cost`` describes.
        plan: Its counts are scaled where budget or candidates do not fit.
        budget: In denoiser calls.
        num_candidates: How many there are to start; None: as many as wished.
        num_scenarios: Simulated per decision; 0 follows the plan, whatever the scores.
    Raises:
        InputError: If the budget does not pay for one finished image, or model, plan and cost do not fit together.
    """

    def __init__(
        self,
        model: ScoreModel,
        plan: RacePlan,
        cost: RaceCost,
        *,
        budget: float,
        num_candidates: int | None = None,
        num_scenarios: int = 256,
        seed: int = 0,
    ) -> None:
        if model.num_steps != len(cost.calls) or max(plan.checks, default=0) >= len(cost.calls):
            raise InputError(
                f"model has {model.num_steps} scored steps, cost {len(cost.calls)} and the plan looks at columns "
                f"{plan.checks}: they must describe the same scored steps"
            )
        self.checks, self.budget = plan.checks, budget
        self.price = cost.waves(plan.checks)
        self.planned = _as_planned(plan.counts, self.price, budget, num_candidates)
        self.gain_std, self.whiten = _innovations(model, plan.checks)
        self.scenarios = _scenarios(num_scenarios, MOST_SIMULATED, len(self.price), seed)

    def counts_after(
        self, counts: tuple[int, ...], wave: int, mean: Float[np.ndarray, " candidate"], spread: float
    ) -> tuple[int, ...]:
        """The counts of all waves, those from ``wave`` on decided anew.

        Args:
            counts: Of all waves, as decided after the check before; those before ``wave`` have been run.
            wave: The next one, at least 1.
            mean: Posterior means of the candidates that are left, falling, as normal scores.
            spread: Standard deviation of this prompt's innovations so far, see :meth:`spread`.
        """
        left = self.budget - float(np.dot(counts[:wave], self.price[:wave]))
        options = continuations(counts[wave:], self.price[wave:], left, len(mean))
        chosen = options[0]
        if len(options) > 1 and len(mean) <= MOST_SIMULATED and len(self.scenarios):
            scenarios = self.scenarios[:, : len(mean), wave - len(self.price) :]
            worth = finished_best(mean, spread * self.gain_std[wave - 1 :], options, scenarios)
            chosen = options[_clearly_best(worth)]
        return (*counts[:wave], *chosen)

    def innovations(self, normal: Float[np.ndarray, "image check"]) -> Float[np.ndarray, "image check"]:
        """Normal scores at the first checks as numbers of variance 1, independent within a prompt of the fitted spread.

        NaN from the first check on at which a score is missing: the innovations before it do not depend on it.
        """
        checks = normal.shape[1]
        gone = np.isnan(normal).cumsum(axis=1) > 0
        return np.where(gone, np.nan, np.nan_to_num(normal) @ self.whiten[:checks, :checks].T)


def spread(innovations: Float[np.ndarray, "candidate check"]) -> float:
    """How far the candidates of a prompt lie apart, as a standard deviation; 1 in the fitted prompts.

    Args:
        innovations: NaN where not scored; at each check those that got there, whose selection by earlier scores changes
            nothing, since innovations do not depend on earlier ones.
    """
    seen = ~np.isnan(innovations)
    count = seen.sum(axis=0)
    level = np.where(seen, innovations, 0.0).sum(axis=0) / np.maximum(count, 1)
    squares = ((innovations - level)[seen] ** 2).sum()
    return float(np.sqrt((PRIOR_SPREAD + squares) / (PRIOR_SPREAD + np.maximum(count - 1, 0).sum())))


@lru_cache(maxsize=4096)  # the races of many prompts meet the same few
def continuations(
    planned: tuple[int, ...], price: tuple[float, ...], budget: float, most: int
) -> tuple[tuple[int, ...], ...]:
    """Ways to spend what is left: the planned one first, then such as keep fewer now and more later, or more now.

    Returns:
        Counts of the waves ahead, distinct, each within the budget.
    """
    options = [_as_planned(planned, price, budget, most)]
    for tilt in TILTS if len(planned) > 1 else ():
        weights = np.multiply(planned, np.exp(tilt * np.linspace(1, -1, len(planned))))
        options.append(affordable(weights.tolist(), price, budget, most))
    return tuple(dict.fromkeys(options))


def finished_best(
    mean: Float[np.ndarray, " candidate"],
    gain_std: Float[np.ndarray, " wave"],
    options: Sequence[Sequence[int]],
    scenarios: Float[np.ndarray, "scenario candidate wave"],
) -> Float[np.ndarray, "option scenario"]:
    """Final score of the best finished candidate under each continuation, in every scenario.

    Args:
        mean: Posterior means, falling.
        gain_std: By how much each wave ahead moves a mean, as a standard deviation.
        options: Counts of the waves ahead.
        scenarios: Standard normal.
    """
    path = mean[:, None] + np.cumsum(scenarios * gain_std, axis=2)  # posterior means after each wave
    found = []
    for counts in options:
        alive = path[:, : counts[0]]
        for wave, count in enumerate(counts[1:]):
            if count < alive.shape[1]:
                kept = np.argpartition(-alive[:, :, wave], count - 1, axis=1)[:, :count]
                alive = np.take_along_axis(alive, kept[:, :, None], axis=1)
        found.append(alive[:, :, -1].max(axis=1))
    return np.stack(found)


def _clearly_best(worth: Float[np.ndarray, "option scenario"]) -> int:
    """The option with the highest mean among those that beat the first by more than chance, else the first."""
    more = worth - worth[0]
    error = more.std(axis=1) / np.sqrt(more.shape[1])
    return int(np.where(more.mean(axis=1) > CLEARLY * error, more.mean(axis=1), 0.0).argmax())


def _as_planned(counts: tuple[int, ...], price: tuple[float, ...], budget: float, most: int | None) -> tuple[int, ...]:
    """The counts, if the budget pays for them and not for one more all the way; else near a multiple of them."""
    left = budget - float(np.dot(counts, price))
    if -1e-9 * budget <= left < sum(price) and (most is None or counts[0] <= most):
        return topped_up(counts, price, budget, most)
    return affordable(counts, price, budget, most)


def _scenarios(number: int, most: int, waves: int, seed: int) -> Float[np.ndarray, "scenario candidate wave"]:
    half = np.random.default_rng(seed).standard_normal((number // 2, most, waves))
    return np.concatenate([half, -half])  # antithetic: the mean of every move is exactly 0


def _innovations(
    model: ScoreModel, checks: Sequence[int]
) -> tuple[Float[np.ndarray, " wave"], Float[np.ndarray, "check check"]]:
    """Standard deviation that each wave after the first adds to what is known of an image's own part of the final
    score, the finished image last; and the matrix that turns normal scores at the checks into independent ones of variance 1
    (up to the level of the prompt)."""
    seen = list(checks)
    within, cross, own = model.within[np.ix_(seen, seen)], model.within[seen, -1], model.within[-1, -1]
    factor = np.linalg.cholesky(within) if seen else within
    known = np.cumsum(np.linalg.solve(factor, cross) ** 2) if seen else np.zeros(0)  # variance known after each check
    whiten = np.linalg.inv(factor) if seen else factor
    return np.sqrt(np.maximum(np.diff([*known, own]), 0.0)), whiten
