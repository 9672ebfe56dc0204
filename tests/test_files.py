import hashlib
import os
import stat
import subprocess
import sys
import threading

import pytest

from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path, read_json, remove_unfinished, sha256_file, write_json


def test_the_file_appears_whole_and_nothing_else_stays(tmp_path):
    target = tmp_path / "made" / "a.json"
    with atomic_path(target) as temporary:
        assert temporary.parent.parent == target.parent and temporary.suffix == ".json"
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


WRITE_TOO_MUCH = """
import resource, signal, sys
import numpy as np
from safetensors.numpy import save_file
from moe_artifacts.files import atomic_path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic_path(sys.argv[1]) as temporary:
        save_file({"a": np.zeros(1000)}, temporary)
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_an_os_error_also_where_safetensors_writes(tmp_path):
    command = [sys.executable, "-c", WRITE_TOO_MUCH, str(tmp_path / "a.safetensors")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"cannot write {tmp_path / 'a.safetensors'}: ")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_is_removed(tmp_path):
    (tmp_path / ".a.json-x1y2").mkdir()
    (tmp_path / ".a.json-x1y2" / "a.json").write_text("half")
    (tmp_path / ".a.json.bak-x1y2").mkdir()  # of another file
    write_json(tmp_path / "a.json", 1)
    remove_unfinished(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.bak-x1y2", "a.json"]


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    target, texts = tmp_path / "a.txt", [letter * 100_000 for letter in "abcd"]
    both_inside = threading.Barrier(len(texts))

    def write(text):
        with atomic_path(target) as temporary:
            both_inside.wait()
            temporary.write_text(text)

    threads = [threading.Thread(target=write, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in texts
    assert list(tmp_path.iterdir()) == [target]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("")
    (tmp_path / "b").write_text("")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_json_comes_back_as_it_went(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"\u00e9": "x"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"]  # the order is for the reader


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), {"a": object()}, [b"bytes"]])
def test_what_json_cannot_hold_is_refused_and_nothing_written(tmp_path, value):
    with pytest.raises(InputError, match="as JSON"):
        write_json(tmp_path / "a.json", value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is not JSON"):
        read_json(tmp_path / "a.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*a\.json: No such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path)


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
