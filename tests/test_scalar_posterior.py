"""P(bad | scores so far): calibrated on prompts it has not seen, for any kind of label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from moe_artifacts.errors import CalibrationError, CheckpointError
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.posterior import PROBIT, ScalarPosterior, _logistic

STEPS = 5


def simulated(prompts, images, label, seed=0):
    """Final score = level of the prompt + the image's own; scores = final + noise that shrinks; "bad" by either."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), images)
    own = rng.normal(size=len(prompt))
    final = rng.normal(size=prompts)[prompt] + own
    noise = rng.normal(size=(len(prompt), STEPS)) * np.linspace(2, 0.3, STEPS)
    scores = final[:, None] + noise
    bad = (final < -1) if label == "pooled" else (own < -0.8)
    return ScoredRuns(
        scores=scores,
        final=final,
        label=bad.astype(float),
        prompt=prompt,
        calls=np.arange(2, 2 * STEPS + 2, 2),
        total_calls=2 * STEPS,
    )


@pytest.mark.parametrize("label", ["pooled", "within"])
@pytest.mark.parametrize("with_final", [True, False])
def test_calibrated_and_no_worse_than_logistic_regression_on_all_scores(label, with_final):
    fit, test = simulated(500, 4, label), simulated(1_000, 4, label, seed=1)
    posterior = ScalarPosterior.fit(fit if with_final else replace(fit, final=None))
    prob = posterior.prob(test.scores)
    for step in range(STEPS):
        p = prob[:, step]
        plain = LogisticRegression().fit(fit.scores[:, : step + 1], fit.bad)
        reference = plain.predict_proba(test.scores[:, : step + 1])[:, 1]
        # In nats; that of the labels alone is 0.5. Without final scores the last score stands for them, noise and all.
        assert log_loss(test.bad, p) < log_loss(test.bad, reference) + (0.005 if with_final else 0.015)
        assert roc_auc_score(test.bad, p) > roc_auc_score(test.bad, reference) - 0.005
        for low, high in ((0, 0.2), (0.2, 0.5), (0.5, 1)):
            rows = (p >= low) & (p < high)
            if rows.sum() > 300:
                assert p[rows].mean() == pytest.approx(
                    test.label[rows].mean(), abs=0.05
                )  # two or three standard errors


def test_siblings_find_what_is_bad_within_a_prompt():
    fit, test = simulated(80, 8, "within"), simulated(200, 8, "within", seed=1)
    alone = ScalarPosterior.fit(fit).prob(test.scores)[:, -1]
    together = ScalarPosterior.fit(fit, siblings=fit.prompt).prob(test.scores, test.prompt)[:, -1]
    assert roc_auc_score(test.bad, together) > roc_auc_score(test.bad, alone) + 0.05


def test_the_label_says_whether_the_prompt_matters():
    _, on_final, on_within = ScalarPosterior.fit(simulated(80, 20, "pooled")).label_weights
    assert on_final < -3 and abs(on_within) < 0.5
    _, on_final, on_within = ScalarPosterior.fit(simulated(80, 20, "within")).label_weights
    assert on_within < -3 and abs(on_final) < 0.5


def test_probability_is_the_mean_over_what_the_image_may_become():
    runs = simulated(60, 10, "pooled")
    fitted = ScalarPosterior.fit(runs)
    weights = np.array([-1.0, -2.0, 1.5])  # of the final score and of its part within the prompt, against each other
    plain = replace(fitted, label_weights=weights, scale=np.ones(STEPS), bias=np.zeros(STEPS))
    known = fitted.model.predict_now(runs.scores[:5], np.array([0, 0, 0, 1, 1]))
    found = plain.prob_now(runs.scores[:5], np.array([0, 0, 0, 1, 1]))
    rng = np.random.default_rng(0)
    for i in range(5):
        cov = [[known.std[i] ** 2, known.covariance[i]], [known.covariance[i], known.within_std[i] ** 2]]
        draws = rng.multivariate_normal([known.mean[i], known.within_mean[i]], cov, size=100_000)
        expected = expit(weights[0] + draws @ weights[1:]).mean()
        assert found[i] == pytest.approx(expected, abs=0.015)  # sigmoid(x) is Phi(x / 1.7) to 0.01


def test_a_missing_score_leaves_the_posterior_as_it_was():
    runs = simulated(80, 10, "pooled")
    posterior = ScalarPosterior.fit(runs)
    scores = runs.scores[:50].copy()
    whole = posterior.prob(scores)
    scores[:, 2] = np.nan
    prob = posterior.prob(scores)
    np.testing.assert_array_equal(prob[:, :2], whole[:, :2])
    np.testing.assert_allclose(prob[:, 2], prob[:, 1], rtol=1e-9)
    assert (np.abs(prob[:, 4] - whole[:, 4]) < 0.2).all()  # one of five scores less
    # Nothing seen at all: what is known of every image.
    nothing = posterior.prob(np.full((1, STEPS), np.nan))
    assert nothing == pytest.approx(np.full((1, STEPS), runs.label.mean()), abs=0.06)


def test_now_is_the_last_column():
    runs = simulated(40, 6, "within")
    posterior = ScalarPosterior.fit(runs, siblings=runs.prompt)
    prob = posterior.prob(runs.scores, runs.prompt)
    for step in range(STEPS):
        seen = runs.scores.copy()
        seen[:, step + 1 :] = np.nan
        np.testing.assert_allclose(posterior.prob_now(seen, runs.prompt), prob[:, step], rtol=1e-9)


def test_soft_labels_count_as_shares():
    runs = simulated(100, 10, "pooled")
    soft = replace(runs, label=expit(-1.5 * (runs.final + 1)))
    prob = ScalarPosterior.fit(soft).prob(runs.scores)[:, -1]
    assert prob.mean() == pytest.approx(soft.label.mean(), abs=0.01)
    assert np.abs(prob - soft.label).mean() < 0.08  # the last score is off by 0.3, and the label's slope at most 0.375


def test_arrays_bring_it_back():
    runs = simulated(40, 6, "pooled")
    posterior = ScalarPosterior.fit(runs)
    again = ScalarPosterior.from_arrays(posterior.arrays(), STEPS)
    np.testing.assert_array_equal(again.prob(runs.scores), posterior.prob(runs.scores))
    with pytest.raises(CheckpointError, match="a posterior of 4 steps"):
        ScalarPosterior.from_arrays(posterior.arrays(), 4)
    with pytest.raises(CheckpointError, match="'bias'"):
        ScalarPosterior.from_arrays({k: v for k, v in posterior.arrays().items() if k != "bias"}, STEPS)


def test_one_class_is_refused():
    runs = simulated(40, 6, "pooled")
    with pytest.raises(CalibrationError, match="at least 10 of each class to fit a posterior, got 0 bad and 240 clean"):
        ScalarPosterior.fit(replace(runs, label=np.zeros(len(runs))))


def test_logistic_regression_is_the_textbook_one():
    rng = np.random.default_rng(0)
    features = np.column_stack([np.ones(500), 5 * rng.normal(size=(500, 2))])
    label = (rng.random(500) < expit(features @ [0.5, 2, -1])).astype(float)
    pull = 1e-3
    found = _logistic(features, label, pull, at=np.zeros(3))
    gradient = features.T @ (expit(features @ found) - label) + pull * found
    np.testing.assert_allclose(gradient, 0, atol=1e-6)  # where the slope is 0, and it is convex
    separable = _logistic(features, (features[:, 1] > 0).astype(float), 1.0, at=np.zeros(3))
    assert np.isfinite(separable).all()


def test_probit_stands_in_for_the_logistic_function():
    from scipy.special import ndtr

    x = np.linspace(-10, 10, 1001)
    assert np.abs(ndtr(x / PROBIT) - expit(x)).max() < 0.011
