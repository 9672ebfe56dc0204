"""One guarded run: which steps are scored, what was found, what became of each image."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from moe_artifacts.config import ThresholdConfig, WatchedConfig
from moe_artifacts.decision import Decider
from moe_artifacts.guard.output import GuardedOutput, Setting, no_images
from moe_artifacts.guard.request import Request
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.guard.tap import TappedStep
from moe_artifacts.noise import check_steps, progress, variance_preserving
from moe_artifacts.shapes import RowMask, Rows
from moe_artifacts.trajectory import Status, Trajectory, Verdict

PROBS = ("artifact_prob", "exit_prob", "exit_cdf", "cumulative_artifact_prob", "cumulative_clean_prob")
SCORES = ("score", *PROBS)  # a scorer has the first, or the others, or both
LOG_SNR_LIMIT = 40.0  # nats, beyond any float32 sample: flow matching starts at -inf, which no file can hold


@runtime_checkable  # for `make shapes`
class Scorer(Protocol):
    """What the guard needs of a scorer: an ``ArtifactScorer``, or a ``ScalarScorer`` around a function of one's own."""

    @property
    def config(self) -> WatchedConfig: ...

    def session(self, batch_size: int, prompts: list[str] | None = None) -> Any: ...


class Watch:
    """Observes the steps of one run; its verdicts are final as they are made.

    Images are numbered as they were asked for, the living rows are ``rows.alive`` of them, and the session scores
    ``_scored`` of those: an image that was cleared lives on without being scored.
    """

    def __init__(self, scorer: Scorer, rule: ThresholdConfig | None, request: Request, *, drop: bool) -> None:
        size = request.batch_size
        self.rows = LiveRows(size)
        self._config, self._rule, self._request, self._drop = scorer.config, rule, request, drop
        self._session = scorer.session(size, prompts=request.prompts)
        self._decider = None if rule is None else Decider(rule, size)
        self._scored: Rows = torch.arange(size)  # rising, in the session's order
        self._prompts = request.prompts or [""] * size
        self._verdicts = [
            Verdict(i, "kept", None, math.nan, math.nan, self._prompts[i], request.seeds[i]) for i in range(size)
        ]
        self._num_steps = self._steps_run = 0
        self._latent_shape: tuple[int, ...] = ()
        self._checks: list[int] = []
        self._steps: list[int] = []
        self._log_snr: list[float] = []
        self._series: dict[str, list[Tensor]] = {}  # of each score, one [batch] tensor a scored step

    def observe(self, step: TappedStep) -> Rows | None:
        """Which of the living rows go on after this step; None: all of them."""
        if step.index == 0:
            self._num_steps = step.num_steps
            self._latent_shape = tuple(step.sample.shape[1:])
            self._checks = check_steps(step.levels, self._config)
        self._steps_run += len(self.rows)
        if step.index in self._checks and len(self._scored):
            self._score(step)
        if step.is_last:
            self._find_nonfinite(step)
        staying = [k for k, i in enumerate(self.rows.alive.tolist()) if self._status(i) in ("kept", "cleared")]
        return torch.tensor(staying, dtype=torch.int64) if self._drop else None

    def finish(self, scheduler: str, output: Any) -> GuardedOutput:
        """The record of the run; ``output`` is the pipeline's, None if it was stopped because no row was left."""
        request, size = self._request, self._request.batch_size
        setting = Setting(scheduler, request.num_inference_steps, request.guidance_scale, tuple(self._checks))
        return GuardedOutput(
            images=self._no_images() if output is None else output.images,
            kept_indices=self.rows.alive.tolist(),
            verdicts=self._verdicts,
            trajectory=Trajectory(
                prompts=self._prompts,
                seeds=request.seeds,
                step=self._steps,
                log_snr=torch.tensor(self._log_snr),
                scores={name: torch.stack(series, dim=1) for name, series in self._series.items()},
                num_steps=self._num_steps,
                meta=dataclasses.asdict(setting),
            ),
            steps_run=self._steps_run,
            steps_full=size * self._num_steps,
            nsfw_content_detected=None if output is None else output.nsfw_content_detected,
            setting=setting,
            rule=self._rule,
            recorded=not self._drop,
        )

    def _score(self, step: TappedStep) -> None:
        places = torch.searchsorted(self.rows.alive, self._scored)  # both rise
        log_snr = min(max(step.level.log_snr, -LOG_SNR_LIMIT), LOG_SNR_LIMIT)
        noisy = variance_preserving(step.sample[places], step.level) if self._config.uses_noisy else None
        with torch.no_grad():
            # Indexing copies: whatever the scorer does to its input, the run does not see it.
            score = self._session.step(x0=step.x0[places], log_snr=log_snr, latents=noisy)
        given = {name: getattr(score, name, None) for name in SCORES}
        found = {name: values.float().cpu() for name, values in given.items() if values is not None}
        finite = score.finite.cpu()
        for name in ("artifact_prob", "cumulative_artifact_prob"):
            finite = finite & found[name].isfinite() if name in found else finite
        abort = clear = torch.zeros_like(finite)
        if self._decider is not None:
            decision = self._decider.step(score, progress(log_snr, self._config.log_snr_range))
            abort, clear = decision.abort.cpu(), decision.clear.cpu()
            found["statistic"] = decision.statistic.float().cpu()

        self._steps.append(step.index)
        self._log_snr.append(log_snr)
        for name, values in found.items():
            column = torch.full((self._request.batch_size,), math.nan)
            column[self._scored[finite]] = values[finite]
            self._series.setdefault(name, []).append(column)
        self._judge(step, found, finite, abort, clear)

        # "record" goes on scoring what is decided, as long as there is something to score.
        done = ("aborted", "rejected", "cleared", "error") if self._drop else ("error",)
        self._score_only([k for k, i in enumerate(self._scored.tolist()) if self._status(i) not in done])

    def _judge(
        self, step: TappedStep, found: dict[str, Tensor], finite: RowMask, abort: RowMask, clear: RowMask
    ) -> None:
        for k, i in enumerate(self._scored.tolist()):
            if self._status(i) != "kept":
                continue
            if not finite[k]:
                self._settle(i, "error", step.index)
                continue
            seen = {
                name: found[name][k].item() for name in ("artifact_prob", "cumulative_artifact_prob") if name in found
            }
            self._verdicts[i] = dataclasses.replace(self._verdicts[i], **seen)
            if abort[k]:
                self._settle(i, "rejected" if step.is_last else "aborted", step.index)
            elif clear[k]:
                self._settle(i, "cleared", step.index)

    def _find_nonfinite(self, step: TappedStep) -> None:
        """A last look at the finished latents: nothing has looked at a cleared image since it was cleared."""
        finite = step.prev_sample.isfinite().flatten(1).all(dim=1).tolist()
        for i, ok in zip(self.rows.alive.tolist(), finite, strict=True):
            if not ok and self._status(i) in ("kept", "cleared"):
                self._settle(i, "error", step.index)

    def _score_only(self, places: list[int]) -> None:
        if len(places) == len(self._scored):
            return
        keep = torch.tensor(places, dtype=torch.int64)
        self._scored = self._scored[keep]
        if len(keep):
            self._session.keep(keep)
            if self._decider is not None:
                self._decider.keep(keep)

    def _no_images(self) -> Any:
        return no_images(self._request.output_type, self._latent_shape, self._config.latent_space.downsampling)

    def _status(self, image: int) -> Status:
        return self._verdicts[image].status

    def _settle(self, image: int, status: Status, step_index: int) -> None:
        self._verdicts[image] = dataclasses.replace(self._verdicts[image], status=status, step=step_index)
