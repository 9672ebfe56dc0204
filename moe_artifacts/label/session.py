"""Keys to verdicts, one image after the other, with undo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moe_artifacts.label.images import LabelImage
from moe_artifacts.label.table import ARTIFACT, CLEAN, SKIPPED, Table

HELP = "a artifacts   c clean   u undo   s skip   q quit"
VERDICTS = {"a": ARTIFACT, "c": CLEAN}
_WORDS = {ARTIFACT: "artifacts", CLEAN: "clean", SKIPPED: "skipped", None: "no verdict"}


@runtime_checkable  # for `make shapes`
class Rater(Protocol):
    """Where the images are shown and the keys come from; ``terminal.Terminal`` is one."""

    def show(self, image: LabelImage, heading: str) -> None: ...

    def say(self, text: str) -> None: ...

    def key(self, known: str) -> str:
        """The next key, one of ``known``; "q" when there are no more."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What the table says of the images at the end."""

    images: int
    artifact: int
    clean: int
    skipped: int

    def __str__(self) -> str:
        left = self.images - self.artifact - self.clean - self.skipped
        return (
            f"{self.images:,} images: {self.artifact:,} with artifacts, {self.clean:,} clean, {self.skipped:,} skipped, "
            f"{left:,} to do"
        )


def label_images(images: Sequence[LabelImage], table: Table, rater: Rater, *, redo: bool = False) -> Outcome:
    """Ask about each image that has no row in the table; every answer is stored before the next image is shown.

    Undo goes back by one image and restores what the table said of it. Skipping leaves an earlier verdict as it is.
    After the last image undo is still possible.

    Args:
        redo: Ask about every image, those with a verdict too.
    """
    asked = [image for image in images if redo or table.get(image) is None]
    before: list[str | None] = []  # what the table said of asked[:len(before)] until this session
    while asked:
        if len(before) < len(asked):
            image = asked[len(before)]
            verdict = table.get(image)
            so_far = f", so far {_WORDS[verdict]}" if verdict is not None else ""
            rater.show(image, f"{len(images) - len(asked) + len(before) + 1} of {len(images)}{so_far}")
            rater.say(HELP)
            key = rater.key("acusq")
        else:
            rater.say("that was the last image: u undo, q quit")
            key = rater.key("uq")
        if key == "q":
            break
        if key == "u":
            if before:
                previous = before.pop()
                table.put(asked[len(before)], previous)
                rater.say("undone")
            else:
                rater.say("nothing to undo")
            continue
        known = table.get(image)
        given = VERDICTS.get(key, known or SKIPPED)
        if given != known:
            table.put(image, given)
        before.append(known)
        rater.say(_WORDS[given])
    verdicts = [table.get(image) for image in images]
    return Outcome(len(images), *(verdicts.count(kind) for kind in (ARTIFACT, CLEAN, SKIPPED)))
