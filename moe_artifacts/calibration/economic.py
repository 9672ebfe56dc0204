"""The cheapest way to get clean images: where to abort, where to stop looking, and which steps to look at.

Cost per clean image = E[denoiser calls and checks spent] / P(image is kept and clean). With a price V of a clean image, the
cost of an image after a check at which its posterior is a_t is the least of

    abort     0
    clear     f_t = calls left - V (1 - a_t)                       finish, without any further check
    go on     f_t + check - E[f_t+1 - least cost at t+1 | a_t]     what a decision then spares, against finishing

found from the last check backwards. The expectation comes from a Markov chain on bins of the posterior, counted on the
fitting images and made monotone: the higher the posterior, the more a later decision may spare. The best ratio is the one that leads to
itself as the price (Dinkelbach, Management Science 13, 1967). A limit on the false-abort rate is a multiplier on top: a
clean image that is thrown away costs more than it is worth, by so much that the limit holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from moe_artifacts.config import ThresholdConfig
from moe_artifacts.errors import CalibrationError, InputError
from moe_artifacts.policy import Run, spending

BINS = 64  # of the posterior, at most, and at least so many images in each on average:
IMAGES_PER_BIN = 30
ROUNDS = 8  # of the search for a price
HIGHEST_PRICE = 100.0  # in prices without a limit: an abort then needs all but certainty
FLAT_TRIED = 5_000
NEVER = 1.5  # a boundary that no posterior reaches, also where a threshold is moved a little

Prob = Real[np.ndarray, "image step"]
PerStep = Float[np.ndarray, " step"]
Column = Int[np.ndarray, " image"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Boundary:
    """Abort at a posterior >= ``abort``; otherwise stop looking at one < ``clear``."""

    abort: PerStep  # above 1: never at this step
    clear: PerStep  # in [0, 1]; 0: never at this step
    calls: Int[np.ndarray, " step"]
    total_calls: int
    price: float  # V, of a clean image, in denoiser calls
    multiplier: (
        float  # of a wrongly aborted clean image, in denoiser calls, on top of the price; 0 where no limit binds
    )
    cost_per_clean: float  # on the fitting images, in denoiser calls
    false_abort_rate: float  # on the fitting images

    def rule(self) -> ThresholdConfig:
        """The rule that aborts at this boundary, over progress = calls / total_calls; a promise is the caller's to add."""
        columns = (self.calls / self.total_calls, self.abort, self.clear)
        points = tuple((float(u), float(a), float(c)) for u, a, c in zip(*columns, strict=True))
        return ThresholdConfig(rule="economic", threshold=0.5, boundary=points)

    def statistic(self, prob: Prob) -> Float[np.ndarray, "image step"]:
        """Path statistic in [0, 1], 0.5 at the boundary: that of moe_artifacts/decision.py, for numpy."""
        value = (prob.astype(np.float32) - self.abort.astype(np.float32) + 1) / 2
        seen = np.arange(len(self.calls)) <= self.clear_step(prob)[:, None]
        return np.maximum.accumulate(np.where(seen, value, np.float32(0)).clip(0), axis=1)

    def clear_step(self, prob: Prob) -> Column:
        """First step with a posterior below ``clear``, whatever the threshold; the number of steps where none is."""
        return _first(prob.astype(np.float32) < self.clear.astype(np.float32))


def fit_boundary(
    prob: Prob,
    bad: Bool[np.ndarray, " image"],
    calls: Int[np.ndarray, " step"],
    total_calls: int,
    check_cost: float,
    *,
    max_false_aborts: float | None = None,
    clear: bool = True,
    bins: int = BINS,
) -> Boundary:
    """Boundary with the lowest cost per clean image on these images; never dearer there than the best flat threshold.

    Args:
        prob: Posterior at each scored step, in [0, 1]. It orders the images; what it is worth is read off ``bad``.
        calls: Denoiser calls spent by each step, rising, below ``total_calls``: afterwards an abort saves nothing.
        check_cost: Price of one check of one image, in denoiser calls of one image.
        max_false_aborts: Largest share of the clean fitting images that may be aborted, in (0, 1); None: any.
        clear: Whether images that are clean all but surely are spared the later checks.
        bins: Of the posterior, at most.
    Raises:
        InputError: If shapes do not fit or a number leaves its range.
        CalibrationError: If only one class is there.
    """
    prob, run = _checked(prob, bad, calls, total_calls, check_cost, max_false_aborts)
    chain = _Chain(run, prob, clear, bins)
    best = _by_price(chain)
    if max_false_aborts is not None and best.false_abort_rate > max_false_aborts:
        best = _within_limit(chain, max_false_aborts, best.price)
    flat = _flat(run, prob, 1.0 if max_false_aborts is None else max_false_aborts)
    return min(best, flat, key=lambda found: found.cost_per_clean)


def choose_steps(
    cost: Callable[[tuple[int, ...]], float], num_steps: int, *, most: int = 6, gain: float = 0.0
) -> tuple[int, ...]:
    """Which steps to look at: added one by one, and taken out again, as long as that makes it cheaper.

    Args:
        cost: Of a rule that looks at these columns only, rising; the price of the checks included. Called once a choice.
        num_steps: Columns to choose from.
        most: Number of steps chosen, at most.
        gain: How much cheaper another step has to make it, in units of ``cost``: noise alone makes it a little cheaper.
    Raises:
        InputError: If there is nothing to choose.
    Example:
        >>> choose_steps(lambda steps: abs(sum(steps) - 5) + 0.1 * len(steps), 4)
        (2, 3)
    """
    if num_steps < 1 or most < 1:
        raise InputError(f"num_steps and most must be at least 1, got {num_steps} and {most}")
    seen: dict[tuple[int, ...], float] = {}

    def at(steps: tuple[int, ...]) -> float:
        if steps not in seen:
            seen[steps] = cost(steps)
        return seen[steps]

    best: tuple[int, ...] = min(((s,) for s in range(num_steps)), key=at)
    while True:
        more = [tuple(sorted((*best, s))) for s in range(num_steps) if s not in best and len(best) < most]
        fewer = [tuple(s for s in best if s != out) for out in best if len(best) > 1]
        cheaper = [steps for steps in more if at(steps) < at(best) - gain] + [s for s in fewer if at(s) < at(best)]
        if not cheaper:
            return best
        best = min(cheaper, key=at)


class _Chain:
    """The fitting images as a Markov chain: bins of the posterior at each step, and how images move between them."""

    def __init__(self, run: Run, prob: np.ndarray, clear: bool, bins: int) -> None:
        from scipy.optimize import isotonic_regression

        self.run, self.posterior, self.clear = run, prob, clear
        self._isotonic = isotonic_regression
        columns = [_bin(column, min(bins, max(2, len(prob) // IMAGES_PER_BIN))) for column in prob.T]
        self.counts = [np.bincount(column) for column in columns]
        self.prob = [np.bincount(columns[t], weights=prob[:, t]) / n for t, n in enumerate(self.counts)]
        self.bad = [self._rising(np.bincount(columns[t], weights=run.bad) / n, n) for t, n in enumerate(self.counts)]
        self.moves = []  # [bin next_bin], rows sum to 1
        for t in range(len(columns) - 1):
            here, there = len(self.counts[t]), len(self.counts[t + 1])
            joint = np.bincount(columns[t] * there + columns[t + 1], minlength=here * there).reshape(here, there)
            self.moves.append(joint / self.counts[t][:, None])

    def best(self, price: float) -> Boundary:
        """The boundary at this price of a clean image, by backward induction, and what it does to the fitting images."""
        steps = len(self.prob)
        abort, clear = np.empty(steps), np.zeros(steps)
        spared = np.empty(0)  # by the decision at the step that was just done, against finishing, by bin; it rises
        for t in reversed(range(steps)):
            keep = finish = self.run.total_calls - self.run.calls[t] - price * (1 - self.bad[t])
            if t < steps - 1:
                # What the later checks are worth, and this one costs: below 0 the image is cleared, if it may be.
                gain = self._rising(self.moves[t] @ spared, self.counts[t]) - self.run.check_cost
                if self.clear:
                    clear[t] = _crossing(self.prob[t], gain)
                    gain = np.maximum(gain, 0)
                keep = finish - gain
            abort[t] = _crossing(self.prob[t], keep)
            spared = finish - np.minimum(keep, 0)
        return _judge(self.run, self.posterior, abort, np.minimum(clear, abort.clip(max=1)))

    def _rising(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return self._isotonic(values, weights=weights).x


def _by_price(chain: _Chain) -> Boundary:
    """Without a limit: the ratio that a price leads to is the next price. It falls until it stays."""
    best = chain.best(chain.run.total_calls / (~chain.run.bad).mean())  # of the unguarded run
    for _ in range(ROUNDS):
        found = chain.best(best.cost_per_clean)
        if not found.cost_per_clean < best.cost_per_clean:
            break
        best = found
    return best


def _within_limit(chain: _Chain, limit: float, price: float) -> Boundary:
    """The lowest price above ``price`` at which the limit holds, by halving; then what is left of the limit is used up."""
    low, high = np.log(price), np.log(price * HIGHEST_PRICE)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if chain.best(np.exp(middle)).false_abort_rate > limit else (low, middle)
    found = chain.best(np.exp(high))
    value = np.where(
        np.arange(len(found.calls)) <= found.clear_step(chain.posterior)[:, None], chain.posterior, -np.inf
    )
    clean = np.sort((value - found.abort).max(axis=1)[~chain.run.bad])
    lowest = clean[len(clean) - 1 - int(np.floor(limit * len(clean)))] + 1e-12  # more than the sum below rounds off
    return _judge(chain.run, chain.posterior, (found.abort + lowest).clip(0, NEVER), found.clear, np.exp(high))


def _flat(run: Run, prob: np.ndarray, limit: float) -> Boundary:
    """The best flat threshold without clearing: every one is tried, or with many images a few thousand of them."""
    highest = np.maximum.accumulate(prob, axis=1)
    clean = np.sort(highest[~run.bad, -1])
    tried = np.append(np.unique(highest[:: -(-highest.size // FLAT_TRIED)]), NEVER)
    kept_clean = np.searchsorted(clean, tried, side="left")
    # Each step at which an image would be stopped spares the calls and the check up to the next one.
    spared = np.diff(run.calls, append=run.total_calls) + run.check_cost * (
        np.arange(len(run.calls)) < len(run.calls) - 1
    )
    stopped = np.stack([len(prob) - np.searchsorted(np.sort(column), tried, side="left") for column in highest.T])
    spent = len(prob) * (run.total_calls + run.check_cost * len(run.calls)) - spared @ stopped
    allowed = (kept_clean > 0) & ((len(clean) - kept_clean) / len(clean) <= limit)
    threshold = tried[allowed][np.argmin(spent[allowed] / kept_clean[allowed])]
    return _judge(run, prob, np.full(prob.shape[1], threshold), np.zeros(prob.shape[1]))


def _judge(run: Run, prob: np.ndarray, abort: np.ndarray, clear: np.ndarray, limit_price: float = 0.0) -> Boundary:
    """What a boundary does to the fitting images; the price of a clean image is the ratio found there."""
    column, cleared = _first(prob >= abort), _first((prob < clear) & (prob < abort))
    column = np.where(column < cleared, column, len(run.calls))
    calls, checks = spending(run, column, cleared)
    kept = column == len(run.calls)
    kept_clean = (kept & ~run.bad).mean()
    cost = float((calls + checks * run.check_cost).mean() / kept_clean) if kept_clean > 0 else np.inf
    return Boundary(
        abort=abort,
        clear=clear,
        calls=run.calls,
        total_calls=run.total_calls,
        price=cost,
        multiplier=max(0.0, float(limit_price) - cost),
        cost_per_clean=cost,
        false_abort_rate=float((~kept)[~run.bad].mean()),
    )


def _first(hit: np.ndarray) -> np.ndarray:
    """First step of each image that is hit; the number of steps where none is."""
    return np.where(hit.any(axis=1), hit.argmax(axis=1), hit.shape[1])


def _bin(values: np.ndarray, bins: int) -> np.ndarray:
    """Bin of each value: half of the edges share out the images, half the range, since few images lie high up."""
    shares = np.quantile(values, np.linspace(0, 1, bins // 2 + 1)[1:])
    even = np.linspace(values.min(), values.max(), bins - bins // 2 + 1)[1:]
    edges = np.unique(np.concatenate([shares, even]))
    return np.unique(np.searchsorted(edges, values, side="left"), return_inverse=True)[1]


def _crossing(at: np.ndarray, values: np.ndarray) -> float:
    """Where rising values reach 0, between two bins; ``NEVER`` where they do not, 0 where they start there."""
    reached = values >= 0
    first = int(reached.argmax())
    if not reached[first]:
        return NEVER
    if first == 0:
        return 0.0
    share = values[first - 1] / (values[first - 1] - values[first])
    return float(at[first - 1] + share * (at[first] - at[first - 1]))


def _checked(
    prob: np.ndarray, bad: np.ndarray, calls: np.ndarray, total_calls: int, check_cost: float, limit: float | None
) -> tuple[np.ndarray, Run]:
    prob, bad, calls = np.asarray(prob, dtype=np.float64), np.asarray(bad), np.asarray(calls)
    if prob.ndim != 2 or 0 in prob.shape or not ((prob >= 0) & (prob <= 1)).all():  # NaN fails too
        raise InputError(f"prob must be [image step] in [0, 1] without NaN, got shape {prob.shape}")
    for name, value, length in (("bad", bad, len(prob)), ("calls", calls, prob.shape[1])):
        if value.shape != (length,):
            raise InputError(f"{name} must have shape ({length},) to fit prob {prob.shape}, got {value.shape}")
    if bad.dtype != bool:
        raise InputError(f"bad must be bool, one per image, got {bad.dtype}; soft labels: label > 0.5")
    if calls[0] < 1 or (np.diff(calls) <= 0).any() or calls[-1] >= total_calls:
        raise InputError(
            f"calls must rise from 1 to below total_calls={total_calls}, got {calls.tolist()}; leave the last step out: "
            "stopping there saves nothing"
        )
    if not 0 <= check_cost < np.inf:
        raise InputError(f"check_cost must be a number of denoiser calls, 0 or more, got {check_cost!r}")
    if limit is not None and not 0 < limit < 1:
        raise InputError(f"max_false_aborts must be between 0 and 1, both excluded, or None, got {limit!r}")
    if bad.all() or not bad.any():
        raise CalibrationError(f"bad must hold both classes, got {bad.sum()} bad of {len(bad)} images")
    return prob, Run(bad, calls, float(check_cost), int(total_calls))
