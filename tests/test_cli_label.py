import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from moe_artifacts.audit import audit
from moe_artifacts.cli import app
from moe_artifacts.label import find_images
from tests.commands import refused, run
from tests.runs import made_up_run
from tests.typist import PATIENCE, at_a_terminal

ASKS = "q quit"
DOC = Path(__file__).parents[1] / "docs" / "labelling.md"


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        Image.new("RGB", (4, 4), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def at_work(monkeypatch, script, *arguments):
    """Run the command at a terminal; returns its exit code and what the screen showed."""
    with at_a_terminal(monkeypatch, script) as typist, pytest.raises(SystemExit) as done:
        app(["label", *map(str, arguments)])
    return done.value.code, typist.screen.replace("\r\n", "\n")


def test_labels_a_run_so_that_the_audit_can_read_it(tmp_path, monkeypatch):
    made = made_up_run(tmp_path / "run", {"a bag": "kkkkuu"})
    code, screen = at_work(monkeypatch, [(ASKS, "a"), (ASKS, "c"), (ASKS, "c"), (ASKS, "q")], made, "--kept", 1)
    assert code == 0
    assert screen.endswith(f"3 images: 1 with artifacts, 2 clean, 0 skipped, 0 to do\n{made / 'labels.csv'}\n")
    found = audit([made], labels=made / "labels.csv")
    assert "2 of 2 audited images and 1 of 4 kept ones" in found.text()


def test_the_same_command_goes_on_where_it_was_stopped(folder, monkeypatch):
    at_work(monkeypatch, [(ASKS, "a"), (ASKS, "q")], folder, "--rater", "ann")
    _, screen = at_work(monkeypatch, [(ASKS, "c"), (ASKS, "c"), (ASKS, "q")], folder, "--rater", "ann")
    assert "3 images: 1 with artifacts, 2 clean, 0 skipped, 0 to do" in screen and "1 of 3" not in screen
    _, screen = at_work(monkeypatch, [(ASKS, "q")], folder, "--rater", "ann", "--redo")
    assert "1 of 3, so far artifacts" in screen
    assert (folder / "labels-ann.csv").read_text().count("\n") == 4


def test_says_how_well_the_raters_agree(folder):
    first, second, third = (image.file for image in find_images(folder))
    (folder / "labels.csv").write_text(f"file,artifact\n{first},1\n{second},0\n{third},0\n")
    assert "has 1 of the tables" in refused("label", folder, "--agreement")
    (folder / "labels-ben.csv").write_text(f"file,artifact\n{first},1\n{second},0\n{third},1\n")
    done = run("label", folder, "--agreement")
    assert done.exit_code == 0
    assert done.stdout == (
        "labels.csv and labels-ben.csv: agree on 66.7 % of 3 images, Cohen's kappa 0.40 (artifacts: both 1, only the "
        "first 0, only the second 1)\n"
    )


def test_refuses_in_one_line(folder, tmp_path):
    assert "needs a terminal" in refused("label", folder)
    assert "is not a folder" in refused("label", tmp_path / "nothing")
    assert "rater must be a name" in refused("label", folder, "--rater", "../ann")
    assert "kept counts the kept images of runs" in refused("label", folder, "--kept", 3)
    assert not (folder / "labels.csv").exists()


def test_ctrl_c_keeps_what_was_answered(folder, monkeypatch):
    from moe_artifacts.label import Terminal

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "key", interrupt)
    assert at_work(monkeypatch, [], folder)[0] == 130


def test_a_killed_session_has_stored_every_answer(folder):
    order = [image.file for image in find_images(folder)]
    master, slave = pty.openpty()
    command = [sys.executable, "-c", "from moe_artifacts.cli import app; app()", "label", str(folder)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    try:
        screen, deadline = "", time.monotonic() + PATIENCE
        for number, key in enumerate((b"a", b"c", b""), start=1):
            while screen.count(ASKS) < number:
                assert time.monotonic() < deadline and process.poll() is None, screen
                if select.select([master], [], [], 0.1)[0]:
                    screen += os.read(master, 65536).decode(errors="replace")
            os.write(master, key)
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)
    assert (folder / "labels.csv").read_text() == f"file,artifact\n{order[0]},1\n{order[1]},0\n"


def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_up_run(tmp_path / "run", {"a bag": "kkuu"})
    (tmp_path / "feh").write_text("#!/bin/sh\n")
    (tmp_path / "feh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    blocks = re.findall(r"```sh\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    for line in "".join(blocks).splitlines():
        program, command, *arguments = shlex.split(line)
        assert (program, command) == ("moe-artifacts", "label")
        code, screen = at_work(monkeypatch, [] if "--agreement" in line else [(ASKS, "a"), (ASKS, "q")], *arguments)
        assert code == 0, screen
    assert "labels-ann.csv and labels-ben.csv: agree on 100.0 % of 1 images" in screen
    assert "moe-artifacts audit run --labels run/labels.csv" in DOC.read_text(encoding="utf-8")
    assert run("audit", "run", "--labels", "run/labels.csv").exit_code == 0
