"""How many images, and audits, it takes until an audit can tell whether a promise is kept: worked out, not simulated.

As in ``rates.py``, of the clean images seen those that would have been aborted are binomial, with the share q(F).
For a true rate F above the promise ``max_risk`` this looks for the smallest x, and the fewest seen images m, with

    P(at least x of m | q(F)) >= power    so many wrong aborts are found that often,
    P(at least x of m | q(max_risk)) <= tail    and would hardly ever be, if the promise were kept;

for one below it, the same with "at most x".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from moe_artifacts.errors import InputError

MOST_WRONG = 5_000  # a plan that takes more wrong aborts than that is refused


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """Expected numbers, rounded up."""

    images: int  # attempts under the guard; the kept ones are all labelled
    audits: int  # would-be aborts that are finished, and labelled
    wrong: int  # of these, clean: the promise is called broken from so many on, or kept up to so many


def plan_audit(
    *,
    max_risk: float,
    true_rate: float,
    audit_rate: float,
    clean_share: float,
    recall: float,
    confidence: float = 0.95,
    power: float = 0.8,
) -> AuditPlan:
    """What it takes to see that a promise is broken, or kept.

    Args:
        max_risk: False-abort rate that was promised.
        true_rate: The real one; the promise is broken if it is above ``max_risk``.
        audit_rate: Share of the would-be aborts that is finished.
        clean_share: Of the images, were none aborted.
        recall: Share of the bad images that is aborted.
        confidence: Of the two-sided interval that has to lie on one side of ``max_risk``.
        power: Chance that it does.
    Raises:
        InputError: If a number is not in (0, 1), where 1 will do for ``audit_rate``, ``clean_share`` and ``recall``, or
            the two rates are too close to be told apart.
    Example:
        >>> plan_audit(max_risk=0.05, true_rate=0.1, audit_rate=0.1, clean_share=0.75, recall=0.6)
        AuditPlan(images=2563, audits=58, wrong=16)
    """
    for name, value in {"max_risk": max_risk, "true_rate": true_rate, "confidence": confidence, "power": power}.items():
        if not 0 < value < 1:
            raise InputError(f"{name} must be between 0 and 1, both excluded, got {value!r}")
    for name, value in {"audit_rate": audit_rate, "clean_share": clean_share, "recall": recall}.items():
        if not 0 < value <= 1:
            raise InputError(f"{name} must be in (0, 1], got {value!r}")
    from scipy.special import betainc

    tail = (1 - confidence) / 2

    def at_least(x: int, m: int, rate: float) -> float:
        """P(at least x of m seen images would have been aborted)."""
        share = rate * audit_rate / (rate * audit_rate + 1 - rate)
        if not 0 < x <= m:
            return float(x <= 0)
        return float(betainc(x, m - x + 1, share))

    def to_see_it_broken(x: int) -> tuple[int, bool]:
        m = _fewest(lambda m: at_least(x, m, true_rate) >= power)
        return m, at_least(x, m, max_risk) <= tail

    def to_see_it_kept(x: int) -> tuple[int, bool]:
        m = _fewest(lambda m: 1 - at_least(x + 1, m, max_risk) <= tail)
        return m, 1 - at_least(x + 1, m, true_rate) >= power

    needed = to_see_it_broken if true_rate > max_risk else to_see_it_kept
    for wrong in range(MOST_WRONG):
        seen, tells = needed(wrong)
        if tells:
            break
    else:
        raise InputError(
            f"true_rate={true_rate} is too close to max_risk={max_risk}: telling them apart takes more than {MOST_WRONG} "
            "wrong aborts"
        )
    images = seen / (clean_share * (true_rate * audit_rate + 1 - true_rate))
    aborts = images * (clean_share * true_rate + (1 - clean_share) * recall)
    return AuditPlan(math.ceil(images), math.ceil(aborts * audit_rate), wrong)


def _fewest(enough: Callable[[int], bool]) -> int:
    """Smallest number, from 1 on, that is enough, of those that stay enough."""
    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
