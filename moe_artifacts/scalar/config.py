"""``config.json`` of a scalar scorer: everything about it but the user's function, its preview and the fitted numbers."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_artifacts.config import FORMAT_VERSION, LatentSpaceConfig, RuleName, ThresholdConfig
from moe_artifacts.errors import ConfigError
from moe_artifacts.noise import progress

TOLERANCE = 1e-3  # nats: recorded noise levels are rounded to float32
PLAIN_RULES: tuple[RuleName, ...] = ("posterior", "patience", "economic")  # those that need no exit distribution


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedStepsConfig:
    """At which noise levels the posterior was fitted, one entry a step."""

    log_snr: tuple[float, ...]  # nats, rising
    share: tuple[float, ...]  # of the denoiser calls of a whole run spent by then
    has_exit: bool  # whether an exit distribution was fitted too

    def __post_init__(self) -> None:
        for name in ("log_snr", "share"):
            values = getattr(self, name)
            if not values or not np.isfinite(values).all() or (np.diff(values) <= 0).any():
                raise ConfigError(f"fitted.{name} must be finite numbers that rise, at least one, got {values!r}")
        if len(self.log_snr) != len(self.share) or self.share[0] <= 0 or self.share[-1] > 1:
            raise ConfigError(f"fitted.share must be one number in (0, 1] for each log_snr, got {self.share!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalarConfig:
    """A scorer made of a user's function. Before it is calibrated it scores every step and decides nothing."""

    name: str
    latent_space: LatentSpaceConfig
    label: str = "a low final score"  # what "bad" means, in words
    higher_is_better: bool = True  # of what the function returns
    siblings: bool = False  # images of one prompt in one batch see each other's scores
    fitted: FittedStepsConfig | None = None
    threshold: ThresholdConfig | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(f"format_version {self.format_version!r} is unknown, this release reads {FORMAT_VERSION}")
        if self.threshold is not None and self.threshold.rule not in self.rules:
            raise ConfigError(
                f"the {self.threshold.rule} rule needs "
                + ("an exit distribution" if self.fitted else "a fitted posterior")
                + f", which the scorer {self.name!r} lacks; it supports: {', '.join(self.rules) or 'none'}"
            )

    @property
    def uses_prompt(self) -> bool:
        return True

    @property
    def uses_noisy(self) -> bool:
        return False

    @property
    def rules(self) -> tuple[RuleName, ...]:
        """The rules that can decide by its scores."""
        if self.fitted is None:
            return ()
        return typing.get_args(RuleName) if self.fitted.has_exit else PLAIN_RULES

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """Nats; progress rises from 0 just before the first fitted step, and is below 1 at the last."""
        if self.fitted is None:
            return (-20.0, 20.0)  # nothing looks at progress then
        return (self.fitted.log_snr[0] - TOLERANCE, self.fitted.log_snr[-1] + 1.0)

    @property
    def check_progress(self) -> tuple[float, ...] | None:
        """Score the first step at or past each of these; None: every step."""
        if self.fitted is None:
            return None
        return tuple(progress(level - TOLERANCE, self.log_snr_range) for level in self.fitted.log_snr)

    @property
    def checks_last(self) -> bool:
        """Whether the last step is always scored: to record it, but it comes too late to decide."""
        return self.fitted is None

    def column(self, log_snr: float) -> int:
        """Number of the last fitted step at or before this noise level; -1: none."""
        assert self.fitted is not None
        return int(np.searchsorted(self.fitted.log_snr, log_snr + TOLERANCE, side="right")) - 1
