from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.calibration import (
    MIN_CLASS_WEIGHT,
    MIN_SCALE,
    Calibration,
    brier_score,
    expected_calibration_error,
    fit_monotone,
    fit_scale_bias,
)
from moe_artifacts.errors import CalibrationError, InputError

RANGE = (-6.0, 8.0)


# --- scale and bias --------------------------------------------------------------------------------------------------


def draw(scale: list[float], bias: list[float], size: int = 60_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels and log-SNRs, from scales and biases at the centres of bands."""
    rng = np.random.default_rng(0)
    low, high = RANGE
    centres = low + (high - low) * (np.arange(len(scale)) + 0.5) / len(scale)
    log_snr = rng.uniform(low, high, size)
    logits = rng.normal(0, 2, size)
    true_logits = np.interp(log_snr, centres, scale) * logits + np.interp(log_snr, centres, bias)
    return logits, (rng.random(size) < 1 / (1 + np.exp(-true_logits))).astype(float), log_snr


def test_finds_the_scale_and_bias_that_made_the_labels() -> None:
    scale, bias = fit_scale_bias(*draw([0.5, 1.0, 2.0], [1.0, 0.0, -1.0]), RANGE, num_bands=3)
    np.testing.assert_allclose(scale, [0.5, 1.0, 2.0], atol=0.1)  # standard errors are about 0.03
    np.testing.assert_allclose(bias, [1.0, 0.0, -1.0], atol=0.1)


def test_agrees_with_a_plain_logistic_regression_where_there_is_one_band() -> None:
    from sklearn.linear_model import LogisticRegression

    logits, labels, log_snr = draw([0.7], [0.4], size=2_000)
    plain = LogisticRegression(C=np.inf).fit(logits[:, None], labels)
    scale, bias = fit_scale_bias(logits, labels, log_snr, RANGE, num_bands=1)
    assert (scale[0], bias[0]) == pytest.approx((plain.coef_[0, 0], plain.intercept_[0]), abs=1e-3)  # its pull to 0


def test_few_noise_levels_are_calibrated_each_and_the_bands_between_follow() -> None:
    """As in use: fewer scored steps than bands, none of them at a centre."""
    logits, labels, _ = draw([1.0], [0.0])
    log_snr = np.repeat([-5.0, 0.1, 6.3], 20_000)
    stretch, move = np.repeat([0.5, 1.0, 2.0], 20_000), np.repeat([0.6, 0.0, -0.6], 20_000)
    calibration = Calibration(RANGE)
    calibration.set(*fit_scale_bias((logits - move) / stretch, labels, log_snr, RANGE))
    prob = calibration(torch.tensor((logits - move) / stretch), torch.tensor(log_snr)).numpy()
    for level in (-5.0, 0.1, 6.3):
        at = log_snr == level
        assert expected_calibration_error(prob[at], labels[at]) < 0.015  # the sampling error alone is about 0.008
    assert (calibration.scale[:-1] > 0.4).all() and (calibration.scale < 2.5).all()


def test_a_soft_label_counts_as_its_share_of_hard_ones() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 200) / 4
    logits = rng.normal(4 * labels - 2, 2)
    soft = fit_scale_bias(np.tile(logits, 4), np.tile(labels, 4), np.zeros(800), RANGE)
    hard = np.concatenate([labels > share for share in (0.0, 0.25, 0.5, 0.75)]).astype(float)
    np.testing.assert_allclose(
        soft, fit_scale_bias(np.tile(logits, 4), hard, np.zeros(800), RANGE), atol=1e-3
    )  # solver


def test_a_band_without_images_or_with_few_stays_close_to_what_all_images_say() -> None:
    logits, labels, log_snr = draw([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    used = log_snr < -1
    used[np.flatnonzero(log_snr > 6)[:5]] = True
    scale, bias = fit_scale_bias(logits[used], labels[used], log_snr[used], RANGE, num_bands=3)
    np.testing.assert_allclose(scale, 1.0, atol=0.3)
    np.testing.assert_allclose(bias, 0.0, atol=0.6)


def test_a_band_with_turned_logits_keeps_its_ranking() -> None:
    scale, _ = fit_scale_bias(*draw([1.0, 1.0, -1.0], [0.0, 0.0, 0.0]), RANGE, num_bands=3)
    assert scale[2] == MIN_SCALE
    assert (scale[:2] > 0.9).all()


def test_separated_data_stay_finite() -> None:
    logits = np.concatenate([np.full(50, -1.0), np.full(50, 1.0)])
    scale, bias = fit_scale_bias(logits, (logits > 0).astype(float), np.zeros(100), RANGE, num_bands=2)
    assert np.isfinite(scale).all() and np.isfinite(bias).all() and (scale > 0).all()


def test_too_few_or_turned_images_cannot_be_calibrated() -> None:
    logits, labels, log_snr = draw([1.0], [0.0], size=1_000)
    few = np.zeros(1_000)
    few[: int(MIN_CLASS_WEIGHT) - 1] = 1
    with pytest.raises(CalibrationError, match=r"at least 10 of each class.*got 9 with artifacts and 991 clean"):
        fit_scale_bias(logits, few, log_snr, RANGE)
    with pytest.raises(CalibrationError, match="logits must rise with the labels"):
        fit_scale_bias(-logits, labels, log_snr, RANGE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.array([0.0, np.nan])}, "logits must hold finite numbers"),
        ({"labels": np.array([0.0, 2.0])}, r"labels must be in \[0, 1\]"),
        ({"log_snr": np.array([0.0, np.nan])}, "log_snr must hold finite numbers"),
    ],
)
def test_bad_calibration_data_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    inputs = {"logits": np.zeros(2), "labels": np.array([0.0, 1.0]), "log_snr": np.zeros(2)} | change
    with pytest.raises(InputError, match=message):
        fit_scale_bias(**inputs, log_snr_range=RANGE)


def test_calibration_is_the_identity_until_set() -> None:
    logit = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(Calibration(RANGE)(logit, torch.zeros(11)), logit.sigmoid(), atol=0, rtol=0)


@given(st.floats(allow_nan=False, width=32), st.integers(1, 6))
def test_scale_and_bias_are_interpolated_between_centres(log_snr: float, num_bands: int) -> None:
    rng = np.random.default_rng(num_bands)
    scale, bias = rng.uniform(0.5, 2, num_bands), rng.normal(0, 1, num_bands)
    calibration = Calibration(RANGE, num_bands)
    calibration.set(scale, bias)
    centres = [-6 + 14 * (k + 0.5) / num_bands for k in range(num_bands)]
    s, b = (reference.interpolated(log_snr, centres, v.tolist()) for v in (scale, bias))
    prob = calibration(torch.tensor([1.5]), torch.tensor([log_snr])).item()
    assert prob == pytest.approx(1 / (1 + math.exp(-(1.5 * s + b))), abs=1e-5)  # float32 positions among the bands


def test_a_nan_stays_in_its_row() -> None:
    nan = torch.nan
    prob = Calibration(RANGE)(torch.tensor([0.0, nan, 0.0]), torch.tensor([nan, 0.0, 0.0]))
    assert prob.isnan().tolist() == [True, True, False]


def test_calibration_survives_its_state_dict_and_works_on_whole_trajectories() -> None:
    calibration, loaded = Calibration(RANGE), Calibration(RANGE)
    calibration.set(np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8))
    loaded.load_state_dict(calibration.state_dict())
    logit, log_snr = torch.randn(3, 5), torch.linspace(-7, 9, 15).reshape(3, 5)
    torch.testing.assert_close(loaded(logit, log_snr), calibration(logit, log_snr), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("scale", "bias"),
    [
        (np.array([1.0, np.nan]), np.zeros(2)),
        (np.array([1.0, 0.0]), np.zeros(2)),
        (np.array([1.0, -1.0]), np.zeros(2)),
    ],
)
def test_a_scale_or_bias_that_cannot_be_is_refused(scale: np.ndarray, bias: np.ndarray) -> None:
    with pytest.raises(InputError):
        Calibration(RANGE, num_bands=2).set(scale, bias)


# --- how well calibrated ---------------------------------------------------------------------------------------------

samples = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=50)


@given(samples, st.integers(1, 20))
def test_calibration_error_agrees_with_the_loop(sample: list[tuple[float, float]], bins: int) -> None:
    prob, label = map(list, zip(*sample, strict=True))
    ours = expected_calibration_error(np.array(prob), np.array(label), bins)
    assert ours == pytest.approx(reference.calibration_error(prob, label, bins), abs=1e-12)


@given(samples)
def test_brier_score_agrees_with_the_loop(sample: list[tuple[float, float]]) -> None:
    prob, label = map(list, zip(*sample, strict=True))
    expected = sum((p - y) ** 2 for p, y in sample) / len(sample)
    assert brier_score(np.array(prob), np.array(label)) == pytest.approx(expected, abs=1e-12)


def test_a_perfect_forecast_has_no_error_and_a_probability_of_one_has_a_bin() -> None:
    sure = np.array([0.0, 1.0, 1.0])
    assert expected_calibration_error(sure, sure) == brier_score(sure, sure) == 0


@pytest.mark.parametrize("measure", [brier_score, expected_calibration_error])
def test_what_is_no_probability_is_refused(measure: type) -> None:
    for bad in ([0.5, np.nan], [0.5, 1.1]):
        with pytest.raises(InputError):
            measure(np.array(bad), np.array([0.0, 1.0]))


@given(samples)
def test_the_monotone_map_rises_and_is_never_sure(sample: list[tuple[float, float]]) -> None:
    statistic, labels = map(np.array, zip(*sample, strict=True))
    prob = fit_monotone(statistic, labels)(np.linspace(0, 1, 33))
    assert (np.diff(prob) >= 0).all()
    assert (prob > 0).all() and (prob < 1).all()


def test_the_monotone_map_repairs_a_statistic_that_is_no_probability() -> None:
    rng = np.random.default_rng(0)
    prob = rng.random(20_000)
    labels = (rng.random(20_000) < prob).astype(float)
    statistic = 0.1 * prob**2  # as cumulative_artifact_prob is for images that are decided late
    fitted = fit_monotone(statistic[:10_000], labels[:10_000])
    assert expected_calibration_error(statistic[10_000:], labels[10_000:]) > 0.4
    assert expected_calibration_error(fitted(statistic[10_000:]), labels[10_000:]) < 0.03


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_scale_bias(np.zeros(2), np.zeros(2), np.zeros(3), RANGE), "equally long, got 2, 2, 3"),
        (lambda: Calibration(RANGE, num_bands=2).set(np.ones(3), np.zeros(2)), "scale must be 2 finite numbers"),
        (lambda: brier_score(np.zeros(1), np.zeros(2)), "prob and label must be equally long, got 1 and 2"),
        (lambda: expected_calibration_error(np.zeros(0), np.zeros(0)), r"prob must be .* at least one number"),
        (lambda: fit_monotone(np.zeros(2), np.zeros(3)), "statistic and labels must be equally long, got 2 and 3"),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
