import subprocess
import sys

import pytest

from moe_artifacts import demo
from moe_artifacts.cli import app
from tests.commands import run

COMMANDS = [command.callback.__name__ for command in app.registered_commands]


def test_the_help_names_every_command():
    assert COMMANDS == ["demo", "generate", "label", "audit", "score", "calibrate", "inspect"]
    listed = [line.split()[0] for line in run("--help").stdout.partition("Commands:")[2].splitlines() if line]
    assert listed == COMMANDS


def test_no_help_imports_torch():
    code = f"""
import sys
from moe_artifacts.cli import app
for arguments in (["--help"], *([name, "--help"] for name in {COMMANDS})):
    try:
        app(arguments)
    except SystemExit as done:
        assert not done.code
assert not {{"torch", "numpy", "scipy", "pyarrow"}} & sys.modules.keys(), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_ctrl_c_is_one_line(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    done = run("demo", "--out", tmp_path)
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


def test_a_reader_that_has_seen_enough_is_no_error():
    words = [sys.executable, "-c", "from moe_artifacts.cli import app; app()", "inspect", "fashion"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        command.stdout.close()  # before anything is written
        assert command.stderr.read() == ""
    assert command.returncode == 1


def test_our_own_mistakes_keep_their_traceback(monkeypatch, tmp_path):
    def fail(*_):
        raise IndexError("ours")

    monkeypatch.setattr(demo, "run_demo", fail)
    with pytest.raises(IndexError, match="ours"):
        run("demo", "--out", tmp_path)
