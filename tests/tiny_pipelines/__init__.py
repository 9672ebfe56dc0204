"""Every pipeline family the guard supports or refuses, tiny and with random weights: nothing is downloaded.

``CASES[name].pipe(scheduler)`` builds one and ``CASES[name].call(prompts, guidance)`` makes the arguments of a call.
"""

from __future__ import annotations

from . import adapters, lumina, packed, transformers, unets
from .case import Case

CASES: dict[str, Case] = {
    case.name: case for case in (*unets.CASES, *transformers.CASES, *lumina.CASES, *packed.CASES, *adapters.CASES)
}
