"""What a calibration is asked for, what came out, and how it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from moe_artifacts.accumulator import Accumulated
from moe_artifacts.calibration.certify import Certified
from moe_artifacts.calibration.risks import RiskName
from moe_artifacts.config import RuleName, ThresholdConfig, to_dict
from moe_artifacts.errors import InputError
from moe_artifacts.held_back import Bin
from moe_artifacts.policy import Outcome, PromptOutcome
from moe_artifacts.records import Records
from moe_artifacts.scalar.exit import ScalarExit
from moe_artifacts.scalar.posterior import ScalarPosterior

RiskOption = Literal["per-image", "per-prompt", "miss", "wrong-aborts"]
RISKS: dict[RiskOption, RiskName] = {
    "per-image": "false-aborts",
    "per-prompt": "false-aborts-per-prompt",
    "miss": "miss",
    "wrong-aborts": "wrong-aborts",
}
RISK_WORDS = {  # as they are stored with a threshold, where the guard's report reads them
    "per-image": "false_abort_rate",
    "per-prompt": "false aborts per prompt",
    "miss": "missed bad images",
    "wrong-aborts": "wrong aborts among the aborts",
}
RISK_TITLES: dict[str, str] = {
    "per-image": "clean images aborted",
    "per-prompt": "clean images aborted, by prompt",
    "miss": "bad images not aborted",
    "wrong-aborts": "clean ones among the aborted",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Raises:
        InputError: If a number is out of its range, or the risk needs another unit.
    """

    rule: RuleName = "cumulative"
    risk: RiskOption = "per-image"
    max_risk: float = 0.05
    confidence: float = 0.95
    unit: Literal["image", "prompt"] = "prompt"
    check_cost: float = 0.02  # of one check of one image, in denoiser calls of one image
    q: float = 0.5  # q-exit only
    patience: int = 2  # patience only
    choose_steps: bool | None = (
        None  # look only at the steps that make a clean image cheapest; None: where it can be done
    )
    siblings: int = 1  # scalar scores only: images of one prompt that run in one batch and see each other's scores
    shares: tuple[float, float, float] = (0.3, 0.5, 0.2)  # of the prompts: fitted on, certified on, reported on
    seed: int = 0  # of the split

    def __post_init__(self) -> None:
        for name in ("max_risk", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must be between 0 and 1, both excluded, got {getattr(self, name)}")
        if not 0 <= self.check_cost < np.inf:
            raise InputError(f"check_cost must be a number of denoiser calls, 0 or more, got {self.check_cost}")
        if not 0 <= self.q < 1:
            raise InputError(f"q must be in [0, 1), got {self.q}")
        for name in ("patience", "siblings"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.risk == "per-prompt" and self.unit == "image":
            raise InputError('the risk per-prompt is a mean over prompts: it needs the unit "prompt", got "image"')


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """The posterior of every image and scored step, and where it comes from."""

    prob: Float[np.ndarray, "image step"]
    acc: Accumulated
    posterior: ScalarPosterior | None = None  # None: the posterior is the recorded one
    exit_head: ScalarExit | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibrated:
    """What came out."""

    request: Request
    rule: ThresholdConfig  # with its provenance
    certified: Certified
    cheapest: float | None  # threshold that was cheapest on the first part; None: nothing was fitted there
    images: tuple[int, int, int]  # in each part
    prompts: tuple[int, int, int]
    outcome: Outcome  # on the third part, as all that follows
    prompt_outcome: PromptOutcome
    risks: dict[str, float]  # each risk the command knows
    reliability: list[Bin]
    ece: float
    curve: dict[str, np.ndarray]  # threshold, false_abort_rate, recall, cost_per_clean
    fitted: Fitted
    records: Records
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """All of it, as the command prints it."""
        return "\n".join(
            [*self._data(), "", *self._promise(), "", *self._held_back(), "", *self._table(), *self._notes()]
        )

    def summary(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        certified = self.certified
        values: dict[str, Any] = {
            "rule": to_dict(self.rule),
            "certified_threshold": certified.threshold,
            "cheapest_threshold": self.cheapest,
            "num_units": certified.num_units,
            "left_out": certified.left_out,
            "images": self.images,
            "prompts": self.prompts,
            "held_back": {
                **self.outcome.row(),
                "risks": self.risks,
                "cost_per_clean_mean_over_prompts": self.prompt_outcome.cost_per_clean,
                "prompts_left_empty": self.prompt_outcome.empty,
                "ece": self.ece,
            },
            "reliability": [vars(line) for line in self.reliability],
            "curve": {name: points.tolist() for name, points in self.curve.items()},
            "notes": self.notes,
        }
        return _without_nan(values)

    def _data(self) -> list[str]:
        runs = self.records.runs
        steps = ", ".join(str(calls) for calls in runs.calls)
        names = ("fitted on", "threshold from", "held back")
        parts = [
            f"{name} {prompts} prompts with {images} images"
            for name, prompts, images in zip(names, self.prompts, self.images, strict=True)
            if images
        ]
        return [
            f"{len(runs)} images of {len(self.records.prompts)} prompts, {_percent(runs.label.mean())} bad; scored after {steps} of "
            f"{runs.total_calls} denoiser calls",
            "; ".join(parts),
        ]

    def _promise(self) -> list[str]:
        request, certified, rule = self.request, self.certified, self.rule
        units = "prompts" if request.unit == "prompt" else "images"
        left_out = f", {certified.left_out} without one that counts left out" if certified.left_out else ""
        free = {"q-exit": f" (q {rule.q})", "patience": f" ({rule.patience} in a row)"}.get(rule.rule, "")
        lines = [
            f"rule           {rule.rule}{free}",
            f"threshold      {rule.threshold:.6g}",
            f"promise        {RISK_TITLES[request.risk]} <= {_percent(request.max_risk)}, {_percent(request.confidence)} sure",
            f"n              {certified.num_units} {units}{left_out}",
        ]
        if self.cheapest is not None:
            higher = "which is taken" if self.cheapest > certified.threshold else "lower, hence not promised"
            lines.append(
                f"               lowest threshold with this promise {certified.threshold:.6g}; cheapest on the fitting part "
                f"{self.cheapest:.6g}, {higher}"
                if self.cheapest != certified.threshold
                else "               also the cheapest on the fitting part"
            )
        return lines

    def _held_back(self) -> list[str]:
        found, risks = self.outcome, self.risks
        asked = self.request.risk
        lines = [f"on the part held back ({self.prompts[2]} prompts, {self.images[2]} images):"]
        for name in sorted(RISK_TITLES, key=lambda name: name != asked):  # the one that is promised first
            promised = f"   (promised: {_percent(self.request.max_risk)})" if name == asked else ""
            lines.append(f"  {RISK_TITLES[name]:34} {_percent(risks[name]):>8}{promised}")
        clean = (
            f"{_change(found.cost_per_clean)}   (without the price of scoring {_change(found.cost_per_clean_unscored)})"
        )
        mean = f"{_change(self.prompt_outcome.cost_per_clean)}   ({_percent(self.prompt_outcome.empty)} of prompts left empty)"
        rejected = f"{_percent(found.rejected)}   (of all images; not aborts, and kept in what stands above and below)"
        rows = {
            "bad among the kept": f"{_percent(found.bad_left)}   (before: {_percent(found.bad_rate)})",
            "steps saved": _percent(found.steps_saved),
            **({"rejected at the last step": rejected} if found.rejected else {}),
            "cost per clean image": clean,
            "the same, mean over prompts": mean,
        }
        return lines + [f"  {title:34} {'':>{8 - len(text.split('   ')[0])}}{text}" for title, text in rows.items()]

    def _table(self) -> list[str]:
        lines = [
            f"reliability of the posterior there, at the steps where stopping saves calls (calibration error {self.ece:.3f}):",
            "  posterior     seen   mean posterior   really bad",
        ]
        for line in self.reliability:
            lines.append(
                f"  {line.low:.1f} to {line.high:.1f} {line.count:8}   {_percent(line.predicted):>14}   {_percent(line.observed):>10}"
            )
        return lines

    def _notes(self) -> list[str]:
        return ["", *(f"note: {note}" for note in self.notes)] if self.notes else []


def _percent(rate: float) -> str:
    return "none" if math.isnan(rate) else f"{100 * rate:.3g} %"


def _change(rate: float) -> str:
    return "no clean image left" if math.isinf(rate) else f"{100 * rate:+.1f} %"


def _without_nan(value: Any) -> Any:
    """NaN and infinity become null: JSON has neither."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
