"""Shows every call of ``scheduler.step`` to an observer, for the length of one pipeline run.

``scheduler.step`` is the one place that every pipeline passes, with the model output after guidance and the sample it
belongs to. The callback that pipelines offer comes after the step: its latents are at the next noise level already.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

from torch import Tensor

from moe_artifacts.errors import GuardStateError
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.noise import NoiseLevel, noise_levels, predict_x0
from moe_artifacts.shapes import Latents, Rows

_entering = threading.Lock()  # two threads that tap one scheduler at the same moment


class AllRowsGone(Exception):
    """Ends the pipeline's loop when no row is left. Raised out of the loop, so that nothing after it runs either:
    no denoiser call, no VAE decode, no callback on an empty batch. It never reaches the caller of the guard."""


@dataclass
class TappedStep:
    """One call of ``scheduler.step``. All tensors hold the living rows."""

    index: int  # place in the denoising loop
    levels: list[NoiseLevel]  # of the whole loop
    model_output: Latents  # after guidance
    sample: Latents  # what the model output belongs to, at ``level``
    prev_sample: Latents  # what the step returned, at the next level
    scheduler: Any

    @property
    def level(self) -> NoiseLevel:
        return self.levels[self.index]

    @property
    def num_steps(self) -> int:
        return len(self.levels)

    @property
    def is_last(self) -> bool:
        return self.index == len(self.levels) - 1

    @cached_property
    def x0(self) -> Latents:
        """Prediction of the clean latents, float32; computed when first asked for."""
        return predict_x0(self.scheduler, self.model_output, self.sample, self.level)


Observer = Callable[[TappedStep], Rows | None]  # returns which of the living rows to keep; None: all


class SchedulerTap:
    """While open, ``observe`` sees each step of ``scheduler`` and may take rows out of the batch.

    The observer runs after the scheduler's own step. On leaving, by whatever way, the scheduler is as it was: ``step``
    is replaced on the instance, not on the class.

    Raises:
        GuardStateError: On entering, if the scheduler is tapped already. In a step, if it comes from another thread, or
            with another number of rows than are alive: one row would be broadcast silently against the old batch.
        AllRowsGone: In a step, once the observer keeps no row.
    """

    def __init__(self, scheduler: Any, observe: Observer, rows: LiveRows) -> None:
        self._scheduler = scheduler
        self._observe = observe
        self._rows = rows
        self._calls = 0
        self._levels: list[NoiseLevel] = []

    def __enter__(self) -> SchedulerTap:
        with _entering:
            if hasattr(self._scheduler.step, "_is_tapped"):
                raise GuardStateError(
                    f"this {type(self._scheduler).__name__} is being watched already: a guard cannot run inside "
                    "another, and pipelines that run at the same time need a scheduler each"
                )
            self._original = self._scheduler.step
            self._before = vars(self._scheduler).get("step")  # set if something else has wrapped it too
            self._thread = threading.get_ident()
            self._scheduler.step = self._wrap(self._original)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            del self._scheduler.step  # the class's own method shows again
        else:
            self._scheduler.step = self._before

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        # functools.wraps, not a bare *args wrapper: pipelines inspect the signature of scheduler.step and silently stop
        # passing `eta` and `generator` to a callable that does not name them, which changes the image.
        @functools.wraps(original)
        def step(model_output: Latents, timestep: Any, sample: Latents, *args: Any, **kwargs: Any) -> Any:
            self._check_call(model_output, sample)
            rows = self._rows
            full = original(rows.pad(model_output), timestep, rows.pad(sample), *args, **kwargs)
            if not self._levels:
                # Not before the first step: only now are the timesteps set, and is the place of the first one known.
                self._levels = noise_levels(self._scheduler)[_first_index(self._scheduler, timestep) :]
            prev_sample = rows.take(full[0])
            tapped = TappedStep(self._calls, self._levels, model_output, sample, prev_sample, self._scheduler)
            self._calls += 1
            keep = self._observe(tapped)
            if keep is not None:
                rows.keep(keep)
            if len(rows) == 0:
                raise AllRowsGone
            return _living(full, rows)

        step._is_tapped = True  # type: ignore[attr-defined]  # survives another functools.wraps on top
        return step

    def _check_call(self, model_output: Tensor, sample: Tensor) -> None:
        if threading.get_ident() != self._thread:
            raise GuardStateError("scheduler.step was called from another thread than the guard that watches it")
        if len(model_output) != len(self._rows) or len(sample) != len(self._rows):
            raise GuardStateError(
                f"scheduler.step got model_output with {len(model_output)} and sample with {len(sample)} rows while "
                f"{len(self._rows)} of {self._rows.batch_size} are alive"
            )


def _living(result: Any, rows: LiveRows) -> Any:
    """A step's result, a tuple or a diffusers output, with the living rows of every tensor that holds the batch."""
    if rows.complete:
        return result

    def living(value: Any) -> Any:
        return rows.take(value) if isinstance(value, Tensor) and value.shape[:1] == (rows.batch_size,) else value

    if isinstance(result, tuple):
        return tuple(living(value) for value in result)
    return type(result)(**{name: living(value) for name, value in result.items()})


def _first_index(scheduler: Any, timestep: Any) -> int:
    """Where in ``scheduler.timesteps`` the run began; asked after its first step."""
    if getattr(scheduler, "step_index", None) is not None:
        return scheduler.step_index - 1
    return int((scheduler.timesteps == timestep).nonzero()[0])  # DDIM, DDPM and PNDM go by the timestep alone
