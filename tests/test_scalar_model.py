"""Scores as a Gaussian in two levels: against brute-force conditioning on the joint of all images of a prompt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from moe_artifacts.errors import CalibrationError, InputError
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.model import ScoreModel
from moe_artifacts.scalar.normal import LIMIT, NormalScores
from moe_artifacts.scalar.variance import variance_components

STEPS = 3


def covariance(rng, size, rank=None):
    root = rng.normal(size=(size, rank or size))
    return root @ root.T


def simulated(rng, between, within, prompts, images):
    """Columns and prompts of every image, from the model itself."""
    size = len(within)
    level = rng.multivariate_normal(np.zeros(size), between, size=prompts)
    prompt = np.repeat(np.arange(prompts), images)
    return level[prompt] + rng.multivariate_normal(np.zeros(size), within, size=len(prompt)), prompt


def runs(columns, prompt):
    steps = columns.shape[1] - 1
    return ScoredRuns(
        scores=columns[:, :-1],
        final=columns[:, -1],
        label=np.zeros(len(columns)),
        prompt=prompt,
        calls=np.arange(1, steps + 1),
        total_calls=steps,
    )


def fitted(seed=0, prompts=30, images=6):
    rng = np.random.default_rng(seed)
    columns, prompt = simulated(rng, covariance(rng, STEPS + 1), covariance(rng, STEPS + 1), prompts, images)
    return ScoreModel.fit(runs(columns, prompt)), columns, prompt


def brute_force(model, normal, i):
    """Mean and covariance of (final score, its part within the prompt) of image i, given all that is seen of the group.

    The joint Gaussian of everything: for each image its scores and final score, and the level of the prompt.
    """
    size, images = STEPS + 1, len(normal)
    joint = np.kron(np.ones((images, images)), model.between) + np.kron(np.eye(images), model.within)
    to_level = np.tile(model.between, (images, 1))  # covariance of every entry with the prompt's level b
    joint = np.block([[joint, to_level], [to_level.T, model.between]])
    mean = np.concatenate([np.tile(model.mean, images), np.zeros(size)])
    values = np.concatenate([np.append(row, np.nan) for row in normal] + [np.full(size, np.nan)])
    seen = np.flatnonzero(~np.isnan(values))
    final, level = i * size + STEPS, images * size + STEPS
    pick = np.zeros((2, len(mean)))
    pick[0, final], pick[1, final], pick[1, level] = 1, 1, -1
    known = joint[np.ix_(seen, seen)]
    gain = np.linalg.solve(known, joint[seen]).T if len(seen) else np.zeros((len(mean), 0))
    expected = mean + gain @ (values - mean)[seen]
    left = joint - gain @ joint[seen]
    offset = np.array([0.0, model.mean[STEPS]])  # the part within the prompt has mean 0
    return pick @ expected - offset, pick @ left @ pick.T


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 5), st.data())
def test_conditional_is_that_of_the_full_joint(seed, images, data):
    model, columns, _ = fitted()
    rng = np.random.default_rng(seed)
    scores = columns[rng.integers(len(columns), size=images), :-1] + 0.1 * rng.normal(size=(images, STEPS))
    unseen = data.draw(
        st.lists(st.lists(st.booleans(), min_size=STEPS, max_size=STEPS), min_size=images, max_size=images)
    )
    scores[np.array(unseen)] = np.nan
    known = model.predict_now(scores, np.zeros(images, dtype=int))
    for i in range(images):
        expected, left = brute_force(model, model.marginals(scores), i)
        # Both solve systems of condition 1e4 at most, see SMALLEST_SHARE.
        np.testing.assert_allclose([known.mean[i], known.within_mean[i]], expected, atol=1e-8)
        found = [[known.std[i] ** 2, known.covariance[i]], [known.covariance[i], known.within_std[i] ** 2]]
        np.testing.assert_allclose(found, left, atol=1e-8)


def test_steps_are_seen_one_after_the_other():
    model, columns, prompt = fitted()
    scores = columns[:12, :-1].copy()
    scores[3, 1] = np.nan
    over_time = model.predict(scores, prompt[:12])
    for step in range(STEPS):
        later = scores.copy()
        later[:, step + 1 :] = np.nan
        now = model.predict_now(later, prompt[:12])
        np.testing.assert_allclose(over_time.mean[:, step], now.mean, rtol=1e-12)
        np.testing.assert_allclose(over_time.within_std[:, step], now.within_std, rtol=1e-12)
    np.testing.assert_array_equal(
        over_time.mean[3, 1] != over_time.mean[3, 0], False if prompt[3] != prompt[0] else True
    )


def test_an_image_alone_is_a_batch_of_one_and_strangers_do_not_matter():
    model, columns, _ = fitted()
    scores = columns[:8, :-1]
    alone = model.predict(scores)
    np.testing.assert_allclose(model.predict(scores, np.arange(8)[::-1]).mean, alone.mean, rtol=1e-12)
    np.testing.assert_allclose(model.predict(scores[:1]).std, alone.std[:1], rtol=1e-12)
    together = model.predict(scores, np.zeros(8, dtype=int))
    assert (together.within_std < alone.within_std).all()  # siblings can only tell more
    # Order of the rows, and the names of the groups, mean nothing.
    order = np.random.default_rng(0).permutation(8)
    group = np.array([5, 5, 5, 9, 9, -1, -1, -1])
    np.testing.assert_allclose(
        model.predict(scores[order], group[order]).within_mean,
        model.predict(scores, group).within_mean[order],
        atol=1e-12,
    )


def test_siblings_seen_less_far_are_used_as_far_as_they_were_seen():
    model, columns, prompt = fitted()
    scores = columns[prompt == 4][:3, :-1].copy()
    stopped = scores.copy()
    stopped[1:, 1:] = np.nan  # two siblings were aborted after the first step
    group = np.zeros(3, dtype=int)
    full, some, none = (
        model.predict_now(s, g).within_std[0] for s, g in ((scores, group), (stopped, group), (scores, np.arange(3)))
    )
    assert full < some < none


def test_scale_of_the_scores_does_not_matter():
    _, columns, prompt = fitted()
    moved = np.column_stack([np.exp(columns[:, 0] / 3), 5 - 0.01 * np.exp(-columns[:, 1] / 3), 1e3 * columns[:, 2:]])
    other = ScoreModel.fit(runs(moved, prompt))
    one = ScoreModel.fit(runs(columns, prompt))
    # Between knots a linear piece is not quite the same on another scale.
    np.testing.assert_allclose(other.predict(moved[:, :-1]).mean, one.predict(columns[:, :-1]).mean, atol=0.1)


def test_final_scores_come_back_on_their_own_scale():
    model, columns, _ = fitted()
    normal = model.marginals.of_column(STEPS, columns[:, -1])
    np.testing.assert_allclose(model.final_score(normal), columns[:, -1], atol=1e-9)


@example([0.0, 0.0, 2.2e-309])
@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=60))
def test_map_to_normal_scores_rises_and_stays_finite(values):
    column = np.array(values)
    try:
        maps = NormalScores.fit(column[:, None])
    except CalibrationError:  # all but equal
        assume(False)
    grid = np.sort(np.concatenate([column, np.linspace(-2e6, 2e6, 50)]))
    normal = maps.of_column(0, grid)
    assert (np.diff(normal) >= -1e-9).all() and (np.abs(normal) <= LIMIT).all()


def test_normal_scores_are_normal_and_ties_share_theirs():
    column = np.random.default_rng(0).gamma(2, size=5_000)
    normal = NormalScores.fit(column[:, None])(column[:, None])[:, 0]
    for share in (0.1, 0.5, 0.9):
        assert np.quantile(normal, share) == pytest.approx(ndtri(share), abs=0.03)  # between knots 3 % apart
    binary = np.repeat([0.0, 1.0], [80, 20])
    low, high = NormalScores.fit(binary[:, None])(np.array([[0.0], [1.0]]))[:, 0]
    assert low < 0 < high and 0.8 * low + 0.2 * high == pytest.approx(0, abs=0.05)


def test_moments_are_unbiased_with_scores_missing():
    rng = np.random.default_rng(1)
    between, within = covariance(rng, 4), covariance(rng, 4)
    columns, prompt = simulated(rng, between, within, 2_000, 4)
    columns[rng.random(columns.shape) < 0.3] = np.nan
    columns[prompt < 50, 2] = np.nan  # and whole prompts of one column
    _, b, w = variance_components(columns, prompt)
    # 2,000 prompts: standard errors of 3 % of the variances; shrinkage is below 1 %.
    scale = np.sqrt(np.outer(np.diag(between + within), np.diag(between + within)))
    np.testing.assert_allclose(b / scale, between / scale, atol=0.1)
    np.testing.assert_allclose(w / scale, within / scale, atol=0.05)


def test_complete_scores_give_the_analysis_of_variance():
    rng = np.random.default_rng(2)
    columns, prompt = simulated(rng, covariance(rng, 2), covariance(rng, 2), 500, 3)
    mean, between, within = variance_components(columns, prompt)
    means = columns.reshape(500, 3, 2).mean(axis=1)
    own = (columns - means[prompt]).T @ (columns - means[prompt]) / (1_500 - 500)
    shared = np.cov(means.T) - own / 3
    np.testing.assert_allclose(mean, columns.mean(axis=0), rtol=1e-12)
    # What is left is the pull towards the total: weights 2/1,002 and 2/501.
    np.testing.assert_allclose(within, own, atol=0.01 * np.abs(shared + own).max())
    np.testing.assert_allclose(between, shared, atol=0.01 * np.abs(shared + own).max())


def test_one_image_a_prompt_or_one_prompt_leaves_nothing_to_share():
    rng = np.random.default_rng(3)
    columns = rng.multivariate_normal(np.zeros(4), covariance(rng, 4), size=200)
    for prompt in (np.arange(200), np.zeros(200, dtype=int)):
        model = ScoreModel.fit(runs(columns, prompt))
        assert (model.between == 0).all()
        alone = model.predict(columns[:5, :-1])
        np.testing.assert_allclose(model.predict(columns[:5, :-1], np.zeros(5, dtype=int)).mean, alone.mean, atol=1e-12)
        assert np.isfinite(alone.std).all()


def test_before_any_score_the_population_is_all_that_is_known():
    model, _, _ = fitted()
    known = model.predict(np.full((2, STEPS), np.nan))
    np.testing.assert_allclose(known.mean, model.mean[STEPS])
    np.testing.assert_allclose(known.std**2, model.between[STEPS, STEPS] + model.within[STEPS, STEPS])


def test_bad_input_is_refused():
    model, columns, prompt = fitted()
    with pytest.raises(InputError, match=r"scores must be \[image, 3 steps\] as fitted, got shape \(2, 4\)"):
        model.predict(np.zeros((2, 4)))
    with pytest.raises(InputError, match="1 are infinite"):
        model.predict(np.array([[0, np.inf, 0]]))
    with pytest.raises(InputError, match=r"siblings must be 2 group ids, one per image, got shape \(3,\)"):
        model.predict(np.zeros((2, 3)), np.zeros(3, dtype=int))
    constant = columns.copy()
    constant[:, 1] = 7
    with pytest.raises(CalibrationError, match="column 1 of the scores is 7 in nearly all images"):
        ScoreModel.fit(runs(constant, prompt))
    apart = columns.copy()
    apart[::2, 0], apart[1::2, 2] = np.nan, np.nan
    with pytest.raises(CalibrationError, match="columns 0 and 2 of the scores were both seen in 0 images"):
        ScoreModel.fit(runs(apart, prompt))
