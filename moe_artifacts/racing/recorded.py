"""Many races over recorded runs at once, to fit and to judge plans without running a denoiser."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from moe_artifacts.errors import InputError
from moe_artifacts.racing.course import Course, spread
from moe_artifacts.racing.plan import RaceCost, RacePlan
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.model import ScoreModel

Orders = Int[np.ndarray, "prompt order candidate"]  # images
Rewards = Float[np.ndarray, "prompt order"]


def draw_orders(runs: ScoredRuns, num_orders: int, seed: int) -> Orders:
    """The images of every prompt in random orders; as many of them as the prompt with the fewest has."""
    images = [np.flatnonzero(runs.prompt == prompt) for prompt in np.unique(runs.prompt)]
    most = min(map(len, images))
    rng = np.random.default_rng(seed)
    return np.stack([[rng.permutation(rows)[:most] for _ in range(num_orders)] for rows in images])


class RecordedRaces:
    """Races whose candidates are recorded images, in given orders.

    Args:
        model: Of the final score; to judge fairly, fitted on other prompts.
        runs: With final scores and every step of the model scored.
        order: See :func:`draw_orders`; a race starts the first ones.
    Raises:
        InputError: If runs lack final scores or miss a score.
    """

    def __init__(self, model: ScoreModel, runs: ScoredRuns, order: Orders) -> None:
        if runs.final is None or np.isnan(runs.scores).any():
            raise InputError("runs must have final scores and a score at every step to race them")
        self.model, self.order, self.final = model, order, runs.final
        self.normal = model.marginals(np.column_stack([runs.scores, runs.final])) - model.mean
        self._means: dict[tuple[int, ...], np.ndarray] = {}

    @property
    def num_candidates(self) -> int:
        """Per race."""
        return self.order.shape[-1]

    def planned(self, plan: RacePlan) -> Rewards:
        """Final score of the best finished image if every race follows the plan."""
        alive = self.order[..., : plan.counts[0]]
        for k, count in enumerate(plan.counts[1:]):
            if count < alive.shape[-1]:
                mean = self._mean(plan.checks[: k + 1])[alive]
                kept = np.argpartition(-mean, count - 1, axis=-1)[..., :count]
                alive = np.take_along_axis(alive, kept, axis=-1)
        return self.final[alive].max(axis=-1)

    def raced(
        self, plan: RacePlan, cost: RaceCost, *, budget: float, num_scenarios: int = 256, seed: int = 0
    ) -> tuple[Rewards, Rewards]:
        """What :class:`~moe_artifacts.racing.Race` does on each: final score of its best image, and the calls it spent."""
        course = Course(
            self.model,
            plan,
            cost,
            budget=budget,
            num_candidates=self.num_candidates,
            num_scenarios=num_scenarios,
            seed=seed,
        )
        innovations = course.innovations(self.normal[:, plan.checks])
        means = [self._mean(plan.checks[: k + 1]) for k in range(len(plan.checks))]
        reward, spent = np.empty(self.order.shape[:2]), np.empty(self.order.shape[:2])
        for race in np.ndindex(reward.shape):
            counts = course.planned
            alive = self.order[race][: counts[0]]
            seen = np.full((len(alive), len(plan.checks)), np.nan)
            for k, mean in enumerate(means):
                seen[: len(alive), k] = innovations[alive, k]  # which row a candidate has does not matter
                order = np.argsort(-mean[alive], kind="stable")
                counts = course.counts_after(counts, k + 1, mean[alive[order]], spread(seen[:, : k + 1]))
                alive = alive[order[: counts[k + 1]]]
            reward[race], spent[race] = self.final[alive].max(), np.dot(counts, course.price)
        return reward, spent

    def _mean(self, checks: tuple[int, ...]) -> Float[np.ndarray, " image"]:
        """Posterior mean of the final score, up to what the images of a prompt share."""
        if checks not in self._means:
            within, seen = self.model.within, list(checks)
            gain = np.linalg.solve(within[np.ix_(seen, seen)], within[seen, -1])
            self._means[checks] = self.normal[:, seen] @ gain
        return self._means[checks]
