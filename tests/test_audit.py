"""The rates of an audit: exact where they claim to be, however the images were drawn."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from moe_artifacts.audit.planning import plan_audit
from moe_artifacts.audit.rates import (
    KEPT_SHARE,
    Rate,
    Tally,
    _Bounds,
    _interval,
    _mean,
    false_abort_rate,
    miss_rate,
    more_audits,
    wrong_abort_share,
)
from moe_artifacts.calibration.bounds import clopper_pearson
from moe_artifacts.errors import InputError
from tests.reference_bounds import binomial_tail

ERROR = 0.1  # of the intervals whose misses are counted
DRAWS = 1000


def tally(audit_rate=0.1, aborts=400, audited=40, clean=4, kept=1000, kept_clean=960, **changes):
    """All finished images labelled, unless ``changes`` say otherwise."""
    values = {"audited_labelled": audited, "audited_clean": clean, "kept_labelled": kept, "kept_clean": kept_clean}
    return Tally(**{"audit_rate": audit_rate, "aborts": aborts, "audited": audited, "kept": kept} | values | changes)


def drawn(
    rng, images, false_aborts, audit_rate, *, clean_share=0.7, recall=0.6, rejects=0.0, labelled=1.0, sample=None
):
    """A run of ``images`` images, each with a fate of its own.

    Args:
        false_aborts: Chance of each clean image to be aborted, one number or one per image.
        rejects: Chance of an image that is not aborted to be rejected at the last step.
        labelled: Chance of an audited image to get a label.
        sample: Kept images that are labelled; None: all.
    """
    clean = rng.random(images) < clean_share
    aborted = rng.random(images) < np.where(clean, false_aborts, recall)
    audited = aborted & (rng.random(images) < audit_rate)
    seen = audited & (rng.random(images) < labelled)
    rejected = ~aborted & (rng.random(images) < rejects)
    kept = ~aborted & ~rejected
    looked_at = kept
    if sample is not None:
        looked_at = np.zeros(images, dtype=bool)
        looked_at[rng.choice(np.flatnonzero(kept), sample, replace=False)] = True
    counts = {
        "aborts": aborted,
        "audited": audited,
        "audited_labelled": seen,
        "audited_clean": seen & clean,
        "kept": kept,
        "kept_labelled": looked_at,
        "kept_clean": looked_at & clean,
        "rejected": rejected,
    }
    found = Tally(audit_rate=audit_rate, **{name: int(mask.sum()) for name, mask in counts.items()})
    return found, float((aborted & clean).sum() / clean.sum())


def misses(rates, truths):
    """Shares of the intervals that lie above the truth and below it."""
    above = np.mean([rate.low > truth for rate, truth in zip(rates, truths, strict=True)])
    below = np.mean([rate.high < truth for rate, truth in zip(rates, truths, strict=True)])
    return above, below


def at_most(share):
    """What a share of ``DRAWS`` may be by chance: 3 standard errors."""
    return share + 3 * math.sqrt(share * (1 - share) / DRAWS)


# --- how often the intervals miss ------------------------------------------------------------------------------------

SITUATIONS = {
    "all labelled": {},
    "every abort finished": {"audit_rate": 1.0, "images": 300},
    "often wrong": {"false_aborts": 0.4, "audit_rate": 0.3, "images": 400},
    "hardly audited": {"audit_rate": 0.02, "images": 4000},
    "some audited images without a label": {"labelled": 0.6},
    "some rejected": {"rejects": 0.05},
    "a sample of the kept": {"sample": 100},
    "no kept image labelled": {"sample": 0},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_interval_misses_the_truth_no_more_often_than_it_says(situation):
    rng = np.random.default_rng(0)
    values = {"images": 1000, "false_aborts": 0.08, "audit_rate": 0.15} | SITUATIONS[situation]
    rates, wrong = [], []
    for _ in range(DRAWS):
        found, _ = drawn(rng, **values)
        rates.append(false_abort_rate([found], 1 - ERROR))
        wrong.append(wrong_abort_share([found], 1 - ERROR))
    above, below = misses(rates, [values["false_aborts"]] * DRAWS)
    tail = ERROR / 2 if situation != "no kept image labelled" else ERROR  # there the upper end says nothing
    assert above <= at_most(tail) and below <= at_most(tail)
    if situation == "all labelled":  # not wider than it has to be: X is a whole number, so some of the error is lost
        assert above + below >= 0.5 * ERROR
    clean_aborts = 0.7 * values["false_aborts"]
    share = clean_aborts / (clean_aborts + 0.3 * 0.6)
    assert max(misses(wrong, [share] * DRAWS)) <= at_most(ERROR / 2)


def test_it_holds_where_prompts_differ_and_for_the_very_images_of_the_run():
    rng = np.random.default_rng(1)
    easy_and_hard = np.repeat([0.0, 0.02, 0.3], [500, 300, 200])
    found, in_the_run = zip(*(drawn(rng, 1000, easy_and_hard, 0.2) for _ in range(DRAWS)), strict=True)
    rates = [false_abort_rate([one], 1 - ERROR) for one in found]
    assert max(misses(rates, [easy_and_hard.mean()] * DRAWS)) <= at_most(ERROR / 2)
    assert max(misses(rates, in_the_run)) <= at_most(ERROR / 2)


def test_it_holds_for_runs_with_other_audit_rates_and_other_false_aborts():
    rng = np.random.default_rng(2)
    rates, wrong, truths = [], [], []
    for _ in range(DRAWS):
        (first, _), (second, _) = drawn(rng, 2000, 0.12, 0.05), drawn(rng, 400, 0.02, 1.0, sample=150)
        rates.append(false_abort_rate([first, second], 1 - ERROR))
        wrong.append(wrong_abort_share([first, second], 1 - ERROR))
        truths.append((2000 * 0.12 + 400 * 0.02) / 2400)
    assert max(misses(rates, truths)) <= at_most(ERROR / 2)
    # The estimates are weighted: the mean of all audited images would be far lower, as the second run has most audits.
    assert np.mean([rate.value for rate in rates]) == pytest.approx(truths[0], rel=0.05)
    shares = [0.7 * f / (0.7 * f + 0.18) for f in (0.12, 0.02)]
    aborts = [2000 * (0.7 * 0.12 + 0.18), 400 * (0.7 * 0.02 + 0.18)]
    assert np.mean([rate.value for rate in wrong]) == pytest.approx(np.average(shares, weights=aborts), rel=0.05)


def test_a_sample_of_the_kept_is_bounded_whatever_it_is_drawn_from():
    """Clopper and Pearson's interval is made for drawing with replacement; without, it errs on the safe side."""
    tail = KEPT_SHARE * ERROR / 2
    for kept, drawn_kept in ((30, 10), (30, 29), (200, 20), (200, 150), (1000, 60)):
        ends = np.array([_interval(k, drawn_kept, tail) for k in range(drawn_kept + 1)])
        for clean in range(kept + 1):
            chance = hypergeom.pmf(np.arange(drawn_kept + 1), kept, clean, drawn_kept)
            assert chance[clean < np.floor(ends[:, 0] * kept)].sum() <= tail + 1e-12
            assert chance[clean > np.ceil(ends[:, 1] * kept)].sum() <= tail + 1e-12


# --- against slow versions, and by hand ------------------------------------------------------------------------------


def slowly(clean, kept_clean, audit_rate, tail):
    """Ends of the false-abort rate, by trying out rates: with fewer, or more, so many would hardly have been seen."""

    def seen(rate, k):
        return binomial_tail(k, clean + kept_clean, rate * audit_rate / (rate * audit_rate + 1 - rate))

    low, high = (0.0, 1.0), (0.0, 1.0)
    for _ in range(40):
        middle = sum(low) / 2
        low = (low[0], middle) if 1 - seen(middle, clean - 1) > tail else (middle, low[1])
        middle = sum(high) / 2
        high = (high[0], middle) if seen(middle, clean) < tail else (middle, high[1])
    return (low[0] if clean else 0.0), (high[0] if kept_clean else 1.0)


@given(st.integers(0, 20), st.integers(0, 60), st.floats(0.02, 1), st.floats(0.5, 0.99))
def test_agrees_with_trying_out_every_rate(clean, kept_clean, audit_rate, confidence):
    found = tally(audit_rate, aborts=50, audited=20, clean=clean, kept=60, kept_clean=kept_clean)
    rate = false_abort_rate([found], confidence)
    low, high = slowly(clean, kept_clean, audit_rate, (1 - confidence) / 2) if clean + kept_clean else (0, 1)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=1e-6)  # 40 halvings, and float64 tails
    if clean + kept_clean:
        assert (
            rate.low - 1e-9 <= rate.value <= rate.high + 1e-9
        )  # at the ends they are the same number, but for rounding


tallies = st.builds(
    tally,
    audit_rate=st.floats(0.01, 1),
    aborts=st.integers(30, 100),
    audited=st.integers(20, 30),
    clean=st.integers(0, 20),
    kept=st.integers(30, 60),
    kept_clean=st.integers(0, 30),
    kept_labelled=st.just(30),
    rejected=st.integers(0, 5),
)


@given(st.lists(tallies, min_size=1, max_size=4), st.floats(0.5, 0.99))
def test_every_rate_lies_within_its_interval_and_runs_may_come_in_any_order(found, confidence):
    for measure in (false_abort_rate, miss_rate, wrong_abort_share):
        rate = measure(found, confidence)
        assert 0 <= rate.low <= rate.high <= 1
        if rate.value is not None and len(found) == 1:
            assert rate.low - 1e-9 <= rate.value <= rate.high + 1e-9
        backwards = measure(found[::-1], confidence)
        assert (backwards.low, backwards.high) == pytest.approx((rate.low, rate.high), abs=1e-12)
        surer = measure(found, (1 + confidence) / 2)
        assert surer.low <= rate.low + 1e-12 and surer.high >= rate.high - 1e-12


groups = st.lists(
    st.tuples(st.floats(0, 5), st.floats(0, 5), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5
)


@given(groups)
def test_the_bounds_of_several_runs_hold_for_every_weight_they_may_have(values):
    bounds = [_Bounds((min(a, b), max(a, b)), (min(c, d), max(c, d))) for a, b, c, d in values]
    weights = np.array([chosen for chosen in itertools.product(*(one.clean for one in bounds)) if sum(chosen)])
    if len(weights):  # a mean is extreme where each weight is
        for end, extreme in ((0, np.min), (1, np.max)):
            means = weights @ np.array([one.odds[end] for one in bounds]) / weights.sum(axis=1)
            assert _mean(bounds, lowest=end == 0) == pytest.approx(extreme(means), abs=1e-12)


def test_one_rate_twice_is_as_wide_as_two_runs_at_that_rate_allow():
    one = tally()
    both = false_abort_rate([one, one], 0.9)
    assert (both.low, both.high) == pytest.approx(
        (false_abort_rate([one], 0.95).low, false_abort_rate([one], 0.95).high)
    )  # half of the error each
    assert both.value == pytest.approx(false_abort_rate([one], 0.9).value)


def test_nothing_audited_all_clean_and_all_bad():
    nothing = false_abort_rate([tally(aborts=0, audited=0, clean=0)], 0.9)
    assert nothing.value == nothing.low == 0 and 0 < nothing.high < 0.1  # 960 clean images at 0.1: about 96 seen
    all_clean = tally(clean=40, kept_clean=1000)
    assert wrong_abort_share([all_clean], 0.9).high == wrong_abort_share([all_clean], 0.9).value == 1
    assert false_abort_rate([all_clean], 0.9).value == pytest.approx(400 / 1400)
    assert miss_rate([all_clean], 0.9) == Rate(None, 0.0, 1.0)  # no bad image was seen
    all_bad = tally(clean=0, kept_clean=0)
    assert false_abort_rate([all_bad], 0.9) == Rate(None, 0.0, 1.0)
    assert wrong_abort_share([all_bad], 0.9).value == 0
    assert miss_rate([all_bad], 0.9).value == pytest.approx(1000 / 1400)
    nobody = tally(aborts=0, audited=0, clean=0, kept=0, kept_clean=0)
    assert false_abort_rate([nobody], 0.9) == wrong_abort_share([nobody], 0.9) == Rate(None, 0.0, 1.0)


def test_audits_without_a_label_say_nothing_and_unlabelled_kept_images_leave_the_lower_end():
    unlabelled = tally(audited_labelled=0, audited_clean=0)
    assert false_abort_rate([unlabelled], 0.9) == wrong_abort_share([unlabelled], 0.9) == Rate(None, 0.0, 1.0)
    half = dataclasses.replace(tally(), kept_labelled=0, kept_clean=0)
    rate = false_abort_rate([half], 0.9)
    assert rate.value is None and rate.high == 1
    # As if all kept images were clean, with all of the error at that end.
    assert rate.low == pytest.approx(false_abort_rate([tally(kept_clean=1000)], 0.8).low)
    together = false_abort_rate([half, tally()], 0.9)
    assert together.value is None and together.high == 1 and together.low > 0


def test_a_sample_of_the_kept_takes_its_share_of_the_error():
    rate = false_abort_rate([tally(kept_labelled=100, kept_clean=96)], 0.9)
    low, high = clopper_pearson(96, 100, 1 - KEPT_SHARE * 0.1)
    fewest, most = math.floor(1000 * low), min(math.ceil(1000 * high), 996)  # four were seen to be bad
    rest = 1 - (1 - KEPT_SHARE) * 0.1
    assert rate.low == pytest.approx(false_abort_rate([tally(kept=most, kept_clean=most)], rest).low)
    assert rate.high == pytest.approx(false_abort_rate([tally(kept=fewest, kept_clean=fewest)], rest).high)


def test_rejected_images_may_be_clean_or_not():
    without, with_them = (false_abort_rate([tally(rejected=count)], 0.9) for count in (0, 300))
    assert with_them.high == without.high and with_them.low < without.low
    assert with_them.low == pytest.approx(false_abort_rate([tally(kept=1300, kept_clean=1260)], 0.9).low)


@pytest.mark.parametrize("measure", [false_abort_rate, miss_rate, wrong_abort_share])
def test_refused_without_runs_or_with_an_impossible_confidence(measure):
    with pytest.raises(InputError, match="at least one, got none"):
        measure([], 0.9)
    for confidence in (0, 1, math.nan):
        with pytest.raises(InputError, match="confidence must be between 0 and 1"):
            measure([tally()], confidence)


@pytest.mark.parametrize("changes", [{"audited": 401}, {"audited_clean": 41}, {"kept_clean": 1001}, {"rejected": -1}])
def test_counts_that_do_not_fit_are_refused(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        tally(**changes)


@pytest.mark.parametrize("audit_rate", [0, 1.1, math.nan])
def test_an_impossible_audit_rate_is_refused(audit_rate):
    with pytest.raises(InputError, match="audit_rate must be in"):
        tally(audit_rate=audit_rate)


# --- how many it takes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [false_abort_rate, miss_rate, wrong_abort_share])
@pytest.mark.parametrize("away", [0.8, 1.25])
def test_about_as_many_more_audits_as_it_says_would_do(measure, away):
    found = tally(aborts=100, audited=10, clean=2, kept=200, kept_clean=180)
    max_risk = min(measure([found], 0.9).value * away, 0.999)
    more = more_audits([found], 0.9, max_risk, measure)

    def tells(audits):
        rate = measure([found.times(audits / 10)], 0.9)
        return rate.low > max_risk or rate.high <= max_risk

    # 20 %: counts are rounded, so there is no single turning point.
    assert more > 0 and tells(10 + 1.2 * more) and not tells(10 + 0.8 * more)


def test_no_number_is_named_where_none_can_be():
    found = tally()
    assert more_audits([found], 0.9, false_abort_rate([found], 0.9).value, false_abort_rate) is None
    none_yet = tally(aborts=0, audited=0, clean=0, kept=5, kept_clean=5)
    assert more_audits([none_yet], 0.9, 0.05, false_abort_rate) is None


@pytest.mark.parametrize("true_rate", [0.02, 0.1, 0.2])
@pytest.mark.parametrize("audit_rate", [0.1, 1.0])
def test_a_plan_tells_as_often_as_it_says(true_rate, audit_rate):
    plan = plan_audit(max_risk=0.05, true_rate=true_rate, audit_rate=audit_rate, clean_share=0.7, recall=0.6)
    rng = np.random.default_rng(0)
    found = [drawn(rng, plan.images, true_rate, audit_rate)[0] for _ in range(DRAWS)]
    rates = [false_abort_rate([one], 0.95) for one in found]
    right = [rate.low > 0.05 if true_rate > 0.05 else rate.high <= 0.05 for rate in rates]
    # The plan takes the number of clean images seen as given, so it may be off by a little more than chance.
    assert np.mean(right) == pytest.approx(0.8, abs=0.05)
    assert np.mean([one.audited for one in found]) == pytest.approx(plan.audits, rel=0.05, abs=1)


def test_a_kept_promise_is_hardly_ever_called_broken():
    rng = np.random.default_rng(3)
    rates = [false_abort_rate([drawn(rng, 2500, 0.05, 0.1)[0]], 0.95) for _ in range(DRAWS)]
    assert np.mean([rate.low > 0.05 for rate in rates]) <= at_most(0.025)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"true_rate": 0.05}, "too close"),
        ({"true_rate": 0.0501}, "too close"),
        ({"max_risk": 0}, "max_risk must be between"),
        ({"power": 1}, "power must be between"),
        ({"audit_rate": 0}, "audit_rate must be in"),
        ({"recall": 1.5}, "recall must be in"),
    ],
)
def test_plans_for_nothing_are_refused(changes, message):
    values = {"max_risk": 0.05, "true_rate": 0.1, "audit_rate": 0.1, "clean_share": 0.7, "recall": 0.6}
    with pytest.raises(InputError, match=message):
        plan_audit(**values | changes)
