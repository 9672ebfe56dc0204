"""The folder of a run is whole or resumable at every moment, and says so when it is damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from moe_artifacts.config import ThresholdConfig, to_dict
from moe_artifacts.errors import GuardStateError, InputError
from moe_artifacts.guard.output import Setting
from moe_artifacts.guard.run_folder import Attempt, RunWriter, Wave, image_name, read_run

PROMPTS = ["a bag", "ein Schuh für 5 €", "a bag"]
RULE = ThresholdConfig(rule="cumulative", threshold=0.5, max_risk=0.05, confidence=0.95)
SETTING = Setting("DDIMScheduler", 6, 3.0, (1, 3, 5))


def settings(**changes):
    values = {
        "format_version": 1,
        "version": "0.1.0",
        "pipeline": "StableDiffusionPipeline",
        "model": None,
        "dtype": "float32",
        "scheduler": {"_class_name": "DDIMScheduler", "beta_start": 0.00085},
        "call": {"num_inference_steps": 6, "size": (16, 16)},
        "scorer": "scripted",
        "rule": to_dict(RULE),
        "audit_rate": 0.0,
        "audit_seed": 0,
        "seed": 0,
        "images_per_prompt": 2,
        "prompts": PROMPTS,
    }
    return values | changes


def attempt(index=0, number=0, status="kept", **changes):
    finished = status in ("kept", "cleared", "audited")
    values = {
        "prompt_index": index,
        "prompt": PROMPTS[index],
        "attempt": number,
        "seed": 2**53 - 1 - number,
        "status": status,
        "step": None if status == "kept" else 3,
        "audited": status == "audited",
        "artifact_prob": 0.1,
        "cumulative_artifact_prob": None,
        "prompt_truncated": False,
        "nsfw_content_detected": None,
        "file": image_name(index, number, status == "audited") if finished else None,
    }
    return Attempt(**values | changes)


def wave(*attempts):
    return Wave(attempts=attempts, steps_run=5 * len(attempts), steps_full=6 * len(attempts), setting=SETTING)


def picture(shade=0):
    return Image.new("RGB", (4, 4), (shade, 2, 3))


def commit(writer, *attempts):
    writer.commit(wave(*attempts), [None if made.file is None else picture(made.attempt) for made in attempts])


FIRST = (attempt(0, 0), attempt(0, 1, "aborted"), attempt(1, 0, "audited"))
SECOND = (attempt(0, 3, "cleared"), attempt(1, 2))


@pytest.fixture
def run(tmp_path):
    with RunWriter(tmp_path / "run", settings()) as writer:
        commit(writer, *FIRST)
        commit(writer, *SECOND)
    return tmp_path / "run"


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_what_was_written_is_read(run):
    record = read_run(run)
    assert record.attempts == [*FIRST, *SECOND]
    assert [(w.steps_run, w.steps_full, w.setting) for w in record.waves] == [(15, 18, SETTING), (10, 12, SETTING)]
    assert record.settings == settings(call={"num_inference_steps": 6, "size": [16, 16]})
    assert record.rule == RULE and {wave.setting for wave in record.waves} == {SETTING}
    assert sorted(files(run)) == [
        "audited/p00001-a0000.png",
        "images/p00000-a0000.png",
        "images/p00000-a0003.png",
        "images/p00001-a0002.png",
        "run.json",
        "waves/000000.json",
        "waves/000001.json",
    ]


def test_a_run_without_a_wave_is_a_run(tmp_path):
    with RunWriter(tmp_path, settings()):
        record = read_run(tmp_path)
    assert (record.attempts, record.waves) == ([], [])


def test_an_image_says_what_makes_it_again(run):
    with Image.open(run / "audited/p00001-a0000.png") as image:
        text = image.text
    assert (text["prompt"], text["seed"], text["attempt"]) == (PROMPTS[1], str(2**53 - 1), "0")
    assert text["moe_artifacts"] == "0.1.0"
    recorded = read_run(run).settings
    # The other prompts of the run are not for those who are given one image.
    assert json.loads(text["settings"]) == {k: v for k, v in recorded.items() if k not in ("prompts", "version")}


@examples(max_examples=25)  # each writes and syncs three files
@given(prompt=st.text(st.characters(codec="utf-8"), max_size=40), prob=st.none() | st.floats(0, 1))
def test_any_prompt_survives(tmp_path_factory, prompt, prob):
    folder = tmp_path_factory.mktemp("run")
    made = attempt(prompt=prompt, artifact_prob=prob)
    with RunWriter(folder, settings(prompts=[prompt])) as writer:
        commit(writer, made)
    assert read_run(folder).attempts == [made]
    with Image.open(folder / made.file) as image:
        assert image.text["prompt"] == prompt


def test_resuming_goes_on_after_the_last_committed_wave(run, tmp_path):
    before = files(run)
    with RunWriter(run, settings()) as writer:
        assert [w.attempts for w in writer.waves] == [FIRST, SECOND]
        commit(writer, attempt(2, 0))
    after = files(run)
    assert {name: after[name] for name in before} == before
    assert sorted(after.keys() - before.keys()) == ["images/p00002-a0000.png", "waves/000002.json"]


def test_resuming_removes_what_a_killed_run_left_and_nothing_else(run):
    before = files(run)
    (run / "notes.txt").write_text("mine")
    (run / "images" / "contact-sheet.png").write_bytes(b"mine")
    for name in (
        "images/p00002-a0000.png",  # its wave was not committed
        "audited/p00002-a0001.png",
        "images/.p00002-a0000.png-x3k_9f1b/p00002-a0000.png",
        "waves/.000002.json-abcd_123/000002.json",
        ".run.json-0a1b2c3d/run.json",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"half")
    with RunWriter(run, settings()):
        pass
    assert files(run) == before | {"notes.txt": b"mine", "images/contact-sheet.png": b"mine"}


def test_a_wave_whose_images_cannot_be_written_is_not_committed(run):
    class Broken:
        def save(self, path, **options):
            path.write_bytes(b"half")
            raise OSError("disk full")

    before = files(run)
    with pytest.raises(OSError, match="disk full"), RunWriter(run, settings()) as writer:
        writer.commit(wave(attempt(2, 0), attempt(2, 1)), [picture(), Broken()])
    assert [w.attempts for w in read_run(run).waves] == [FIRST, SECOND]
    with RunWriter(run, settings()):
        pass
    assert files(run) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed 1 instead of 0"),
        ({"call": {"num_inference_steps": 7, "size": (16, 16)}}, "call.num_inference_steps 7 instead of 6"),
        ({"call": {"num_inference_steps": 6, "size": (16, 32)}}, r"call.size\[1\] 32 instead of 16"),
        ({"scheduler": {"_class_name": "DDIMScheduler", "beta_start": 0.1}}, "scheduler.beta_start 0.1 instead of"),
        ({"prompts": [*PROMPTS[:2], "a coat"]}, r"prompts\[2\] 'a coat' instead of 'a bag'"),
        ({"prompts": [*PROMPTS, "a coat"]}, r"prompts\[3\] 'a coat' instead of not given"),
        ({"rule": to_dict(dataclasses.replace(RULE, threshold=0.4))}, "rule.threshold 0.4 instead of 0.5"),
        ({"prompts": ["x"] * 90}, "and 85 more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_with_other_settings_is_refused(run, changes, named):
    before = files(run)
    with pytest.raises(InputError, match=f"holds a run with other settings: .*{named}"):
        RunWriter(run, settings(**changes)).__enter__()
    assert files(run) == before


def test_another_release_may_resume(run):
    with RunWriter(run, settings(version="9.9.9")) as writer:
        assert len(writer.waves) == 2
    assert read_run(run).settings["version"] == "0.1.0"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds 'holiday.png' and no run.json: give an empty folder"):
        RunWriter(tmp_path, settings()).__enter__()
    assert list(files(tmp_path)) == ["holiday.png"]


def test_a_run_killed_while_it_wrote_its_first_file_can_be_started_again(tmp_path):
    (tmp_path / ".run.json-0a1b2c3d").mkdir()
    (tmp_path / ".run.json-0a1b2c3d" / "run.json").write_text("{")
    with RunWriter(tmp_path, settings()):
        pass
    assert list(files(tmp_path)) == ["run.json"]


def test_two_writers_at_once_are_refused(run):
    with RunWriter(run, settings()), pytest.raises(GuardStateError, match="being written by another run"):
        RunWriter(run, settings()).__enter__()
    with RunWriter(run, settings()):
        pass  # free again


def test_a_writer_that_was_killed_leaves_no_lock(run):
    child = os.fork()
    if child == 0:
        RunWriter(run, settings()).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with RunWriter(run, settings()) as writer:
        assert len(writer.waves) == 2


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_attempt(path, **changes):
    values = json.loads(path.read_text())
    values["attempts"][0] |= changes
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "is not the folder of a run: run.json not found"),
        (lambda run: shutil.rmtree(run), "is not the folder of a run"),
        (lambda run: (run / "run.json").write_text("[]"), "format_version 1, got None"),
        (lambda run: _edit(run / "run.json", format_version=2), "format_version 1, got 2"),
        (lambda run: _edit(run / "run.json", more=2), "must have the keys"),
        (lambda run: _edit(run / "run.json", prompts="a bag"), "prompts must be a list of texts"),
        (lambda run: (run / "waves/000000.json").unlink(), "000000.json is missing, but 000001.json is there"),
        (lambda run: (run / "waves/000001.json").write_text("{"), "000001.json is not JSON"),
        (
            lambda run: _edit(run / "waves/000001.json", more=2),
            r"not a wave of this release: .*unknown keys \['more'\]",
        ),
        (lambda run: _edit(run / "waves/000001.json", steps_run="5"), "steps_run must be int"),
        (lambda run: _edit_attempt(run / "waves/000001.json", status="fine"), "status must be one of"),
        (lambda run: _edit_attempt(run / "waves/000001.json", attempt=0), "attempt 0 of prompt 0.* is there twice"),
        (lambda run: _edit_attempt(run / "waves/000001.json", prompt="other"), "not of the prompt that run.json has"),
        (lambda run: _edit_attempt(run / "waves/000001.json", prompt_index=9), "not of the prompt that run.json has"),
        (lambda run: _edit_attempt(run / "waves/000001.json", file="../../etc/passwd"), "file must be like"),
    ],
)
def test_a_damaged_folder_is_refused(run, damage, message):
    damage(run)
    with pytest.raises(InputError, match=message):
        read_run(run)
