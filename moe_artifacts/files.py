"""Files that are either whole or absent: what is written appears under its name in one move.

A reader, or a run that was killed half-way, then never meets half a file.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moe_artifacts.errors import InputError

_UMASK = threading.Lock()  # of the whole process: two threads at once would leave it at 0


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name near ``path``; moved there when the block ends well, removed when it raises.

    The temporary file keeps the name of ``path``, since some writers choose their format by the suffix. The folder is made if
    it is missing. Two writers at once each have their own temporary file; the last to finish wins.

    Raises:
        OSError: Also where safetensors fails to write, which has an error of its own for a full disk.
    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(f"{folder}/a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     Path(folder, "a.txt").read_text()
        'whole'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: os.replace is atomic only on one file system. A folder: safetensors makes a temporary file of its own
    # next to the one it is given.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        temporary = Path(folder, target.name)
        try:
            yield temporary
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        temporary.chmod(
            0o666 & ~_umask()
        )  # safetensors makes private files; a checkpoint is meant to be read by others
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)  # the new name itself must survive a power cut


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Remove what killed writers of ``path`` have left; for files that no two processes write at once."""
    target = Path(path)
    for folder in target.parent.glob(f".{glob.escape(target.name)}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain values as indented JSON with a final newline. NaN and infinity are refused: JSON has neither.

    Raises:
        InputError: If ``value`` holds something JSON cannot.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot write {path} as JSON: {error}; convert tensors, paths and NaN first") from error
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        InputError: If the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise InputError(f"{path} is not JSON: {error}") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in lower-case hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    with _UMASK:
        current = os.umask(0)  # it can only be read by setting it
        os.umask(current)
    return current
