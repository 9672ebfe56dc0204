from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import sources
from benchmarks.sources import source_hashes

FILES = {
    "benchmarks/speed.py": "import time\n\nfrom training import loop\n\n\ndef run():\n    return loop.step(time.time())\n",
    "benchmarks/other.py": "FASTER = 2\n",
    "training/__init__.py": "",
    "training/loop.py": (
        'def step(start):\n    """Go one step."""\n    from moe_artifacts.noise.tables import LEVELS  # late\n\n'
        "    return LEVELS[start]\n"
    ),
    "moe_artifacts/noise/__init__.py": "import moe_artifacts.missing\n",
    "moe_artifacts/noise/tables.py": "LEVELS = [1, 2]\n",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    return tmp_path


def test_what_is_imported_late_or_far_down_is_there(tree: Path) -> None:
    files = ["benchmarks/speed.py", "moe_artifacts/noise/tables.py", "training/__init__.py", "training/loop.py"]
    assert list(source_hashes("benchmarks/speed.py")) == files


@pytest.mark.parametrize(
    ("name", "old", "new", "counts"),
    [
        ("moe_artifacts/noise/tables.py", "[1, 2]", "[1, 3]", True),
        ("training/loop.py", '    """Go one step."""\n', "", False),
        ("training/loop.py", "  # late", "", False),
        ("training/loop.py", "LEVELS[start]", "(\n        LEVELS[start]\n    )", False),
        ("benchmarks/other.py", "2", "3", False),
    ],
)
def test_code_counts_and_its_comments_do_not(tree: Path, name: str, old: str, new: str, counts: bool) -> None:
    before = source_hashes("benchmarks/speed.py")
    (tree / name).write_text(FILES[name].replace(old, new))
    changed = {key for key, value in source_hashes("benchmarks/speed.py").items() if before[key] != value}
    assert changed == ({name} if counts else set())


def test_a_string_that_is_no_docstring_counts(tree: Path) -> None:
    text = {"TEXT = 'a'\n", "TEXT = 'b'\n"}
    found = set()
    for line in text:
        (tree / "benchmarks/other.py").write_text(line)
        found |= set(source_hashes("benchmarks/other.py").values())
    assert len(found) == 2
