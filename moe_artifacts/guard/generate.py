"""generate_clean: goes on until every prompt has its images, with new seeds in place of what was aborted.

Images are made in waves, each one call of the pipeline with as many images as fit, whichever prompts they are of. What
a wave aborts is attempted again in the next one, with another seed (attempts.py).
"""

from __future__ import annotations

import contextlib
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from moe_artifacts.errors import InputError
from moe_artifacts.guard.attempts import AttemptQueue, Place
from moe_artifacts.guard.call_settings import OURS, call_arguments, check_call, run_settings
from moe_artifacts.guard.clean_run import CleanRun, clean_run
from moe_artifacts.guard.fingerprint import fingerprint
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.output import GuardedOutput
from moe_artifacts.guard.request import denoiser_of, require_steps
from moe_artifacts.guard.run_folder import Attempt, RunWriter, Wave, image_name


def generate_clean(
    pipe: Any,
    prompts: str | list[str],
    images_per_prompt: int = 1,
    *,
    guard: ArtifactGuard,
    batch_size: int,
    seed: int = 0,
    max_attempts: int = 4,
    max_denoiser_calls: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    arguments_for: Callable[[list[str]], Mapping[str, Any]] | None = None,
    **pipeline_kwargs: Any,
) -> CleanRun:
    """Generate ``images_per_prompt`` images of every prompt that the guard does not abort.

    Args:
        prompts: A prompt that is there twice gets different images each time.
        guard: Its ``on_abort`` is "drop" or "mask". Images that it audits are handed back apart, and attempted again.
        batch_size: Images in one call of the pipeline.
        seed: Every attempt's own seed follows from it, the prompt and the number of the attempt.
        max_attempts: Per image wanted.
        max_denoiser_calls: Denoiser steps, summed over images. The run ends before a wave that would pass it if it
            aborted nothing.
        folder: Where the images go, one file each (run_folder.py); a run that was stopped is resumed. None: they are
            kept in memory.
        progress: Show a bar with the images kept and the share of steps saved, on stderr.
        arguments_for: Called with the prompts of a wave, one per image; returns arguments of the pipeline that differ
            between prompts, with one row or entry per image, e.g. ``prompt_embeds``, which then stand in for ``prompt``.
            They are not recorded in the folder.
        **pipeline_kwargs: Further arguments of the pipeline, the same for all images.
    Raises:
        InputError: For a bad argument, or a ``folder`` that holds something else than a run with these settings.
        GuardStateError: If another process writes to ``folder``.
        MoeArtifactsError: What the guard refuses, before the first step.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check(prompts, guard, seed, images_per_prompt, batch_size, max_attempts, max_denoiser_calls)
    check_call(pipeline_kwargs, into_folder=folder is not None)
    pipeline_kwargs = {name: value for name, value in pipeline_kwargs.items() if name not in OURS}  # those are None
    denoiser_of(
        pipe
    )  # a pipeline that is not known, and steps that no run can take, are refused before the folder has a run
    if (steps := pipeline_kwargs.get("num_inference_steps")) is not None:
        require_steps(steps, pipe.scheduler.config.get("num_train_timesteps"))
    queue = AttemptQueue(prompts, images_per_prompt, max_attempts, seed)
    spent = _Spent()
    held: dict[Place, Any] = {}
    with contextlib.ExitStack() as stack:
        writer = None
        if folder is not None:
            settings = run_settings(pipe, guard, prompts, images_per_prompt, seed, pipeline_kwargs)
            writer = stack.enter_context(RunWriter(folder, settings))
        waves = [] if writer is None else list(writer.waves)
        _require_same_denoiser(waves, pipe, folder)
        for wave in waves:
            queue.settle(wave.attempts)
            spent.add(wave)
        kept, interrupted = queue.kept.total(), False
        bar = stack.enter_context(tqdm(total=queue.wanted, initial=kept, unit="image", disable=not progress))
        while places := queue.next(batch_size):
            texts = [prompts[index] for index, _ in places]
            seeds = [queue.seed_of(place) for place in places]
            generators = [torch.Generator().manual_seed(number) for number in seeds]
            call = call_arguments(texts, pipeline_kwargs, arguments_for)
            try:
                with spent.stays_below(max_denoiser_calls, pipe, len(places)):
                    output = guard(pipe, generator=generators, **call)
            except _OverBudget:
                break
            if interrupted := output.interrupted:
                break  # like a wave that was killed: it is made again when the run is resumed
            wave, images = _wave(places, texts, seeds, output, in_folder=writer is not None)
            if writer is not None:
                writer.commit(wave, images)
            else:
                held.update((place, image) for place, image in zip(places, images, strict=True) if image is not None)
            waves.append(wave)
            queue.settle(wave.attempts)
            spent.add(wave)
            bar.update(len(output.kept_indices))
            bar.set_postfix_str(f"{spent.share_saved:.1%} of steps saved")
    place = None if folder is None else Path(folder)
    return clean_run(prompts, waves, queue, guard.rule, held, place, interrupted=interrupted)


def _require_same_denoiser(waves: list[Wave], pipe: Any, folder: str | os.PathLike[str] | None) -> None:
    """The folder knows a model by its name, and weights under one name change."""
    was = waves[-1].setting.denoiser if waves else None
    now = fingerprint(denoiser_of(pipe)) if was is not None else None
    if was is not None and now is not None and was != now:
        raise InputError(
            f"{folder} holds a run of another denoiser (its weights or their precision differ): give another folder, or the "
            "model it was started with"
        )


class _OverBudget(Exception):
    """The wave that is about to begin could pass ``max_denoiser_calls``. It never reaches the caller."""


class _Spent:
    """Denoiser steps of the waves so far."""

    def __init__(self) -> None:
        self._run = self._full = self._num_steps = 0

    def add(self, wave: Wave) -> None:
        self._run += wave.steps_run
        self._full += wave.steps_full
        self._num_steps = wave.steps_full // len(wave.attempts)

    @property
    def share_saved(self) -> float:
        return 1 - self._run / self._full

    @contextlib.contextmanager
    def stays_below(self, most: int | None, pipe: Any, images: int) -> Iterator[None]:
        """Raises ``_OverBudget`` before the first call of the denoiser, if so many images could spend too much."""
        if most is None:
            yield
            return

        # The number of steps of the first wave (Heun: two calls each; img2img: fewer) is known only once it has begun.
        def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            steps = self._num_steps or getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
            if self._run + images * steps > most:
                raise _OverBudget

        handle = denoiser_of(pipe).register_forward_pre_hook(check, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _wave(
    places: list[Place], texts: list[str], seeds: list[int], output: GuardedOutput, *, in_folder: bool
) -> tuple[Wave, list[Any]]:
    """The record of a wave, and the finished image of each of its attempts, None where there is none."""
    finished = dict(zip(output.kept_indices, output.images, strict=True))
    finished |= dict(zip(output.audited_indices, output.audited_images, strict=True))
    flagged: dict[int, bool] = {}
    if output.nsfw_content_detected is not None:
        flagged = dict(zip(output.kept_indices, output.nsfw_content_detected, strict=True))
    if output.audited_nsfw is not None:
        flagged |= dict(zip(output.audited_indices, output.audited_nsfw, strict=True))
    attempts = tuple(
        Attempt(
            prompt_index=index,
            prompt=text,
            attempt=attempt,
            seed=seed,
            status=verdict.status,
            step=verdict.step,
            audited=verdict.audited,
            artifact_prob=_finite(verdict.artifact_prob),
            cumulative_artifact_prob=_finite(verdict.cumulative_artifact_prob),
            prompt_truncated=verdict.prompt_truncated,
            nsfw_content_detected=flagged.get(place),
            file=image_name(index, attempt, verdict.audited) if in_folder and place in finished else None,
        )
        for place, ((index, attempt), text, seed, verdict) in enumerate(
            zip(places, texts, seeds, output.verdicts, strict=True)
        )
    )
    wave = Wave(attempts=attempts, steps_run=output.steps_run, steps_full=output.steps_full, setting=output.setting)
    return wave, [finished.get(place) for place in range(len(places))]


def _check(
    prompts: list[str],
    guard: ArtifactGuard,
    seed: int,
    images_per_prompt: int,
    batch_size: int,
    max_attempts: int,
    max_denoiser_calls: int | None,
) -> None:
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"prompts must be at least one text, got {reprlib.repr(prompts)}")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"prompts must be texts that UTF-8 can hold, got {reprlib.repr(prompt)}") from error
    if guard.on_abort == "record":
        raise InputError("generate_clean needs a guard that aborts, on_abort='drop' or 'mask', got 'record'")
    counts = {"images_per_prompt": images_per_prompt, "batch_size": batch_size, "max_attempts": max_attempts}
    if max_denoiser_calls is not None:
        counts["max_denoiser_calls"] = max_denoiser_calls
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed must be a whole number, got {seed!r}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
