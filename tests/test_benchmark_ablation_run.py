"""What ``python -m benchmarks.ablation`` refuses, makes, and says of what is missing; nothing is trained here."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import benchmarks.ablation.__main__ as ablation
from benchmarks.ablation import identity
from benchmarks.ablation.designs import Design, Scale
from benchmarks.ablation.figures import FIGURES, REPEATS, Result
from benchmarks.ablation.inputs import Inputs
from benchmarks.ablation.scores import Bench
from benchmarks.ablation.wishes import OWN, Variant
from moe_artifacts.errors import CalibrationError, InputError
from moe_artifacts.files import read_json

SCALE = Scale(folder="some", seeds=(0, 1))
BASE, OTHER = OWN, replace(OWN, head="soft")
ROWS = (
    Variant(wish="experts", name="one head", design=BASE),
    Variant(wish="experts", name="soft", design=OTHER, against="one head"),
)


class FakeInputs:
    """Judged runs and a pipeline that are a number each."""

    def __init__(self, scale: Scale, margin: float = 0.0, weight: float = 0.0) -> None:
        self.scale, self.folder = scale, Path("unknown")
        self.margin, self.pipe = margin, SimpleNamespace(unet=torch.nn.Linear(1, 1), vae=torch.nn.Linear(1, 1))
        for module in vars(self.pipe).values():
            torch.nn.init.constant_(module.weight, weight)
            torch.nn.init.zeros_(module.bias)

    def split(self, name: str) -> Any:
        return SimpleNamespace(prompts=["a bag"], margin=torch.tensor([self.margin]))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Designs that are measured at once; of which, in turn."""
    found: list[tuple[Design, int]] = []

    def inputs_of(scale: Scale) -> FakeInputs:
        inputs = FakeInputs(scale)
        inputs.folder = tmp_path / scale.folder
        return inputs

    def measure(bench: Bench, design: Design) -> Result:
        found.append((design, bench.seed))
        point = np.full(len(FIGURES), 0.1 * bench.seed)
        return Result(point, np.tile(point, (REPEATS, 1)), {"samples": 1.0})

    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(tmp_path))
    for name, value in {
        "VARIANTS": ROWS,
        "WISHES": ("experts",),
        "FULL": SCALE,
        "Inputs": inputs_of,
        "prepare": lambda inputs, designs: None,
    }.items():
        monkeypatch.setattr(ablation, name, value)
    monkeypatch.setattr(Bench, "_measure", measure)
    yield found
    log = logging.getLogger(f"training.{SCALE.folder}")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = True


def test_the_table_is_written_once_all_seeds_are_there(made: Any, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    assert ablation.main(["--seeds", "1", "--out", str(out)]) == 0
    assert len(made) == 2 and not out.exists()
    log = (tmp_path / SCALE.folder / "log.txt").read_text()
    assert "no table yet, 2 results are missing" in log and "experts: soft, seed 0" in log
    assert ablation.main(["--seeds", "0", "--out", str(out)]) == 0
    assert {(design.key, seed) for design, seed in made} == {(d.key, s) for d in (BASE, OTHER) for s in (0, 1)}
    rows = [row for row in read_json(out)["rows"] if row["table"] == "variants"]
    assert [row["seeds"] for row in rows] == [2, 2] and rows[0]["auroc_within"] == pytest.approx(0.05)
    written = out.stat().st_mtime_ns
    assert ablation.main(["--seeds", "1", "--out", str(out)]) == 0  # nothing left to make: the same table
    assert len(made) == 4 and out.stat().st_mtime_ns >= written
    assert len({row["seed"] for row in read_json(out)["rows"] if row["table"] == "runs"}) == 2


def test_a_seed_that_is_not_of_the_table_is_refused(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablation.main(["--seeds", "0,7"])
    assert "must be of those of the table, 0, 1, got 0,7" in capsys.readouterr().err and not made


def test_a_design_that_fails_is_named_and_the_others_are_made(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, out = Bench._measure, tmp_path / "table.json"

    def failing(bench: Bench, design: Design) -> Result:
        if (design, bench.seed) == (OTHER, 0):
            raise CalibrationError("too few clean images")
        return measure(bench, design)

    with monkeypatch.context() as patched:
        patched.setattr(Bench, "_measure", failing)
        assert ablation.main(["--out", str(out)]) == 1
    assert len(made) == 3 and not out.exists()
    log = (tmp_path / SCALE.folder / "log.txt").read_text()
    assert "seed 0: too few clean images" in log and "1 failed:\n  experts: soft, seed 0" in log
    assert ablation.main(["--out", str(out)]) == 0
    assert len(made) == 4 and out.exists()


# --- what the files were made of -------------------------------------------------------------------------------------


def inputs_in(folder: Path, scale: Scale = SCALE, **changes: float) -> Inputs:
    inputs: Any = FakeInputs(scale, **changes)
    inputs.folder = folder
    return inputs


def test_files_of_other_data_or_another_program_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity.claim(inputs_in(tmp_path))
    identity.claim(inputs_in(tmp_path))
    identity.claim(inputs_in(tmp_path, replace(SCALE, seeds=(5,))))  # which seeds there are changes no file
    for other, name in (
        (inputs_in(tmp_path, margin=1.0), "runs"),
        (inputs_in(tmp_path, weight=1.0), "pipeline"),
        (inputs_in(tmp_path, replace(SCALE, test=7)), "scale"),
    ):
        with pytest.raises(InputError, match=f"{tmp_path} holds files made with another {name}; delete the folder"):
            identity.claim(other)
    sources = identity.source_hashes(identity.START)
    changed = sources | {"training/loop.py": "0" * 64}
    monkeypatch.setattr(identity, "source_hashes", lambda start: changed)
    with pytest.raises(InputError, match=r"made with another training/loop\.py; delete"):
        identity.claim(inputs_in(tmp_path))


def test_files_that_say_nothing_of_themselves_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log.txt").touch()
    (tmp_path / "results").mkdir()
    with pytest.raises(InputError, match=r"and \d+ more; delete the folder to begin anew"):
        identity.claim(inputs_in(tmp_path))
    (tmp_path / "results").rmdir()
    identity.claim(inputs_in(tmp_path))


def test_all_that_makes_a_kept_file_is_part_of_its_identity() -> None:
    parts = {"designs", "figures", "inputs", "noisy_runs", "pictures", "price", "samples", "scores", "towers"}
    called = {"training/loop.py", "training/posterior.py", "training/collect.py", "moe_artifacts/policy.py"}
    found = identity.source_hashes(identity.START).keys()
    assert {f"benchmarks/ablation/{part}.py" for part in parts} | called <= found
    assert not [name for name in found if name.startswith("benchmarks/") and "/ablation/" not in name]
