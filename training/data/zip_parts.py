"""DiffusionDB's zip parts, read in place: part-000001.zip and on, of 1,000 images each, nothing unpacked to disk."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from training.data.images import BadImage

PART = re.compile(r"part-(\d+)\.zip")
MAX_BYTES = 256 * 2**20  # of one member, unpacked; a large image of DiffusionDB has 10 MB
KEPT_OPEN = 16  # zip files; each holds the table of its members in memory


def find_parts(folder: Path) -> dict[int, list[str]]:
    """The zip files of every part number, relative to ``folder``.

    Parts of both subsets (``images`` of 2M, ``diffusiondb-large-part-1`` of Large) have the same numbers, hence the lists.
    """
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("part-*.zip")):
        if match := PART.fullmatch(path.name):
            found[int(match[1])].append(path.relative_to(folder).as_posix())
    return dict(found)


class ZipParts:
    """Members of zip files under a folder; the last few zip files used stay open.

    Not for several threads at once; each process has its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, tuple[zipfile.ZipFile, Mapping[str, str]]] = OrderedDict()

    def __enter__(self) -> ZipParts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the zip files; the next read opens them again."""
        while self._open:
            self._open.popitem()[1][0].close()

    def members(self, part: str) -> Mapping[str, str]:
        """The full name of every member by its file name, wherever in the zip it lies.

        Raises:
            BadImage: With the reason ``archive``, if the zip file cannot be opened.
        """
        return self._part(part)[1]

    def read(self, part: str, member: str) -> bytes:
        """The bytes of a member, its checksum verified.

        Raises:
            BadImage: With the reason ``archive``, if it is not there, damaged, or would unpack to more than MAX_BYTES.
        """
        name = f"{part}/{member}"
        file = self._part(part)[0]
        try:
            size = file.getinfo(member).file_size
            if size > MAX_BYTES:
                raise BadImage("archive", name, f"would unpack to {size} bytes, more than {MAX_BYTES}")
            return file.read(member)
        except KeyError as error:
            raise BadImage("archive", name, "is not in the zip file") from error
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            # RuntimeError: a password is needed; NotImplementedError: another compression
            raise BadImage("archive", name, f"{type(error).__name__}: {error}") from error

    def _part(self, part: str) -> tuple[zipfile.ZipFile, Mapping[str, str]]:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        try:
            file = zipfile.ZipFile(self.folder / part)
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise BadImage("archive", part, f"cannot be opened as a zip file: {error}") from error
        self._open[part] = file, {name.rpartition("/")[2]: name for name in file.namelist()}
        if len(self._open) > KEPT_OPEN:
            self._open.popitem(last=False)[1][0].close()
        return self._open[part]
