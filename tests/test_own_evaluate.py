"""Figures of a scorer on trajectories whose bad images are known."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.config import LatentSpaceConfig
from moe_artifacts.errors import InputError
from moe_artifacts.files import read_json
from tests.own_data import write_trajectories
from tests.scorers import tiny_scorer
from training.figures import halves_rate
from training.metrics import auroc, auroc_within, over_groups, over_images, rarer_in_mixed_groups
from training.own import evaluate as own

SPACE = LatentSpaceConfig(name="tiny", vae_class="AutoencoderKL", channels=4, scaling_factor=0.18215, downsampling=2)

groups = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1)


def columns(rows: list[tuple[int, bool, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    group, bad, score = zip(*rows, strict=True)
    return np.array(group), np.array(bad), np.array(score)


@given(groups)
def test_auroc_within_groups_agrees_with_counting_pairs(rows: list[tuple[int, bool, float]]) -> None:
    group, bad, score = columns(rows)
    values, rarer = [], [0, 0]
    for g in np.unique(group):
        worse, better = score[(group == g) & bad], score[(group == g) & ~bad]
        if len(worse) and len(better):
            won = [(w > b) + (w == b) / 2 for w in worse for b in better]
            values.append(np.mean(won))
            rarer = [rarer[0] + len(worse), rarer[1] + len(better)]
    expected = float(np.mean(values)) if values else math.nan
    assert auroc_within(score, bad, group) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert rarer_in_mixed_groups(bad, group) == min(rarer)


@given(groups)
def test_what_a_prompt_tells_comes_from_the_other_half_of_its_images(rows: list[tuple[int, bool, float]]) -> None:
    prompt, bad, _ = columns(rows)
    seen: dict[int, list[int]] = defaultdict(list)
    for i, p in enumerate(prompt.tolist()):
        seen[p].append(i)
    found = halves_rate(bad, prompt)
    for i, p in enumerate(prompt.tolist()):
        half = seen[p].index(i) % 2
        others = [j for k, j in enumerate(seen[p]) if k % 2 != half]
        expected = float(bad[others].mean()) if others else math.nan
        assert found[i] == pytest.approx(expected, nan_ok=True)


def test_resampled_prompts_keep_all_of_their_images_and_count_as_often_as_drawn() -> None:
    prompt = np.array([5, 5, 5, 2, 2, 9])
    seen = []

    def measure(rows: np.ndarray, group: np.ndarray) -> float:
        assert len(np.unique(group)) == 3  # as many as there are prompts, copies apart
        for g in np.unique(group):
            (name,) = np.unique(prompt[rows[group == g]])
            assert sorted(rows[group == g]) == np.flatnonzero(prompt == name).tolist()
        seen.append(len(rows))
        return float(len(rows))

    low, high = over_groups(measure, prompt, repeats=50)
    assert (low, high) == tuple(np.percentile(seen, [2.5, 97.5]))
    assert over_images(lambda rows, group: math.nan, prompt) == pytest.approx((math.nan, math.nan), nan_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scorers and trajectories: of 60 images of 20 prompts."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny_scorer(latent_space=SPACE).save_pretrained(root / "scorer")
    tiny_scorer(seed=1, latent_space=SPACE, threshold=None).save_pretrained(root / "other")
    write_trajectories(root / "test", 60, prompts=20)
    return root


def rows_of(folder: Path, *options: str) -> dict[str, list[dict[str, object]]]:
    out = folder / "result.json"
    assert own.main([str(folder / "scorer"), str(folder / "test"), "--out", str(out), *options]) == 0
    tables: dict[str, list[dict[str, object]]] = {"quality": [], "rules": [], "against": []}
    for row in read_json(out)["rows"]:
        tables[str(row["table"])].append(row)
    return tables


def test_the_figures_are_those_of_the_scores_at_the_steps_of_the_guard(folder: Path) -> None:
    scorer = own._load(str(folder / "scorer"), None)
    test = own.read_test_set(folder / "test")
    guarded = test.guarded(scorer)
    at = (torch.tensor(test.log_snr) + 5) / 12  # progress in the range of the scorer
    assert guarded == sorted({*(int((at >= c).nonzero()[0]) for c in (0.3, 0.6)), 3})  # the last one at 90 % too
    tables = rows_of(folder)
    seen = test.score(scorer, guarded)
    assert [row["share"] for row in tables["quality"]] == [(test.step[c] + 1) / 8 for c in guarded]
    for column, row in enumerate(tables["quality"]):
        prob = seen.prob[:, column].numpy()
        assert row["auroc_pooled"] == pytest.approx(auroc(prob, seen.bad))
        assert row["auroc_within"] == pytest.approx(auroc_within(prob, seen.bad, seen.prompt))
        assert row["auroc_within_low"] <= row["auroc_within"] <= row["auroc_within_high"]  # type: ignore[operator]
        assert row["brier_base_rate"] == pytest.approx(seen.bad.mean() * (1 - seen.bad.mean()), abs=1e-6)
    names = [(row["rule"], row["setting"]) for row in tables["rules"]]
    assert names == [("cumulative", "deployed"), ("cumulative", "matched"), ("perfect", "matched")]
    assert tables["rules"][1]["false_abort_rate"] <= 0.05  # type: ignore[operator]
    aborted = seen.paths(scorer.config.threshold).statistic[:, -2] >= 0.4  # type: ignore[arg-type]
    assert tables["rules"][0]["recall"] == pytest.approx(aborted[seen.bad].mean())


def test_the_scores_are_those_of_whole_trajectories(folder: Path) -> None:
    from moe_artifacts.trajectory_files import iter_trajectories

    scorer = own._load(str(folder / "scorer"), None)
    test = own.read_test_set(folder / "test")
    seen = test.score(scorer, range(len(test.step)))
    expected = [scorer.score(part).scores["artifact_prob"] for part in iter_trajectories(folder / "test", 50)]
    torch.testing.assert_close(seen.prob, torch.cat(expected), atol=1e-5, rtol=1e-5)  # other batches


def test_a_scorer_is_no_better_than_itself(folder: Path) -> None:
    for row in rows_of(folder, "--against", str(folder / "scorer"))["against"]:
        assert row["minus_auroc_within"] == row["minus_auroc_pooled_low"] == row["minus_auroc_pooled_high"] == 0


def test_another_scorer_is_looked_at_in_the_same_steps(folder: Path) -> None:
    options = ["--against", str(folder / "other"), "--shares", "0.2,0.6,1", "--check-cost", "0.3"]
    tables = rows_of(folder, *options)
    shares = [0.25, 0.625, 1.0]  # of 2, 5, 7 and 8 of 8 steps recorded
    assert [row["share"] for row in tables["against"]] == shares
    assert [row["share"] for row in tables["quality"]] == shares + shares
    for ours, theirs, row in zip(tables["quality"][:3], tables["quality"][3:], tables["against"], strict=True):
        difference = ours["auroc_within"] - theirs["auroc_within"]  # type: ignore[operator]
        assert row["minus_auroc_within"] == pytest.approx(difference)
    assert {row["check_cost"] for row in tables["rules"]} == {0.3}
    assert [row["rule"] for row in tables["rules"] if row["scorer"] == str(folder / "other")] == ["perfect"]


@pytest.mark.parametrize(
    ("images", "steps", "labelled", "message"),
    [(6, 10, True, "of several settings"), (6, 8, False, "must hold labelled images of both kinds, got no label")],
)
def test_what_cannot_be_evaluated_is_refused(
    tmp_path: Path, images: int, steps: int, labelled: bool, message: str
) -> None:
    if steps != 8:
        write_trajectories(tmp_path / "test", 20)
        write_trajectories(tmp_path / "more", images, steps=steps)
        (tmp_path / "more" / "00000").rename(tmp_path / "test" / "00002")
    else:
        write_trajectories(tmp_path / "test", images, labelled=labelled)
    with pytest.raises(InputError, match=message):
        own.read_test_set(tmp_path / "test")


def test_wrong_options_are_said_in_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--shares", "all"], ["--shares", "0.5,2"], ["--against", "nowhere"]):
        assert own.main([str(folder / "scorer"), str(folder / "test"), *options]) == 2
        assert capsys.readouterr().err.startswith("error: ")
