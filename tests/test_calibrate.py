import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numbers
from PIL import Image
from typer.testing import CliRunner

import moe_artifacts.checkpoint
from moe_artifacts.calibrate import calibrate
from moe_artifacts.calibrated import Request
from moe_artifacts.calibration.bounds import fewest_units
from moe_artifacts.checkpoint import load_checkpoint
from moe_artifacts.cli import app
from moe_artifacts.decision import Decider, decide
from moe_artifacts.embedder import state_sha256
from moe_artifacts.errors import CalibrationError, CheckpointError, InputError
from moe_artifacts.held_back import reliability
from moe_artifacts.noise import progress
from moe_artifacts.records import read_records, split_parts
from moe_artifacts.report import save_calibration
from moe_artifacts.scalar.scorer import ScalarScorer
from moe_artifacts.write_back import own_folder, write_threshold
from tests.recorded import NUM_STEPS, STEPS, arrays, long_form, made_up, trajectory, write
from tests.scorers import tiny_scorer

RUNS = made_up(prompts=60, images=5)
EASY = {"max_risk": 0.2, "confidence": 0.8}  # a promise for few prompts
PROMISE = ("--max-risk", 0.2, "--confidence", 0.8)
RULES = ("cumulative", "q-exit", "posterior", "patience", "economic")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The posterior in a trajectory folder."""
    folder = tmp_path_factory.mktemp("recorded") / "runs"
    trajectory(RUNS).save(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Plain scores in a table."""
    return write(tmp_path_factory.mktemp("plain") / "runs.csv", long_form(RUNS))


def of_rows(records, label):
    """The records with other labels."""
    return dataclasses.replace(records, runs=dataclasses.replace(records.runs, label=label))


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *(str(a) for a in arguments)], catch_exceptions=False)


def refused(*arguments):
    """The single line on stderr."""
    done = run(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["posterior", "patience", "cumulative"])
def test_the_report_agrees_with_a_walk_along_each_run(recorded, rule):
    records = read_records(recorded)
    found = calibrate(records, Request(rule=rule, check_cost=0.3, **EASY))
    report = np.flatnonzero(split_parts(records, (0.3, 0.5, 0.2), seed=0)[2])
    assert found.images[2] == len(report)
    spent, kept_clean, lost, missed = 0.0, 0, {}, 0
    for i in report:
        stopped = None
        for t, calls in enumerate(records.runs.calls):
            spent += 0.3
            prob = records.runs.scores[i].astype(np.float32)
            value = {
                "posterior": prob[t],
                "patience": min(prob[max(t - 1, 0)], prob[t]) if t else 0,
                "cumulative": records.exits["cumulative_artifact_prob"][i, t],
            }[rule]
            if value >= np.float32(found.rule.threshold):
                stopped = calls
                break
        spent += stopped or NUM_STEPS
        bad = records.runs.label[i] == 1
        missed += bad and stopped is None
        if not bad:
            kept_clean += stopped is None
            lost.setdefault(records.runs.prompt[i], []).append(stopped is not None)
    clean = sum(map(len, lost.values()))
    before = len(report) * NUM_STEPS / clean
    empty = [all(values) for values in lost.values()]
    assert found.prompt_outcome.empty == pytest.approx(np.mean(empty))
    assert found.outcome.cost_per_clean == pytest.approx(spent / kept_clean / before - 1)
    assert found.risks["per-image"] == pytest.approx(sum(map(sum, lost.values())) / clean)
    assert found.risks["per-prompt"] == pytest.approx(np.mean([np.mean(values) for values in lost.values()]))
    assert found.risks["miss"] == pytest.approx(missed / (len(report) - clean))
    assert found.outcome.recall == pytest.approx(1 - found.risks["miss"])


@pytest.mark.parametrize("rule", RULES)
def test_the_threshold_keeps_the_promise_where_it_comes_from(recorded, rule):
    found = calibrate(read_records(recorded), Request(rule=rule, **EASY))
    certified = found.certified
    assert certified.num_units == found.prompts[1] == 30
    assert certified.empirical["false-aborts"] < 0.2
    assert found.rule.threshold == max(certified.threshold, found.cheapest)
    kept = (found.rule.risk, found.rule.max_risk, found.rule.confidence, found.rule.unit, found.rule.num_clean)
    assert kept == ("false_abort_rate", 0.2, 0.8, "prompt", 30)
    assert (found.rule.scheduler, found.rule.num_inference_steps, found.rule.guidance_scale) == (
        "DDIMScheduler",
        10,
        1.5,
    )
    assert found.rule.scored_steps == STEPS


@pytest.mark.parametrize("risk", ["per-image", "per-prompt", "miss", "wrong-aborts"])
def test_each_risk_can_be_promised(recorded, risk):
    found = calibrate(read_records(recorded), Request(rule="posterior", risk=risk, max_risk=0.8, confidence=0.6))
    assert found.text().index("(promised: 80 %)") < found.text().index("cost per clean image")
    assert found.certified.risks[0].max_risk == 0.8 and (found.cheapest is None) == (risk in ("miss", "wrong-aborts"))


def test_the_certified_threshold_does_not_see_the_other_parts(recorded):
    records = read_records(recorded)
    request = Request(rule="posterior", **EASY)
    fit, held_out, report = split_parts(records, request.shares, request.seed)
    first = calibrate(records, request)
    label = records.runs.label.copy()
    label[report] = 1 - label[report]
    other = calibrate(of_rows(records, label), request)
    assert other.rule == first.rule and other.outcome != first.outcome
    label[fit] = 1 - label[fit]
    assert calibrate(of_rows(records, label), request).certified == first.certified
    label = records.runs.label.copy()
    label[np.flatnonzero(held_out & records.runs.bad)[1:]] = 0  # all but one; bad ones have the highest statistics
    assert calibrate(of_rows(records, label), request).certified.threshold > first.certified.threshold


@pytest.mark.parametrize("rule", RULES)
def test_plain_scores_become_a_posterior_that_knows_more_than_nothing(plain, rule):
    found = calibrate(read_records(plain), Request(rule=rule, choose_steps=False, **EASY))
    assert found.rule.scored_steps == STEPS
    label = found.records.runs.label
    prob = found.fitted.prob[:, -1]
    assert np.square(prob - label).mean() < 0.6 * label.mean() * (1 - label.mean())  # the Brier score of the base rate
    assert found.fitted.posterior is not None
    assert (found.fitted.exit_head is not None) == (rule in ("cumulative", "q-exit"))
    assert found.outcome.recall > 0.2


def test_steps_are_chosen_where_a_check_is_dear(plain):
    dear, free = (
        calibrate(read_records(plain), Request(rule="economic", check_cost=cost, **EASY)).rule for cost in (1.0, 0.0)
    )
    assert len(dear.scored_steps) == 1 < len(free.scored_steps)
    assert set(dear.scored_steps) < set(STEPS) and len(dear.boundary) == 1


def test_scores_may_have_gaps(tmp_path):
    scores = RUNS["scores"].copy()
    scores[::7, 1] = math.nan
    records = read_records(write(tmp_path / "runs.npz", arrays(RUNS, scores=scores)))
    assert calibrate(records, Request(rule="posterior", **EASY)).rule.scored_steps == STEPS  # none is left out
    with pytest.raises(InputError, match="here are gaps"):
        calibrate(records, Request(rule="posterior", choose_steps=True, **EASY))


def test_nothing_is_fitted_without_a_part_for_it(recorded, plain):
    request = Request(rule="posterior", shares=(0.0, 0.7, 0.3), **EASY)
    found = calibrate(read_records(recorded), request)
    assert found.cheapest is None and found.rule.threshold == found.certified.threshold and found.prompts == (0, 42, 18)
    with pytest.raises(InputError, match="the posterior of scalar scores needs prompts to be fitted on"):
        calibrate(read_records(plain), request)
    with pytest.raises(InputError, match="the economic rule needs prompts to be fitted on"):
        calibrate(read_records(recorded), dataclasses.replace(request, rule="economic"))


@given(numbers(np.float64, 30, elements=st.floats(0, 1)), st.integers(1, 12))
def test_the_reliability_table_agrees_with_a_loop(prob, bins):
    label = (np.arange(30) % 3 == 0).astype(float)
    lines = reliability(prob, label, bins)
    groups = {}
    for p, y in zip(prob, label, strict=True):
        groups.setdefault(min(int(p * bins), bins - 1), []).append((p, y))
    assert [(line.count, line.predicted, line.observed) for line in lines] == [
        pytest.approx((len(groups[k]), *np.mean(groups[k], axis=0)), abs=1e-12) for k in sorted(groups)
    ]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "rule"), [("prompt", "posterior"), ("image", "posterior"), ("prompt", "economic")])
def test_too_few_for_the_promise_is_an_error_with_the_number_needed(recorded, unit, rule):
    request = Request(rule=rule, max_risk=0.01, confidence=0.99, unit=unit)
    needed = math.ceil(math.log(0.01) / math.log(0.99))  # if nothing ever went wrong
    with pytest.raises(
        CalibrationError, match=rf"needs at least \d+ .*{unit if unit == 'prompt' else 'clean image'}s"
    ) as error:
        calibrate(read_records(recorded), request)
    assert int(str(error.value).split("at least ")[1].split()[0]) >= needed
    assert "Thresholds come from 30 of the 60 prompts here, 150 images: a share of 0.5, see --shares" in str(
        error.value
    )


def test_ties_are_all_aborted_or_none_of_them(recorded):
    records = read_records(recorded)
    coarse = np.round(records.runs.scores, 1).clip(0, 0.9)
    found = calibrate(
        dataclasses.replace(records, runs=dataclasses.replace(records.runs, scores=coarse)),
        Request(rule="posterior", **EASY),
    )
    assert np.float32(found.certified.threshold) not in coarse.astype(np.float32)  # just above a tied value
    assert found.certified.empirical["false-aborts"] <= 0.2


@pytest.mark.parametrize(("value", "message"), [(0.5, None), (1.0, "no threshold in .0, 1. keeps")])
def test_posteriors_that_are_all_the_same_abort_nothing(recorded, value, message):
    records = read_records(recorded)
    same = dataclasses.replace(records.runs, scores=np.full(records.runs.scores.shape, value))
    records, request = dataclasses.replace(records, runs=same), Request(rule="posterior", **EASY)
    if message is not None:
        with pytest.raises(CalibrationError, match=message):
            calibrate(records, request)
        return
    found = calibrate(records, request)
    assert found.outcome.recall == 0 and math.isnan(found.risks["wrong-aborts"])
    assert "none" in found.text() and found.summary()["held_back"]["risks"]["wrong-aborts"] is None


def test_scores_that_are_all_the_same_are_refused(tmp_path):
    records = read_records(write(tmp_path / "runs.npz", arrays(RUNS, scores=np.ones((300, 3)))))
    with pytest.raises(InputError, match="the same in nearly all images: they tell nothing"):
        calibrate(records, Request(rule="posterior", **EASY))


@pytest.mark.parametrize("chosen", [False, None])
def test_a_step_at_which_all_scores_are_the_same_is_left_out(tmp_path, chosen):
    """A face detector sees nothing in noise."""
    scores = RUNS["scores"].copy()
    scores[:, 0] = 0.0
    found, without = (
        calibrate(
            read_records(write(tmp_path / f"{name}.npz", arrays(RUNS, **changes))),
            Request(rule="posterior", choose_steps=chosen, **EASY),
        )
        for name, changes in (
            ("silent", {"scores": scores}),
            ("without", {"scores": scores[:, 1:], "calls": np.array(STEPS[1:]) + 1}),
        )
    )
    assert found.notes == [
        f"not looked at: the scores after {STEPS[0] + 1} calls, which are the same in nearly all images"
    ]
    assert found.rule == without.rule and found.outcome == without.outcome
    assert f"note: {found.notes[0]}" in found.text()


def test_too_few_of_one_class_to_fit_are_refused(tmp_path):
    label = (np.arange(300) % 25 == 0).astype(float)  # 12 bad ones, some in each part
    records = read_records(write(tmp_path / "runs.npz", arrays(RUNS, label=label)))
    with pytest.raises(CalibrationError, match="at least 10 of each class"):
        calibrate(records, Request(rule="posterior", **EASY))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_part_of_one_class_is_named(recorded, part):
    records = read_records(recorded)
    rows = split_parts(records, (0.3, 0.5, 0.2), seed=0)[part]
    label = np.where(rows, 0, records.runs.label)
    name = ("fit", "calibrate", "report")[part]
    with pytest.raises(CalibrationError, match=f"all {rows.sum()} images of the part '{name}' are clean"):
        calibrate(of_rows(records, label), Request(rule="posterior", **EASY))


def test_images_that_share_a_prompt_promise_nothing_as_single_images(recorded):
    found = calibrate(read_records(recorded), Request(rule="posterior", unit="image", **EASY))
    assert 'the unit "image" promises nothing here: 300 images share 60 prompts' in found.text()


def test_the_cumulative_rule_needs_the_exits(tmp_path):
    whole = trajectory(RUNS)
    scores = {"artifact_prob": whole.scores["artifact_prob"]}
    dataclasses.replace(whole, scores=scores).save(tmp_path / "runs")
    records = read_records(tmp_path / "runs")
    with pytest.raises(InputError, match=r"needs the columns \['exit_cdf', 'cumulative_artifact_prob'\]"):
        calibrate(records, Request(**EASY))
    assert calibrate(records, Request(rule="posterior", **EASY)).outcome.recall > 0
    with pytest.raises(InputError, match="scorer of ours looks at those of its config"):
        calibrate(records, Request(rule="posterior", choose_steps=True, **EASY))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_risk": 0.0}, "max_risk must be between 0 and 1"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1"),
        ({"check_cost": -0.1}, "check_cost must be a number of denoiser calls"),
        ({"q": 1.0}, r"q must be in \[0, 1\)"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"risk": "per-prompt", "unit": "image"}, 'it needs the unit "prompt"'),
    ],
)
def test_numbers_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Request(**values)


# --- into a checkpoint -----------------------------------------------------------------------------------------------


@pytest.fixture
def scorer_folder(tmp_path):
    tiny_scorer().save_pretrained(tmp_path / "my-scorer")
    return tmp_path / "my-scorer"


def scored_by(folder, path, **meta):
    """Records that say that the scorer in ``folder`` made them."""
    scorer = tiny_scorer()
    whole = trajectory(RUNS)
    identity = {"name": scorer.config.name, "sha256": state_sha256(scorer.state_dict())}
    dataclasses.replace(whole, meta=whole.meta | {"scorer": identity} | meta).save(path)
    return read_records(path)


def test_writing_replaces_the_threshold_and_nothing_else(scorer_folder, tmp_path):
    before, weights = load_checkpoint(scorer_folder)
    found = calibrate(scored_by(scorer_folder, tmp_path / "runs"), Request(**EASY))
    assert write_threshold(own_folder(str(scorer_folder)), found) == scorer_folder / "config.json"
    after, same = load_checkpoint(scorer_folder)
    assert after == dataclasses.replace(before, threshold=found.rule) and after.threshold.max_risk == 0.2
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_a_boundary_is_written_over_the_scorers_own_progress(scorer_folder, tmp_path):
    found = calibrate(scored_by(scorer_folder, tmp_path / "runs"), Request(rule="economic", **EASY))
    assert [point[0] for point in found.rule.boundary] == [0.2, 0.5, 0.8]  # calls of 10
    write_threshold(scorer_folder, found)
    config, _ = load_checkpoint(scorer_folder)
    written = config.threshold.boundary
    expected = [progress(log_snr, config.log_snr_range) for log_snr in (-3.0, 0.0, 3.0)]
    assert [point[0] for point in written] == pytest.approx(expected)
    assert [point[1:] for point in written] == [point[1:] for point in found.rule.boundary]


def test_another_scorers_records_and_plain_scores_are_not_written(scorer_folder, tmp_path, plain):
    other = scored_by(scorer_folder, tmp_path / "runs", scorer={"name": "tiny", "sha256": "0" * 64})
    with pytest.raises(InputError, match="thresholds do not carry over"):
        write_threshold(scorer_folder, calibrate(other, Request(**EASY)))
    unknown = calibrate(dataclasses.replace(other, meta={}), Request(**EASY))
    with pytest.raises(InputError, match="the records do not say which scorer made them"):
        write_threshold(scorer_folder, unknown)
    found = calibrate(read_records(plain), Request(rule="posterior", **EASY))
    with pytest.raises(InputError, match="the records hold plain scores"):
        write_threshold(scorer_folder, found)
    assert load_checkpoint(scorer_folder)[0] == tiny_scorer().config


def test_what_is_installed_is_never_written_to(scorer_folder, monkeypatch):
    bundled = scorer_folder.parent / "bundled"
    tiny_scorer().save_pretrained(bundled / "fashion" / "scorer")
    monkeypatch.setattr(moe_artifacts.checkpoint, "BUNDLED", bundled)
    for name in ("fashion", str(bundled / "fashion" / "scorer")):
        with pytest.raises(CheckpointError, match="part of the installed package and is not changed; make a copy"):
            own_folder(name)
    with pytest.raises(CheckpointError, match="no checkpoint 'nothing'"):
        own_folder("nothing")
    assert own_folder(str(scorer_folder)) == scorer_folder


# --- a scalar scorer -------------------------------------------------------------------------------------------------


class Replay:
    """The recorded scores again, in their order, as a user's function that returns them step by step."""

    def __init__(self, scores):
        self.scores, self.step = scores, -1

    def __call__(self, previews, prompts):
        self.step += 1
        return self.scores[:, self.step]


def scalar_folder(folder, **options):
    space = tiny_scorer().config.latent_space
    scorer = ScalarScorer(len, preview=lambda x0: x0[:, :3].clamp(0, 1), latent_space=space, **options)
    scorer.save_pretrained(folder)
    return folder


def recorded_scores(path):
    """As a guard records a scalar scorer: a score at every step, the last one being the final score."""
    scores = np.column_stack([RUNS["scores"], RUNS["final"]])
    changes = {"step": [*STEPS, NUM_STEPS - 1], "log_snr": torch.tensor([-3.0, 0.0, 3.0, 6.0]), "label": None}
    trajectory(RUNS, scores={"score": torch.tensor(scores).float()}, **changes).save(path)
    return path


@pytest.mark.parametrize("rule", ["cumulative", "economic"])
def test_a_scalar_scorer_decides_live_as_it_was_calibrated(tmp_path, rule):
    folder, runs = scalar_folder(tmp_path / "my-score"), recorded_scores(tmp_path / "runs")
    arguments = (*PROMISE, "--rule", rule, "--label-from-final", 0.2, "--all-steps", "--scorer", folder, "--write")
    done = run(runs, *arguments)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == f"written to {folder / 'config.json'}"
    records = read_records(runs, label_from_final=0.2)
    assert records.runs.final.tolist() == pytest.approx(RUNS["final"], abs=1e-5)  # stored as float32
    found = calibrate(records, Request(rule=rule, choose_steps=False, **EASY))

    live = ScalarScorer.from_pretrained(
        folder, Replay(torch.tensor(RUNS["scores"])), preview=lambda x0: x0[:, :3].clamp(0, 1)
    )
    assert live.config.threshold.threshold == found.rule.threshold
    session, decider = live.session(300, ["a bag"] * 300), Decider(live.config.threshold, 300)
    abort_step = np.full(300, len(STEPS))
    for k, log_snr in enumerate((-3.0, 0.0, 3.0)):
        score = session.step(x0=torch.zeros(300, 4, 2, 2), log_snr=log_snr)
        np.testing.assert_allclose(score.artifact_prob, found.fitted.prob[:, k], atol=1e-5)
        decision = decider.step(score, progress(log_snr, live.config.log_snr_range))
        abort_step[decision.abort.numpy()] = k
    spent = torch.tensor(found.records.runs.calls / NUM_STEPS).float().expand(300, -1)
    offline = decide(found.rule, torch.from_numpy(found.fitted.prob), found.fitted.acc, spent).abort_step.numpy()
    assert (abort_step == offline).mean() > 0.99  # a posterior at the threshold may fall on either side
    assert 0 < (offline < 3).mean() < 0.5


def test_steps_that_were_not_chosen_are_not_in_the_scalar_scorer(tmp_path):
    folder = scalar_folder(tmp_path / "my-score")
    records = read_records(recorded_scores(tmp_path / "runs"), label_from_final=0.2)
    found = calibrate(records, Request(rule="posterior", check_cost=1.0, **EASY))
    write_threshold(own_folder(str(folder)), found)
    fitted = json.loads((folder / "config.json").read_text())["fitted"]
    levels = dict(zip((2, 5, 8), (-3.0, 0.0, 3.0), strict=True))
    assert len(fitted["log_snr"]) == 1 and fitted["log_snr"] == [levels[calls] for calls in found.records.runs.calls]


def test_siblings_are_calibrated_for_a_scorer_that_looks_at_them_and_no_other(tmp_path):
    records = read_records(recorded_scores(tmp_path / "runs"), label_from_final=0.2, label_within="prompt")
    alone, together = (
        calibrate(records, Request(rule="posterior", siblings=size, choose_steps=False, **EASY)) for size in (1, 5)
    )
    label = records.runs.label[:, None]
    loss = [-np.log(np.where(label, found.fitted.prob, 1 - found.fitted.prob)).mean() for found in (alone, together)]
    assert loss[1] < loss[0]  # which image of a prompt is the worst one shows beside the others
    for siblings, right, wrong in ((True, together, alone), (False, alone, together)):
        folder = scalar_folder(tmp_path / f"siblings-{siblings}", siblings=siblings)
        with pytest.raises(InputError, match="give --siblings accordingly"):
            write_threshold(folder, wrong)
        write_threshold(folder, right)


def test_siblings_and_scalar_scorers_are_not_for_our_posterior(recorded, tmp_path):
    with pytest.raises(InputError, match="siblings are for scalar scores only"):
        calibrate(read_records(recorded), Request(siblings=5, **EASY))
    with pytest.raises(InputError, match="the posterior of another scorer"):
        write_threshold(scalar_folder(tmp_path / "my-score"), calibrate(read_records(recorded), Request(**EASY)))


def test_the_noise_levels_must_be_known_to_find_the_steps_again(plain, tmp_path):
    found = calibrate(read_records(plain), Request(rule="posterior", **EASY))
    with pytest.raises(InputError, match="do not say the noise levels"):
        write_threshold(scalar_folder(tmp_path / "my-score"), found)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_threshold_and_what_it_does(recorded, tmp_path):
    done = run(recorded, *PROMISE, "--rule", "posterior", "--out", tmp_path / "out")
    assert done.exit_code == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "300 images of 60 prompts, 20 % bad; scored after 2, 5, 8 of 10 denoiser calls"
    assert lines[1] == (
        "fitted on 18 prompts with 90 images; threshold from 30 prompts with 150 images; held back 12 prompts with 60 images"
    )
    facts = dict(line.split(maxsplit=1) for line in lines[3:7])
    values = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert facts["rule"] == "posterior" and facts["promise"] == "clean images aborted <= 20 %, 80 % sure"
    assert float(facts["threshold"]) == pytest.approx(values["rule"]["threshold"], rel=1e-5)
    assert facts["n"] == f"{values['num_units']} prompts"
    held_back = values["held_back"]
    cost = next(line for line in lines if line.startswith("  cost per clean image")).split()
    assert cost[4:6] == [f"{100 * held_back['cost_per_clean']:+.1f}", "%"]
    assert f"{100 * held_back['risks']['per-image']:.3g} %   (promised: 20 %)" in done.stdout
    assert len([line for line in lines if " to " in line and line.startswith("  0.")]) == len(values["reliability"])
    assert lines[-1] == "not written to any scorer: that takes --scorer FOLDER --write"
    Image.open(tmp_path / "out" / "curves.png").verify()


@pytest.mark.parametrize("rule", ["posterior", "economic"])
def test_the_command_reads_every_kind_of_file(plain, recorded, tmp_path, rule):
    base = np.repeat(RUNS["final"][:, None], 3, axis=1)  # the last step is the finished image
    published = {"sd_imr_naft": RUNS["scores"].reshape(60, 5, 3), "sd_imr_base": base.reshape(60, 5, 3)}
    npz = write(tmp_path / "rewards.npz", published)
    for arguments in ([recorded], [plain], [npz, "--key", "sd_imr_naft", "--label-from-final", 0.25]):
        done = run(*arguments, *PROMISE, "--rule", rule)
        assert done.exit_code == 0 and f"rule           {rule}" in done.stdout, done.stderr


def test_the_same_data_in_another_format_give_the_same_threshold(plain, tmp_path):
    others = [write(tmp_path / "a.parquet", long_form(RUNS)), write(tmp_path / "b.npz", arrays(RUNS))]
    # The npz names its prompts otherwise, and prompts are drawn in the order of their names.
    others[1] = write(tmp_path / "b.npz", arrays(RUNS, prompt=np.array([f"prompt {p}" for p in RUNS["prompt"]])))
    outputs = {run(path, *PROMISE, "--rule", "posterior").stdout for path in (plain, *others)}
    assert len(outputs) == 1


def test_writing_from_the_command(scorer_folder, tmp_path, monkeypatch):
    scored_by(scorer_folder, tmp_path / "runs")
    done = run(tmp_path / "runs", *PROMISE, "--scorer", scorer_folder, "--write")
    assert done.stdout.splitlines()[-1] == f"written to {scorer_folder / 'config.json'}"
    threshold = load_checkpoint(scorer_folder)[0].threshold
    assert f"threshold      {threshold.threshold:.6g}" in done.stdout
    shown = CliRunner().invoke(app, ["inspect", str(scorer_folder)], catch_exceptions=False).stdout
    assert "false aborts <= 20 % (80 % sure" in shown and "certified on 30 prompts" in shown
    assert "is not changed; make a copy" in refused(tmp_path / "runs", *PROMISE, "--scorer", "fashion", "--write")
    assert "--write needs --scorer" in refused(tmp_path / "runs", *PROMISE, "--write")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-risk", 0.05], "needs at least"),
        (["--max-risk", 5], "max_risk must be between 0 and 1"),
        (["--shares", "half"], "three numbers such as 0.3,0.5,0.2, got 'half'"),
        (["--shares", "0.5,0.5"], "three numbers such as 0.3,0.5,0.2"),
        (["--score", "beauty"], "no column 'beauty'"),
        (["--key", "flux_imr_naft"], "a key names an array of an npz"),
        (["--risk", "per-prompt", "--unit", "image"], 'needs the unit "prompt"'),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(plain, arguments, message):
    assert message in refused(plain, *arguments)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    assert "there is no file or folder" in refused(tmp_path / "runs.csv")


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_is_drawn_for_every_risk_and_only_as_png(recorded, tmp_path):
    records = read_records(recorded)
    for risk in ("per-image", "miss"):
        found = calibrate(records, Request(rule="posterior", risk=risk, max_risk=0.6, confidence=0.6))
        save_calibration(tmp_path / f"{risk}.png", found)
        Image.open(tmp_path / f"{risk}.png").verify()
    with pytest.raises(InputError, match=r"must end in \.png"):
        save_calibration(tmp_path / "curves.svg", found)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_says_how_many_prompts_it_takes():
    page = (Path(__file__).parents[1] / "docs" / "which-threshold.md").read_text()
    confidences = [
        int(text) / 100 for text in re.findall(r"(\d+) % sure", page.split("## How many runs?")[1].split("\n| ---")[0])
    ]
    rows = re.findall(r"^\| at most (\d+) % \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 5 and confidences == [0.8, 0.9, 0.95, 0.99]
    for risk, cells in rows:
        counts = [int(cell) for cell in cells.split("|")]
        assert counts == [fewest_units(int(risk) / 100, confidence) for confidence in confidences]


def test_every_option_that_the_page_names_exists():
    page = (Path(__file__).parents[1] / "docs" / "which-threshold.md").read_text()
    named = set(re.findall(r"--[a-z][a-z-]+", page))
    known = set(re.findall(r"--[a-z][a-z-]+", run("--help").stdout))
    assert len(named) > 8 and named <= known
