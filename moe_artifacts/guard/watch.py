"""One guarded run: which steps are scored, what was found, what became of each image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from moe_artifacts.config import ThresholdConfig, WatchedConfig
from moe_artifacts.decision import Decider
from moe_artifacts.guard.audit_draw import AuditDraw
from moe_artifacts.guard.output import GuardedOutput, Setting, no_images, select_images
from moe_artifacts.guard.request import Request
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.guard.space import unpack
from moe_artifacts.guard.tap import TappedStep
from moe_artifacts.noise import check_steps, progress, variance_preserving
from moe_artifacts.shapes import Latents, Preview, RowMask, Rows
from moe_artifacts.trajectory import Trajectory
from moe_artifacts.verdict import Status, Verdict

PROBS = ("artifact_prob", "exit_prob", "exit_cdf", "cumulative_artifact_prob", "cumulative_clean_prob")
SCORES = ("score", *PROBS)  # a scorer has the first, or the others, or both
LOG_SNR_LIMIT = 40.0  # nats, beyond any float32 sample: flow matching starts at -inf, which no file can hold
FINISHED: tuple[Status, ...] = ("kept", "cleared", "audited")  # images that run to the end


@runtime_checkable  # for `make shapes`
class Scorer(Protocol):
    """What the guard needs of a scorer: an ``ArtifactScorer``, or a ``ScalarScorer`` around a function of one's own."""

    @property
    def config(self) -> WatchedConfig: ...

    def session(self, batch_size: int, prompts: list[str] | None = None) -> Any: ...


@dataclass(frozen=True)
class Policy:
    """What is done about an image that reaches the threshold."""

    on_abort: Literal["drop", "mask", "record"]
    drop_sizes: tuple[int, ...] | None  # of "drop"
    audit: AuditDraw
    preview: Callable[[Latents], Preview] | None  # keeps one of each image that reached it


class Watch:
    """Observes the steps of one run; its verdicts are final as they are made.

    Images are numbered as they were asked for, ``rows`` says which of them are still in the batch, and the session
    scores ``_scored`` of those: an image that was cleared, or is audited, lives on without being scored.
    """

    def __init__(
        self,
        scorer: Scorer,
        rule: ThresholdConfig | None,
        request: Request,
        policy: Policy,
        truncated: list[bool],
        loop_keeps_all: bool = False,
    ) -> None:
        size = request.batch_size
        sizes = () if policy.on_abort == "mask" else policy.drop_sizes
        self.rows = LiveRows(size, sizes, loop_keeps_all=loop_keeps_all)
        self._config, self._rule, self._request, self._policy = scorer.config, rule, request, policy
        self._session = scorer.session(size, prompts=request.prompts)
        self._decider = None if rule is None else Decider(rule, size)
        self._scored: Rows = torch.arange(size)  # rising, in the session's order
        self._prompts = request.prompts or [""] * size
        self._verdicts = [
            Verdict(i, "kept", None, math.nan, math.nan, self._prompts[i], request.seeds[i], truncated[i])
            for i in range(size)
        ]
        self._num_steps = self._steps_run = 0
        self._reached_end = False
        self._no_latents = torch.empty(0)  # what the latents look like, without a row
        self._checks: list[int] = []
        self._steps: list[int] = []
        self._log_snr: list[float] = []
        self._series: dict[str, list[Tensor]] = {}  # of each score, one [batch] tensor a scored step
        self._last_previews: dict[int, Tensor] = {}

    @property
    def _recording(self) -> bool:
        return self._policy.on_abort == "record"

    def observe(self, step: TappedStep) -> Rows | None:
        """Which of the living rows go on after this step; None: all of them."""
        if step.index == 0:
            self._num_steps = step.num_steps
            self._no_latents = step.sample[:0].clone()
            self._checks = check_steps(step.levels, self._config)
        self._steps_run += len(self.rows)
        if step.index in self._checks and len(self._scored):
            self._score(step)
        if step.is_last:
            self._reached_end = True
            self._find_nonfinite(step)
        if self._recording:
            return None
        alive = self.rows.alive.tolist()
        staying = [k for k, i in enumerate(alive) if self._status(i) in FINISHED]
        return None if len(staying) == len(alive) else torch.tensor(staying, dtype=torch.int64)

    def finish(self, scheduler: str, denoiser: str | None, output: Any) -> GuardedOutput:
        """The record of the run.

        Args:
            scheduler: Its class.
            denoiser: Its fingerprint.
            output: The pipeline's, None if it was stopped because no row was left.
        """
        request, size = self._request, self._request.batch_size
        setting = Setting(
            scheduler=scheduler,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            scored_steps=tuple(self._checks),
            eta=request.eta,
            image_size=self._image_size() if self._num_steps else None,
            denoiser=denoiser,
        )
        if output is None:
            images, nsfw = self._no_images(), None
        else:
            images, nsfw = output.images, getattr(output, "nsfw_content_detected", None)
        audited = [i for i in self.rows.alive.tolist() if self._status(i) == "audited"]
        kept = [i for i in self.rows.alive.tolist() if i not in audited]
        # Where a callback interrupted the run, the passengers did not leave and were decoded too.
        shown = self.rows.held.tolist()

        def flags(places: list[int]) -> list[bool] | None:
            return None if nsfw is None else [nsfw[shown.index(i)] for i in places]

        return GuardedOutput(
            images=select_images(images, [shown.index(i) for i in kept]),
            kept_indices=kept,
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
            nsfw_content_detected=flags(kept),
            interrupted=output is not None and not self._reached_end,
            setting=setting,
            rule=self._rule,
            recorded=self._recording,
            audited_indices=audited,
            audited_nsfw=flags(audited),
            audited_images=select_images(images, [shown.index(i) for i in audited]),
            last_previews=self._last_previews,
        )

    def _score(self, step: TappedStep) -> None:
        log_snr = min(max(step.level.log_snr, -LOG_SNR_LIMIT), LOG_SNR_LIMIT)
        places = self.rows.places(self._scored)
        noisy = None
        if self._config.uses_noisy:
            noisy = variance_preserving(self._unpacked(step.sample[places]), step.level)
        with torch.no_grad():
            # Indexing copies: whatever the scorer does to its input, the run does not see it.
            score = self._session.step(x0=self._unpacked(step.x0[places]), log_snr=log_snr, latents=noisy)
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
        self._score_only(
            [
                k
                for k, i in enumerate(self._scored.tolist())
                if self._status(i) == "kept" or (self._recording and self._status(i) != "error")
            ]
        )

    def _judge(
        self, step: TappedStep, found: dict[str, Tensor], finite: RowMask, abort: RowMask, clear: RowMask
    ) -> None:
        gone = []
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
            if abort[k] and not step.is_last and self._audits(i):
                self._settle(i, "audited", step.index)
            elif abort[k]:
                self._settle(i, "rejected" if step.is_last else "aborted", step.index)
                gone.append(i)
            elif clear[k]:
                self._settle(i, "cleared", step.index)
        if self._policy.preview is not None and gone:
            x0 = self._unpacked(step.x0[self.rows.places(torch.tensor(gone))])
            with torch.no_grad():
                previews = self._policy.preview(x0.float()).float().cpu()
            self._last_previews |= dict(zip(gone, previews, strict=True))

    def _audits(self, image: int) -> bool:
        return self._policy.audit.takes(image, self._request.seeds[image], self._prompts[image])

    def _no_images(self) -> Any:
        return no_images(self._request.output_type, self._no_latents, self._image_size())

    def _image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self._unpacked(self._no_latents).shape[2:]
        pixels = self._config.latent_space.downsampling
        return height * pixels, width * pixels

    def _unpacked(self, latents: Tensor) -> Latents:
        return unpack(latents, self._config.latent_space, self._request.height, self._request.width)

    def _find_nonfinite(self, step: TappedStep) -> None:
        """A last look at the finished latents: nothing has looked at a cleared image since it was cleared."""
        alive = self.rows.alive
        finite = step.prev_sample[self.rows.places(alive)].isfinite().flatten(1).all(dim=1).tolist()
        for i, ok in zip(alive.tolist(), finite, strict=True):
            if not ok and self._status(i) in FINISHED:
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

    def _status(self, image: int) -> Status:
        return self._verdicts[image].status

    def _settle(self, image: int, status: Status, step_index: int) -> None:
        before = self._verdicts[image]
        audited = before.audited or status == "audited"
        self._verdicts[image] = dataclasses.replace(before, status=status, step=step_index, audited=audited)
