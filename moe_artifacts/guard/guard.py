"""ArtifactGuard: scores a pipeline run while it runs, decides, and takes the images that go wrong out of the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from moe_artifacts.config import ThresholdConfig
from moe_artifacts.errors import ConfigError, InputError
from moe_artifacts.guard.output import GuardedOutput
from moe_artifacts.guard.request import check_latent_space, denoiser_of, read_request
from moe_artifacts.guard.rows import conditioning_follows
from moe_artifacts.guard.tap import AllRowsGone, SchedulerTap
from moe_artifacts.guard.watch import Scorer, Watch

__all__ = ["ArtifactGuard", "GuardedOutput"]


class ArtifactGuard:
    """A diffusers pipeline call under watch.

    Args:
        scorer: Trained for the latent space of the pipelines it will watch.
        on_abort: "drop" takes an image that reaches the threshold out of the running batch; the others go on unchanged.
            "record" lets every image finish, bit-identical to the unwatched run, and states the same verdicts.
        threshold: The rule that decides; the scorer's own by default. A number is that threshold for the scorer's rule:
            it then promises nothing.
    Raises:
        ConfigError: If there is no threshold to drop by, or one outside [0, 1], or the scorer has not what its rule needs.
        InputError: If ``on_abort`` is neither "drop" nor "record".
    """

    def __init__(
        self,
        scorer: Scorer,
        on_abort: Literal["drop", "record"] = "drop",
        threshold: ThresholdConfig | float | None = None,
    ) -> None:
        if on_abort not in ("drop", "record"):
            raise InputError(f"on_abort must be 'drop' or 'record', got {on_abort!r}")
        self.scorer = scorer
        self.on_abort = on_abort
        self.rule = _rule(scorer.config.threshold, threshold)
        if self.rule is None and on_abort == "drop":
            raise ConfigError(
                f"on_abort='drop' needs a threshold and the scorer {scorer.config.name!r} has none; "
                "give one, or use on_abort='record'"
            )
        if self.rule is not None and self.rule.rule not in scorer.config.rules:
            raise ConfigError(
                f"the scorer {scorer.config.name!r} cannot decide by the {self.rule.rule} rule, only by: "
                f"{', '.join(scorer.config.rules) or 'none, it is not calibrated'}"
            )

    def __call__(self, pipe: Any, *args: Any, prompts: list[str] | None = None, **kwargs: Any) -> GuardedOutput:
        """Call ``pipe(*args, **kwargs)`` under watch.

        A ``callback_on_step_end`` of the caller sees the latents of the living rows, and all rows of the prompt
        embeddings. The pipeline, its scheduler and the caller's generators are used as in an unwatched run.

        Args:
            prompts: What ``prompt_embeds`` stand for, one per row, for a scorer that looks at the prompt.
        Raises:
            UnsupportedPipelineError: Before the first step, for what the guard cannot treat correctly.
            LatentSpaceError: Before the first step, if the scorer was trained on other latents.
            InputError: Before the first step, for a bad argument.
            GuardStateError: If the scheduler is being watched already.
        """
        denoiser = denoiser_of(pipe)
        check_latent_space(pipe, self.scorer.config.latent_space)
        request = read_request(pipe, args, kwargs, prompts)
        if request.prompts is None and self.scorer.config.uses_prompt:
            raise InputError("this scorer looks at the prompt: give prompts=[...] beside prompt_embeds, one per row")

        watch = Watch(self.scorer, self.rule, request, drop=self.on_abort == "drop")
        output = None
        with (
            SchedulerTap(pipe.scheduler, watch.observe, watch.rows),
            conditioning_follows(watch.rows, denoiser),
            contextlib.suppress(AllRowsGone),
            _models_freed(pipe),
        ):
            output = pipe(*args, **kwargs)
        return watch.finish(type(pipe.scheduler).__name__, output)


def _rule(own: ThresholdConfig | None, given: ThresholdConfig | float | None) -> ThresholdConfig | None:
    if given is None or isinstance(given, ThresholdConfig):
        return own if given is None else given
    if own is None:
        return ThresholdConfig(rule="cumulative", threshold=given)
    # Without its provenance: that belongs to the number which was calibrated.
    return ThresholdConfig(
        rule=own.rule, threshold=given, clear_threshold=own.clear_threshold, q=own.q, patience=own.patience
    )


@contextlib.contextmanager
def _models_freed(pipe: Any) -> Iterator[None]:
    """An exception out of the pipeline's loop skips its own last line, which sends offloaded models back."""
    try:
        yield
    except BaseException:
        pipe.maybe_free_model_hooks()
        raise
