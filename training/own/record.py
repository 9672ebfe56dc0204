"""A batch of images of any pipeline that the guard supports, watched to the end: x0 predictions and finished images.

The guard watches with a :class:`Recorder` in place of a scorer and stops nothing: what it knows of pipelines, schedulers
and packed latents holds here too, and the images are those of the unwatched run.

Which steps are recorded is said in terms of noise, so that runs of other schedulers and lengths are recorded at about the
same levels: those of the steps that :func:`spread_checks` chooses in the first setting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moe_artifacts.config import LatentSpaceConfig, RuleName
from moe_artifacts.errors import InputError
from moe_artifacts.guard.call_settings import call_arguments
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.pipelines import spec_of
from moe_artifacts.guard.request import read_request
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.guard.space import latent_space_of
from moe_artifacts.guard.tap import AllRowsGone, SchedulerTap, TappedStep
from moe_artifacts.noise import NoiseLevel, progress
from moe_artifacts.schedulers import set_scheduler
from moe_artifacts.shapes import Latents, Preview, RowMask
from moe_artifacts.trajectory import Trajectory

ArgumentsFor = Callable[[list[str]], Mapping[str, Any]]  # of the prompts of a batch, as generate_clean has it
HAIR = 1e-6  # of progress: so much rounding does not hide a step
MARGIN = 1e-3  # of the log-SNR range below its first level, or a step from pure noise, clamped to it, would pass for that one


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of sampling."""

    scheduler: str | None = None  # a name of moe_artifacts.schedulers; None: the pipeline's own
    steps: int | None = None  # None: as many as the pipeline makes by itself


def parse_settings(text: str) -> tuple[Setting, ...]:
    """``NAME:STEPS`` separated by commas; ``own`` names the pipeline's own scheduler, and steps may be left out.

    Raises:
        InputError: If steps are no number of at least 1. Whether there is such a scheduler shows when it is used.

    Example:
        >>> parse_settings("ddim:50,own")
        (Setting(scheduler='ddim', steps=50), Setting(scheduler=None, steps=None))
    """
    settings = []
    for part in text.split(","):
        name, colon, steps = part.strip().partition(":")
        if not name or (colon and not (steps.isdecimal() and int(steps) > 0)):
            raise InputError(f"settings must be NAME:STEPS separated by commas, e.g. ddim:50,dpm:25, got {part!r}")
        settings.append(Setting(scheduler=None if name == "own" else name, steps=int(steps) if steps else None))
    return tuple(settings)


@dataclass(frozen=True, kw_only=True)
class RecorderConfig:
    """What the guard reads of the config of a scorer."""

    latent_space: LatentSpaceConfig
    log_snr_range: tuple[float, float]  # nats
    check_progress: tuple[float, ...]
    uses_noisy: bool  # record x_t too
    name: str = "recorder"
    threshold: None = None
    rules: tuple[RuleName, ...] = ()
    checks_last: bool = True
    uses_prompt: bool = False


class Recorder:
    """Stands in for a scorer: keeps what it is shown of the last run, in float16, and finds nothing wrong."""

    def __init__(self, config: RecorderConfig) -> None:
        self.config = config
        self.x0: list[Latents] = []
        self.latents: list[Latents] = []

    def session(self, batch_size: int, prompts: list[str] | None = None) -> Recorder:
        self.x0, self.latents = [], []
        return self

    def step(self, *, x0: Latents, log_snr: float, latents: Latents | None = None) -> SimpleNamespace:
        self.x0.append(x0.half().cpu())
        if latents is not None:
            self.latents.append(latents.half().cpu())
        # Also where it is not: an image that the guard took for an error would be missing from the following steps.
        return SimpleNamespace(finite=torch.ones(len(x0), dtype=torch.bool))


@dataclass(frozen=True)
class Recording:
    """One batch, also of the images that went wrong on the way."""

    trajectory: Trajectory
    images: Preview  # float32, on the CPU
    wrong: dict[int, tuple[str, str]]  # row of an image that cannot be used -> reason, detail


class PipelineRecorder:
    """Records batches of one pipeline; afterwards its scheduler is its own again.

    Args:
        pipe: Any that the guard supports.
        first: The setting whose noise levels are to be recorded.
        prompt: Any; a run of it is begun to see the noise levels.
        checks: Record at most so many steps of that setting.
        arguments: Further arguments of every call.
        arguments_for: Called with the prompts of a batch; returns arguments with one row or entry per prompt.
        keep_latents: Record x_t, scaled to variance one, beside x0.
    Raises:
        MoeArtifactsError: What the guard refuses.
        InputError: If the run is too short to have anything to record.
    """

    def __init__(
        self,
        pipe: Any,
        first: Setting,
        prompt: str,
        *,
        checks: int,
        arguments: Mapping[str, Any],
        arguments_for: ArgumentsFor | None = None,
        keep_latents: bool = False,
    ) -> None:
        self._pipe, self._arguments, self._arguments_for = pipe, arguments, arguments_for
        self._own_scheduler = pipe.scheduler
        with self._set(first):
            levels = self._levels_of(first, prompt)
        log_snr_range, check_progress = spread_checks(levels, checks)
        self.config = RecorderConfig(
            latent_space=latent_space_of(pipe, type(pipe).__name__),
            log_snr_range=log_snr_range,
            check_progress=check_progress,
            uses_noisy=keep_latents,
        )

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], setting: Setting, *, bfloat16: bool = False
    ) -> Recording:
        """Run the pipeline once.

        Args:
            bfloat16: Run the denoiser under autocast; what comes out of it is of the latents' own dtype again.
        """
        recorder = Recorder(self.config)
        guard = ArtifactGuard(recorder, on_abort="record")
        call = self._call(list(prompts), list(seeds), setting)
        half = denoiser_in_bfloat16(self._pipe) if bfloat16 else contextlib.nullcontext()
        with self._set(setting), half, torch.no_grad():
            output = guard(self._pipe, **call)
        images, recorded = output.images.float().cpu(), output.trajectory
        sampled = ("scheduler", "num_inference_steps", "guidance_scale", "eta", "image_size", "denoiser")
        meta = recorded.meta | {
            "pipeline": type(self._pipe).__name__,
            "setting": {name: recorded.meta[name] for name in sampled},
            "truncated": sum(verdict.prompt_truncated for verdict in output.verdicts),
        }
        trajectory = dataclasses.replace(
            recorded,
            x0=torch.stack(recorder.x0, dim=1),
            latents=torch.stack(recorder.latents, dim=1) if recorder.latents else None,
            meta=meta,
        )
        statuses = [verdict.status for verdict in output.verdicts]
        return Recording(trajectory, images, _wrong(trajectory, images, output.nsfw_content_detected, statuses))

    def _call(self, prompts: list[str], seeds: list[int], setting: Setting) -> dict[str, Any]:
        arguments = dict(self._arguments)
        if setting.steps is not None:
            arguments["num_inference_steps"] = setting.steps
        call = call_arguments(prompts, arguments, self._arguments_for)
        return call | {"generator": [torch.Generator().manual_seed(seed) for seed in seeds], "output_type": "pt"}

    @contextlib.contextmanager
    def _set(self, setting: Setting) -> Iterator[None]:
        try:
            if setting.scheduler is not None:
                set_scheduler(self._pipe, setting.scheduler)
            yield
        finally:
            self._pipe.scheduler = self._own_scheduler  # the next is made from it again, not from one made from it

    def _levels_of(self, setting: Setting, prompt: str) -> list[NoiseLevel]:
        """The noise level of every step of a run, found by beginning one: some pipelines shift them by the image size."""
        pipe, spec = self._pipe, spec_of(self._pipe)
        call = self._call([prompt], [0], setting)
        texts = call.pop("prompts", None)
        read_request(pipe, spec, (), call, texts)
        levels: list[NoiseLevel] = []

        def observe(step: TappedStep) -> Tensor:
            levels.extend(step.levels)
            return torch.empty(0, dtype=torch.int64)  # no row goes on: the run ends here

        tap = SchedulerTap(
            pipe.scheduler, observe, LiveRows(1), num_steps=lambda: getattr(pipe, "_num_timesteps", None)
        )
        with tap, contextlib.suppress(AllRowsGone), torch.no_grad():
            pipe(**call)
        pipe.maybe_free_model_hooks()
        return levels


def spread_checks(levels: Sequence[NoiseLevel], count: int) -> tuple[tuple[float, float], tuple[float, ...]]:
    """The log-SNR range of a run, and the progress in it of the steps to record, but for the last, which always is.

    They are evenly spaced in the mean of the share of the steps done and the progress in log-SNR. By the steps alone the
    clean end would be bare, where log-SNR rises fastest; by log-SNR alone the early steps, where stopping saves most. A
    step that starts from pure noise is never recorded: its prediction knows the prompt only.

    Raises:
        InputError: If there are fewer than two steps to choose from.

    Example:
        >>> levels = [NoiseLevel(alpha, (1 - alpha**2) ** 0.5) for alpha in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)]
        >>> (low, high), checks = spread_checks(levels, 3)
        >>> [next(i for i, level in enumerate(levels) if level.log_snr >= low + c * (high - low)) for c in checks]
        [2, 4]
    """
    found = [level.log_snr for level in levels if not level.half_step and math.isfinite(level.log_snr)]
    if len(found) < 2 or min(found) == max(found):
        raise InputError(
            f"a run needs two steps beside one from pure noise, so that there is something to stop; it has {len(levels)} "
            "in all: give more steps"
        )
    low, high = min(found), max(found)
    log_snr_range = (low - MARGIN * (high - low), high)
    places = [(i / (len(found) - 1) + progress(value, log_snr_range)) / 2 for i, value in enumerate(found)]
    spare = len(found) - 1  # without the last
    steps: list[int] = []
    for left in range(min(count - 1, spare), 0, -1):
        target = (len(steps) + 0.5) / (count - 1)
        step = next(i for i, place in enumerate(places) if place >= target)
        steps.append(min(max(step, steps[-1] + 1 if steps else 0), spare - left))
    return log_snr_range, tuple(sorted({max(progress(found[i], log_snr_range) - HAIR, 0.0) for i in steps}))


@contextlib.contextmanager
def denoiser_in_bfloat16(pipe: Any) -> Iterator[None]:
    """While open, the denoiser, and what is called with it, runs under autocast.

    Not the whole pipeline: the finished images are decoded as a user's are. What comes out is cast back, since some
    schedulers keep the latents in the dtype of the model output from then on.
    """
    with contextlib.ExitStack() as restored:
        for module in spec_of(pipe).modules(pipe):
            restored.enter_context(_forward_in_bfloat16(module))
        yield


@contextlib.contextmanager
def _forward_in_bfloat16(module: nn.Module) -> Iterator[None]:
    denoiser: Any = module  # with `device` and `dtype`, as all of diffusers' have
    original, before = denoiser.forward, vars(denoiser).get("forward")  # set if something else has wrapped it too

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(denoiser.device.type, torch.bfloat16):
            output = original(*args, **kwargs)
        return tree_map(lambda part: part.to(denoiser.dtype) if isinstance(part, Tensor) else part, output)

    denoiser.forward = forward
    try:
        yield
    finally:
        if before is None:
            del denoiser.forward  # the class's own method shows again
        else:
            denoiser.forward = before


def _wrong(
    trajectory: Trajectory, images: Preview, nsfw: Sequence[bool] | None, statuses: Sequence[str]
) -> dict[int, tuple[str, str]]:
    """The images that cannot be used, by row."""
    assert trajectory.x0 is not None
    recorded = [part for part in (trajectory.x0, trajectory.latents) if part is not None]
    finite: RowMask = torch.stack([part.flatten(1).isfinite().all(dim=1) for part in recorded]).all(dim=0)
    shown = images.flatten(1).isfinite().all(dim=1)
    wrong = {}
    for row, status in enumerate(statuses):
        if status == "error" or not finite[row]:
            wrong[row] = ("latents", "latents are NaN, infinite or beyond float16")
        elif not shown[row]:
            wrong[row] = ("image", "the finished image has values that are not finite")
        elif nsfw is not None and nsfw[row]:
            wrong[row] = ("nsfw", "the pipeline's safety checker has painted it black")
    return wrong
