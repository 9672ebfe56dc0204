"""What a check costs on any pipeline that the guard supports, as a share of the denoiser calls of a step."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from moe_artifacts.guard.call_settings import call_arguments
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.pipelines import spec_of
from moe_artifacts.scorer import ArtifactScorer, Session, StepScore
from moe_artifacts.shapes import Rows

STEPS = 12  # of the run that is timed
WARMUP = 2  # steps that are slower than the others


class Stopwatch:
    """Seconds spent in the denoiser and in the check of each step; work on a GPU is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._denoising = 0.0
        self.steps: list[tuple[float, float]] = []  # denoiser, check

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def checked(self, start: float) -> None:
        """A check, which began at ``start``, is done: it belongs to the denoiser calls since the one before."""
        self.steps.append((self._denoising, self.now() - start))
        self._denoising = 0.0

    @contextlib.contextmanager
    def watching(self, modules: list[nn.Module]) -> Iterator[None]:
        """While open, calls of these modules are timed."""

        def begin(*_: Any) -> None:
            self._started = self.now()

        def end(*_: Any) -> None:
            self._denoising += self.now() - self._started

        with contextlib.ExitStack() as handles:
            for module in modules:
                handles.callback(module.register_forward_pre_hook(begin).remove)
                handles.callback(module.register_forward_hook(end).remove)
            yield


class TimedScorer:
    """A scorer that is asked at every step, by the clock; nothing is decided by it."""

    def __init__(self, scorer: ArtifactScorer, watch: Stopwatch) -> None:
        names = ("name", "latent_space", "log_snr_range", "uses_prompt", "uses_noisy")
        own = {name: getattr(scorer.config, name) for name in names}
        self.config = SimpleNamespace(**own, threshold=None, rules=(), check_progress=None, checks_last=True)
        self._scorer, self._watch = scorer, watch

    def session(self, batch_size: int, prompts: list[str] | None = None) -> TimedSession:
        return TimedSession(self._scorer.session(batch_size, prompts), self._watch)


class TimedSession:
    """A session of :class:`TimedScorer`."""

    def __init__(self, session: Session, watch: Stopwatch) -> None:
        self._session, self._watch = session, watch

    def step(self, **given: Any) -> StepScore:
        start = self._watch.now()
        score = self._session.step(**given)
        self._watch.checked(start)
        return score

    def keep(self, rows: Rows) -> None:
        self._session.keep(rows)


def measure_check_cost(pipe: Any, scorer: ArtifactScorer, prompts: list[str], arguments: Mapping[str, Any]) -> float:
    """Time of scoring one step of a batch over that of its denoiser calls; median over the steps of one short run.

    The pipeline's scheduler is used as it is.

    Args:
        prompts: Of the batch.
        arguments: Of the call.
    Raises:
        MoeArtifactsError: What the guard refuses.
    """
    watch = Stopwatch(pipe._execution_device)
    steps = min(int(arguments.get("num_inference_steps", STEPS)), STEPS)
    call = call_arguments(prompts, {**arguments, "num_inference_steps": steps}, None)
    call |= {"generator": [torch.Generator().manual_seed(i) for i in range(len(prompts))], "output_type": "latent"}
    with watch.watching(spec_of(pipe).modules(pipe)):
        ArtifactGuard(TimedScorer(scorer, watch), on_abort="record")(pipe, **call)
    timed = watch.steps[WARMUP:] or watch.steps
    return statistics.median(check / denoiser for denoiser, check in timed)
