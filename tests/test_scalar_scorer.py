"""A function of one's own as a scorer: recorded, calibrated, saved, and watched live by the guard."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_artifacts.accumulator import accumulate
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.errors import CheckpointError, ConfigError, InputError, LatentSpaceError
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.space import latent_space_of
from moe_artifacts.noise import progress
from moe_artifacts.preview import LinearPreview
from moe_artifacts.recorded import ScoredRuns
from moe_artifacts.scalar.exit import ScalarExit
from moe_artifacts.scalar.posterior import ScalarPosterior
from moe_artifacts.scalar.scorer import ScalarScorer

STEPS, PROMPTS = 4, ["a shoe", "a shoe", "a bag", "a bag"]
LOG_SNR = np.array([-3.0, -1.0, 1.0, 3.0], dtype=np.float32)
CALLS, TOTAL_CALLS = np.array([2, 4, 6, 8]), 10


def brightness(previews, prompts):
    return previews.mean(dim=(1, 2, 3))


def scorer(fn=brightness, **options):
    torch.manual_seed(1)
    space = tiny.scorer_config().latent_space
    return ScalarScorer(fn, preview=LinearPreview(4), latent_space=space, **options)


def runs(images=400, seed=0):
    """Scores of about the brightness of a random preview, which say more and more."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(images // 4), 4)
    final = 0.5 + 0.02 * rng.normal(size=images // 4)[prompt] + 0.02 * rng.normal(size=images)
    scores = final[:, None] + rng.normal(size=(images, STEPS)) * np.array([0.04, 0.03, 0.02, 0.01])
    return ScoredRuns(
        scores=scores,
        final=final,
        label=(final < 0.48).astype(float),
        prompt=prompt,
        calls=CALLS,
        total_calls=TOTAL_CALLS,
    )


def calibration(rule="posterior", threshold=0.5, exits=False, siblings=False, log_snr=LOG_SNR, **options):
    """What ``moe_artifacts.calibrate`` hands over."""
    found = runs()
    torch.manual_seed(2)
    return types.SimpleNamespace(
        records=types.SimpleNamespace(runs=found, log_snr=log_snr),
        fitted=types.SimpleNamespace(
            posterior=ScalarPosterior.fit(found, siblings=found.prompt if siblings else None),
            exit_head=ScalarExit().eval() if exits else None,
        ),
        rule=ThresholdConfig(rule=rule, threshold=threshold, **options),
    )


def latents(seed, rows=4):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_new_scorer_only_records():
    pipe = tiny.stable_diffusion()
    arguments = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "pt"}
    unwatched = pipe(PROMPTS, generator=tiny.generators(4), **arguments).images
    out = ArtifactGuard(scorer(), on_abort="record")(pipe, PROMPTS, generator=tiny.generators(4), **arguments)
    assert torch.equal(out.images, unwatched)
    assert list(out.trajectory.scores) == ["score"]
    assert out.trajectory.step == [0, 1, 2, 3, 4] and out.trajectory.scores["score"].isfinite().all()
    assert {verdict.status for verdict in out.verdicts} == {"kept"}
    assert out.report().startswith("4 images: 4 kept; 0 of 20")
    with pytest.raises(ConfigError, match="on_abort='drop' needs a threshold and the scorer 'my-score' has none"):
        ArtifactGuard(scorer())
    with pytest.raises(ConfigError, match="cannot decide by the cumulative rule, only by: none, it is not calibrated"):
        ArtifactGuard(scorer(), threshold=0.3)


def test_the_function_sees_previews_and_prompts_of_the_living():
    seen = []

    def fn(previews, prompts):
        seen.append((tuple(previews.shape), previews.min() >= 0 and previews.max() <= 1, list(prompts)))
        return previews.mean(dim=(1, 2, 3)).tolist()

    session = scorer(fn).session(4, ["a", "b", "c", "d"])
    x0 = latents(0)
    x0[2, 0, 0, 0] = torch.nan
    found = session.step(x0=x0, log_snr=-3.0)
    assert found.finite.tolist() == [True, True, False, True] and found.score.isnan().tolist() == [
        False,
        False,
        True,
        False,
    ]
    session.keep(torch.tensor([0, 3]))
    session.step(x0=latents(1, rows=2), log_snr=-1.0)
    assert seen == [((3, 3, 8, 8), True, ["a", "b", "d"]), ((2, 3, 8, 8), True, ["a", "d"])]


@settings(max_examples=15)
@given(siblings=st.booleans(), exits=st.booleans(), skipped=st.sets(st.integers(0, STEPS - 1), max_size=2))
def test_session_equals_the_whole_trajectory(siblings, exits, skipped):
    found = calibration(exits=exits, siblings=siblings)
    live = scorer(siblings=siblings).calibrated(found)
    session = live.session(4, PROMPTS)
    columns = [k for k in range(STEPS) if k not in skipped]
    steps = [session.step(x0=latents(k), log_snr=float(LOG_SNR[k]) + 0.2) for k in columns]  # a little past each level

    scores = np.full((4, STEPS), np.nan)
    scores[:, columns] = torch.stack([live.score_previews(latents(k), PROMPTS) for k in columns], dim=1)
    group = np.array([0, 0, 1, 1]) if siblings else None
    prob = torch.from_numpy(found.fitted.posterior.prob(scores, group)[:, columns]).float()
    np.testing.assert_allclose(torch.stack([s.artifact_prob for s in steps], dim=1), prob, atol=1e-6)  # float32
    mass = torch.zeros_like(prob)
    if exits:
        mass = torch.from_numpy(found.fitted.exit_head.mass(prob.numpy(), CALLS[columns] / TOTAL_CALLS))
    expected = accumulate(prob, mass)
    for name in ("exit_prob", "exit_cdf", "cumulative_artifact_prob", "cumulative_clean_prob"):
        np.testing.assert_allclose(
            torch.stack([getattr(s, name) for s in steps], dim=1), getattr(expected, name), atol=1e-5
        )


def test_a_stopped_sibling_is_known_as_far_as_it_was_seen():
    found = calibration(siblings=True)
    live = scorer(siblings=True).calibrated(found)
    session = live.session(3, ["a", "a", "b"])
    session.step(x0=latents(0, 3), log_snr=-3.0)
    session.keep(torch.tensor([2, 1]))  # in another order, too
    x0 = latents(1, 2)
    after = session.step(x0=x0, log_snr=-1.0).artifact_prob
    scores = np.full((3, STEPS), np.nan)
    scores[:, 0] = live.score_previews(latents(0, 3), ["a", "a", "b"])
    scores[[2, 1], 1] = live.score_previews(x0, ["b", "a"])
    expected = found.fitted.posterior.prob_now(scores, np.array([0, 0, 1]))[[2, 1]]
    np.testing.assert_allclose(after, expected, atol=1e-6)
    scores[0] = np.nan
    assert abs(found.fitted.posterior.prob_now(scores, np.array([0, 0, 1]))[1] - after[1]) > 1e-4


def test_rows_that_are_kept_go_on_as_if_nothing_had_happened():
    live = scorer().calibrated(calibration(exits=True))
    session, undisturbed = live.session(4, PROMPTS), live.session(4, PROMPTS)
    rows = torch.tensor([3, 1])
    for k in range(STEPS):
        expected = undisturbed.step(x0=latents(k), log_snr=float(LOG_SNR[k]))
        found = session.step(x0=latents(k) if k < 2 else latents(k)[rows], log_snr=float(LOG_SNR[k]))
        if k == 1:
            session.keep(rows)
        for name in ("artifact_prob", "exit_prob", "cumulative_artifact_prob"):
            values = getattr(expected, name)
            torch.testing.assert_close(getattr(found, name), values if k < 2 else values[rows])


def test_a_bad_row_is_an_error_while_recording_too():
    start = latents(0)
    start[1, 0, 0, 0] = torch.nan
    guard = ArtifactGuard(scorer(), on_abort="record")
    with np.errstate(invalid="ignore"):
        out = guard(tiny.stable_diffusion(), PROMPTS, latents=start, num_inference_steps=3, output_type="latent")
    assert [verdict.status for verdict in out.verdicts] == ["kept", "error", "kept", "kept"]
    assert out.trajectory.scores["score"].isnan().any(dim=1).tolist() == [False, True, False, False]


def test_a_bad_row_stays_bad_and_alone():
    live = scorer().calibrated(calibration(exits=True))
    session, clean = live.session(4, PROMPTS), live.session(4, PROMPTS)
    for k in range(STEPS):
        x0, undisturbed = latents(k), latents(k)
        if k == 1:
            x0[0] = torch.inf
        found, expected = (s.step(x0=x, log_snr=float(LOG_SNR[k])) for s, x in ((session, x0), (clean, undisturbed)))
        for name in ("artifact_prob", "exit_cdf", "cumulative_artifact_prob"):
            values = getattr(found, name)
            assert values[0].isnan() == (k >= 1)
            torch.testing.assert_close(values[1:], getattr(expected, name)[1:])
    assert not found.finite[0]


def test_steps_between_the_fitted_levels_add_no_exit_mass():
    live = scorer().calibrated(calibration(exits=True))
    session = live.session(4, PROMPTS)
    first = session.step(x0=latents(0), log_snr=-3.0)
    again = session.step(x0=latents(1), log_snr=-2.0)  # still the first of the fitted levels
    assert not torch.equal(again.artifact_prob, first.artifact_prob)
    assert (again.exit_prob == 0).all() and torch.equal(again.exit_cdf, first.exit_cdf)


def test_a_calibrated_scorer_stops_images_in_a_pipeline():
    pipe = tiny.stable_diffusion()
    arguments = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "pt"}
    recorder = scorer()
    record = ArtifactGuard(recorder, on_abort="record")(pipe, PROMPTS, generator=tiny.generators(4), **arguments)
    log_snr = record.trajectory.log_snr[[0, 1, 3, 4]].numpy()
    found = calibration(log_snr=log_snr)
    scores = record.trajectory.scores["score"][:, [0, 1, 3, 4]].numpy()
    prob = found.fitted.posterior.prob(scores).astype(np.float32)
    found.rule = dataclasses.replace(found.rule, threshold=float(np.sort(prob.max(axis=1))[2]))  # two images reach it
    out = ArtifactGuard(recorder.calibrated(found))(pipe, PROMPTS, generator=tiny.generators(4), **arguments)
    assert out.trajectory.step == [0, 1, 3, 4]  # the fitted steps, and not the last
    bad = prob.max(axis=1) >= found.rule.threshold
    assert [verdict.status for verdict in out.verdicts] == ["aborted" if b else "kept" for b in bad]
    column = (np.maximum.accumulate(prob, axis=1) < found.rule.threshold).sum(axis=1)
    assert [v.step for v in out.verdicts] == [[0, 1, 3, 4][c] if b else None for b, c in zip(bad, column, strict=True)]
    np.testing.assert_allclose(out.trajectory.scores["artifact_prob"][~bad], prob[~bad], atol=1e-5)  # float32 batches


def test_rules_need_what_they_decide_by():
    with pytest.raises(
        ConfigError, match="the q-exit rule needs an exit distribution, which the scorer 'my-score' lacks"
    ):
        scorer().calibrated(calibration(rule="q-exit", q=0.5))
    live = scorer().calibrated(calibration())
    with pytest.raises(
        ConfigError, match="cannot decide by the cumulative rule, only by: posterior, patience, economic"
    ):
        ArtifactGuard(live, threshold=ThresholdConfig(rule="cumulative", threshold=0.3))
    assert ArtifactGuard(live, threshold=0.7).rule == ThresholdConfig(rule="posterior", threshold=0.7)
    scorer().calibrated(calibration(rule="q-exit", q=0.5, exits=True))


def test_an_economic_boundary_lies_at_the_steps_it_was_fitted_for():
    share = (CALLS / TOTAL_CALLS).tolist()
    points = tuple((u, a, 0.0) for u, a in zip(share[:3], (0.9, 0.6, 0.4), strict=True))
    live = scorer().calibrated(calibration(rule="economic", boundary=points))
    at = [progress(float(level), live.config.log_snr_range) for level in LOG_SNR[:3]]
    assert live.config.threshold.boundary == tuple((u, a, c) for u, (_, a, c) in zip(at, points, strict=True))


def test_an_economic_boundary_decides_live():
    share = (CALLS / TOTAL_CALLS).tolist()
    late = tuple(
        (u, abort, 0.0) for u, abort in zip(share[:3], (2.0, 2.0, 0.0), strict=True)
    )  # at the third check, all
    live = scorer().calibrated(calibration(rule="economic", boundary=late))
    out = ArtifactGuard(live)(tiny.stable_diffusion(), PROMPTS, num_inference_steps=12, output_type="latent")
    assert {verdict.status for verdict in out.verdicts} == {"aborted"}
    assert {verdict.step for verdict in out.verdicts} == {out.trajectory.step[2]}


def test_sign_is_turned_where_lower_is_better():
    x0 = latents(0)
    up, down = scorer().score_previews(x0, PROMPTS), scorer(higher_is_better=False).score_previews(x0, PROMPTS)
    assert torch.equal(up, -down)


@pytest.mark.parametrize("exits", [False, True])
def test_files_bring_it_back_bit_by_bit(tmp_path, exits):
    live = scorer(siblings=True).calibrated(calibration(exits=exits, siblings=True))
    live.save_pretrained(tmp_path / "s")
    again = ScalarScorer.from_pretrained(tmp_path / "s", brightness, preview=live.preview)
    assert again.config == live.config
    sessions = [s.session(4, PROMPTS) for s in (live, again)]
    for k in range(STEPS):
        one, two = (s.step(x0=latents(k), log_snr=float(LOG_SNR[k])) for s in sessions)
        assert torch.equal(one.artifact_prob, two.artifact_prob)
        assert torch.equal(one.cumulative_artifact_prob, two.cumulative_artifact_prob)


def test_a_new_scorer_is_saved_and_loaded_too(tmp_path):
    scorer(name="mine", higher_is_better=False).save_pretrained(tmp_path)
    again = ScalarScorer.from_pretrained(tmp_path, brightness, preview=LinearPreview(4))
    assert again.config.name == "mine" and not again.config.higher_is_better and again.posterior is None


def test_damaged_files_are_refused(tmp_path):
    live = scorer().calibrated(calibration())
    live.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def load(**changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return ScalarScorer.from_pretrained(tmp_path, brightness, preview=live.preview)

    with pytest.raises(ConfigError, match="unknown keys"):
        load(experts=3)
    short = {"log_snr": [-3.0, -1.0], "share": [0.2, 0.4], "has_exit": False}
    with pytest.raises(CheckpointError, match="a posterior of 2 steps"):
        load(fitted=short)
    with pytest.raises(ConfigError, match="log_snr must be finite numbers that rise"):
        load(fitted=short | {"log_snr": [1.0, -1.0]})
    with pytest.raises(CheckpointError, match="lacks"):
        load(fitted=config["fitted"] | {"has_exit": True})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load()


def test_bad_input_is_refused():
    live = scorer()
    with pytest.raises(InputError, match="prompts must be one per image, 4, got none"):
        live.session(4)
    session = live.session(4, PROMPTS)
    with pytest.raises(InputError, match="x0 must have 4 rows, the living images, got 3; call keep after a drop"):
        session.step(x0=latents(0, 3), log_snr=0.0)
    with pytest.raises(LatentSpaceError, match=r"needs latents \(batch, 4, height, width\), got \(4, 16, 8, 8\)"):
        session.step(x0=torch.zeros(4, 16, 8, 8), log_snr=0.0)
    for fn, message in ((lambda p, t: 0.5, r"got shape \(\)"), (lambda p, t: [np.inf] * len(p), "with infinity")):
        with pytest.raises(InputError, match=message):
            scorer(fn).session(4, PROMPTS).step(x0=latents(0), log_snr=0.0)
    found = calibration()
    found.fitted.posterior = None
    with pytest.raises(InputError, match="record plain scores"):
        live.calibrated(found)
    with pytest.raises(InputError, match="do not say the noise levels"):
        live.calibrated(calibration(log_snr=None))


def test_latent_space_is_that_of_the_pipeline():
    assert latent_space_of(tiny.stable_diffusion(), "tiny") == tiny.scorer_config().latent_space
