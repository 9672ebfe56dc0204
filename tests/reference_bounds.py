"""Slow, obvious versions of the bounds and of certification, in plain Python numbers: what the tests compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Image = tuple[float, float, int]  # statistic, label, place of its unit in the order of the bets


def bets(num_units: int, max_risk: float, confidence: float) -> list[tuple[float, float]]:
    """Share and weight of each."""
    kelly = (1 - max_risk) * math.sqrt(2 * math.log(1 / (1 - confidence)) / (num_units * max_risk * (1 - max_risk)))
    lowest = min(0.8, kelly)
    shares = [lowest ** (k / 7) for k in range(8)]
    reserved = min(1, (1 - max_risk) ** num_units / (1 - confidence))
    weights = [0.7**k for k in range(8)]
    weights = [w / sum(weights) * (1 - reserved) for w in weights]
    weights[0] += reserved
    return list(zip(shares, weights, strict=True))


def betting_p_value(excess: Sequence[float], max_risk: float, confidence: float) -> float:
    most = 1.0
    capital = bets(max(len(excess), 1), max_risk, confidence)
    for e in excess:
        capital = [(share, money * max(0.0, 1 - share * e / (1 - max_risk))) for share, money in capital]
        most = max(most, sum(money for _, money in capital))
    return 1 / most


def binomial_tail(k: int, n: int, rate: float) -> float:
    return sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(k + 1))


def p_value(
    name: str, threshold: float, images: Sequence[Image], max_risk: float, confidence: float, *, cap: int, counted: bool
) -> float:
    """Of one risk at one threshold; ``counted``: every image a unit with a label of 0 or 1."""
    wrong: dict[int, float] = {}
    total: dict[int, float] = {}
    for statistic, label, unit in images:
        aborted = statistic >= threshold
        weight = {"miss": label, "wrong-aborts": float(aborted)}.get(name, 1 - label)
        fault = {"miss": label * (not aborted)}.get(name, (1 - label) * aborted)
        wrong[unit] = wrong.get(unit, 0) + fault
        total[unit] = total.get(unit, 0) + weight
    if counted:
        n = round(sum(total.values()))
        return binomial_tail(round(sum(wrong.values())), n, max_risk)
    units = sorted(total)
    if name == "false-aborts-per-prompt":
        excess = [wrong[u] / total[u] - max_risk for u in units if total[u] > 0]
    else:
        excess = [(wrong[u] - max_risk * total[u]) / cap for u in units]
    return betting_p_value(excess, max_risk, confidence)


def walk(
    name: str, images: Sequence[Image], max_risk: float, confidence: float, *, cap: int, counted: bool
) -> float | None:
    """From the safest threshold on, step by step until the first that fails; None if that is the safest."""
    miss = name == "miss"
    values = sorted({s for s, label, _ in images if (label if miss else 1 - label) > 0}, reverse=not miss)
    last = None
    for value in values:
        threshold = value if miss else max(float(np.nextafter(np.float32(value), np.float32(2))), 2.0**-126)
        if p_value(name, threshold, images, max_risk, confidence, cap=cap, counted=counted) > 1 - confidence:
            break
        last = threshold
    return last
