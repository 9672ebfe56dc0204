"""Image files of any kind as RGB pictures, or refused with a reason.

Turned as their EXIF data say, transparent parts over white, of an animation the first picture; palettes, grey, CMYK and 16
bits a channel become 8-bit RGB. A picture whose header states more than ``PIL.Image.MAX_IMAGE_PIXELS`` is refused before
anything is decoded.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from moe_artifacts.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import, and a clean-up of tables needs none
    from moe_artifacts.shapes import Preview

SUFFIXES = frozenset(".png .jpg .jpeg .jpe .jfif .webp .bmp .tif .tiff .gif .avif .ppm .pgm .pbm .pnm".split())
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "TIFF",
    "GIF",
    "AVIF",
    "PPM",
)  # no others: Pillow would run Ghostscript for EPS

Reason = Literal["missing", "empty", "format", "pixels", "mode", "damaged", "archive"]


class BadImage(InputError):
    """An image that cannot be used.

    ``reason``, for counting: ``missing`` (no file that can be opened), ``empty`` (no bytes), ``format`` (none of FORMATS),
    ``pixels`` (more than allowed), ``mode`` (pixels without a known range), ``damaged`` (cut short or corrupt), ``archive``
    (not to be had from its zip file).
    """

    def __init__(self, reason: Reason, source: str, detail: str) -> None:
        super().__init__(reason, source, detail)  # all three, or it could not be unpickled from another process
        self.reason = reason
        self.source = source
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.source}: {self.detail}"


def image_files(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders that are named like images, sorted; hidden ones are not."""
    return [path for path in visible_files(folder) if path.suffix.lower() in SUFFIXES]


def visible_files(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders, sorted; hidden ones are not."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_rgb(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """A picture in mode RGB, of its own size.

    Args:
        source: A path, or the bytes of a file.
        name: What errors call it; by default the path.
    Raises:
        BadImage: If it is none, or cannot be decoded in full.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), name or f"{len(source)} bytes")
    name = name or os.fspath(source)
    try:
        stream = open(source, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadImage("missing", name, f"cannot be opened: {error}") from error
    with stream:
        return _decode(stream, name)


def square(image: Image.Image, size: int) -> Image.Image:
    """The middle square at ``size`` x ``size`` pixels; a smaller image is enlarged."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)


def to_preview(image: Image.Image) -> Preview:
    """An RGB picture as floats in [0, 1], of shape [1, 3, height, width]."""
    import torch

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


def read_image(source: str | os.PathLike[str] | bytes, size: int, name: str | None = None) -> Preview:
    """The middle square of an image at ``size`` x ``size`` pixels, RGB in [0, 1], of shape [1, 3, size, size].

    Raises:
        BadImage: As :func:`read_rgb`.
    """
    return to_preview(square(read_rgb(source, name), size))


def _decode(stream: BinaryIO, name: str) -> Image.Image:
    if not stream.read(1):
        raise BadImage("empty", name, "the file is empty")
    stream.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage, which is found below, and of size, which is checked below
        try:
            image = Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise BadImage("format", name, f"is none of {', '.join(FORMATS)}, or its header is damaged") from error
        except Image.DecompressionBombError as error:
            raise BadImage("pixels", name, str(error)) from error
        except Exception as error:  # damaged files end in a dozen unrelated classes, SyntaxError among them
            raise BadImage("damaged", name, f"{type(error).__name__}: {error}") from error
        pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if limit is not None and pixels > limit:  # Pillow itself only warns up to twice that
            raise BadImage("pixels", name, f"{image.width} x {image.height} pixels are more than {limit}")
        try:
            return _as_rgb(ImageOps.exif_transpose(image), name)
        except (BadImage, MemoryError):
            raise
        except Exception as error:
            raise BadImage("damaged", name, f"{type(error).__name__}: {error}") from error


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 and turns nearly all of such an image white.
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F", "LAB"):
        raise BadImage("mode", name, f"its pixels are of mode {image.mode}, which says nothing about their range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
