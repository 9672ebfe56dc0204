"""What a sample says about a rate: exact binomial tails, and bets against it.

Betting (Waudby-Smith and Ramdas, 2023, arXiv:2010.09686): whoever doubts that a mean is above ``max_risk`` bets against it,
unit after unit. With the excess e = (value of the unit) - max_risk, at most 1 - max_risk, the capital of one bet is

    capital_j = prod_{i <= j} (1 - share * e_i / (1 - max_risk))          0 < share <= 1

It is never negative, and where the mean is at or above ``max_risk`` it is not expected to grow. So it ever reaches 1 / p
with probability p at most (Ville, 1939), and so does a weighted mean of such capitals. One difference to the paper: constant
shares, mixed with weights that depend on the number of units alone, in place of a share learned on the way. Every share
is the same at every threshold, so the capital rises as the risk falls, and a threshold can be found by bisection.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from moe_artifacts.errors import InputError

NUM_BETS = 8
LARGEST_LOW_SHARE = (
    0.8  # of the most cautious bet, however few the units: one unit that is all wrong must not end it all
)
NEXT_WEIGHT = 0.7  # of each bet, relative to the next bolder one
ROUNDING = 1e-9  # relative; a tie of a p-value with its level must not depend on the last digit


def is_small(p_value: float, level: float) -> bool:
    """``p_value <= level``, ties included whatever the rounding."""
    return p_value <= level * (1 + ROUNDING)


def binomial_p_value(k: int, n: int, max_risk: float) -> float:
    """P(Binomial(n, max_risk) <= k): how likely so few are, were the rate ``max_risk``; 1 where n is 0.

    Example:
        >>> round(binomial_p_value(0, 59, 0.05), 4), round(binomial_p_value(0, 58, 0.05), 4)
        (0.0485, 0.051)
    """
    from scipy.special import bdtr

    return float(bdtr(k, n, max_risk)) if n else 1.0


def allowed_aborts(num_clean: int, max_risk: float, confidence: float) -> int:
    """Largest k below ``num_clean`` with P(Binomial(num_clean, max_risk) <= k) <= 1 - confidence; -1 if there is none."""
    low, high = -1, num_clean - 1
    while low < high:  # the tail rises with k
        middle = (low + high + 1) // 2
        enough = is_small(binomial_p_value(middle, num_clean, max_risk), 1 - confidence)
        low, high = (middle, high) if enough else (low, middle - 1)
    return low


def fewest_units(max_risk: float, confidence: float) -> int:
    """Units needed even if nothing goes wrong on any: the fewest n with (1 - max_risk)^n <= 1 - confidence.

    Example:
        >>> fewest_units(0.05, 0.95), fewest_units(0.1, 0.9)
        (59, 22)
    """
    n = max(1, math.floor(math.log(1 - confidence) / math.log(1 - max_risk)))
    while not is_small((1 - max_risk) ** n, 1 - confidence):
        n += 1
    return n


def bets(
    num_units: int, max_risk: float, confidence: float
) -> tuple[Float[np.ndarray, " bet"], Float[np.ndarray, " bet"]]:
    """Shares, from 1 down, and their weights, which sum to 1.

    Share 1 is the best bet where the units hardly vary, and is lost for good at the first unit that is all wrong. The
    last one is the best where every unit is all wrong or all right, the largest variance a mean of ``max_risk`` allows,
    were all units needed. The boldest gets at least the weight with which it certifies if nothing goes wrong on any unit.
    """
    variance = max_risk * (1 - max_risk)
    kelly = (1 - max_risk) * math.sqrt(2 * math.log(1 / (1 - confidence)) / (max(num_units, 1) * variance))
    shares = min(LARGEST_LOW_SHARE, kelly) ** (np.arange(NUM_BETS) / (NUM_BETS - 1))
    weights = NEXT_WEIGHT ** np.arange(NUM_BETS)
    reserved = min(1.0, (1 - max_risk) ** num_units / (1 - confidence))
    weights *= (1 - reserved) / weights.sum()
    weights[0] += reserved
    return shares, weights


def betting_p_value(excess: Float[np.ndarray, " unit"], max_risk: float, confidence: float) -> float:
    """How likely it is, were the mean excess above 0, that the bets against it ever win as much as they did.

    Args:
        excess: What each unit has above the promise: values in [0, 1] minus ``max_risk``, or anything else that is at most
            1 - max_risk and has a mean above 0 where the promise is broken. Independent, in an order that does not depend
            on them.
        max_risk: In (0, 1).
        confidence: In (0, 1). It only shapes the bets: the p-value is valid at every level.
    Returns:
        In [0, 1]; never rises where an excess falls.
    Example:
        >>> [round(betting_p_value(np.full(n, -0.05), max_risk=0.05, confidence=0.95), 3) for n in (58, 59, 100)]
        [0.051, 0.049, 0.007]
    """
    log_total = np.full(len(excess), -np.inf)
    with np.errstate(divide="ignore"):  # log(0): a lost bet
        for share, weight in zip(*bets(len(excess), max_risk, confidence), strict=True):
            growth = np.maximum(1 - share / (1 - max_risk) * excess, 0)  # rounding can make it -1e-17
            log_total = np.logaddexp(log_total, np.log(weight) + np.log(growth).cumsum())
    return math.exp(-max(0.0, log_total.max(initial=0.0)))


def clopper_pearson(k: int, n: int, confidence: float) -> tuple[float, float]:
    """Exact two-sided interval of a rate of which ``k`` out of ``n`` were seen (Clopper and Pearson, 1934).

    Example:
        >>> low, high = clopper_pearson(0, 59, 0.9)
        >>> low, round(high, 4)
        (0.0, 0.0495)
    """
    from scipy.stats import beta

    if not (0 <= k <= n and n >= 1):
        raise InputError(f"k must be between 0 and n, and n at least 1, got k={k!r}, n={n!r}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, both excluded, got {confidence!r}")
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return low, high
