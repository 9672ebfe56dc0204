"""ArtifactGuard: scores a pipeline run while it runs, decides, and takes the images that go wrong out of the batch."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from moe_artifacts.config import ThresholdConfig
from moe_artifacts.errors import ConfigError, InputError, UnsupportedPipelineError
from moe_artifacts.guard.audit_draw import AuditDraw
from moe_artifacts.guard.conditioning import conditioning_follows
from moe_artifacts.guard.fingerprint import fingerprint
from moe_artifacts.guard.output import GuardedOutput
from moe_artifacts.guard.pipelines import PipelineSpec, spec_of
from moe_artifacts.guard.reproducible import warn_if_not_alone
from moe_artifacts.guard.request import read_request
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.guard.space import check_latent_space
from moe_artifacts.guard.tap import AllRowsGone, SchedulerTap
from moe_artifacts.guard.truncation import truncated_prompts
from moe_artifacts.guard.watch import Policy, Scorer, Watch

__all__ = ["ArtifactGuard", "GuardedOutput"]

ON_ABORT = ("drop", "mask", "record")


class ArtifactGuard:
    """A diffusers pipeline call under watch.

    Args:
        scorer: Trained for the latent space of the pipelines it will watch.
        on_abort: "drop" takes an image that reaches the threshold out of the running batch; the others go on unchanged.
            "mask" keeps the batch at its size, for compiled denoisers and CUDA graphs: the image runs on unscored, and is
            not decoded. It saves denoiser calls only once all images are aborted.
            "record" lets every image finish, bit-identical to the unwatched run, and states the same verdicts.
        threshold: The rule that decides; the scorer's own by default. A number is that threshold for the scorer's rule:
            it then promises nothing.
        drop_sizes: What "drop" may shrink the batch to, e.g. (8, 4, 2, 1); aborted images fill it up to the next of these.
            None: any size.
        audit_rate: Share of the images to be aborted that are finished instead, and handed back apart, to measure how many
            of them are clean. Drawn by the image's seed and prompt, the same ones in every run.
        audit_seed: Another one draws other images.
        keep_last_preview: Hand back what each aborted image looked like when it was aborted.
    Raises:
        ConfigError: If there is no threshold to abort by, or one outside [0, 1], or the scorer has not what its rule, or
            ``keep_last_preview``, needs, or an option does not go with ``on_abort``.
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        scorer: Scorer,
        on_abort: Literal["drop", "mask", "record"] = "drop",
        threshold: ThresholdConfig | float | None = None,
        *,
        drop_sizes: Sequence[int] | None = None,
        audit_rate: float = 0.0,
        audit_seed: int = 0,
        keep_last_preview: bool = False,
    ) -> None:
        if on_abort not in ON_ABORT:
            raise InputError(f"on_abort must be 'drop', 'mask' or 'record', got {on_abort!r}")
        self.scorer = scorer
        self.on_abort = on_abort
        self.rule = _rule(scorer.config.threshold, threshold)
        if self.rule is None and on_abort != "record":
            raise ConfigError(
                f"on_abort={on_abort!r} needs a threshold and the scorer {scorer.config.name!r} has none; "
                "give one, or use on_abort='record'"
            )
        if self.rule is not None and self.rule.rule not in scorer.config.rules:
            raise ConfigError(
                f"the scorer {scorer.config.name!r} cannot decide by the {self.rule.rule} rule, only by: "
                f"{', '.join(scorer.config.rules) or 'none, it is not calibrated'}"
            )
        self.drop_sizes = _drop_sizes(drop_sizes, on_abort)
        self.audit_rate, self.audit_seed = _audit_rate(audit_rate, on_abort), audit_seed
        preview = getattr(scorer, "preview", None)
        if keep_last_preview and preview is None:
            raise ConfigError(f"keep_last_preview=True needs a scorer with a preview, {scorer.config.name!r} has none")
        self.keep_last_preview = keep_last_preview
        self._policy = Policy(
            on_abort, self.drop_sizes, AuditDraw(audit_rate, audit_seed), preview if keep_last_preview else None
        )

    def __call__(self, pipe: Any, *args: Any, prompts: list[str] | None = None, **kwargs: Any) -> GuardedOutput:
        """Call ``pipe(*args, **kwargs)`` under watch.

        A ``callback_on_step_end`` of the caller sees the latents of the running rows, and all rows of the prompt
        embeddings. The pipeline, its scheduler and the caller's generators are used as in an unwatched run.

        Args:
            prompts: What ``prompt_embeds`` stand for, one per row, for a scorer that looks at the prompt.
        Raises:
            UnsupportedPipelineError: Before the first step, for what the guard cannot treat correctly.
            LatentSpaceError: Before the first step, if the scorer was trained on other latents.
            InputError: Before the first step, for a bad argument.
            GuardStateError: If the scheduler is being watched already.
        Warns:
            ReproducibilityWarning: If an image that is kept cannot be made again by itself.
        """
        spec = spec_of(pipe)
        _require_one_scheduler(pipe)
        check_latent_space(pipe, self.scorer.config.latent_space)
        request = read_request(pipe, spec, args, kwargs, prompts)
        if request.prompts is None and self.scorer.config.uses_prompt:
            raise InputError("this scorer looks at the prompt: give prompts=[...] beside prompt_embeds, one per row")
        call = inspect.signature(type(pipe).__call__).bind(pipe, *args, **kwargs)
        call.apply_defaults()
        if self.on_abort != "record":
            warn_if_not_alone(pipe.scheduler, request, call.arguments.get("eta"), stacklevel=2)
        truncated = [False] * request.batch_size
        if request.prompts is not None and call.arguments["prompt"] is not None:
            truncated = truncated_prompts(pipe, request.prompts, call.arguments)
        call.arguments["return_dict"] = True  # for us; the caller gets a GuardedOutput in any case

        denoiser = fingerprint(getattr(pipe, spec.denoiser))
        watch = Watch(self.scorer, self.rule, request, self._policy, truncated, loop_keeps_all=spec.keeps_batch)
        modules = [getattr(pipe, name) for name in (spec.denoiser, *spec.also)]
        output = None
        with (
            SchedulerTap(
                pipe.scheduler,
                watch.observe,
                watch.rows,
                on_shrink=lambda: _forget_caches(modules),
                num_steps=lambda: getattr(pipe, "_num_timesteps", None),
            ),
            self._conditioning_follows(watch.rows, modules, spec),
            contextlib.suppress(AllRowsGone),
            _models_freed(pipe),
        ):
            output = type(pipe).__call__(*call.args, **call.kwargs)
        out = watch.finish(type(pipe.scheduler).__name__, denoiser, output)
        if self.on_abort == "record" and self._identity is not None:
            out.trajectory.meta["scorer"] = self._identity  # thresholds found on these records are for this one
        return out

    @functools.cached_property
    def _identity(self) -> dict[str, str] | None:
        """Of a scorer of ours; a function of the user's has none. Read once: the weights may be gigabytes."""
        identity = getattr(self.scorer, "identity", None)
        return None if identity is None else identity()

    def _conditioning_follows(
        self, rows: LiveRows, modules: list[nn.Module], spec: PipelineSpec
    ) -> contextlib.AbstractContextManager[None]:
        if self.on_abort == "drop":
            return conditioning_follows(rows, modules, spec)
        return contextlib.nullcontext()  # nothing is ever cut: a compiled denoiser stays as it was compiled


def _rule(own: ThresholdConfig | None, given: ThresholdConfig | float | None) -> ThresholdConfig | None:
    if given is None or isinstance(given, ThresholdConfig):
        return own if given is None else given
    if own is None:
        return ThresholdConfig(rule="cumulative", threshold=given)
    # Without its provenance: that belongs to the number which was calibrated.
    return ThresholdConfig(
        rule=own.rule,
        threshold=given,
        clear_threshold=own.clear_threshold,
        q=own.q,
        patience=own.patience,
        boundary=own.boundary,
    )


def _drop_sizes(sizes: Sequence[int] | None, on_abort: str) -> tuple[int, ...] | None:
    if sizes is None:
        return None
    if on_abort != "drop":
        raise ConfigError(f"drop_sizes goes with on_abort='drop', got on_abort={on_abort!r}; leave it out")
    sizes = tuple(sizes)
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise InputError(f"drop_sizes must be whole numbers of at least 1, e.g. (8, 4, 2, 1), got {sizes}")
    return sizes


def _audit_rate(rate: float, on_abort: str) -> float:
    if not 0 <= rate <= 1:
        raise InputError(f"audit_rate must be in [0, 1], got {rate!r}")
    if rate and on_abort == "record":
        raise ConfigError("audit_rate has no use with on_abort='record', which finishes every image; leave it out")
    return rate


def _require_one_scheduler(pipe: Any) -> None:
    """A step of another scheduler would pass unseen."""
    from diffusers import SchedulerMixin

    found = [name for name, part in vars(pipe).items() if isinstance(part, SchedulerMixin)]
    if found != ["scheduler"]:
        raise UnsupportedPipelineError(
            f"the guard watches one scheduler, {type(pipe).__name__} has {', '.join(found) or 'none'}"
        )


def _forget_caches(modules: list[nn.Module]) -> None:
    """What a cache (``enable_cache``: FirstBlockCache and its like) has kept of earlier steps has the old batch size."""
    for module in modules:
        reset = getattr(module, "_reset_stateful_cache", None)
        if callable(reset):
            reset()


@contextlib.contextmanager
def _models_freed(pipe: Any) -> Iterator[None]:
    """An exception out of the pipeline's loop skips its own last line, which sends offloaded models back."""
    try:
        yield
    except BaseException:
        pipe.maybe_free_model_hooks()
        raise
