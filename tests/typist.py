"""A terminal with somebody at it: waits until the screen shows what it should, then presses a key."""

from __future__ import annotations

import codecs
import os
import pty
import select
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

CTRL_D = b"\x04"
PATIENCE = 60  # seconds until a text must have appeared, on a machine that is busy with other things


class Typist:
    """Presses each key once its text has appeared after what was there at the key before; at the end Ctrl-D."""

    def __init__(self, master: int, script: Sequence[tuple[str, str | bytes]]) -> None:
        self.screen = ""
        self._master, self._script = master, script
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a character may come in two parts
        self._ended = threading.Event()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Reads what is left on the screen."""
        self._ended.set()
        self._thread.join(PATIENCE)
        assert self.failure is None, self.failure

    def _run(self) -> None:
        seen = 0
        for text, key in self._script:
            deadline = time.monotonic() + PATIENCE
            while (found := self.screen.find(text, seen)) < 0 and time.monotonic() < deadline:
                self._read()
            if found < 0:
                self.failure = f"{text!r} did not appear after {self.screen[seen:]!r}"
                break
            seen = found + len(text)
            os.write(self._master, key if isinstance(key, bytes) else key.encode())
        while not self._ended.is_set():
            self._read()
            os.write(self._master, CTRL_D)
        while self._read():
            pass

    def _read(self) -> bool:
        """Whether there was something, within a moment."""
        ready = bool(select.select([self._master], [], [], 0.05)[0])
        if ready:
            self.screen += self._decoder.decode(os.read(self._master, 65536))
        return ready


@contextmanager
def at_a_terminal(
    monkeypatch: pytest.MonkeyPatch, script: Sequence[tuple[str, str | bytes]], size: tuple[int, int] = (24, 80)
) -> Iterator[Typist]:
    """stdin and stdout are a terminal of so many rows and columns; afterwards its modes must be as before."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, size)
    modes = termios.tcgetattr(slave)
    typist = Typist(master, script)
    with os.fdopen(os.dup(slave), encoding="utf-8") as stdin, os.fdopen(os.dup(slave), "w", encoding="utf-8") as stdout:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", stdin)
            patch.setattr(sys, "stdout", stdout)
            typist.start()
            try:
                yield typist
            finally:
                stdout.flush()
                typist.end()
                after = termios.tcgetattr(slave)
    os.close(slave)
    os.close(master)
    assert after == modes
