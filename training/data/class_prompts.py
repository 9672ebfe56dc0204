"""Prompts for classes that are named by folders: ``ankle_boot`` becomes "a photo of an ankle boot".

A template holds the name of the class once, as ``{}``. The last third of the templates is held out: no scorer is trained on
its prompts, so that its figures are on unseen prompts as well as on unseen seeds. The generator learns all of them.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from moe_artifacts.errors import InputError
from moe_artifacts.judge import class_in

NAME = "{}"
TEMPLATES = tuple(
    map("".join, itertools.product(
        ("", "an image of ", "a photo of ", "a picture of ", "a view of ", "a close-up of "),
        ("{}", "a {}", "the {}", "one {}"),
    ))
) + tuple(
    map("".join, itertools.product(
        ("a shot of ", "a scan of ", "an example of "),
        ("a {}", "the {}", "one {}", "some {}"),
    ))
)  # fmt: skip


def class_name(folder: str) -> str:
    """What prompts call the class of a folder.

    Example:
        >>> class_name("Ankle_Boot"), class_name("T-shirt"), class_name("Straße")
        ('ankle boot', 't-shirt', 'straße')
    """
    return " ".join(unicodedata.normalize("NFKC", folder.replace("_", " ")).lower().split())


def fill(template: str, name: str) -> str:
    """The prompt, with the article that the name wants.

    Example:
        >>> fill("a photo of a {}", "ankle boot"), fill("a photo of a {}", "bag")
        ('a photo of an ankle boot', 'a photo of a bag')
    """
    if name[0] in "aeiou":
        template = re.sub(r"\b([Aa]) \{\}", r"\1n {}", template)
    return template.replace(NAME, name)  # not str.format: a template of the user's may hold other braces


def read_templates(path: Path) -> tuple[str, ...]:
    """The lines of a text file; empty ones and repeated ones are left out.

    Raises:
        InputError: If the file cannot be read, or a line does not hold ``{}`` once.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the templates in {path}: {error}") from error
    templates = tuple(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
    for template in templates:
        if template.count(NAME) != 1:
            raise InputError(f"{path}: a template must hold {NAME} once, for the name of the class, got {template!r}")
    return templates


def clear_templates(names: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
    """Those templates in which every class is recognised by :func:`moe_artifacts.judge.class_in`.

    "an image of a cat" asks for no cat where another class is called "image".

    Raises:
        InputError: If fewer than two are left: one to train with and one that is held out.
    """
    classes = [[name] for name in names]
    clear = tuple(
        template
        for template in templates
        if all(class_in(fill(template, name), classes) == k for k, name in enumerate(names))
    )
    if len(clear) < 2:
        raise InputError(
            f"at least 2 templates are needed in which every class can be told by its name, got {len(clear)} of "
            f"{len(templates)}: give --templates whose own words are not the name of a class"
        )
    return clear


def prompts_table(names: Sequence[str], templates: Sequence[str]) -> pa.Table:
    """Columns prompt, split and group (the class), as ``training.own.collect`` reads them.

    Validation has the prompts of training and test those of calibration; what is drawn for them differs by its seeds.
    """
    held_out = max(1, len(templates) // 3)
    of_split = {
        "train": templates[:-held_out],
        "validation": templates[:-held_out],
        "calibration": templates[-held_out:],
        "test": templates[-held_out:],
    }
    rows = [
        (fill(template, name), split, name)
        for split, chosen in of_split.items()
        for name in names
        for template in chosen
    ]
    prompt, split, group = zip(*rows, strict=True)
    return pa.table({"prompt": prompt, "split": split, "group": group})
