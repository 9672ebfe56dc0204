"""A user's own function as a scorer: previews and prompts in, one number an image out, watched live by the guard.

preview = preview(x0)                 in [0, 1]
score   = fn(preview, prompts)        any scale, higher is better unless said otherwise
a_t     = posterior(scores so far)    posterior.py, once it is calibrated; before that, scores are only recorded
C_t     = accumulator(a_t, exit head) where an exit distribution was fitted
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_artifacts.accumulator import Accumulator
from moe_artifacts.checkpoint import find_checkpoint
from moe_artifacts.config import LatentSpaceConfig
from moe_artifacts.errors import InputError, LatentSpaceError
from moe_artifacts.scalar import checkpoint
from moe_artifacts.scalar.config import ScalarConfig
from moe_artifacts.scalar.exit import ScalarExit
from moe_artifacts.scalar.posterior import ScalarPosterior
from moe_artifacts.shapes import Latents, PerImage, Preview, RowMask, Rows

if TYPE_CHECKING:
    from moe_artifacts.calibrated import Calibrated

ScoreFunction = Callable[[Preview, list[str]], Any]  # numbers, one per image: a tensor, an array or a list


@dataclass(frozen=True, slots=True)
class ScalarScore:
    """What is known of each living image after one scored step; None before calibration.

    Without an exit distribution nothing is ever decided by it: ``exit_prob`` and the sums stay 0.
    """

    score: PerImage  # higher is better; NaN: the function gave none
    finite: RowMask  # False where the latents held NaN or infinity: all of that row is NaN
    artifact_prob: PerImage | None = None
    exit_prob: PerImage | None = None
    exit_cdf: PerImage | None = None
    cumulative_artifact_prob: PerImage | None = None
    cumulative_clean_prob: PerImage | None = None


class ScalarScorer:
    """Scores the steps of a diffusion run with a function of the user's. New ones record; :meth:`calibrated` ones decide.

    Args:
        fn: Takes previews (batch, 3, height, width) in [0, 1] and their prompts; returns a number an image, NaN for none.
        preview: Latents to previews, see moe_artifacts/preview.py.
        latent_space: Of the pipelines it will watch: ``latent_space_of(pipe)``.
        name: For messages.
        higher_is_better: What the function returns is good where it is high. Else its sign is turned, in the records too.
        siblings: Let the images of one prompt in one batch see each other's scores. An image that was dropped keeps those it
            had. Thresholds certified on recorded runs, in which nothing is dropped, then hold approximately.
    """

    def __init__(
        self,
        fn: ScoreFunction,
        *,
        preview: Callable[[Latents], Preview],
        latent_space: LatentSpaceConfig,
        name: str = "my-score",
        higher_is_better: bool = True,
        siblings: bool = False,
    ) -> None:
        self.fn, self.preview = fn, preview
        self.config = ScalarConfig(
            name=name, latent_space=latent_space, higher_is_better=higher_is_better, siblings=siblings
        )
        self.posterior: ScalarPosterior | None = None
        self.exit_head: ScalarExit | None = None

    def calibrated(self, found: Calibrated) -> ScalarScorer:
        """This scorer with the posterior, the exit distribution and the threshold that ``calibrate`` found.

        Raises:
            InputError: If the records were no plain scores, or the noise levels of their steps are not known.
        """
        config = checkpoint.calibrated_config(self.config, found)
        return self._with(config, found.fitted.posterior, found.fitted.exit_head)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], fn: ScoreFunction, *, preview: Callable[[Latents], Preview]
    ) -> ScalarScorer:
        """Load a folder written by :meth:`save_pretrained` or ``moe-artifacts calibrate --write``, or a Hub id.

        Args:
            fn: The function whose scores it was calibrated on; like the preview it is not part of the files.
        Raises:
            CheckpointError: If files are missing or damaged, or do not belong together.
            ConfigError: If the config is of another format or has values out of range.
        """
        config, posterior, head = checkpoint.load(find_checkpoint(os.fspath(name_or_path)))
        return cls(fn, preview=preview, latent_space=config.latent_space)._with(config, posterior, head)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and, once it is calibrated, ``model.safetensors``."""
        checkpoint.save(folder, self.config, self.posterior, self.exit_head)

    def session(self, batch_size: int, prompts: list[str] | None = None) -> ScalarSession:
        """Score a batch step by step, while it is denoised.

        Raises:
            InputError: If prompts are missing, or not one per image.
        """
        if prompts is None or len(prompts) != batch_size:
            got = "none" if prompts is None else len(prompts)
            raise InputError(f"prompts must be one per image, {batch_size}, got {got}")
        return ScalarSession(self, prompts)

    @torch.no_grad()
    def score_previews(self, x0: Latents, prompts: list[str]) -> PerImage:
        """What the function says of the previews of ``x0``, higher is better; float32, on the CPU.

        Raises:
            LatentSpaceError: If the latents have the wrong number of channels.
            InputError: If the function does not return one number an image, or an infinite one.
        """
        channels = self.config.latent_space.channels
        if x0.ndim != 4 or x0.shape[1] != channels:
            raise LatentSpaceError(
                f"the scorer {self.config.name!r} needs latents (batch, {channels}, height, width), got {tuple(x0.shape)}"
            )
        values = torch.as_tensor(self.fn(self.preview(x0.float()), prompts)).float().cpu()
        if values.shape != (len(x0),) or values.isinf().any():
            raise InputError(
                f"the function of the scorer {self.config.name!r} must return {len(x0)} numbers, one per image, finite or "
                f"NaN; got shape {tuple(values.shape)}" + (" with infinity" if values.isinf().any() else "")
            )
        return values if self.config.higher_is_better else -values

    def _with(
        self, config: ScalarConfig, posterior: ScalarPosterior | None, exit_head: ScalarExit | None
    ) -> ScalarScorer:
        scorer = ScalarScorer(self.fn, preview=self.preview, latent_space=config.latent_space)
        scorer.config, scorer.posterior, scorer.exit_head = config, posterior, exit_head
        return scorer


class ScalarSession:
    """One running batch; made by :meth:`ScalarScorer.session`."""

    def __init__(self, scorer: ScalarScorer, prompts: list[str]) -> None:
        size = len(prompts)
        self._scorer, self._prompts = scorer, prompts
        self._rows = np.arange(size)  # the living images, of all that were there at the start
        self._finite = torch.ones(size, dtype=torch.bool)  # of the living ones, as what follows
        self._accumulator = Accumulator(size)
        fitted = scorer.config.fitted
        self._columns: list[int] = []  # fitted steps seen so far
        self._prob = np.empty((size, 0), dtype=np.float32)  # at those
        self._scores = np.full((size, 0 if fitted is None else len(fitted.log_snr)), np.nan)  # of all images
        alone = np.arange(size)
        self._siblings = np.unique(prompts, return_inverse=True)[1] if scorer.config.siblings else alone

    @torch.no_grad()
    def step(self, *, x0: Latents, log_snr: float, latents: Latents | None = None) -> ScalarScore:
        """Score one step.

        Args:
            x0: Prediction of the clean latents, as the scheduler holds them; any float dtype.
            log_snr: Of the sample that entered the step, in nats. The score stands for one at the last of the fitted noise
                levels at or before this one.
            latents: Not used.
        Raises:
            LatentSpaceError: If the latents have the wrong number of channels.
            InputError: If the number of rows is not the one of the living images, or the function does not return one
                number an image.
        """
        if len(x0) != len(self._rows):
            raise InputError(
                f"x0 must have {len(self._rows)} rows, the living images, got {len(x0)}; call keep after a drop"
            )
        self._finite = self._finite & x0.isfinite().flatten(1).all(dim=-1).cpu()
        finite = self._finite
        score = torch.full((len(x0),), torch.nan)
        if finite.any():
            prompts = [self._prompts[i] for i in self._rows[finite.numpy()]]
            score[finite] = self._scorer.score_previews(x0[finite.to(x0.device)], prompts)
        if self._scorer.posterior is None:
            return ScalarScore(score, finite)

        column, mass = self._column(float(log_snr)), torch.zeros(len(x0))
        self._scores[self._rows, column] = score.numpy()
        prob = self._scorer.posterior.prob_now(self._scores, self._siblings)[self._rows].astype(np.float32)
        if self._columns[-1:] == [column]:
            self._prob[:, -1] = prob  # no progress, no exit mass
        else:
            self._columns.append(column)
            self._prob = np.column_stack([self._prob, prob])
            mass = self._exit_mass()
        posterior = torch.from_numpy(prob).masked_fill(~finite, torch.nan)
        done = self._accumulator.step(posterior, mass.masked_fill(~finite, torch.nan))
        return ScalarScore(
            score=score,
            finite=finite,
            artifact_prob=posterior,
            exit_prob=done.exit_prob,
            exit_cdf=done.exit_cdf,
            cumulative_artifact_prob=done.cumulative_artifact_prob,
            cumulative_clean_prob=done.cumulative_clean_prob,
        )

    def keep(self, rows: Rows) -> None:
        """Go on with these rows only, in this order. What was seen of the others stays known to their siblings."""
        rows = rows.cpu()
        self._rows, self._finite, self._prob = self._rows[rows.numpy()], self._finite[rows], self._prob[rows.numpy()]
        self._accumulator.keep(rows)

    def _column(self, log_snr: float) -> int:
        """The fitted step that a score at this noise level stands for: the last one at or before it."""
        return max(self._scorer.config.column(log_snr), *self._columns[-1:], 0)

    def _exit_mass(self) -> PerImage:
        """Of the step that was scored last."""
        head, fitted = self._scorer.exit_head, self._scorer.config.fitted
        if head is None or fitted is None:
            return torch.zeros(len(self._prob))
        return torch.from_numpy(head.mass(self._prob, np.array(fitted.share)[self._columns])[:, -1])
