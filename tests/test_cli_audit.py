import json

import pytest

from moe_artifacts.audit import audit
from tests.commands import refused, run
from tests.runs import made_up_run


@pytest.fixture
def folders(tmp_path):
    return [made_up_run(tmp_path / name, {"a bag": "kkuauk"}, seed=k) for k, name in enumerate("ab")]


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("file,artifact\na/audited/p00000-a0002.png,1\nb/audited/p00000-a0004.png,0\n")
    return path


def test_prints_what_the_audit_finds(folders, labels):
    done = run("audit", *folders, "--labels", labels, "--confidence", 0.8)
    assert done.exit_code == 0 and done.stderr == ""
    assert done.stdout == audit(folders, labels=labels, confidence=0.8).text() + "\n"
    assert "intervals 80 % sure" in done.stdout and "2 of 4 audited images and 0 of 6 kept ones" in done.stdout


def test_prints_the_same_for_machines(folders, labels):
    done = run("audit", *folders, "--labels", labels, "--json")
    assert json.loads(done.stdout) == json.loads(json.dumps(audit(folders, labels=labels).summary()))


def test_refuses_in_one_line(folders, labels, tmp_path):
    assert "not the folder of a run" in refused("audit", tmp_path)
    assert "nothing bundled is called 'nobody'" in refused("audit", *folders, "--judge", "nobody")
    assert "give one of them" in refused("audit", *folders, "--labels", labels, "--judge", "fashion")
    assert "confidence must be between 0 and 1" in refused("audit", *folders, "--confidence", 1)
    assert run("audit").exit_code == 2
