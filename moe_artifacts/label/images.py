"""Which images of a folder are to be looked at, in an order that tells nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_artifacts.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})


@dataclass(frozen=True, slots=True)
class LabelImage:
    """One image to look at."""

    file: str  # its path as seen from the folder, with forward slashes: what tables call it
    path: Path
    hide_path: bool = False  # it says what the guard thought of the image, which whoever labels should not know
    kept: bool = False  # by the guard of a run


def find_images(folder: str | os.PathLike[str], kept: int | None = None) -> list[LabelImage]:
    """The images of a folder and those below it, in an order drawn by lot from their names.

    The order is the same for every rater, and more images do not change it among the old ones. So whoever stops early
    has labelled a random sample. Hidden files are left out. Of the folder of a run of ``generate_clean`` the finished
    images count, kept and audited; not those that a safety checker has painted black.

    Args:
        kept: Of the images that guards of runs kept, only this many. None: all.
    Raises:
        InputError: If the folder is missing or holds no image, or the folder of a run is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    if kept is not None and kept < 0:
        raise InputError(f"kept must be at least 0, got {kept}")
    runs = _run_folders(folder)
    images = [image for run in runs for image in _of_run(run, folder)]
    if kept is not None and not runs:
        raise InputError(f"kept counts the kept images of runs, but {folder} holds no run")
    run_folders = set(runs)
    images += [LabelImage(_name(path, folder), path) for path in _files(folder) if run_folders.isdisjoint(path.parents)]
    if not images:
        raise InputError(f"{folder} holds no finished image ({', '.join(sorted(SUFFIXES))})")
    images.sort(key=lambda image: hashlib.sha256(image.file.encode()).digest())
    if kept is None:
        return images
    chosen = {image.file for image in [image for image in images if image.kept][:kept]}
    return [image for image in images if not image.kept or image.file in chosen]


def _run_folders(folder: Path) -> list[Path]:
    # Two files of a run, not one: others may call a file run.json too.
    return sorted(path.parent for path in folder.rglob("run.json") if (path.parent / "waves").is_dir())


def _of_run(run: Path, folder: Path) -> Iterator[LabelImage]:
    from moe_artifacts.guard.run_folder import read_run  # takes seconds: it imports torch

    for attempt in read_run(run).attempts:
        if attempt.file is not None and not attempt.nsfw_content_detected:
            path = run / attempt.file
            yield LabelImage(_name(path, folder), path, hide_path=True, kept=attempt.kept)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def _name(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"the name of {os.fsencode(path)!r} is not UTF-8, so no table can hold it; rename it"
        ) from None
    return name
