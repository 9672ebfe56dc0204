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

from jaxtyping import Float
from torch import Tensor

from moe_artifacts.errors import GuardStateError
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.noise import NoiseLevel, first_index, noise_levels, predict_x0
from moe_artifacts.shapes import Rows

_entering = threading.Lock()  # two threads that tap one scheduler at the same moment


class AllRowsGone(Exception):
    """Ends the pipeline's loop when no row is left. Raised out of the loop, so that nothing after it runs either:
    no denoiser call, no VAE decode, no callback on an empty batch. It never reaches the caller of the guard."""


@dataclass
class TappedStep:
    """One call of ``scheduler.step``. All tensors hold the rows of the pipeline's latents, ``LiveRows.held``."""

    index: int  # place in the denoising loop
    levels: list[NoiseLevel]  # of the whole loop
    model_output: Float[Tensor, "batch ..."]  # after guidance; latents, or the tokens some pipelines make of them
    sample: Float[Tensor, "batch ..."]  # what the model output belongs to, at ``level``
    prev_sample: Float[Tensor, "batch ..."]  # what the step returned, at the next level
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
    def x0(self) -> Float[Tensor, "batch ..."]:
        """Prediction of the clean latents, float32; computed when first asked for."""
        return predict_x0(self.scheduler, self.model_output, self.sample, self.level)


Observer = Callable[[TappedStep], Rows | None]  # returns which of the living rows to keep; None: all


class SchedulerTap:
    """While open, ``observe`` sees each step of ``scheduler`` and may take rows out of the batch.

    The observer runs after the scheduler's own step. On leaving, by whatever way, the scheduler is as it was: ``step``
    is replaced on the instance, not on the class.

    Args:
        on_shrink: Called when fewer rows go on than before.
        num_steps: Asked once, in the first step: the length of the loop, where the pipeline tells. It is needed where an
            image-to-image run begins at a timestep that stands twice in the schedule.
    Raises:
        GuardStateError: On entering, if the scheduler is tapped already. In a step, if it comes from another thread, or
            with another number of rows than were left: one row would be broadcast silently against the old batch.
            Also where a tapped scheduler is copied deeply or pickled.
        AllRowsGone: In a step, once the observer keeps no row.
    """

    def __init__(
        self,
        scheduler: Any,
        observe: Observer,
        rows: LiveRows,
        on_shrink: Callable[[], None] = lambda: None,
        num_steps: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._observe = observe
        self._rows = rows
        self._on_shrink, self._num_steps = on_shrink, num_steps
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

    def _wrap(self, original: Callable[..., Any]) -> _ReplacedStep:
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._check_call(model_output, sample)
            rows, running = self._rows, len(self._rows)
            full = original(rows.pad(model_output), timestep, rows.pad(sample), *args, **kwargs)
            if not self._levels:
                # Not before the first step: only now are the timesteps set, and is the place of the first one known.
                first = first_index(self._scheduler, timestep, self._num_steps())
                self._levels = noise_levels(self._scheduler, first)
            prev_sample = rows.take(full[0])
            tapped = TappedStep(self._calls, self._levels, model_output, sample, prev_sample, self._scheduler)
            self._calls += 1
            keep = self._observe(tapped)
            if keep is not None:
                rows.keep(keep)
            if tapped.is_last:
                rows.drop_passengers()  # before what they were denoised with is decoded
            if len(rows) == 0:
                raise AllRowsGone
            if len(rows) < running:
                self._on_shrink()
            return _held(full, rows)

        return _ReplacedStep(step, original)

    def _check_call(self, model_output: Tensor, sample: Tensor) -> None:
        if threading.get_ident() != self._thread:
            raise GuardStateError("scheduler.step was called from another thread than the guard that watches it")
        expected = len(self._rows.held)
        if len(model_output) != expected or len(sample) != expected:
            raise GuardStateError(
                f"scheduler.step got model_output with {len(model_output)} and sample with {len(sample)} rows while "
                f"{expected} of {self._rows.batch_size} are expected"
            )


class _ReplacedStep:
    """What stands in for ``scheduler.step``. An object, not a function: those are copied by reference."""

    def __init__(self, call: Callable[..., Any], original: Callable[..., Any]) -> None:
        # Not a bare *args wrapper: pipelines inspect the signature of scheduler.step and silently stop passing `eta` and
        # `generator` to a callable that does not name them, which changes the image.
        functools.update_wrapper(self, original)
        self._call = call
        self._is_tapped = True  # survives another functools.wraps on top

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> Any:  # what deepcopy asks for too
        raise GuardStateError(
            "a scheduler that a guard is watching cannot be copied or pickled: the steps of a copy would be taken for its "
            "own; do that before or after the run"
        )


def _held(result: Any, rows: LiveRows) -> Any:
    """A step's result, a tuple or a diffusers output, with the held rows of every tensor that has the full batch."""
    if len(rows.held) == rows.batch_size:
        return result

    def held(value: Any) -> Any:
        return rows.take(value) if isinstance(value, Tensor) and value.shape[:1] == (rows.batch_size,) else value

    if isinstance(result, tuple):
        return tuple(held(value) for value in result)
    return type(result)(**{name: held(value) for name, value in result.items()})
