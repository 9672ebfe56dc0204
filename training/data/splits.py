"""Splits that share neither a prompt nor a user.

Images are linked if they have the same prompt or were made by the same user; what hangs together, over however many links,
is one group and goes into one split. Otherwise a scorer could know a held-out image's prompt, or its author's habits, from
training.
"""

from __future__ import annotations

import argparse
import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moe_artifacts.errors import InputError

SPLITS = ("train", "validation", "test")


def same_prompt(prompt: str) -> str:
    """What prompts are compared by: compatible characters, case and spaces do not tell two apart.

    Example:
        >>> same_prompt("  A\u00a0CAT,  4k ") == same_prompt("a cat, 4K")
        True
    """
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def linked_groups(prompts: Sequence[str], users: Sequence[str | None] | None = None) -> Int[np.ndarray, " image"]:
    """The group of each image, numbered from 0 in the order of first appearance.

    Args:
        users: Of each image; None where it is unknown, which links the image to no other.
    Raises:
        InputError: If there is not one user per prompt.
    """
    if users is not None and len(users) != len(prompts):
        raise InputError(f"users must be as many as prompts, {len(prompts)}, got {len(users)}")
    prompt = _codes([same_prompt(text) for text in prompts])
    nodes = _count(prompt)
    edges = np.empty((2, 0), dtype=np.int64)
    if users is not None:
        known = np.array([user is not None for user in users], dtype=bool)
        user = _codes([name for name in users if name is not None])
        edges = np.stack([prompt[known], user + nodes])  # prompts and users are the nodes, images the edges
        nodes += _count(user)
    graph = coo_array((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(nodes, nodes))
    _, component = connected_components(graph, directed=False)
    return _codes(component[prompt].tolist())


def assign_splits(
    keys: Sequence[str], groups: Int[np.ndarray, " image"], shares: tuple[float, float, float], seed: int
) -> list[str]:
    """The split of each image, whole groups at a time, near the shares asked for.

    Groups come in a random order, each to the split that lacks most of its share and has room for it; one that is too
    large for the others goes to training. The outcome depends on the keys, the groups and the seed, not on the order of rows.

    Args:
        keys: Ids of the images, each once.
        groups: Of :func:`linked_groups`.
        shares: Of the images, for training, validation and test; a share may be 0, that of training not.
    Raises:
        InputError: If the shares are not that, or a split that has a share is left empty.
    """
    if len(shares) != 3 or min(shares) < 0 or shares[0] == 0 or not np.isclose(sum(shares), 1):
        raise InputError(f"shares must be three numbers >= 0 that add up to 1, the first above 0, got {shares}")
    if len(keys) == 0:
        return []
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    names: dict[int, str] = {}  # of each group, its smallest key
    for key, group in zip(keys, group_of.tolist(), strict=True):
        names[group] = min(names.get(group, key), key)
    targets = [max(round(share * len(keys)), 1) if share else 0 for share in shares]

    def turn(group: int) -> tuple[bool, bytes]:
        """Those that only training can take come first, the others at random."""
        return bool(sizes[group] <= max(targets[1:])), hashlib.sha256(f"{seed} {names[group]}".encode()).digest()

    filled = [0] * len(shares)
    split_of = np.zeros(len(sizes), dtype=np.int64)  # training, where nothing else is said
    for group in sorted(names, key=turn):
        size = int(sizes[group])
        room = [k for k in range(len(shares)) if filled[k] + size <= targets[k]]
        chosen = max(room, key=lambda k: (targets[k] - filled[k]) / targets[k]) if room else 0
        split_of[group] = chosen
        filled[chosen] += size
    for name, share, count in zip(SPLITS, shares, filled, strict=True):
        if share and not count:
            raise InputError(
                f"no image is left for the split {name!r}: the {len(keys)} images hang together by prompts and users in "
                f"{len(sizes)} groups, the largest of {sizes.max()}; a split without a leak needs more prompts and users, "
                "or other shares"
            )
    return [SPLITS[k] for k in split_of[group_of].tolist()]


def split_summary(table: pa.Table) -> str:
    """Images, mean label, prompts and groups of each split, as a table."""
    lines = [f"{'split':<12}{'images':>12}{'mean label':>12}{'prompts':>12}{'groups':>12}{'largest':>12}"]
    for split in SPLITS:
        rows = table.filter(pc.equal(table["split"], split))
        if len(rows):
            label, groups = pc.mean(rows["label"]).as_py(), np.bincount(rows["group"].to_numpy())
            prompts = pc.count_distinct(rows["prompt"]).as_py()
            lines.append(
                f"{split:<12}{len(rows):>12,}{label:>12.3f}{prompts:>12,}{(groups > 0).sum():>12,}{groups.max():>12,}"
            )
    return "\n".join(lines)


def add_split_options(parser: argparse.ArgumentParser, shares: Sequence[float], seed: int) -> None:
    """``--shares`` and ``--seed``, with these defaults."""
    parser.add_argument(
        "--shares",
        type=float,
        nargs=3,
        default=shares,
        metavar=tuple(name.upper() for name in SPLITS),
        help="of the images (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=seed, help="of the splits (%(default)s)")


def _codes(values: Sequence[str] | Sequence[int]) -> Int[np.ndarray, " value"]:
    """Equal values get equal numbers, from 0 in the order of first appearance."""
    numbers: dict[str | int, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def _count(codes: Int[np.ndarray, " value"]) -> int:
    return int(codes.max()) + 1 if len(codes) else 0
