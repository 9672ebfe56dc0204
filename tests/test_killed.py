"""kill -9 at random points of every stage of the road changes nothing in what it makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from moe_artifacts.files import read_json

ROOT = Path(__file__).parents[1]
OF_THE_RUN = {"log.txt", "output.txt"}  # tell when something was done


def contents(path: Path) -> Any:
    """A file's bytes; of safetensors their tensors and metadata, which are written in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, framework="np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in sorted(file.keys())}


def files(folder: Path) -> dict[Path, Any]:
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    hidden = {name for name in found if any(part.startswith(".") for part in name.parts)}  # left half written by a kill
    return {name: path for name, path in found.items() if name not in hidden and name.name not in OF_THE_RUN}


@pytest.mark.slow
def test_every_stage_killed_ten_times_makes_what_it_would_have_made(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, "-m", "tests.killed", str(tmp_path)], cwd=ROOT, env=environment, check=True)
    told = read_json(tmp_path / "told.json")
    assert len(told) == 14, told
    whole, often = files(tmp_path / "whole"), files(tmp_path / "often")
    assert whole.keys() == often.keys()
    assert [str(name) for name in whole if contents(whole[name]) != contents(often[name])] == []
