"""The folder of a long run: what was asked, what became of every attempt, and the images, so that a killed run resumes.

    run.json                     what was asked: written once, at the start
    images/p00012-a0003.png      kept images by the place of their prompt and their attempt, with their settings as text
    audited/p00012-a0004.png     images that would have been aborted, finished to be looked at
    waves/000007.json            one per finished wave: written last, so it says that the files it names are there

A wave is committed by one move of its file. What a killed run leaves without its wave is removed when the run resumes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import reprlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import moe_artifacts
from moe_artifacts.config import ThresholdConfig, from_dict, to_dict
from moe_artifacts.errors import ConfigError, GuardStateError, InputError
from moe_artifacts.files import atomic_path, read_json, write_json
from moe_artifacts.guard.output import Setting
from moe_artifacts.verdict import Status

FORMAT_VERSION = 1
RUN_NAME, IMAGES_NAME, AUDITED_NAME, WAVES_NAME = "run.json", "images", "audited", "waves"
# Every key of run.json; ``version`` is for people and may differ when a run resumes.
SETTINGS = (
    "format_version", "version", "pipeline", "model", "dtype", "scheduler", "call", "scorer", "rule", "audit_rate",
    "audit_seed", "seed", "images_per_prompt", "prompts",
)  # fmt: skip

_IMAGE = re.compile(rf"(?:{IMAGES_NAME}|{AUDITED_NAME})/p\d{{5,}}-a\d{{4,}}\.png")
_WAVE = re.compile(r"\d{6,}\.json")
_UNFINISHED = re.compile(r"\.(?:run|p\d+-a\d+|\d+)\.(?:json|png)-\w+")  # the temporary folders of files.atomic_path


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """What became of one image that was tried."""

    prompt_index: int
    prompt: str
    attempt: int  # 0-based, among those of its prompt
    seed: int
    status: Status
    step: int | None  # 0-based denoising step of the decision
    audited: bool  # would have been aborted at ``step``, finished to be looked at
    artifact_prob: float | None  # None: not scored
    cumulative_artifact_prob: float | None
    prompt_truncated: bool
    nsfw_content_detected: bool | None  # by the pipeline's safety checker; None: not checked
    file: str | None  # in the folder of the run; None: no image was finished, or the run has no folder

    @property
    def kept(self) -> bool:
        return self.status in ("kept", "cleared")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wave:
    """One call of the pipeline."""

    attempts: tuple[Attempt, ...]  # in the order of the batch
    steps_run: int  # denoiser steps, summed over images
    steps_full: int  # the same without the guard
    setting: Setting


@dataclass(frozen=True)
class RunRecord:
    """All that a folder says of its run, whether it is finished or not."""

    folder: Path
    settings: dict[str, Any]  # run.json; its keys are SETTINGS
    waves: list[Wave]

    @property
    def attempts(self) -> list[Attempt]:
        """In the order in which they were made."""
        return [attempt for wave in self.waves for attempt in wave.attempts]

    @property
    def rule(self) -> ThresholdConfig:
        """The rule that decided, with what it promises."""
        return from_dict(ThresholdConfig, self.settings["rule"], f"{self.folder / RUN_NAME}: rule")


def read_run(folder: str | os.PathLike[str]) -> RunRecord:
    """Read the folder of a run that is finished, stopped or still going on.

    Raises:
        InputError: If it holds no run, or is damaged.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    return RunRecord(folder, settings, list(iter_waves(folder, settings["prompts"])))


def read_settings(folder: Path) -> dict[str, Any]:
    """run.json.

    Raises:
        InputError: If it is missing, damaged or of another format.
    """
    path = folder / RUN_NAME
    if not path.exists():
        raise InputError(f"{folder} is not the folder of a run: {RUN_NAME} not found")
    settings = read_json(path)
    version = settings.get("format_version") if isinstance(settings, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path} must be a JSON object with format_version {FORMAT_VERSION}, got {version!r}")
    if set(settings) != set(SETTINGS):
        raise InputError(f"{path} must have the keys {sorted(SETTINGS)}, got {sorted(settings)}")
    prompts = settings["prompts"]
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"{path}: prompts must be a list of texts, got {reprlib.repr(prompts)}")
    return settings


def iter_waves(folder: Path, prompts: list[str]) -> Iterator[Wave]:
    """The committed waves in order, one file at a time.

    Raises:
        InputError: If one is missing or damaged, or an attempt is there twice or not of one of ``prompts``.
    """
    waves = folder / WAVES_NAME
    found = [path.name for path in waves.iterdir() if _WAVE.fullmatch(path.name)] if waves.is_dir() else []
    seen: set[tuple[int, int]] = set()
    for number, name in enumerate(sorted(found, key=lambda name: int(Path(name).stem))):
        path = waves / name
        if name != wave_name(number):
            raise InputError(f"{waves / wave_name(number)} is missing, but {name} is there: the run is damaged")
        try:
            wave = from_dict(Wave, read_json(path), str(path))
        except ConfigError as error:
            raise InputError(f"{path} is not a wave of this release: {error}") from error
        if not wave.attempts:
            raise InputError(f"{path} has no attempts: the run is damaged")
        for attempt in wave.attempts:
            where = (attempt.prompt_index, attempt.attempt)
            if where in seen or not 0 <= where[0] < len(prompts) or prompts[where[0]] != attempt.prompt:
                raise InputError(
                    f"{path}: attempt {where[1]} of prompt {where[0]}, {attempt.prompt!r}, is there twice, or is not "
                    f"of the prompt that {RUN_NAME} has there"
                )
            if attempt.file is not None and not _IMAGE.fullmatch(attempt.file):  # nothing outside the folder
                raise InputError(f"{path}: file must be like {image_name(0, 0)!r}, got {attempt.file!r}")
            seen.add(where)
        yield wave


class RunWriter:
    """Writes the folder of a run, and resumes one that was stopped: ``waves`` are those that are committed.

    While open it holds a lock on the folder, which the system frees however the process ends.

    Args:
        settings: Plain JSON values with the keys ``SETTINGS``.
    Raises:
        InputError: On entering, if the folder holds something else than a run, a damaged one, or one with other settings.
        GuardStateError: On entering, if another writer has it open.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.waves: list[Wave] = []
        self._settings = json.loads(json.dumps(settings))  # as it will be read: tuples become lists

    def __enter__(self) -> RunWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            self._take_lock()
            if (self.folder / RUN_NAME).exists():
                self._resume()
            else:
                self._start()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def commit(self, wave: Wave, images: Sequence[Image.Image | None]) -> None:
        """Write the images of a wave, and then the wave itself.

        Args:
            images: One per attempt; None where it has no ``file``.
        """
        for attempt, image in zip(wave.attempts, images, strict=True):
            if attempt.file is not None:
                assert image is not None, f"an attempt with the file {attempt.file} has no image"
                with atomic_path(self.folder / attempt.file) as temporary:
                    image.save(temporary, format="PNG", pnginfo=self._text(attempt))
        write_json(self.folder / WAVES_NAME / wave_name(len(self.waves)), to_dict(wave))
        self.waves.append(wave)

    def _text(self, attempt: Attempt) -> PngInfo:
        """What makes the image again, for people and programs that meet it outside the folder."""
        settings = {name: value for name, value in self._settings.items() if name not in ("prompts", "version")}
        text = PngInfo()
        for name, value in {
            "prompt": attempt.prompt,
            "seed": str(attempt.seed),
            "attempt": str(attempt.attempt),
            "settings": json.dumps(settings),
            "moe_artifacts": moe_artifacts.__version__,
        }.items():
            text.add_itxt(name, value)  # UTF-8; the other kind of text chunk is Latin-1
        return text

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GuardStateError(
                f"{self.folder} is being written by another run: wait for it, or give another folder"
            ) from error
        except OSError:
            pass  # a file system without locks

    def _start(self) -> None:
        if others := sorted(p.name for p in self.folder.iterdir() if not _UNFINISHED.fullmatch(p.name)):
            raise InputError(
                f"{self.folder} holds {others[0]!r} and no {RUN_NAME}: give an empty folder or one of a run"
            )
        self._remove_unfinished()
        write_json(self.folder / RUN_NAME, self._settings)

    def _resume(self) -> None:
        found = read_settings(self.folder)
        if differences := _differences(found, self._settings):
            raise InputError(
                f"{self.folder} holds a run with other settings: {'; '.join(differences)}. Give another folder, or the "
                "settings it was started with"
            )
        self.waves = list(iter_waves(self.folder, found["prompts"]))
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """What a killed run has left: files that were not whole yet, and images without their wave."""
        committed = {attempt.file for wave in self.waves for attempt in wave.attempts}
        for name in ("", IMAGES_NAME, AUDITED_NAME, WAVES_NAME):
            part = self.folder / name
            for path in part.iterdir() if part.is_dir() else ():
                file = path.relative_to(self.folder).as_posix()
                if _UNFINISHED.fullmatch(path.name):
                    shutil.rmtree(path)
                elif _IMAGE.fullmatch(file) and file not in committed:
                    path.unlink()


def image_name(prompt_index: int, attempt: int, audited: bool = False) -> str:
    """Where an image lies in the folder of its run.

    Example:
        >>> image_name(12, 3), image_name(12, 4, audited=True)
        ('images/p00012-a0003.png', 'audited/p00012-a0004.png')
    """
    return f"{AUDITED_NAME if audited else IMAGES_NAME}/p{prompt_index:05d}-a{attempt:04d}.png"


def wave_name(number: int) -> str:
    return f"{number:06d}.json"


def _differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Where the settings differ that say what the images are; the first five."""
    was, now = _flat(found), _flat(asked)
    names, absent = [name for name in {**was, **now} if name != "version"], object()
    different = [name for name in names if was.get(name, absent) != now.get(name, absent)]
    short = reprlib.Repr()
    short.maxstring = 80

    def told(values: Mapping[str, Any], name: str) -> str:
        return short.repr(values[name]) if name in values else "not given"

    shown = [f"{name} {told(now, name)} instead of {told(was, name)}" for name in different[:5]]
    return shown + [f"and {len(different) - 5} more"] * (len(different) > 5)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested values by names like ``call.size[0]``."""
    if isinstance(value, dict) and value:
        parts = [_flat(part, f"{name}.{key}" if name else key) for key, part in value.items()]
    elif isinstance(value, list) and value:
        parts = [_flat(part, f"{name}[{number}]") for number, part in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for part in parts for key, leaf in part.items()}
