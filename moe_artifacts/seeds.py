"""Seeds that follow from what an image is, not from when or beside which others it is made."""

from __future__ import annotations

import hashlib
import json


def attempt_seed(seed: int, prompt: str, attempt: int, occurrence: int = 0) -> int:
    """The seed of one attempt at an image of a prompt: another one for every combination of the arguments.

    Args:
        seed: Of the whole run.
        attempt: 0-based, among those of this prompt.
        occurrence: How often the same prompt came before in the list of prompts.
    Returns:
        In 0..2**53-1: exact in every reader of JSON, some of which have floats only.
    Example:
        >>> attempt_seed(0, "a bag", attempt=0), attempt_seed(0, "a bag", attempt=1)
        (4344874878933995, 2601681251890601)
    """
    # JSON of the list, not the parts in a row: ("a", 11) and ("a1", 1) must differ. SHA-256, not hash(): that one
    # differs between processes.
    digest = hashlib.sha256(json.dumps([seed, prompt, occurrence, attempt]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11
