"""Runs and labels: what is counted, what is refused, and how the findings read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import moe_artifacts.audit.labels
from moe_artifacts.audit import audit
from moe_artifacts.audit.counts import read_runs
from moe_artifacts.audit.findings import MEASURES
from moe_artifacts.audit.labels import read_labels
from moe_artifacts.audit.rates import Tally
from moe_artifacts.calibrated import RISK_WORDS
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.errors import CheckpointError, InputError
from moe_artifacts.guard.run_folder import read_run
from tests.runs import RULE, made_up_run

# Two images of each prompt were asked for: attempts 2 and later stand in for those that were not kept.
FATES = {"a bag": "kauakk", "a coat": "ckx", "a sandal": "reku"}
FINISHED = {
    "images/p00000-a0000.png": 0,
    "audited/p00000-a0002.png": 1,
    "images/p00000-a0004.png": 0,
    "images/p00000-a0005.png": 1,
    "images/p00001-a0000.png": 0,
    "images/p00001-a0001.png": 0,
    "images/p00002-a0002.png": 0,
    "audited/p00002-a0003.png": 0,
}


@pytest.fixture
def folder(tmp_path):
    return made_up_run(tmp_path / "run", FATES, images_per_prompt=2)


def table(path: Path, rows) -> Path:
    lines = [f"{file},{value}" for file, value in (rows.items() if isinstance(rows, dict) else rows)]
    path.write_text("\n".join(["file,artifact", *lines, ""]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """A run in which every abort was finished: 20 of 100 images."""
    return made_up_run(tmp_path_factory.mktemp("runs") / "hundred", {"a bag": "u" * 20 + "k" * 80}, audit_rate=1.0)


def labels_of(folder: Path, values: str, path: Path) -> Path:
    """The table of the labels of a run: one figure per finished image in the order of the attempts, a point for none."""
    (record,) = read_runs([folder])
    finished = [attempt.file for attempt in record.attempts if attempt.file is not None]
    return table(path, [(folder / file, value) for file, value in zip(finished, values, strict=True) if value != "."])


# --- what is counted -------------------------------------------------------------------------------------------------


def test_every_attempt_is_counted_where_it_belongs(folder, tmp_path):
    found = audit([folder], labels=table(tmp_path / "labels.csv", FINISHED))
    assert found.all == [
        Tally(
            audit_rate=0.5,
            aborts=5,  # the two that stayed aborted, the two that were audited, and the one that broke after that
            audited=3,
            audited_labelled=3,  # what broke is bad
            audited_clean=1,
            kept=6,  # the cleared one too
            kept_labelled=6,
            kept_clean=5,
            rejected=1,
        )
    ]
    assert found.first == [
        Tally(
            audit_rate=0.5,
            aborts=1,
            audited=0,
            audited_labelled=0,
            audited_clean=0,
            kept=3,
            kept_labelled=3,
            kept_clean=3,
            rejected=1,
        )
    ]


def test_empty_values_and_files_that_are_not_named_have_no_label(folder, tmp_path):
    rows = [(file, "" if number == 0 else value) for number, (file, value) in enumerate(FINISHED.items())][:-2]
    (found,) = audit([folder], labels=table(tmp_path / "labels.csv", rows)).all
    assert (found.audited_labelled, found.audited_clean, found.kept_labelled, found.kept_clean) == (2, 0, 4, 3)
    (found,) = audit([folder]).all
    assert (found.audited_labelled, found.kept_labelled) == (1, 0)  # the broken one needs none


def test_runs_with_one_audit_rate_are_counted_together_and_others_apart(tmp_path):
    folders = [
        made_up_run(tmp_path / "a", {"a bag": "ka"}),
        made_up_run(tmp_path / "b", {"a bag": "uu"}, audit_rate=1.0, seed=1),
        made_up_run(tmp_path / "c", {"a bag": "kk"}, seed=2),
    ]
    found = audit(folders).all
    assert [(one.audit_rate, one.kept, one.aborts) for one in found] == [(0.5, 3, 1), (1.0, 0, 2)]


def test_a_run_that_is_still_going_on_counts_as_far_as_it_is(folder):
    (folder / "waves" / "000002.json").unlink()
    assert audit([folder]).all[0].kept == 5


# --- labels ----------------------------------------------------------------------------------------------------------


def test_a_file_is_found_by_every_path_that_leads_to_it(folder, tmp_path, monkeypatch):
    runs = read_runs([folder])
    files = list(FINISHED)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    names = [
        files[0],
        str((folder / files[1]).resolve()),
        f"../run/{files[2]}",
        f"run/{files[3]}",  # from the table
        Path(files[4]).name,
        f"../elsewhere/../run/{files[5]}",
    ]
    found = read_labels(table(tmp_path / "labels.csv", [(name, k % 2) for k, name in enumerate(names)]), runs)
    assert found.artifact == {(0, file): k % 2 for k, file in enumerate(files[:6])}


def test_a_name_that_several_runs_have_is_refused_until_the_run_is_named(tmp_path):
    folders = [made_up_run(tmp_path / name, {"a bag": "ku"}, seed=k) for k, name in enumerate("ab")]
    runs = read_runs(folders)
    for file in ("images/p00000-a0000.png", "p00000-a0001.png"):
        with pytest.raises(InputError, match="could be an image of 2 of the runs"):
            read_labels(table(tmp_path / "labels.csv", {file: 1}), runs)
    found = read_labels(table(tmp_path / "labels.csv", {"b/images/p00000-a0000.png": 1}), runs)
    assert found.artifact == {(1, "images/p00000-a0000.png"): 1}


@pytest.mark.parametrize(
    "values",
    [
        [0, 1, None],
        [0.0, 1.0, None],
        [False, True, None],
        ["0", "1", ""],
        pa.array([0, 1, None], pa.int8()),
    ],
)
def test_parquet_may_hold_numbers_truth_values_or_text(folder, tmp_path, values):
    files = list(FINISHED)[:3]
    pq.write_table(pa.table({"note": ["x"] * 3, "file": files, "artifact": values}), tmp_path / "labels.parquet")
    found = read_labels(tmp_path / "labels.parquet", read_runs([folder]))
    assert found.artifact == {(0, files[0]): 0, (0, files[1]): 1}


def test_a_table_as_spreadsheets_write_it(folder, tmp_path):
    path = tmp_path / "labels.csv"
    first, second, *_ = FINISHED
    path.write_bytes(f'\ufeffartifact,who,file\r\n1,"me, myself",{first}\r\n 0.0 ,,{second}\r\n'.encode())
    assert read_labels(path, read_runs([folder])).artifact == {(0, first): 1, (0, second): 0}


@pytest.mark.parametrize("value", ["2", "-1", "0.5", "yes", "nan", "true"])
def test_other_values_than_0_and_1_are_refused(folder, tmp_path, value):
    file = next(iter(FINISHED))
    with pytest.raises(
        InputError, match=f"artifact of '{file}' must be 1 with artifacts, 0 for a clean image.*{value}"
    ):
        audit([folder], labels=table(tmp_path / "labels.csv", {file: value}))


def test_doubled_foreign_and_unfinished_files_are_refused(folder, tmp_path):
    file = next(iter(FINISHED))
    for rows, message in (
        ([(file, 1), (f"../{folder.name}/{file}", 1)], "is there twice"),
        ([(file, ""), (file, 1)], "is there twice"),
        ([("images/p00009-a0000.png", 1)], "is no finished image of"),
        ([("images/p00000-a0001.png", 1)], "is no finished image of"),  # aborted
        ([("../secret.png", 1)], "is no finished image of"),
        ([("", 1)], "every row must name a file"),
    ):
        (folder / "images").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            audit([folder], labels=table(folder / "images" / "labels.csv", rows))


def test_tables_that_cannot_be_read_are_refused(folder, tmp_path):
    def refused(name, content):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError) as found:
            audit([folder], labels=path)
        assert name in str(found.value)
        return str(found.value)

    assert "lacks the columns ['artifact']" in refused("a.csv", b"file,label\nx,1\n")
    assert "lacks the columns" in refused("empty.csv", b"")
    assert "cannot read" in refused("missing.csv", None)
    assert "cannot read" in refused("latin.csv", b"file,artifact\n\xe4.png,1\n")
    assert "cannot read" in refused("b.parquet", b"no parquet")
    assert "must be a .csv or .parquet file" in refused("labels.xlsx", b"")


# --- the judge -------------------------------------------------------------------------------------------------------


class DarkIsBad:
    def margin(self, images, labels):
        self.labels = labels.tolist()
        assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
        return 0.5 - images.mean(dim=(1, 2, 3))


@pytest.fixture
def judge(monkeypatch):
    judge = DarkIsBad()
    monkeypatch.setattr(moe_artifacts.audit.labels, "bundled_judge", lambda name: judge)
    return judge


def test_a_judge_labels_every_finished_image_and_leaves_out_prompts_it_has_no_class_for(tmp_path, judge):
    folder = made_up_run(tmp_path / "run", {"a bag": "kau", "a spaceship": "kua", "a coat": "kk"}, side=32)
    Image.new("RGB", (32, 32), "white").save(folder / "images" / "p00000-a0000.png")
    found = audit([folder], judge="fashion")
    assert judge.labels == [8, 8, 4, 4]
    assert found.labels.artifact[0, "images/p00000-a0000.png"] == 0
    assert found.labels.artifact[0, "audited/p00000-a0002.png"] == 1
    (one,) = found.all
    assert (one.kept, one.kept_clean, one.aborts, one.audited_labelled) == (3, 1, 2, 1)  # none of the spaceship's
    assert "3 images were left out: the judge 'fashion' has no class for their prompts" in found.text()


def test_what_a_safety_checker_painted_over_is_not_judged(folder, judge, tmp_path):
    folder = made_up_run(tmp_path / "nsfw", {"a bag": "kk"}, side=32)
    wave = json.loads((folder / "waves" / "000000.json").read_text())
    wave["attempts"][0]["nsfw_content_detected"] = True
    (folder / "waves" / "000000.json").write_text(json.dumps(wave))
    assert audit([folder], judge="fashion").all[0].kept_labelled == 1
    labels = labels_of(folder, "10", tmp_path / "labels.csv")
    (found,) = audit([folder], labels=labels).all
    assert (found.kept_labelled, found.kept_clean) == (1, 1)


def test_a_judge_refuses_what_it_cannot_look_at(tmp_path, judge):
    folder = made_up_run(tmp_path / "small", {"a bag": "k"}, side=16)
    with pytest.raises(InputError, match=r"32x32 pixels, but .* has 16x16"):
        audit([folder], judge="fashion")
    folder = made_up_run(tmp_path / "broken", {"a bag": "k"}, side=32)
    image = folder / "images" / "p00000-a0000.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(InputError, match=r"cannot read .*p00000-a0000\.png"):
        audit([folder], judge="fashion")
    image.unlink()
    with pytest.raises(InputError, match=r"cannot read .*p00000-a0000\.png"):
        audit([folder], judge="fashion")


def test_an_unknown_judge_and_two_sources_of_labels_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="nothing bundled is called 'nobody'"):
        audit([folder], judge="nobody")
    with pytest.raises(InputError, match="give one of them"):
        audit([folder], labels=tmp_path / "labels.csv", judge="fashion")


# --- which runs ------------------------------------------------------------------------------------------------------


def test_runs_that_do_not_go_together_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="at least one folder"):
        audit([])
    with pytest.raises(InputError, match="not the folder of a run"):
        audit([tmp_path])
    for changes, message in (
        ({"audit_rate": 0.0}, "made with audit_rate 0"),
        ({"audit_rate": "much"}, "audit_rate must be a number"),
        ({"rule": dataclasses.replace(RULE, threshold=0.4)}, "differ in their rule"),
        ({"scorer": "another"}, "differ in their scorer"),
    ):
        other = made_up_run(tmp_path / message, {"a bag": "k"}, **{"seed": 1, **changes})
        with pytest.raises(InputError, match=message):
            audit([folder, other])


def test_images_that_are_there_twice_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for runs in ([folder, folder], [folder, copy]):
        with pytest.raises(InputError, match="hold the same images, the first of 'a bag' with seed 0"):
            audit(runs)
    made_up_run(tmp_path / "other", FATES, images_per_prompt=2, call={"num_inference_steps": 7})
    assert audit([folder, tmp_path / "other"]).all[0].kept == 12


def sampled_as(folder, **changes):
    """The same waves, made in another setting."""
    for path in (folder / "waves").iterdir():
        wave = json.loads(path.read_text())
        path.write_text(json.dumps(wave | {"setting": wave["setting"] | changes}))
    return folder


def test_images_of_two_models_of_one_name_are_not_the_same(folder, tmp_path):
    other = sampled_as(shutil.copytree(folder, tmp_path / "other"), denoiser="43aa37edcee1b0e6")
    assert audit([folder, other]).all[0].kept == 12


# --- how it reads ----------------------------------------------------------------------------------------------------


def test_a_promise_that_is_broken_is_called_broken(hundred, tmp_path):
    found = audit([hundred], labels=labels_of(hundred, "0" * 100, tmp_path / "labels.csv"))
    assert found.reading == "broken" and found.missing_audits is None
    low = 100 * found.promised.low
    assert f"verdict        BROKEN: clean images aborted at least {low:.1f} %, at most 5 % promised" in found.text()
    assert found.promised.value == pytest.approx(0.2)


def test_runs_in_another_setting_neither_keep_nor_break_the_promise(tmp_path):
    rule = dataclasses.replace(RULE, num_inference_steps=6)
    runs = [
        made_up_run(tmp_path / name, {"a bag": "u" * 20 + "k" * 80}, rule=rule, seed=n) for n, name in enumerate("ab")
    ]
    labels = table(tmp_path / "labels.csv", [(f"{run}/{a.file}", 0) for run in runs for a in read_run(run).attempts])
    assert audit(runs, labels=labels).reading == "broken"
    sampled_as(runs[1], num_inference_steps=4)
    found = audit(runs, labels=labels)
    assert found.reading == "nothing to compare with"
    assert found.summary()["uncertified"] == {str(runs[1]): ["4 steps instead of 6"]}
    told = f"certified for another setting: {runs[1]} has 4 steps instead of 6; audit the other runs without it"
    assert told in found.text() and "clean images aborted" in found.text()


def test_a_promise_that_is_kept_is_called_kept(hundred, tmp_path):
    labels = labels_of(hundred, "1" * 20 + "0" * 80, tmp_path / "labels.csv")
    found = audit([hundred], labels=labels)
    high = 1 - 0.05 ** (1 / 80)  # none of 80 clean images: the rate at which that has a chance of 5 %
    assert found.reading == "kept" and found.promised.high == pytest.approx(high)
    assert f"verdict        kept: clean images aborted at most {100 * high:.1f} %, at most 5 % promised" in found.text()
    assert audit([hundred], labels=labels, confidence=0.999).reading == "not enough audits"


def test_between_the_two_it_says_how_many_more_would_do(tmp_path):
    folder = made_up_run(tmp_path / "run", {"a bag": "u" * 20 + "k" * 30}, audit_rate=1.0)
    found = audit([folder], labels=labels_of(folder, "1" * 20 + "0" * 30, tmp_path / "labels.csv"))
    assert found.reading == "not enough audits"
    # None of 59 clean images would do, and there were 30 to 20 audits.
    assert found.missing_audits == pytest.approx(20 * 59 / 30 - 20, abs=1)
    assert f"about {found.missing_audits} more audited images would do" in found.text()


def test_without_labels_of_kept_images_there_is_a_lower_end_only(hundred, tmp_path):
    found = audit([hundred], labels=labels_of(hundred, "0" * 20 + "." * 80, tmp_path / "labels.csv"))
    assert found.reading == "broken" and found.promised.high == 1
    assert f"clean images aborted            at least {100 * found.promised.low:.1f} %" in found.text()
    assert "all of them may be clean, so their rates have one end only" in found.text()
    found = audit([hundred], labels=labels_of(hundred, "1" * 20 + "." * 80, tmp_path / "labels.csv"))
    assert found.reading == "not enough audits"
    assert found.text().splitlines()[-2].endswith("label the kept images, or a random sample of them")


def test_what_is_missing_is_named(tmp_path):
    def ending(fates):
        folder = made_up_run(tmp_path / fates, {"a bag": fates})
        return audit([folder]).text().splitlines()[-2].partition("; ")[2]

    assert ending("kkkk") == "no image was aborted yet"
    assert ending("kkaa") == "no image was audited yet"
    assert ending("kkau") == "label the audited images"


def test_attempts_in_the_place_of_others_are_shown_apart(folder, tmp_path):
    found = audit([folder], labels=table(tmp_path / "labels.csv", FINISHED))
    lines = found.text().splitlines()
    assert lines[1] == (
        "images         13: 6 kept; 5 aborted, 3 of them finished for the audit; 1 rejected at the last step; "
        "1 with non-finite latents or scores"
    )
    assert lines[2] == f"labels         3 of 3 audited images and 6 of 6 kept ones, from {tmp_path / 'labels.csv'}"
    assert lines[3] == "promise        false aborts <= 5 % (90 % sure, over the calibration prompts)"
    assert lines[5].split("  ") == ["intervals 90 % sure", *[""] * 6, " first attempts", *[""] * 6, "all attempts"]
    # One clean image audited stands for two, and there are five that were kept.
    assert lines[6].startswith("  clean images aborted            ") and f" {100 * 2 / 7:.1f} % (" in lines[6]
    only = made_up_run(tmp_path / "only", {"a bag": "ku"})
    assert "all attempts" not in audit([only]).text()


@pytest.mark.parametrize(
    ("rule", "reading", "words"),
    [
        (ThresholdConfig(rule="cumulative", threshold=0.5), "nothing to compare with", "it promises nothing"),
        (
            dataclasses.replace(RULE, risk=RISK_WORDS["per-prompt"]),
            "nothing to compare with",
            "the promise is about false aborts per prompt, which an audit of single images does not measure",
        ),
        (dataclasses.replace(RULE, risk=RISK_WORDS["wrong-aborts"]), "broken", "clean ones among the aborted at least"),
        (dataclasses.replace(RULE, risk=RISK_WORDS["miss"], max_risk=0.9), "kept", "bad images not aborted at most"),
    ],
)
def test_what_is_promised_is_what_is_compared(hundred, tmp_path, rule, reading, words):
    folder = shutil.copytree(hundred, tmp_path / "run")
    settings = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(settings | {"rule": dataclasses.asdict(rule)}))
    values = "0" * 8 + "1" * 12 + "0" * 60 + "1" * 20
    found = audit([folder], labels=labels_of(folder, values, tmp_path / "labels.csv"))
    assert found.reading == reading and words in found.text()
    assert found.confidence == (rule.confidence or 0.95)


def test_every_promise_is_known_by_the_words_it_is_stored_under():
    assert set(MEASURES) == set(RISK_WORDS.values()) - {RISK_WORDS["per-prompt"]}


def test_the_summary_is_plain_json(folder, tmp_path):
    found = audit([folder], labels=table(tmp_path / "labels.csv", FINISHED))
    values = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert values["reading"] == found.reading and values["runs"] == [str(folder)]
    assert values["all_attempts"]["tallies"] == [dataclasses.asdict(one) for one in found.all]
    assert values["first_attempts"]["rates"]["false_abort_rate"] == dataclasses.asdict(found.promised)


def test_first_attempts_weigh_every_prompt_alike(tmp_path):
    """A prompt whose images are aborted half the time is tried twice as often; that must not count."""
    hard = ["k", "k", "k", "k", "uk", "uk", "uuk", "uuuk"]  # one image wanted of each: attempts until one is kept
    fates = {f"easy {k}": "k" for k in range(8)} | {f"hard {k}": letters for k, letters in enumerate(hard)}
    folder = made_up_run(tmp_path / "run", fates, images_per_prompt=1, audit_rate=1.0)
    found = audit([folder], labels=labels_of(folder, "0" * 23, tmp_path / "labels.csv"))
    assert found.promised.value == pytest.approx(4 / 16)
    assert [(one.aborts, one.kept) for one in found.all] == [(7, 16)]
