import subprocess
import sys

import pytest

import moe_artifacts

HEAVY = {"torch", "diffusers", "transformers", "open_clip", "sklearn", "pyarrow", "matplotlib"}


def _imported_by(code):
    script = f"{code}\nimport sys\nprint(*set({sorted(HEAVY)}) & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_nothing_heavy():
    assert _imported_by("import moe_artifacts; dir(moe_artifacts); moe_artifacts.InputError") == set()


def test_help_imports_nothing_heavy():
    code = """
from moe_artifacts.cli import app
for arguments in (["--help"], ["demo", "--help"], ["score", "--help"], ["calibrate", "--help"], ["inspect", "--help"]):
    try:
        app(arguments)
    except SystemExit as done:
        assert not done.code
"""
    assert _imported_by(code) == set()


def test_the_command_line_makes_threads_wait_without_spinning():
    code = "import os; os.environ.pop('OMP_WAIT_POLICY', None); import moe_artifacts.cli; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "PASSIVE\n"


@pytest.mark.parametrize("name", moe_artifacts.__all__)
def test_every_public_name_is_there(name):
    assert getattr(moe_artifacts, name).__name__ == name
    assert name in dir(moe_artifacts)


def test_other_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        moe_artifacts.colour  # noqa: B018  # asking is the point
