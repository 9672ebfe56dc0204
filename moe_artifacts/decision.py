"""When to stop an image, and when to stop looking at it.

Every rule is nested in one number, so each trajectory has one path statistic that never falls along its steps: an image
is aborted at the first step whose statistic is >= the threshold. With a the posterior, C and F the accumulated sums:

    cumulative   C_t
    posterior    the largest a so far
    patience     the largest, so far, of the smallest a among ``patience`` consecutive steps
    q-exit       a at the first step with F > q, from there on; 0 before
    economic     the largest (a - b + 1) / 2 so far, with b a boundary over progress; 0.5 is the boundary itself

Sources: PALBERT, arXiv:2204.03276 (q-exit); PABEE, arXiv:2006.04152 (patience, here with alarms instead of equal
classes). The cumulative rule is ours, and so is clearing: stop scoring once K_t >= clear_threshold, or, economic rule, once
a is below a second boundary, where another check costs more than it can save (moe_artifacts/calibration/economic.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe_artifacts.accumulator import Accumulated
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.errors import InputError
from moe_artifacts.shapes import PerImage, RowMask, Rows, StepIndex, StepProbs, StepValues

Progress = Float[Tensor, "... step"]  # in [0, 1], of the steps of a batch, or of each of its images


@dataclass(frozen=True, slots=True)
class Decided:
    """Where each trajectory was aborted or cleared: at most one of the two, the number of steps where never."""

    abort_step: StepIndex
    clear_step: StepIndex


@dataclass(frozen=True, slots=True)
class Decision:
    """What falls at one step. An image is aborted or cleared at most once, and never both."""

    abort: RowMask
    clear: RowMask
    statistic: PerImage  # NaN once a score of this image was NaN: it is neither aborted nor cleared then


@runtime_checkable  # for `make shapes`
class Score(Protocol):
    """What a decision needs of one scored step: one number per image each."""

    @property
    def artifact_prob(self) -> PerImage: ...
    @property
    def exit_cdf(self) -> PerImage: ...
    @property
    def cumulative_artifact_prob(self) -> PerImage: ...
    @property
    def cumulative_clean_prob(self) -> PerImage: ...


def path_statistic(
    rule: ThresholdConfig, artifact_prob: StepProbs, acc: Accumulated, progress: Progress | None = None
) -> StepValues:
    """Largest threshold at which each trajectory would have been aborted by each step.

    Args:
        rule: Its threshold does not matter here.
        artifact_prob: In [0, 1].
        acc: The same steps, accumulated.
        progress: In [0, 1], of each step or of each image and step; the economic rule needs it.
    Returns:
        Float32 in [0, 1] that never falls along ``step``.
    Raises:
        InputError: If the scores hold NaN, which would pass for "never aborted", or if the shapes differ.
    """
    prob = artifact_prob.float()
    for name, value in (("artifact_prob", prob), ("exit_cdf", acc.exit_cdf)):
        if value.shape != prob.shape:
            raise InputError(
                f"{name} must have the shape {tuple(prob.shape)} of artifact_prob, got {tuple(value.shape)}"
            )
        if rows := value.isnan().any(dim=-1).nonzero().flatten().tolist():
            raise InputError(f"{name} is NaN in rows {rows[:8]} ({len(rows)} in all): leave these trajectories out")
    if rule.rule == "cumulative":
        value = acc.cumulative_artifact_prob
    elif rule.rule == "posterior":
        value = prob
    elif rule.rule == "patience":
        assert rule.patience is not None  # the config saw to it
        run = min(rule.patience, prob.shape[-1] + 1)  # a longer one is never complete either
        value = F.pad(prob, (run - 1, 0)).unfold(-1, run, 1).amin(dim=-1)  # 0 while fewer steps than that were seen
    elif rule.rule == "economic":
        abort_at, clear_below = _boundary(rule, progress, prob)
        cleared = (prob < clear_below).long().cumsum(dim=-1) - (prob < clear_below).long()  # before this step
        value = torch.where(cleared == 0, (prob - abort_at + 1) / 2, 0.0).clamp(min=0)
    else:
        assert rule.q is not None
        reached = acc.exit_cdf > rule.q
        value = torch.where(reached & (reached.cumsum(dim=-1) == 1), prob, 0.0)  # at the first such step only
    # For the cumulative rule too: a GPU sums in parallel, where rounding can make a running sum fall by one digit.
    return value.cummax(dim=-1).values


def abort_step(statistic: StepValues, threshold: float) -> StepIndex:
    """First step with ``statistic >= threshold``, or the number of steps where none reaches it.

    Example:
        >>> abort_step(torch.tensor([[0.1, 0.4, 0.4], [0.0, 0.1, 0.2]]), 0.4)
        tensor([1, 3])
    """
    # It never falls, so the steps below the threshold come first: counting them gives the index.
    return (statistic < threshold).sum(dim=-1)


def abort_boundary(rule: ThresholdConfig, progress: Tensor) -> Tensor:
    """Posterior at which the economic rule aborts, at each progress; above 1 where it never does.

    Example:
        >>> rule = ThresholdConfig(rule="economic", threshold=0.55, boundary=((0.0, 0.4, 0.0), (1.0, 0.6, 0.0)))
        >>> abort_boundary(rule, torch.tensor([0.0, 0.5]))
        tensor([0.5000, 0.6000])
    """
    return _boundary(rule, progress, progress)[0] + 2 * rule.threshold - 1


def clear_step(
    rule: ThresholdConfig,
    acc: Accumulated,
    artifact_prob: StepProbs | None = None,
    progress: Progress | None = None,
) -> StepIndex:
    """First step with ``cumulative_clean_prob >= clear_threshold``, or below the economic rule's second boundary.

    Args:
        artifact_prob: As ``progress`` needed by the economic rule only. The other rules clear nothing.
    """
    if rule.rule == "economic":
        if artifact_prob is None:
            raise InputError("artifact_prob is missing: the economic rule clears by the posterior")
        below = artifact_prob < _boundary(rule, progress, artifact_prob)[1]
        return (below.cumsum(dim=-1) == 0).sum(dim=-1)
    clean = acc.cumulative_clean_prob
    if rule.rule != "cumulative" or rule.clear_threshold is None:
        return torch.full(clean.shape[:1], clean.shape[-1], dtype=torch.int64, device=clean.device)
    return abort_step(clean.cummax(dim=-1).values, rule.clear_threshold)


def decide(
    rule: ThresholdConfig, artifact_prob: StepProbs, acc: Accumulated, progress: Progress | None = None
) -> Decided:
    """Abort or clear whole trajectories; both at one step is an abort, and nothing is aborted once it was cleared.

    Raises:
        InputError: As :func:`path_statistic`.
    """
    abort = abort_step(path_statistic(rule, artifact_prob, acc, progress), rule.threshold)
    clear = clear_step(rule, acc, artifact_prob.float(), progress)
    never = artifact_prob.shape[-1]
    return Decided(
        abort_step=torch.where(abort <= clear, abort, never), clear_step=torch.where(clear < abort, clear, never)
    )


class Decider:
    """The same decisions one step at a time, for a batch that is still running and may lose rows."""

    def __init__(self, rule: ThresholdConfig, batch_size: int) -> None:
        self.rule = rule
        self._statistic = torch.zeros(batch_size)
        self._open = torch.ones(batch_size, dtype=torch.bool)  # neither aborted nor cleared so far
        self._reached = torch.zeros(batch_size, dtype=torch.bool)  # q-exit: F has passed q; economic: was cleared
        self._recent: list[Tensor] = []  # patience: the last posteriors

    def step(self, score: Score, progress: float | PerImage | None = None) -> Decision:
        """Decide after one scored step.

        Args:
            progress: In [0, 1]; the economic rule needs it.
        Raises:
            InputError: If the number of rows is not the one of the running batch, or progress is needed and missing.
        """
        prob, cdf = score.artifact_prob.float(), score.exit_cdf
        if prob.shape != self._statistic.shape:
            raise InputError(
                f"artifact_prob must have shape {tuple(self._statistic.shape)}, one number per row that is still "
                f"running, got {tuple(prob.shape)}; call keep(rows) when rows leave the batch"
            )
        self._statistic, self._open, self._reached = (
            t.to(prob.device) for t in (self._statistic, self._open, self._reached)
        )
        at = None if progress is None else torch.as_tensor(progress, dtype=prob.dtype, device=prob.device)
        value = torch.where((prob + cdf).isnan(), torch.nan, self._value(score, prob, at))
        self._statistic = torch.maximum(self._statistic, value)  # NaN stays NaN
        abort = self._open & (self._statistic >= self.rule.threshold)
        clear = torch.zeros_like(abort)
        if self.rule.rule == "cumulative" and self.rule.clear_threshold is not None:
            clear = self._open & ~abort & (score.cumulative_clean_prob >= self.rule.clear_threshold)
        elif self.rule.rule == "economic":
            below = prob < _boundary(self.rule, at, prob)[1]
            clear = self._open & ~abort & below & ~self._statistic.isnan()
            self._reached = self._reached | below
        self._open = self._open & ~abort & ~clear
        return Decision(abort=abort, clear=clear, statistic=self._statistic)

    def keep(self, rows: Rows) -> None:
        """Go on with these rows only, in this order."""
        rows = rows.to(self._statistic.device)
        self._statistic, self._open, self._reached = self._statistic[rows], self._open[rows], self._reached[rows]
        self._recent = [prob[rows] for prob in self._recent]

    def _value(self, score: Score, prob: Tensor, progress: Tensor | None) -> Tensor:
        """What this step alone adds: the path statistic is the largest of these."""
        if self.rule.rule == "cumulative":
            return score.cumulative_artifact_prob
        if self.rule.rule == "posterior":
            return prob
        if self.rule.rule == "patience":
            assert self.rule.patience is not None  # the config saw to it
            self._recent = [*self._recent, prob][-self.rule.patience :]
            complete = len(self._recent) == self.rule.patience
            return torch.stack(self._recent).amin(dim=0) if complete else torch.zeros_like(prob)
        if self.rule.rule == "economic":
            value = ((prob - _boundary(self.rule, progress, prob)[0] + 1) / 2).clamp(min=0)
            return torch.where(self._reached, 0.0, value)
        assert self.rule.q is not None
        first = (score.exit_cdf > self.rule.q) & ~self._reached
        self._reached = self._reached | first
        return torch.where(first, prob, 0.0)


def _boundary(rule: ThresholdConfig, progress: Tensor | None, prob: Tensor) -> tuple[Tensor, Tensor]:
    """Where to abort and where to clear at each progress: linear between the points, constant outside."""
    if progress is None:
        raise InputError("progress is missing: the economic rule compares the posterior with a boundary over progress")
    assert rule.boundary is not None  # the config saw to it
    at, abort, clear = torch.tensor(rule.boundary, device=prob.device).T.contiguous()
    progress = progress.to(prob).expand_as(prob).contiguous()
    if len(at) == 1:
        return abort.expand_as(prob), clear.expand_as(prob)
    right = torch.searchsorted(at, progress).clamp(1, len(at) - 1)
    share = ((progress - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    # Not lerp: at share 1 its rounding may miss the point itself.
    return tuple(v[right - 1] * (1 - share) + v[right] * share for v in (abort, clear))
