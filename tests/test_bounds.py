from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
import reference_bounds
from hypothesis import example, given
from hypothesis import strategies as st

from moe_artifacts.calibration import clopper_pearson, fewest_units
from moe_artifacts.calibration.bounds import allowed_aborts, bets, betting_p_value, binomial_p_value, is_small
from moe_artifacts.errors import InputError

PROMISES = [(0.05, 0.95), (0.1, 0.9), (0.2, 0.8), (0.5, 0.75), (0.01, 0.99)]
fractions = st.lists(st.floats(0, 1), min_size=1, max_size=40)
rates = st.floats(0.02, 0.6)


@given(fractions, rates, st.floats(0.5, 0.99))
@example([1.0] + [0.0] * 150, 0.1, 0.9)  # the boldest bet is lost at once, and lost for good
def test_betting_agrees_with_the_loop(values: list[float], max_risk: float, confidence: float) -> None:
    excess = np.array(values) - max_risk
    expected = reference_bounds.betting_p_value(excess.tolist(), max_risk, confidence)
    assert betting_p_value(excess, max_risk, confidence) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("max_risk", "confidence"), PROMISES)
@pytest.mark.parametrize("num_units", [3, 12])
def test_bets_win_no_more_often_than_allowed_counted_over_every_outcome(
    max_risk: float, confidence: float, num_units: int
) -> None:
    """Units that are all wrong or all right, at a rate of exactly max_risk: no variance is larger."""
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=num_units)))
    probability = np.prod(np.where(outcomes, max_risk, 1 - max_risk), axis=1)
    p = np.array([betting_p_value(row - max_risk, max_risk, confidence) for row in outcomes])
    for level in [*np.unique(p), 1 - confidence]:
        assert probability[p <= level].sum() <= level * (1 + 1e-9)
    # And the bets are fair, not merely cautious: the capital is expected to stay 1.
    share, weight = bets(num_units, max_risk, confidence)
    capital = np.prod(1 - share * (outcomes[..., None] - max_risk) / (1 - max_risk), axis=1) @ weight
    assert probability @ capital == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(("max_risk", "confidence"), [(0.05, 0.95), (0.1, 0.9)])
def test_bets_win_no_more_often_than_allowed_on_fractions(max_risk: float, confidence: float) -> None:
    rng = np.random.default_rng(0)
    for a in (0.05, 0.5, 5.0):  # from nearly all-or-nothing to nearly constant
        draws = rng.beta(a, a * (1 - max_risk) / max_risk, (2_000, 100)) - max_risk
        won = np.mean([is_small(betting_p_value(e, max_risk, confidence), 1 - confidence) for e in draws])
        assert won <= (1 - confidence) + 3 * np.sqrt((1 - confidence) * confidence / 2_000)


@pytest.mark.parametrize(("max_risk", "confidence"), PROMISES)
def test_nothing_wrong_is_certified_from_the_fewest_units_on(max_risk: float, confidence: float) -> None:
    fewest = fewest_units(max_risk, confidence)
    assert (1 - max_risk) ** fewest <= (1 - confidence) * (1 + 1e-9)
    assert (1 - max_risk) ** (fewest - 1) > (1 - confidence) * (1 + 1e-9)
    for n in range(max(1, fewest - 3), 3 * fewest):
        p = betting_p_value(np.full(n, -max_risk), max_risk, confidence)
        assert is_small(p, 1 - confidence) == (n >= fewest)
        assert is_small(binomial_p_value(0, n, max_risk), 1 - confidence) == (n >= fewest)


@given(fractions, st.integers(0, 39), st.floats(0, 1), rates)
def test_less_that_goes_wrong_is_never_less_certain(values: list[float], i: int, less: float, max_risk: float) -> None:
    """What makes bisection over thresholds exact."""
    excess = np.array(values) - max_risk
    fewer = excess.copy()
    fewer[i % len(values)] -= less * values[i % len(values)]
    assert betting_p_value(fewer, max_risk, 0.9) <= betting_p_value(excess, max_risk, 0.9) * (1 + 1e-12)  # rounding


@given(st.integers(0, 10**6), rates, st.floats(0.5, 0.999))
def test_bets_share_out_all_their_weight_and_never_more_than_they_have(n: int, max_risk: float, conf: float) -> None:
    share, weight = bets(n, max_risk, conf)
    assert share[0] == 1 and (np.diff(share) < 0).all() and share[-1] > 0
    assert (weight >= 0).all() and weight.sum() == pytest.approx(1)


def test_one_unit_that_is_all_wrong_does_not_end_it_all() -> None:
    excess = np.full(200, -0.05)
    excess[100] = 0.95
    assert betting_p_value(excess, 0.05, 0.95) < 0.01
    excess[0] = 0.95  # the order matters little
    assert betting_p_value(excess, 0.05, 0.95) < 0.05


def test_no_units_are_no_evidence_and_many_do_not_overflow() -> None:
    assert betting_p_value(np.zeros(0), 0.05, 0.95) == 1
    assert betting_p_value(np.full(1_000_000, -0.05), 0.05, 0.95) == 0.0  # below the smallest float
    assert betting_p_value(np.full(1_000_000, 0.95), 0.05, 0.95) == 1


@given(st.integers(1, 120), rates, st.floats(0.5, 0.99))
def test_allowed_aborts_are_the_most_with_a_small_tail(n: int, max_risk: float, confidence: float) -> None:
    tails = [reference.binomial_tail(k, n, max_risk) for k in range(n)]
    assert allowed_aborts(n, max_risk, confidence) == sum(is_small(tail, 1 - confidence) for tail in tails) - 1
    assert [binomial_p_value(k, n, max_risk) for k in range(n)] == pytest.approx(tails, abs=1e-12)


def test_a_tail_that_meets_its_level_exactly_counts_as_small() -> None:
    assert allowed_aborts(2, 0.5, 0.75) == 0  # 0.5^2 = 0.25
    assert allowed_aborts(1, 0.5, 0.75) == -1
    assert binomial_p_value(0, 0, 0.5) == 1


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (50, 1_000)])
def test_clopper_pearson_ends_where_the_binomial_tails_are_half_of_what_is_left(k: int, n: int) -> None:
    low, high = clopper_pearson(k, n, confidence=0.9)
    assert (1 - reference.binomial_tail(k - 1, n, low) if k else 0.05) == pytest.approx(0.05, abs=1e-9)
    assert (reference.binomial_tail(k, n, high) if k < n else 0.05) == pytest.approx(0.05, abs=1e-9)
    assert (low == 0) == (k == 0) and (high == 1) == (k == n)


@pytest.mark.parametrize(("k", "n", "confidence"), [(3, 2, 0.9), (-1, 2, 0.9), (0, 0, 0.9), (1, 2, 1.0)])
def test_clopper_pearson_refuses_what_is_no_count(k: int, n: int, confidence: float) -> None:
    with pytest.raises(InputError):
        clopper_pearson(k, n, confidence)
