"""Fitting a plan: races over recorded runs of other prompts, improved by random changes that are kept where they help.

Many changes look better by luck. So a change must help by more than its standard error over prompts, and the best plans race
once more over orders of the candidates that none of them was chosen on.
"""

from __future__ import annotations

import numpy as np

from moe_artifacts.racing.plan import RaceCost, RacePlan, affordable
from moe_artifacts.racing.recorded import RecordedRaces, draw_orders
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.model import ScoreModel

NUM_STARTS = 3  # plans that the search improves, of the regular ones that it begins with
NUM_FINALISTS = 6
CLEARLY = 1.0  # standard errors over prompts by which a change must help; less fits the plan to the recorded images
MOST_CHECKS = 6
COUNT_NOISE = 0.25  # standard deviation of the log factor on a count in a random change


def plan_race(
    model: ScoreModel,
    runs: ScoredRuns,
    *,
    budget: float,
    check_cost: float,
    num_orders: int = 16,
    num_changes: int = 1200,
    seed: int = 0,
) -> RacePlan:
    """The plan that reaches the highest final score in races over recorded runs.

    Args:
        model: Of the final score, fitted on such runs.
        runs: With several images of each prompt, final scores, and every step scored. Steps after the last call are no
            checks: leave them out.
        budget: Denoiser calls per prompt, checks included.
        check_cost: Price of one score of one image, in denoiser calls.
        num_orders: Orders of the images of each prompt that plans are compared on; the finalists on four times as many.
        num_changes: Tried in all.
    Raises:
        InputError: If the budget does not pay for one finished image, or runs lack final scores or miss a score.
    """
    cost = RaceCost(tuple(runs.calls.tolist()), runs.total_calls, check_cost)
    races = RecordedRaces(model, runs, draw_orders(runs, num_orders, seed))
    rng = np.random.default_rng([seed, 1])
    values: dict[RacePlan, np.ndarray] = {}

    def value(plan: RacePlan) -> np.ndarray:  # of each prompt
        if plan not in values:
            values[plan] = races.planned(plan).mean(axis=1)
        return values[plan]

    starts = _regular_plans(cost, budget, races.num_candidates)
    kept = []
    for plan in sorted(starts, key=lambda plan: value(plan).mean())[-NUM_STARTS:]:
        kept.append(plan)
        for _ in range(num_changes // NUM_STARTS):
            changed = _changed(plan, cost, budget, races.num_candidates, rng)
            if changed is None:
                continue
            better = value(changed) - value(plan)
            if better.mean() > CLEARLY * better.std() / np.sqrt(len(better)):
                plan = changed
                kept.append(plan)
    finalists = sorted(kept, key=lambda plan: value(plan).mean())[-NUM_FINALISTS:]
    fresh = RecordedRaces(model, runs, draw_orders(runs, 4 * num_orders, seed + 1))
    return max(finalists, key=lambda plan: fresh.planned(plan).mean())


def _regular_plans(cost: RaceCost, budget: float, most: int) -> list[RacePlan]:
    """Checks evenly between 10 and 70 % of a run, counts falling by the same share at each; and no check at all."""
    share = np.array(cost.calls) / cost.total_calls
    plans = [((), (1.0,))]
    for number in range(1, 6):
        checks = tuple(np.unique([np.abs(share - at).argmin() for at in np.linspace(0.1, 0.7, number + 1)[:-1] + 0.05]))
        for finished in (0.05, 0.1, 0.2, 0.4):
            plans.append((checks, tuple(finished ** np.linspace(0, 1, len(checks) + 1))))
    made = []
    for checks, weights in plans:
        price = cost.waves(checks)
        if sum(price) <= budget or not checks:
            made.append(
                _without_idle_checks(RacePlan(tuple(map(int, checks)), affordable(weights, price, budget, most)))
            )
    return made


def _changed(plan: RacePlan, cost: RaceCost, budget: float, most: int, rng: np.random.Generator) -> RacePlan | None:
    """One check moved, added, left out or none of these, counts changed a little; None where that is no plan."""
    checks, counts = list(plan.checks), list(plan.counts)
    kind = rng.choice(["move", "add", "leave out", "counts"])
    if kind == "add" and len(checks) < MOST_CHECKS:
        new = int(rng.integers(len(cost.calls)))
        place = int(np.searchsorted(checks, new))
        checks.insert(place, new)
        counts.insert(place + 1, counts[place])
    elif kind != "counts" and checks:
        place = int(rng.integers(len(checks)))
        if kind == "move":
            checks[place] += int(rng.choice([-1, 1]))
        elif kind == "leave out":
            del checks[place], counts[place + 1]
    if len(set(checks)) < len(checks) or (checks and not 0 <= min(checks) <= max(checks) < len(cost.calls)):
        return None
    checks.sort()
    price = cost.waves(checks)
    if sum(price) > budget:
        return None
    weights = np.array(counts) * np.exp(COUNT_NOISE * rng.standard_normal(len(counts)))
    return _without_idle_checks(RacePlan(tuple(checks), affordable(weights.tolist(), price, budget, most)))


def _without_idle_checks(plan: RacePlan) -> RacePlan:
    """Without the last checks of a single candidate, which is finished whatever they say."""
    idle = sum(count == 1 for count in plan.counts[:-1])
    return RacePlan(plan.checks[: len(plan.checks) - idle], plan.counts[: len(plan.counts) - idle])
