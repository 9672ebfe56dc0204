import dataclasses
import math

import pytest
import torch

from moe_artifacts import offline
from moe_artifacts.accumulator import accumulate
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.decision import decide
from moe_artifacts.errors import InputError
from moe_artifacts.noise import progress
from moe_artifacts.offline import score_folders, summarise
from moe_artifacts.trajectory import Trajectory, join_trajectories
from tests.scorers import EVERY_RULE, LOG_SNR_RANGE, tiny_config, tiny_scorer

SCORES = ("artifact_prob", "exit_prob", "exit_cdf", "cumulative_artifact_prob", "cumulative_clean_prob")


def recorded(seed=0, images=5, steps=(2, 5, 9), **changes):
    rng = torch.Generator().manual_seed(seed)
    fields = {
        "prompts": [f"image {i}" for i in range(images)],
        "seeds": [100 * seed + i for i in range(images)],
        "step": list(steps),
        "log_snr": torch.tensor(steps) / 1.5 - 3,
        "scores": {},
        "num_steps": 10,
        "x0": torch.randn(images, len(steps), 4, 8, 8, generator=rng).half(),
        "meta": {"guidance_scale": 1.5},
    }
    return Trajectory(**{**fields, **changes})


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two trajectory folders, read two images at a time."""
    monkeypatch.setattr(offline, "IMAGES_AT_ONCE", 2)
    for seed, name in enumerate(["a", "b"]):
        recorded(seed).save(tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def scorer():
    return tiny_scorer()


def test_scores_are_those_of_the_whole_trajectory(runs, scorer, tmp_path):
    summaries = list(score_folders(runs, scorer, tmp_path / "out"))
    assert [s.folder for s in summaries] == [tmp_path / "out" / "a", tmp_path / "out" / "b"]
    for seed, summary in enumerate(summaries):
        expected, found = scorer.score(recorded(seed)), Trajectory.load(summary.folder)
        assert (found.prompts, found.seeds, found.step) == (expected.prompts, expected.seeds, expected.step)
        assert found.x0 is None and found.meta["guidance_scale"] == 1.5
        for name in SCORES:
            torch.testing.assert_close(found.scores[name], expected.scores[name], atol=1e-6, rtol=0)  # batches of two
        assert summary.images == 5 and summary.errors == 0
        assert summary.artifact_prob == pytest.approx(expected.scores["artifact_prob"][:, -1].mean().item(), abs=1e-6)


def test_one_folder_is_scored_into_out_itself_and_may_keep_its_latents(runs, scorer, tmp_path):
    (summary,) = score_folders(runs / "a", scorer, tmp_path / "out", keep_latents=True)
    assert summary.folder == tmp_path / "out"
    torch.testing.assert_close(Trajectory.load(tmp_path / "out").x0, recorded(0).x0, atol=0, rtol=0)


def test_what_is_done_is_not_done_again(runs, scorer, tmp_path, monkeypatch):
    first = list(score_folders(runs, scorer, tmp_path / "out"))
    (tmp_path / "out" / "b" / "meta.json").unlink()  # as if killed while b was written
    before = (tmp_path / "out" / "a" / "trajectory.parquet").stat().st_mtime_ns
    again = list(score_folders(runs, scorer, tmp_path / "out"))
    assert [s.resumed for s in again] == [True, False]
    assert [dataclasses.replace(s, resumed=False) for s in again] == first
    assert (tmp_path / "out" / "a" / "trajectory.parquet").stat().st_mtime_ns == before


def test_latents_that_are_missing_are_work_to_be_done(runs, scorer, tmp_path):
    list(score_folders(runs / "a", scorer, tmp_path / "out"))
    (summary,) = score_folders(runs / "a", scorer, tmp_path / "out", keep_latents=True)
    assert not summary.resumed and Trajectory.load(tmp_path / "out").x0 is not None


def test_nothing_of_another_origin_is_overwritten(runs, scorer, tmp_path):
    with pytest.raises(InputError, match="must not be the folder that is scored"):
        list(score_folders(runs, scorer, runs / "." / "a" / ".."))
    list(score_folders(runs / "a", scorer, tmp_path / "out"))
    with pytest.raises(InputError, match="was scored by"):
        list(score_folders(runs / "a", tiny_scorer(seed=1), tmp_path / "out"))
    with pytest.raises(InputError, match="was not scored here"):
        list(score_folders(runs / "a", scorer, runs / "b"))
    assert Trajectory.load(runs / "a").x0 is not None and Trajectory.load(runs / "b").x0 is not None


def _scored(cumulative, clean=None):
    """Scores that hold together: artifact_prob is 1 wherever mass falls on "artifact"."""
    cumulative = torch.tensor(cumulative)
    clean = torch.zeros_like(cumulative) if clean is None else torch.tensor(clean)
    scores = {name: cumulative for name in SCORES} | {"cumulative_clean_prob": clean, "exit_cdf": cumulative + clean}
    return recorded(images=len(cumulative), scores=scores, x0=None)


def test_the_summary_counts_what_a_loop_over_the_images_counts():
    rule = ThresholdConfig(rule="cumulative", threshold=0.5, clear_threshold=0.3)
    scored = _scored(
        [[0.5, 0.6, 0.7], [0.1, 0.2, 0.5], [0.1, 0.2, 0.4], [0.1, 0.55, 0.6], [0.1, math.nan, math.nan]],
        [[0.0, 0.0, 0.0], [0.0, 0.1, 0.1], [0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.0, math.nan, math.nan]],
    )
    # The fourth was cleared before it reached the threshold; the second reaches it when there is nothing left to save.
    summary = summarise(None, scored, tiny_config(threshold=rule))
    assert (summary.images, summary.errors, summary.aborted, summary.rejected) == (5, 1, 1, 1)
    assert summary.artifact_prob == pytest.approx((0.7 + 0.5 + 0.4 + 0.6) / 4)
    assert summarise(None, scored, tiny_config(threshold=None)).aborted is None


@pytest.mark.parametrize("rule", EVERY_RULE, ids=lambda rule: rule.rule)
def test_every_rule_counts_as_the_decision_over_whole_trajectories_does(runs, tmp_path, rule):
    scorer = tiny_scorer(threshold=rule)
    scored = scorer.score(recorded(0))
    prob = scored.scores["artifact_prob"]
    state = scorer.embed(recorded(0).x0.float().flatten(0, 1)).unflatten(0, (5, 3))
    _, mass, _ = scorer.score_embedded(state, scored.log_snr.expand(5, -1), scorer.embed_prompts(scored.prompts, 5))
    steps = decide(rule, prob, accumulate(prob, mass), progress(scored.log_snr, LOG_SNR_RANGE)).abort_step.tolist()
    for resumed in (False, True):
        first, _ = score_folders(runs, scorer, tmp_path / "out")
        assert first.resumed == resumed
        assert (first.aborted, first.rejected) == (sum(k < 2 for k in steps), sum(k == 2 for k in steps))


def test_scores_of_other_trajectories_are_not_taken_for_those_of_the_source(runs, scorer, tmp_path):
    list(score_folders(runs / "a", scorer, tmp_path / "out"))
    for changed in (
        recorded(7),
        recorded(0, label=torch.ones(5)),
    ):  # others, and the same with what was not known before
        changed.save(runs / "a")
        with pytest.raises(
            InputError, match="the scores of other trajectories, or of the same before they were changed"
        ):
            list(score_folders(runs / "a", scorer, tmp_path / "out"))


def test_a_trajectory_without_latents_cannot_be_scored(tmp_path, scorer):
    scorer.score(recorded()).save(tmp_path / "run")
    dataclasses.replace(_scored([[0.1, 0.2, 0.3]]), x0=None).save(tmp_path / "run")
    with pytest.raises(InputError, match="holds no x0"):
        list(score_folders(tmp_path / "run", scorer, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_joined_runs_stand_one_after_the_other_with_nan_where_one_was_not_scored():
    long, short = recorded(images=2), recorded(images=1, steps=(5, 9))
    long = dataclasses.replace(long, scores={"artifact_prob": torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])})
    short = dataclasses.replace(short, scores={"artifact_prob": torch.tensor([[0.7, 0.8]])})
    for parts, first in (([long, short], 0), ([short, long], 1)):
        joined = join_trajectories(parts)
        assert joined.step == [2, 5, 9] and joined.x0 is None and joined.label is None
        assert joined.prompts == [p for part in parts for p in part.prompts]
        torch.testing.assert_close(joined.log_snr, long.log_snr, atol=0, rtol=0)
        expected = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [math.nan, 0.7, 0.8]]).roll(first, dims=0)
        torch.testing.assert_close(joined.scores["artifact_prob"], expected, equal_nan=True, atol=0, rtol=0)


def test_runs_in_different_settings_are_not_joined():
    run = recorded()
    others = [
        recorded(num_steps=11),
        recorded(log_snr=torch.tensor([-3.0, 0.0, 3.5])),
        _scored([[0.1, 0.2, 0.3]]),
    ]
    for other in others:
        with pytest.raises(InputError, match="part 1 differs"):
            join_trajectories([run, other])
    with pytest.raises(InputError, match="at least one"):
        join_trajectories([])
