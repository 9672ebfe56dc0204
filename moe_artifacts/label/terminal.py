"""The terminal: one key at a time, and the picture in it or in a viewer."""

from __future__ import annotations

import fcntl
import os
import select
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import tty
from pathlib import Path
from types import TracebackType
from typing import TextIO

from PIL import Image

from moe_artifacts.errors import InputError
from moe_artifacts.label.images import LabelImage
from moe_artifacts.label.pictures import PROTOCOLS, fitted, protocol_of, read_picture

TEXT_LINES = 5  # kept free beside a picture
CELL = (8, 16)  # pixels of a character, where the terminal does not tell
_CLEAR = "\x1b[2J\x1b[H"
_CLEAR_KITTY = "\x1b_Ga=d,q=2\x1b\\"  # its pictures outlive the text
_ESCAPE, _CTRL_D = b"\x1b", b"\x04"


class Terminal:
    """Shows images and reads keys, from the start of a ``with`` block to its end.

    Where an image's path would tell what the guard thought of it, viewers are given, and the rater is shown, a link that
    is named by a number.

    Args:
        pictures: A name of ``pictures.PROTOCOLS``, "none", or "auto": what the terminal is known to take. Blocks are
            chosen only where they show every pixel.
        viewer: A command that opens a picture; the path is appended. It is ended when the next picture is shown.
    Raises:
        InputError: If there is no terminal, or no such viewer.
    """

    def __init__(
        self,
        pictures: str = "auto",
        viewer: str | None = None,
        keyboard: TextIO | None = None,
        screen: TextIO | None = None,
    ) -> None:
        self._keyboard, self._screen = keyboard or sys.stdin, screen or sys.stdout
        if not (self._keyboard.isatty() and self._screen.isatty()):
            raise InputError(
                "labels are given with keys, which needs a terminal; without one write the table by hand, with the columns "
                "file and artifact"
            )
        if pictures not in ("auto", "none", *PROTOCOLS):
            raise InputError(f"pictures must be auto, none or one of {', '.join(PROTOCOLS)}, got {pictures!r}")
        self._exact = pictures == "auto"
        self._protocol = protocol_of(os.environ) if pictures == "auto" else pictures
        self._viewer = _command(viewer)
        self._viewing: subprocess.Popen[bytes] | None = None
        self._shown = 0

    def __enter__(self) -> Terminal:
        self._links = tempfile.TemporaryDirectory(prefix="moe-artifacts-label-")
        self._modes = termios.tcgetattr(self._keyboard)
        tty.setcbreak(self._keyboard, termios.TCSADRAIN)  # keys at once and unseen; Ctrl-C stays what it is
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._modes)
        self._end_viewing()
        self._links.cleanup()

    def show(self, image: LabelImage, heading: str) -> None:
        """The picture, its prompt where the file tells it, and its path or the link to it.

        Keys pressed before are dropped: they cannot be meant for this image.
        """
        self._end_viewing()
        self._shown += 1
        path = self._link(image.path) if image.hide_path else image.path
        try:
            picture, prompt = read_picture(path)  # by its link: an error would tell the path
        except InputError as error:
            inline, lines = None, [str(error)]
        else:
            inline, lines = self._inline(picture), [] if prompt is None else [f'"{" ".join(prompt.split())}"']
        if inline is not None:
            self._write(_CLEAR + (_CLEAR_KITTY if self._protocol == "kitty" else "") + inline + "\n")
        self.say("\n".join([heading, *map(_printable, [*lines, str(path)])]))
        if self._viewer is not None:
            self._viewing = subprocess.Popen(
                [*self._viewer, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us
            )
        termios.tcflush(self._keyboard, termios.TCIFLUSH)

    def say(self, text: str) -> None:
        """Lines of text; what the screen cannot write is written as its code."""
        encoding = self._screen.encoding or "ascii"
        self._write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")

    def key(self, known: str) -> str:
        """The next key, one of ``known``; "q" for Ctrl-D and where the terminal has gone."""
        keyboard = self._keyboard.fileno()
        while True:
            try:
                pressed = os.read(keyboard, 1)
            except OSError:  # the terminal was closed
                return "q"
            if pressed in (b"", _CTRL_D):
                return "q"
            if pressed == _ESCAPE:
                # Arrows and other such keys send a letter after it. An arrow is no verdict.
                while select.select([keyboard], [], [], 0.02)[0] and os.read(keyboard, 64):
                    pass
            elif (letter := pressed.decode("ascii", "replace")) in known:
                return letter

    def _inline(self, picture: Image.Image) -> str | None:
        """The picture as this terminal takes it; None: it does not."""
        if self._protocol not in PROTOCOLS:
            return None
        rows, columns, width, height = self._window()
        lines = max(1, rows - TEXT_LINES)
        if self._protocol == "blocks":
            box = (columns, 2 * lines)
            if self._exact and (picture.width > box[0] or picture.height > box[1]):
                return None
            small = picture if self._exact else fitted(picture, *box)
            return PROTOCOLS["blocks"](small)
        return PROTOCOLS[self._protocol](fitted(picture, width, height * lines // rows))

    def _window(self) -> tuple[int, int, int, int]:
        """Rows, columns, and width and height in pixels."""
        size = fcntl.ioctl(self._screen, termios.TIOCGWINSZ, bytes(8))
        rows, columns, width, height = struct.unpack("HHHH", size)
        rows, columns = rows or 24, columns or 80
        return rows, columns, width or columns * CELL[0], height or rows * CELL[1]

    def _link(self, path: Path) -> Path:
        link = Path(self._links.name) / f"{self._shown}{path.suffix}"
        link.symlink_to(path.absolute())
        return link

    def _end_viewing(self) -> None:
        if self._viewing is not None:
            self._viewing.terminate()
            self._viewing.wait()
            self._viewing = None

    def _write(self, text: str) -> None:
        self._screen.write(text)
        self._screen.flush()


def _command(viewer: str | None) -> list[str] | None:
    if viewer is None:
        return None
    try:
        words = shlex.split(viewer)
    except ValueError as error:
        raise InputError(f"viewer {viewer!r} is not a command: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise InputError(f"viewer {viewer!r} cannot be run: there is no such program")
    return words


def _printable(text: str) -> str:
    """Prompts and file names come from anywhere: an escape code in them would be obeyed by the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
