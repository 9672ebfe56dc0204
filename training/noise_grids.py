"""Noise levels to draw from: the steps of a run with one scheduler, or of several.

A scheduler is written ``NAME[:STEPS][:SETTING=VALUE]...``:

    ddim                                            flow:28:shift=3
    euler:30:use_karras_sigmas=true                 dpm:20:timestep_spacing="trailing"

NAME is a short name of ``moe_artifacts.schedulers`` ("flow" stands for "flow-euler"), with the noise schedule of a given
model, or the class name of a scheduler that ``moe_artifacts.noise`` supports, with the defaults of that class.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from moe_artifacts.errors import InputError
from moe_artifacts.noise import NoiseLevel, noise_levels
from moe_artifacts.noise_tables import SUPPORTED_SCHEDULERS, uses_flow_sigmas
from moe_artifacts.schedulers import FLOW_SCHEDULERS, MORE_SCHEDULERS, SCHEDULERS, set_scheduler

DEFAULT_STEPS = 50
# The betas of Stable Diffusion 1, 2 and XL: their scheduler/scheduler_config.json.
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ALIASES = {"flow": "flow-euler"}


@dataclass(frozen=True)
class NoiseGrid:
    """The steps of one run at which there is both signal and noise, noisiest first.

    Left out are half-steps, which repeat a level, and levels of pure noise, as of a flow at sigma = 1: they show nothing of
    the image.
    """

    name: str  # as it was asked for
    steps: tuple[int, ...]  # their places in the run
    levels: tuple[NoiseLevel, ...]  # scaled to alpha**2 + sigma**2 = 1, so that all schedulers are alike

    def __post_init__(self) -> None:
        if not self.levels:
            raise InputError(f"scheduler {self.name!r} has no step with both signal and noise; ask for more steps")

    @classmethod
    def from_scheduler(cls, name: str, scheduler: Any) -> NoiseGrid:
        """Of a scheduler that has its grid already, whichever ``set_timesteps`` made it.

        Raises:
            UnsupportedPipelineError: If its noise levels are not known.
        """
        places = [(i, _unit_variance(level)) for i, level in enumerate(noise_levels(scheduler)) if not level.half_step]
        places = sorted((place for place in places if math.isfinite(place[1].log_snr)), key=lambda p: p[1].log_snr)
        return cls(name, tuple(i for i, _ in places), tuple(level for _, level in places))


def parse_grids(schedulers: str, model_scheduler: Any = None) -> list[NoiseGrid]:
    """The grids of a list of schedulers, separated by commas.

    Args:
        model_scheduler: Of the model whose runs the levels stand for; None: the betas of Stable Diffusion, and for flows a
            shift of 1. Names of the other kind, flow or not, always have these.
    Raises:
        InputError: If a name, a number of steps or a setting is none.
        UnsupportedPipelineError: If a scheduler is not supported with these settings.
    """
    names = [name.strip() for name in schedulers.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"schedulers must be one or more different ones, separated by commas, got {schedulers!r}")
    bases = _bases(model_scheduler)
    return [_grid(name, bases) for name in names]


def model_scheduler(name: str, revision: str | None = None) -> Any:
    """The scheduler of the pipeline in a folder or with a Hub id; None where there is none."""
    import diffusers

    try:
        config = diffusers.DDIMScheduler.load_config(name, subfolder="scheduler", revision=revision)
    except OSError:
        return None
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None:
        raise InputError(
            f"{name} has a scheduler of the class {config.get('_class_name')}, which diffusers does not have"
        )
    return kind.from_config(config)


def _grid(spec: str, bases: Mapping[bool, Any]) -> NoiseGrid:
    name, *rest = spec.split(":")
    steps = DEFAULT_STEPS
    if rest and "=" not in rest[0]:
        number = rest.pop(0)
        if not (number.isascii() and number.isdigit() and int(number) > 0):
            raise InputError(f"scheduler {spec!r}: the number of steps must be a positive number, got {number!r}")
        steps = int(number)
    settings = dict(_setting(spec, text) for text in rest)
    kind, scheduler = None, None
    try:
        kind, config = _class_and_config(name, bases)
        known = inspect.signature(kind.__init__).parameters.keys()
        if unknown := sorted(settings.keys() - known):
            raise InputError(f"scheduler {spec!r}: {kind.__name__} has no setting {unknown[0]!r}")
        # Not from_config, which silently ignores a setting that had its default value in the model's scheduler.
        scheduler = kind(**{name: value for name, value in (config | settings).items() if name in known})
        # The two steps for which it has a default here are the only number that default goes with.
        more = {"intermediate_timesteps": None} if kind.__name__ == "SCMScheduler" else {}
        scheduler.set_timesteps(steps, **more)
    except InputError:
        raise
    except Exception as error:  # diffusers refuses settings with whatever comes first, ImportError among them
        if scheduler is not None and scheduler.config.get("use_dynamic_shifting"):
            raise InputError(
                f"scheduler {spec!r}: use_dynamic_shifting makes its levels depend on the size of the image; give a shift: "
                f"{name}:{steps}:use_dynamic_shifting=false:shift=3"
            ) from error
        raise InputError(f"scheduler {spec!r} cannot be built: {type(error).__name__}: {error}") from error
    return NoiseGrid.from_scheduler(spec, scheduler)


def _class_and_config(name: str, bases: Mapping[bool, Any]) -> tuple[Any, dict[str, Any]]:
    import diffusers

    if name in SUPPORTED_SCHEDULERS:
        return getattr(diffusers, name), {}
    name = ALIASES.get(name, name)
    known = SCHEDULERS | MORE_SCHEDULERS | FLOW_SCHEDULERS
    if name not in known:
        raise InputError(
            f"scheduler must be flow, {', '.join(known)} or a class name such as EDMEulerScheduler, got {name!r}"
        )
    holder = SimpleNamespace(scheduler=bases[name in FLOW_SCHEDULERS])
    set_scheduler(holder, name)
    return type(holder.scheduler), dict(holder.scheduler.config)


def _bases(model_scheduler: Any) -> dict[bool, Any]:
    """Schedulers whose configuration others take over: for flows (True) and for the rest."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    bases: dict[bool, Any] = {False: DDIMScheduler(**STABLE_DIFFUSION), True: FlowMatchEulerDiscreteScheduler()}
    if model_scheduler is not None:
        bases[uses_flow_sigmas(model_scheduler)] = model_scheduler
    return bases


def _setting(spec: str, text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found:
        raise InputError(f"scheduler {spec!r}: expected NAME[:STEPS][:SETTING=VALUE]..., got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a word need not be quoted


def _unit_variance(level: NoiseLevel) -> NoiseLevel:
    scale = math.hypot(level.alpha, level.sigma)
    return NoiseLevel(level.alpha / scale, level.sigma / scale, level.half_step)
