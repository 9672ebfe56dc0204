"""Pictures as terminals take them.

kitty    PNG in base64, in parts: kitty, Ghostty            sw.kovidgoyal.net/kitty/graphics-protocol
iterm2   PNG in base64: iTerm2, WezTerm, mintty             iterm2.com/documentation-images.html
sixel    256 colours, six rows of pixels at a time: foot, mlterm, xterm -ti vt340     DEC STD 070
blocks   one character for two pixels, one above the other: every terminal with 24-bit colour
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from moe_artifacts.errors import InputError

KITTY_PART = 4096  # characters of base64 in one escape code, at most
MAX_ENLARGED = 16  # times: of a picture of a few pixels, no more can be seen


def protocol_of(environment: Mapping[str, str]) -> str | None:
    """How the terminal takes pictures, by its environment variables; None: it is not known to.

    Example:
        >>> protocol_of({"TERM": "xterm-kitty"}), protocol_of({"TERM": "xterm"})
        ('kitty', None)
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    exact_colours = environment.get("COLORTERM") in ("truecolor", "24bit")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        # The variables of the terminal around a multiplexer are inherited, but its pictures do not come through.
        return "blocks" if exact_colours else None
    if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    if term.startswith(("foot", "mlterm")) or "sixel" in term:
        return "sixel"
    return "blocks" if exact_colours else None


def read_picture(path: Path) -> tuple[Image.Image, str | None]:
    """A picture in RGB, transparent parts over white, and the prompt that is stored in it, if any.

    Raises:
        InputError: If it cannot be read, or is too large to be honest.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGBA")
                prompt = file.info.get("prompt")
    except Exception as error:  # damaged files end in a dozen unrelated classes, SyntaxError among them
        raise InputError(f"cannot read the picture: {type(error).__name__}: {error}") from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB"), prompt if isinstance(prompt, str) else None


def fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """As large as fits into ``width`` x ``height``; small pictures by whole steps, so that no pixel is invented."""
    scale = min(width / picture.width, height / picture.height)
    if scale >= 1:
        times = min(int(scale), MAX_ENLARGED)
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def kitty(picture: Image.Image) -> str:
    text = _png(picture)
    parts = [text[start : start + KITTY_PART] for start in range(0, len(text), KITTY_PART)]
    codes = []
    for number, part in enumerate(parts):
        first = "a=T,f=100,q=2," if number == 0 else ""  # show, PNG, and do not answer: it would be taken for keys
        codes.append(f"\x1b_G{first}m={int(number + 1 < len(parts))};{part}\x1b\\")
    return "".join(codes)


def iterm2(picture: Image.Image) -> str:
    size = f"width={picture.width}px;height={picture.height}px"
    return f"\x1b]1337;File=inline=1;{size}:{_png(picture)}\x07"


def sixel(picture: Image.Image) -> str:
    """Each band of six rows is drawn once per colour; a character holds the bits of six pixels, the uppermost lowest."""
    indexed = picture.quantize(256)
    pixels = np.asarray(indexed)
    palette = np.array(indexed.getpalette(), dtype=int).reshape(-1, 3)
    codes = [f'\x1bPq"1;1;{picture.width};{picture.height}']
    codes += [f"#{k};2;{r};{g};{b}" for k, (r, g, b) in enumerate((palette * 100 + 127) // 255)]  # in per cent
    for top in range(0, picture.height, 6):
        band = pixels[top : top + 6]
        weights = 1 << np.arange(len(band))
        for colour in np.unique(band):
            characters = (weights @ (band == colour) + 63).astype(np.uint8).tobytes().decode()
            short = re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", characters)
            codes.append(f"#{colour}{short}$")
        codes.append("-")
    return "".join(codes) + "\x1b\\"


def blocks(picture: Image.Image) -> str:
    """The upper half of a character in the colour of one pixel, its ground in that of the pixel below."""
    pixels = np.asarray(picture)
    lines = []
    for top in range(0, picture.height, 2):
        line = []
        for x in range(picture.width):
            line.append("\x1b[38;2;{};{};{}m".format(*pixels[top, x]))
            if top + 1 < picture.height:
                line.append("\x1b[48;2;{};{};{}m".format(*pixels[top + 1, x]))
            line.append("\u2580")
        lines.append("".join(line) + "\x1b[0m")
    return "\n".join(lines)


PROTOCOLS: dict[str, Callable[[Image.Image], str]] = {
    "kitty": kitty,
    "iterm2": iterm2,
    "sixel": sixel,
    "blocks": blocks,
}


def _png(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()
