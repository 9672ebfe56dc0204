"""What a guarded run hands back, and its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from moe_artifacts.config import ThresholdConfig
from moe_artifacts.trajectory import Trajectory
from moe_artifacts.verdict import Verdict


@dataclass(frozen=True)
class Setting:
    """How a run was sampled: a threshold is certified for one such setting."""

    scheduler: str  # class name
    num_inference_steps: int | None  # None: a grid of the caller's own
    guidance_scale: float
    scored_steps: tuple[int, ...]
    eta: float | None = None  # None, here and below: not known
    image_size: tuple[int, ...] | None = None  # height and width in pixels
    denoiser: str | None = None  # its fingerprint


@dataclass
class GuardedOutput:
    """The images that were kept, and what became of every image asked for.

    With ``on_abort="record"`` all images are kept and bit-identical to the unwatched run; the verdicts then say what
    "drop" would have done. Steps are counted as they were run, also for images that were aborted but stayed in the batch
    ("mask", ``drop_sizes``).
    """

    images: Any  # kept ones, in the order asked for, as ``output_type`` says
    kept_indices: list[int]  # place of each in the order asked for
    verdicts: list[Verdict]  # one per image asked for
    trajectory: Trajectory
    steps_run: int  # denoiser steps, summed over images
    steps_full: int  # the same without the guard
    nsfw_content_detected: list[bool] | None  # of the kept images, from the pipeline's safety checker
    setting: Setting
    rule: ThresholdConfig | None
    recorded: bool  # on_abort="record"
    audited_indices: list[int] = field(default_factory=list)  # would have been aborted, and were finished
    audited_images: Any = field(default_factory=list)  # those, as ``images`` has the others
    audited_nsfw: list[bool] | None = None  # of those, as ``nsfw_content_detected``
    interrupted: bool = False  # the pipeline left its loop before the last step: the images kept are not finished
    last_previews: dict[int, Tensor] = field(default_factory=dict)  # of aborted and rejected images: RGB in [0, 1], CPU

    def report(self) -> str:
        """What happened, in one line, and what the threshold promises, in another."""
        return f"{self._events()}\n{promise(self.rule, self.setting)}"

    def _events(self) -> str:
        num_steps = self.trajectory.num_steps
        # Steps are counted from 1 here, as "9 of 50": then 41 of this image's steps were not run.
        aborted = sorted(v.step + 1 for v in self.verdicts if v.status == "aborted" and v.step is not None)
        audited = sum(v.status == "audited" for v in self.verdicts)
        rejected = sum(v.status == "rejected" for v in self.verdicts)
        errors = sum(v.status == "error" for v in self.verdicts)
        would = "would be " if self.recorded else ""
        parts = [f"{len(self.kept_indices)} kept"]
        if aborted:
            parts.append(f"{len(aborted)} {would}aborted at {_steps(aborted)} of {num_steps}")
        if audited:
            parts.append(f"{audited} finished for the audit")
        if rejected:
            parts.append(f"{rejected} {would}rejected at the last step")
        if errors:
            parts.append(f"{errors} with non-finite latents or scores")
        if self.recorded:
            # Only an image that leaves before the last step saves any.
            left = [v.step for v in self.verdicts if v.status in ("aborted", "error") and v.step is not None]
            saved, ending = (sum(num_steps - (step + 1) for step in left), "would not be run")
        else:
            saved, ending = self.steps_full - self.steps_run, "not run"
        if self.interrupted:
            ending += "; INTERRUPTED before the last step, so what was kept is not finished"
        return f"{len(self.verdicts)} images: {', '.join(parts)}; {saved} of {self.steps_full} denoiser steps {ending}"


def select_images(images: Any, places: list[int]) -> Any:
    """Some of a pipeline's images, a list, an array or a tensor, as what they came; ``images`` itself if all are meant."""
    if places == list(range(len(images))):
        return images
    return [images[k] for k in places] if isinstance(images, list) else images[places]


def no_images(output_type: str, no_latents: Tensor, size: tuple[int, int]) -> Any:
    """A batch of no images, of the type that ``output_type`` asks for, so that batches can be put together blindly.

    Args:
        no_latents: Latents of no row, as the scheduler holds them.
        size: Height and width of the images in pixels.
    """
    if output_type == "latent":
        return no_latents
    if output_type == "pt":
        return no_latents.new_empty(0, 3, *size)
    if output_type == "np":
        return np.empty((0, *size, 3), dtype=np.float32)
    return []


def promise(rule: ThresholdConfig | None, setting: Setting) -> str:
    """What the threshold promises in this setting, in one line.

    Example:
        >>> rule = ThresholdConfig(rule="cumulative", threshold=0.4, max_risk=0.05, confidence=0.95,
        ...                        scheduler="DDIMScheduler", num_inference_steps=50)
        >>> promise(rule, Setting("DDIMScheduler", 50, 1.0, (7, 25, 49)))
        'false aborts <= 5 % (95 % sure, over the calibration prompts, DDIM, 50 steps)'
        >>> promise(rule, Setting("DDIMScheduler", 25, 1.0, (3, 12, 24)))
        'threshold NOT certified in this setting: 25 steps instead of 50'
    """
    if rule is None:
        return "no threshold: scores were recorded, nothing was decided"
    if rule.max_risk is None or rule.confidence is None:
        return f"threshold {rule.threshold:g} promises nothing: it does not come from a calibration"
    if differences := setting_differences(rule, setting):
        return f"threshold NOT certified in this setting: {', '.join(differences)}"
    over = rule.prompt_mix or "the calibration prompts"
    where = [f"{100 * rule.confidence:g} % sure", f"over {over}"]
    if rule.scheduler is not None:
        where.append(_short(rule.scheduler))
    if rule.num_inference_steps is not None:
        where.append(f"{rule.num_inference_steps} steps")
    if rule.guidance_scale is not None:
        where.append(f"guidance {rule.guidance_scale:g}")
    risk = "false aborts" if rule.risk == "false_abort_rate" else rule.risk
    return f"{risk} <= {100 * rule.max_risk:g} % ({', '.join(where)})"


def setting_differences(rule: ThresholdConfig, setting: Setting) -> list[str]:
    """Where the setting is not the one the threshold was certified in; what either does not know is not compared."""
    found = []
    if rule.scheduler is not None and _short(rule.scheduler) != _short(setting.scheduler):
        found.append(f"{_short(setting.scheduler)} instead of {_short(rule.scheduler)}")
    if rule.num_inference_steps is not None and rule.num_inference_steps != setting.num_inference_steps:
        steps = (
            "timesteps of your own" if setting.num_inference_steps is None else f"{setting.num_inference_steps} steps"
        )
        found.append(f"{steps} instead of {rule.num_inference_steps}")
    if rule.guidance_scale is not None and rule.guidance_scale != setting.guidance_scale:
        found.append(f"guidance {setting.guidance_scale:g} instead of {rule.guidance_scale:g}")
    for name, say in _TOLD:
        certified, now = getattr(rule, name), getattr(setting, name)
        if certified is not None and now is not None and certified != now:
            found.append(say(now, certified))
    if not found and rule.scored_steps is not None and rule.scored_steps != setting.scored_steps:
        found.append(f"scored steps {list(setting.scored_steps)} instead of {list(rule.scored_steps)}")
    return found


_TOLD: tuple[tuple[str, Callable[[Any, Any], str]], ...] = (
    ("eta", lambda now, certified: f"eta {now:g} instead of {certified:g}"),
    ("image_size", lambda now, certified: f"size {'x'.join(map(str, now))} instead of {'x'.join(map(str, certified))}"),
    ("denoiser", lambda now, certified: "another denoiser (weights or precision)"),
)


def _short(scheduler: str) -> str:
    return scheduler.removesuffix("Scheduler")


def _steps(numbers: list[int]) -> str:
    """Rising numbers in words.

    Example:
        >>> _steps([9, 9]), _steps([9, 17]), _steps([3, 9, 9, 17, 20, 21])
        ('step 9', 'steps 9 and 17', 'steps 3 to 21')
    """
    if numbers[0] == numbers[-1]:
        return f"step {numbers[0]}"
    if len(numbers) > 5:
        return f"steps {numbers[0]} to {numbers[-1]}"
    return f"steps {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
