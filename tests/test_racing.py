from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from moe_artifacts.errors import GuardStateError, InputError
from moe_artifacts.racing import Race, RaceCost, RacePlan, RecordedRaces, draw_orders, plan_race
from moe_artifacts.racing.course import Course, continuations, finished_best, spread
from moe_artifacts.racing.plan import affordable, topped_up
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.model import ScoreModel

CALLS = (1, 2, 4, 7)
TOTAL = 10
COST = RaceCost(CALLS, TOTAL, check_cost=0.25)


def recorded(prompts: int = 30, images: int = 12, noise: float = 1.0, seed: int = 0) -> ScoredRuns:
    """Scores that approach the final one; ``noise=0``: every score is the final one."""
    rng = np.random.default_rng(seed)
    final = np.repeat(rng.normal(size=prompts), images) + rng.normal(size=prompts * images)
    left = 1 - np.array(CALLS) / TOTAL
    return ScoredRuns(
        scores=final[:, None] + noise * left * rng.normal(size=(len(final), len(CALLS))),
        label=np.zeros(len(final)),
        prompt=np.repeat(np.arange(prompts), images),
        calls=np.array(CALLS),
        total_calls=TOTAL,
        final=final,
    )


@pytest.fixture(scope="module")
def runs() -> ScoredRuns:
    return recorded()


@pytest.fixture(scope="module")
def model(runs) -> ScoreModel:
    return ScoreModel.fit(runs)


def play(race: Race, scores: np.ndarray, final: np.ndarray) -> list[tuple[int, ...]]:
    """Run a race over recorded candidates; who was in each wave."""
    waves = []
    while wave := race.next_wave():
        waves.append(wave.candidates)
        rows = list(wave.candidates)
        race.tell(final[rows] if wave.check is None else scores[rows, wave.check])
    return waves


def test_the_cost_of_a_plan_is_that_counted_by_hand():
    plan = RacePlan((1, 2), (6, 3, 1))
    # 6 candidates make 2 calls and a check, 3 of them 2 more calls and a check, 1 the last 6 calls and a final score.
    assert plan.cost(COST) == pytest.approx(6 * (2 + 0.25) + 3 * (2 + 0.25) + 1 * (6 + 0.25))
    assert RacePlan((), (3,)).cost(COST) == pytest.approx(
        3 * (TOTAL + 0.25)
    )  # plain best-of-3 pays no check but the last


counts_wanted = st.lists(st.floats(0.1, 30), min_size=4, max_size=4).map(lambda c: sorted(c, reverse=True))


@given(counts_wanted, st.floats(11.25, 500), st.none() | st.integers(1, 40))
def test_affordable_counts_keep_the_budget_and_leave_nothing_that_would_pay_for_more(weights, budget, most):
    price = COST.waves((0, 1, 3))
    counts = affordable(weights, price, budget, most)
    assert np.dot(counts, price) <= budget * (1 + 1e-8)
    assert counts[-1] >= 1 and all(a >= b for a, b in pairwise(counts))
    assert most is None or counts[0] <= most
    assert topped_up(counts, price, budget, most) == counts
    assert affordable(counts, price, budget, most) == counts  # which is what lets a plan be followed as it is


@given(counts_wanted, st.floats(11.25, 300), st.integers(1, 20))
def test_continuations_keep_the_budget_and_begin_with_the_planned_one(weights, budget, most):
    price = COST.waves((0, 1, 3))
    planned = affordable(weights, price, budget, most)
    options = continuations(planned, price, budget, most)
    assert options[0] == planned
    assert all(np.dot(counts, price) <= budget * (1 + 1e-8) and counts[0] <= most for counts in options)


def test_the_best_of_those_finished_agrees_with_numerical_integration():
    mean, gain = np.array([0.4, 0.1, 0.0, -0.7]), np.array([0.5, 0.8])
    scenarios = np.random.default_rng(0).standard_normal((40_000, 4, 2))
    worth = finished_best(mean, gain, [(3, 3), (2, 1), (1, 1)], scenarios).mean(axis=1)
    std = np.hypot(*gain)

    def density_of_best_of_3(x: float) -> float:
        below = norm.cdf(x, mean[:3], std)
        return sum(norm.pdf(x, mean[i], std) * np.delete(below, i).prod() for i in range(3))

    best_of_3 = quad(lambda x: x * density_of_best_of_3(x), -8, 8)[0]
    # Two go on, the better one after the first wave is finished: its last move has mean 0 (Clark 1961, the best of two).
    apart = np.sqrt(2) * gain[0]
    lead = (mean[0] - mean[1]) / apart
    best_of_2 = mean[0] * norm.cdf(lead) + mean[1] * norm.cdf(-lead) + apart * norm.pdf(lead)
    assert worth == pytest.approx([best_of_3, best_of_2, mean[0]], abs=4 * std / 200)  # 4 standard errors


def test_spread_is_1_for_the_fitted_prompts_and_grows_with_that_of_this_one(model, runs):
    course = Course(model, RacePlan((0, 2), (4, 2, 1)), COST, budget=40)
    normal = model.marginals(runs.scores)[:, [0, 2]]
    found = [spread(course.innovations(normal[runs.prompt == prompt])) for prompt in range(30)]
    assert np.mean(found) == pytest.approx(1, abs=0.05)  # standard error 0.02 over 30 prompts
    stretched = normal.mean(axis=0) + 3 * (normal - normal.mean(axis=0))
    assert spread(course.innovations(stretched[:12])) > 2 * found[0]
    assert spread(np.array([[1.0, np.nan]])) == 1  # one candidate shows no spread


@pytest.mark.parametrize("num_scenarios", [0, 64])
@pytest.mark.parametrize("counts", [(10, 3, 3, 3), (9, 6, 3, 2)])
def test_the_live_race_does_what_the_recorded_races_do(model, runs, num_scenarios, counts):
    order = draw_orders(runs, 3, seed=5)
    plan, budget = RacePlan((0, 1, 3), counts), 41.75
    races = RecordedRaces(model, runs, order)
    reward, spent = races.raced(plan, COST, budget=budget, num_scenarios=num_scenarios)
    sizes = set()
    for prompt, number in np.ndindex(10, 3):
        images = order[prompt, number]
        race = Race(model, plan, COST, budget=budget, num_candidates=12, num_scenarios=num_scenarios)
        waves = play(race, runs.scores[images], runs.final[images])
        assert runs.final[images[race.best]] == reward[prompt, number]
        assert race.spent == pytest.approx(spent[prompt, number]) and race.spent <= budget
        sizes.add(tuple(map(len, waves)))
    if num_scenarios == 0:
        assert sizes == {plan.counts}
        np.testing.assert_array_equal(reward, races.planned(plan))
    else:
        assert len(sizes) > 1  # the scores changed how many went on


def test_candidates_that_were_dropped_keep_the_innovations_they_had(model, runs):
    course = Course(model, RacePlan((0, 1, 3), (12, 6, 4, 3)), COST, budget=80)
    normal = model.marginals(runs.scores[:12])[:, [0, 1, 3]]
    dropped = normal.copy()
    dropped[3:, 2], dropped[6:, 1:] = np.nan, np.nan
    whole, found = course.innovations(normal), course.innovations(dropped)
    assert np.array_equal(np.isnan(found), np.isnan(dropped))
    there = ~np.isnan(dropped)
    np.testing.assert_allclose(found[there], whole[there], rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    budget=st.floats(11.5, 200),
    num_candidates=st.none() | st.integers(1, 12),
    counts=counts_wanted,
    noise=st.floats(0, 30),
    seed=st.integers(0, 100),
)
def test_the_budget_is_never_exceeded(model, budget, num_candidates, counts, noise, seed):
    plan = RacePlan((0, 1, 3), tuple(int(np.ceil(count)) for count in counts))
    race = Race(model, plan, COST, budget=budget, num_candidates=num_candidates, num_scenarios=16)
    rng = np.random.default_rng(seed)
    calls, checks, behind = 0, 0, dict.fromkeys(race.alive, 0)
    while wave := race.next_wave():  # counted anew, from what a pipeline would do
        calls += sum(wave.calls - behind[candidate] for candidate in wave.candidates)
        checks += len(wave.candidates)
        behind.update(dict.fromkeys(wave.candidates, wave.calls))
        race.tell(noise * rng.normal(size=len(wave.candidates)))
    assert race.spent == pytest.approx(calls + 0.25 * checks)
    assert race.spent <= budget * (1 + 1e-8)
    assert race.best is not None and behind[race.best] == TOTAL
    assert num_candidates is None or len(behind) <= num_candidates


def test_with_scores_that_tell_the_final_one_the_best_of_all_starters_is_found():
    runs = recorded(noise=0.0)
    model = ScoreModel.fit(runs)
    order = draw_orders(runs, 2, seed=1)
    plan = RacePlan((0,), (12, 1))
    reward, _ = RecordedRaces(model, runs, order).raced(plan, COST, budget=plan.cost(COST))
    np.testing.assert_array_equal(reward, runs.final[order].max(axis=2))
    found = plan_race(model, runs, budget=plan.cost(COST), check_cost=0.25, num_changes=60)
    assert found.checks[0] == 0 and found.counts[0] == 12  # it finds out that the first check tells all


def test_candidates_are_ranked_by_all_scores_so_far_not_by_the_last_one(model):
    plan = RacePlan((2, 3), (2, 2, 1))
    race = Race(model, plan, COST, budget=plan.cost(COST), num_scenarios=0)
    race.next_wave()
    race.tell(np.array([2.0, -2.0]))
    race.next_wave()
    race.tell(np.array([0.5, 0.55]))  # a little better at the last check, far worse before
    assert race.next_wave().candidates == (0,)


def test_a_candidate_without_a_score_stays_where_its_earlier_scores_put_it(model):
    plan = RacePlan((2, 3), (3, 3, 1))
    race = Race(model, plan, COST, budget=plan.cost(COST), num_scenarios=0)
    race.next_wave()
    race.tell(np.array([-1.0, 2.5, 0.0]))
    race.next_wave()
    race.tell(np.array([-1.0, np.nan, 0.0]))
    assert race.next_wave().candidates == (1,)
    race.tell(np.array([np.nan]))
    assert race.best is None and race.next_wave() is None


def test_plans_of_a_search_are_within_the_budget_and_no_worse_than_plain_best_of_n(model, runs):
    plan = plan_race(model, runs, budget=40, check_cost=0.25, num_orders=4, num_changes=90)
    assert plan.cost(COST) <= 40
    races = RecordedRaces(model, runs, draw_orders(runs, 20, seed=9))
    assert races.planned(plan).mean() > races.planned(RacePlan((), (3,))).mean() + 0.1  # 40 calls pay for 3 full runs


def test_a_plan_for_one_budget_is_scaled_to_another(model):
    plan = RacePlan((1, 2), (6, 3, 1))
    for budget, few in ((12, 1), (200, 45)):
        race = Race(model, plan, COST, budget=budget)
        assert len(race.alive) == pytest.approx(few, abs=3)
    assert len(Race(model, plan, COST, budget=200, num_candidates=5).alive) == 5


def test_what_cannot_be_raced_is_refused(model, runs):
    plan = RacePlan((1,), (4, 1))
    with pytest.raises(InputError, match="budget=9 does not pay for one finished image, which costs 10"):
        Race(model, plan, COST, budget=9)
    with pytest.raises(InputError, match="model has 4 scored steps, cost 2"):
        Race(model, plan, RaceCost((1, 2), 10, 0.1), budget=30)
    with pytest.raises(InputError, match="columns \\(7,\\)"):
        Race(model, RacePlan((7,), (4, 1)), COST, budget=30)
    for checks, counts in (((1,), (4,)), ((1,), (1, 4)), ((1,), (4, 0)), ((2, 1), (4, 2, 1)), ((-1,), (2, 1))):
        with pytest.raises(InputError):
            RacePlan(checks, counts)
    for calls in ((), (0, 1), (2, 2), (1, 10)):
        with pytest.raises(InputError, match="calls must rise from 1 to less than total_calls=10"):
            RaceCost(calls, 10, 0.1)
    with pytest.raises(InputError, match="check_cost"):
        RaceCost((1,), 10, -1.0)
    holes = np.where(np.arange(4) == 1, np.nan, runs.scores)
    unscored = ScoredRuns(
        scores=holes, label=runs.label, prompt=runs.prompt, calls=runs.calls, total_calls=TOTAL, final=runs.final
    )
    with pytest.raises(InputError, match="a score at every step"):
        RecordedRaces(model, unscored, draw_orders(runs, 1, 0))


def test_waves_and_scores_take_turns(model):
    race = Race(model, RacePlan((1,), (4, 1)), COST, budget=40)
    with pytest.raises(GuardStateError, match="no wave is waiting"):
        race.tell(np.zeros(4))
    wave = race.next_wave()
    assert wave.calls == 2 and wave.check == 1
    with pytest.raises(GuardStateError, match="tell the scores"):
        race.next_wave()
    with pytest.raises(InputError, match="one for each"):
        race.tell(np.zeros(len(wave.candidates) + 1))
    with pytest.raises(InputError, match="finite"):
        race.tell(np.full(len(wave.candidates), np.inf))
