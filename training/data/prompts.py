"""Free prompts over the ten classes of Fashion-MNIST: synonyms in templates.

The templates marked as held out are never used to train a scorer, so that its figures are on unseen prompts as well as
on unseen seeds.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch

CLASS_NAMES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("t-shirt", "tee", "top", "short sleeved top"),
    ("trousers", "pants", "slacks", "pair of trousers"),
    ("pullover", "sweater", "jumper", "knitted pullover"),
    ("dress", "gown", "frock", "long dress"),
    ("coat", "jacket", "overcoat", "winter coat"),
    ("sandal", "open shoe", "summer sandal", "strappy sandal"),
    ("shirt", "blouse", "button shirt", "long sleeved shirt"),
    ("sneaker", "running shoe", "trainer", "sports shoe"),
    ("bag", "handbag", "purse", "tote bag"),
    ("ankle boot", "boot", "leather boot", "high boot"),
)
TEMPLATES = (
    "{}", "a {}", "an image of a {}", "a photo of a {}", "a picture of one {}", "a grey {}", "the {}", "{} on black",
    "a {} on a black background", "product photo of a {}", "a small photo of the {}", "one {} from the shop",
    "a plain {}", "studio photo of a {}",
)  # fmt: skip
HELD_OUT_TEMPLATES = ("a nice {}", "a photo of the {} on black", "one plain {}", "shop picture of a {}")


def prompts_of(label: int, split: Literal["train", "held-out", "all"]) -> list[str]:
    """Every prompt of a class in a split, in a fixed order."""
    templates = {"train": TEMPLATES, "held-out": HELD_OUT_TEMPLATES, "all": TEMPLATES + HELD_OUT_TEMPLATES}[split]
    filled = [t.format(s) for t, s in itertools.product(templates, SYNONYMS[label])]
    return [
        p.replace("a ankle", "an ankle").replace("a open", "an open").replace("a overcoat", "an overcoat")
        for p in filled
    ]


def draw_prompts(
    count: int, split: Literal["train", "held-out", "all"], generator: torch.Generator
) -> tuple[list[str], torch.Tensor]:
    """``count`` prompts drawn independently, class first, with their labels int64 [count]."""
    labels = torch.randint(len(CLASS_NAMES), (count,), generator=generator)
    pick = torch.rand(count, generator=generator)
    pools = [prompts_of(label, split) for label in range(len(CLASS_NAMES))]
    prompts = [pools[k][int(u * len(pools[k]))] for k, u in zip(labels.tolist(), pick.tolist(), strict=True)]
    return prompts, labels
