"""One race, live: candidates of one prompt are denoised in waves, and only the most promising go on.

Sources: successive halving, Jamieson and Talwalkar, arXiv:1502.07943; TTSnap, arXiv:2511.22242, which prunes by the score
of one step at fixed ratios. Here candidates are ranked by the posterior mean of the final score given all scores so far,
the plan is fitted, and after each check the counts ahead are decided anew from the posterior (course.py). The budget is a
hard limit on the denoiser calls of all candidates, their checks and the scores of the finished images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from moe_artifacts.errors import GuardStateError, InputError
from moe_artifacts.racing.course import Course, spread
from moe_artifacts.racing.plan import RaceCost, RacePlan
from moe_artifacts.scalar.model import ScoreModel


@dataclass(frozen=True, slots=True)
class Wave:
    """Candidates to be denoised further, all together."""

    candidates: tuple[int, ...]  # rising, numbered from 0
    check: int | None  # scored step at which to score them; None: run them to the end and score the finished images
    calls: int  # denoiser calls that each has behind it then


class Race:
    """The race of one prompt: ask for a wave, denoise and score it, tell the scores.

        race = Race(model, plan, cost, budget=200)
        while wave := race.next_wave():
            race.tell(denoise_and_score(wave.candidates, wave.calls))
        race.best

    Args:
        model: Fitted on runs of other prompts, at the scored steps that ``cost`` describes.
        plan: From :func:`plan_race`. For another budget, or fewer candidates, its counts are scaled to what can be paid.
        cost: In denoiser calls.
        budget: In denoiser calls; never exceeded.
        num_candidates: How many there are to start; None: as many as wished.
        num_scenarios: Simulated per decision; 0 follows the plan, whatever the scores.
        seed: Of the scenarios; the same scores give the same decisions.
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
        self._course = Course(
            model, plan, cost, budget=budget, num_candidates=num_candidates, num_scenarios=num_scenarios, seed=seed
        )
        self._model, self._cost = model, cost
        self._counts = self._course.planned
        self._scores = np.full((self._counts[0], model.num_steps), np.nan)
        self._final = np.full(self._counts[0], np.nan)
        self._alive = np.arange(self._counts[0])
        self._wave = 0  # the next one
        self._waiting: Wave | None = None

    @property
    def alive(self) -> tuple[int, ...]:
        """Candidates that were not dropped."""
        return tuple(self._alive.tolist())

    @property
    def spent(self) -> float:
        """Denoiser calls of the waves whose scores were told, checks included."""
        return float(np.dot(self._counts[: self._wave], self._course.price[: self._wave]))

    @property
    def best(self) -> int | None:
        """The finished candidate with the highest final score; None before one is finished."""
        return None if np.isnan(self._final).all() else int(np.nanargmax(self._final))

    def next_wave(self) -> Wave | None:
        """Who goes on, and how far; None at the end. The others are dropped for good.

        Raises:
            GuardStateError: If the scores of the last wave have not been told.
        """
        if self._waiting is not None:
            raise GuardStateError("tell the scores of the last wave before asking for the next one")
        checks = self._course.checks
        if self._wave > len(checks):
            return None
        if self._wave > 0:
            self._drop()
        check = checks[self._wave] if self._wave < len(checks) else None
        calls = self._cost.total_calls if check is None else self._cost.calls[check]
        self._waiting = Wave(self.alive, check, calls)
        return self._waiting

    def tell(self, scores: Float[np.ndarray, " candidate"]) -> None:
        """Scores of the candidates of the last wave, in their order; NaN where one could not be scored.

        Raises:
            GuardStateError: If no wave is waiting for its scores.
            InputError: If there is not one score a candidate, or one is infinite.
        """
        if self._waiting is None:
            raise GuardStateError("no wave is waiting for scores: ask for the next one first")
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != self._alive.shape or np.isinf(scores).any():
            raise InputError(
                f"scores must be {len(self._alive)} finite numbers or NaN, one for each of the candidates "
                f"{self.alive}, got {scores}"
            )
        if self._waiting.check is None:
            self._final[self._alive] = scores
        else:
            self._scores[self._alive, self._waiting.check] = scores
        self._waiting = None
        self._wave += 1

    def _drop(self) -> None:
        prompt = np.zeros(len(self._scores), dtype=int)
        mean = self._model.predict_now(self._scores, siblings=prompt).mean[self._alive]
        order = np.argsort(-mean, kind="stable")
        columns = np.column_stack([self._scores, np.full(len(self._scores), np.nan)])
        normal = self._model.marginals(columns)[:, self._course.checks[: self._wave]]
        innovations = self._course.innovations(normal)
        self._counts = self._course.counts_after(self._counts, self._wave, mean[order], spread(innovations))
        self._alive = np.sort(self._alive[order[: self._counts[self._wave]]])
