"""One scored step on one screen: stages 1 to 6, from clean-latent prediction to cumulative artifact probability.

    preview    = preview(x0), or preview(x_t)                      2
    embedding  = embedder(preview)                                 3
    features   = embedding, its change, prompt, noisy embedding
    weights    = gate(log_snr, embedding)                          5
    logit, s_t = experts(features, log_snr, weights)               4
    a_t        = calibration(logit, log_snr)                       8, the identity until it is fitted
    mass_t     = exit_head(s_t, s_{t-1}) * (progress_t - progress_{t-1})
    C_t, K_t   = accumulator(a_t, mass_t)                          6

Stage 1 (x0 and log-SNR from what enters ``scheduler.step``) is the caller's: the guard, or one's own sampling loop.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_artifacts.accumulator import Accumulator, ExitHead, accumulate, step_mass
from moe_artifacts.calibration import Calibration
from moe_artifacts.checkpoint import load_checkpoint, load_state_strict, save_checkpoint
from moe_artifacts.config import FeatureConfig, ScorerConfig
from moe_artifacts.embedder import ClipEmbedder, require_offline, state_sha256
from moe_artifacts.errors import ConfigError, InputError, LatentSpaceError
from moe_artifacts.experts import Experts
from moe_artifacts.gate import Gate
from moe_artifacts.noise import progress
from moe_artifacts.preview import LinearPreview
from moe_artifacts.shapes import Embedding, GateWeights, Latents, PerImage, RowMask, Rows, State, StepLatents, StepProbs
from moe_artifacts.trajectory import Trajectory

CLIP_WEIGHTS = "embedder.clip."  # how their names begin in a checkpoint
PREVIEWS_AT_ONCE = 256  # a full VAE decodes them one batch at a time
SMALLEST_STRIDE = 0.02  # progress: two checks closer than this would blow up the change per unit of progress


@dataclass(frozen=True, slots=True)
class StepScore:
    """What is known of each living image after one scored step; every number is in [0, 1], or NaN in a bad row."""

    artifact_prob: PerImage  # P(the finished image has artifacts | seen so far)
    exit_prob: PerImage  # P(decide at this step, undecided so far)
    exit_cdf: PerImage  # P(decided by now)
    cumulative_artifact_prob: PerImage
    cumulative_clean_prob: PerImage
    gate_weights: GateWeights
    finite: RowMask  # False where the latents held NaN or infinity: all scores of that row are NaN


def step_features(
    config: FeatureConfig,
    embedding: Embedding,
    previous: Embedding,
    stride: Float[Tensor, "batch 1"],
    prompt: Embedding | None = None,
    noisy: Embedding | None = None,
) -> Float[Tensor, "batch feature"]:
    """What the experts see of one step, side by side.

    Args:
        previous: Embedding of the last scored step; equal to ``embedding`` at the first one, so that the change is 0.
        stride: Progress made since the last scored step.
        prompt: CLIP text embedding of the prompt.
        noisy: CLIP embedding of the preview of x_t.
    """
    parts = [embedding]
    if config.use_delta:
        parts.append((embedding - previous) / stride.clamp(min=SMALLEST_STRIDE))
    parts += [prompt] if config.use_prompt and prompt is not None else []
    parts += [noisy] if config.use_noisy and noisy is not None else []
    return torch.cat(parts, dim=-1)


class ArtifactScorer(nn.Module):
    """Scores the steps of a diffusion run. Load one with :meth:`from_pretrained`.

    Args:
        preview: Needed where ``config.preview.kind`` is "tiny" or "vae": a ``TinyPreview`` or ``VaePreview`` around an
            autoencoder of the user's own, whose weights are not part of the checkpoint.
        cache_dir: For CLIP weights that the config names by an open_clip tag or a Hub id.
    """

    def __init__(self, config: ScorerConfig, preview: nn.Module | None = None, cache_dir: str | None = None) -> None:
        super().__init__()
        self.config = config
        linear = config.preview.kind == "linear"
        if linear != (preview is None):
            raise ConfigError(
                f"the scorer {config.name!r} uses a {config.preview.kind} preview: "
                + (
                    "it is part of the checkpoint, leave preview out"
                    if linear
                    else "pass preview=TinyPreview(...) or VaePreview(...)"
                )
            )
        self.preview = preview or LinearPreview(config.preview.channels, config.preview.patch)
        self.embedder = ClipEmbedder(config.embedder, cache_dir)
        self.gate = Gate(config.gate)
        self.experts = Experts(config.experts)
        self.exit_head = ExitHead(config.exit_head)
        self.calibration = Calibration(config.log_snr_range)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        preview: nn.Module | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
    ) -> ArtifactScorer:
        """Load a bundled scorer (``"fashion"``), a folder, or a Hub id (``"owner/name"``).

        The network is used for a Hub id only, and for CLIP weights that the config does not hold but names, by an open_clip
        tag or a Hub id.

        Args:
            cache_dir: Of the Hub, for both.
            local_files_only: Take both from the cache, or fail.
        Raises:
            CheckpointError: If files are missing, damaged or hold NaN, or weights and config do not fit together.
            ConfigError: If the config is of another format or has values out of range; or if CLIP weights are named, and
                open_clip would look for them in the network in spite of ``local_files_only``.
        """
        config, state = load_checkpoint(name_or_path, revision, cache_dir, local_files_only)
        if local_files_only and config.embedder.is_named:
            require_offline(config.embedder)
        scorer = cls(config, preview, cache_dir)
        load_state_strict(scorer, {**scorer._foreign_state(), **state}, os.fspath(name_or_path))
        scorer.embedder.verify_weights()
        return scorer.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors``, weights in ``dtype``."""
        foreign = self._foreign_state()
        state = {
            k: v.to(dtype) if v.is_floating_point() else v for k, v in self.state_dict().items() if k not in foreign
        }
        config = self.config
        if config.embedder.weights_sha256 is not None and not config.embedder.is_named:
            # Of the weights as they will be read, rounded to dtype.
            clip = {k: v for k, v in state.items() if k.startswith(CLIP_WEIGHTS)}
            read = {k.removeprefix(CLIP_WEIGHTS): v.float() if v.is_floating_point() else v for k, v in clip.items()}
            config = replace(config, embedder=replace(config.embedder, weights_sha256=state_sha256(read)))
        save_checkpoint(folder, config, state)

    def identity(self) -> dict[str, str]:
        """Name and SHA-256 of all weights: what scores, and thresholds for them, belong to."""
        return {"name": self.config.name, "sha256": state_sha256(self.state_dict())}

    def _foreign_state(self) -> dict[str, Tensor]:
        """Weights that come from elsewhere: a user's autoencoder, an open_clip download."""
        away = ["preview."] if self.config.preview.kind != "linear" else []
        away += ["embedder."] if self.config.embedder.is_named else []
        return {k: v for k, v in self.state_dict().items() if k.startswith(tuple(away))} if away else {}

    def session(self, batch_size: int, prompts: list[str] | None = None) -> Session:
        """Score a batch step by step, while it is denoised.

        Raises:
            InputError: If prompts are missing where the scorer reads them, or are not one per image.
        """
        return Session(self, batch_size, self.embed_prompts(prompts, batch_size))

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str] | None, batch_size: int) -> Embedding | None:
        """Text embeddings, each distinct prompt computed once; None where the scorer does not read prompts."""
        if not self.config.features.use_prompt:
            return None
        if prompts is None:
            raise InputError(f"the scorer {self.config.name!r} reads the prompt: pass prompts, one per image")
        if len(prompts) != batch_size:
            raise InputError(f"prompts must be one per image, {batch_size}, got {len(prompts)}")
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(p) for p in prompts], dtype=torch.int64)
        return self.embedder.embed_texts(distinct)[rows]

    def embed(self, x0: Latents) -> Embedding:
        """Stages 2 and 3.

        Raises:
            LatentSpaceError: If the latents have another number of channels than the scorer was trained on.
        """
        channels = self.config.latent_space.channels
        if x0.ndim != 4 or x0.shape[1] != channels:
            raise LatentSpaceError(
                f"the scorer {self.config.name!r} needs latents (batch, {channels}, height, width) of the space "
                f"{self.config.latent_space.name!r}, got shape {tuple(x0.shape)}"
            )
        return self.embedder.embed_images(self.preview(x0.float()))

    def embed_shown(self, x0: Latents, latents: Latents | None) -> tuple[Embedding, Embedding | None]:
        """The embedding of what the previews are of, and that of x_t where it is a feature of its own.

        Args:
            latents: x_t, scaled to alpha^2 + sigma^2 = 1.
        Raises:
            LatentSpaceError: If the latents have another number of channels than the scorer was trained on.
            InputError: If the noisy latents are needed and missing.
        """
        if not self.config.uses_noisy:
            return self.embed(x0), None
        if latents is None:
            raise InputError(
                f"the scorer {self.config.name!r} looks at the noisy latents: pass latents, or record them"
            )
        noisy = self.embed(latents)
        return (noisy if self.config.shows == "noisy" else self.embed(x0)), noisy

    def judge_step(
        self,
        embedding: Embedding,
        previous: Embedding,
        log_snr: PerImage,
        stride: PerImage,
        prompt: Embedding | None,
        noisy: Embedding | None = None,
    ) -> tuple[PerImage, State, GateWeights]:
        """Stages 4 and 5 and the calibration: posterior, mixed state and gate weights."""
        weights = self.gate(log_snr, embedding)
        features = step_features(self.config.features, embedding, previous, stride[:, None], prompt, noisy)
        logit, state = self.experts(features, log_snr, weights)
        return self.calibration(logit, log_snr), state, weights

    @torch.no_grad()
    def score(self, trajectory: Trajectory) -> Trajectory:
        """Score a recorded trajectory, which must hold x0; equals the session to float tolerance.

        Returns:
            The trajectory with the fields of ``StepScore`` as scores, on the CPU; NaN from where a row is not finite.
        Raises:
            InputError: If the trajectory holds no x0, or no noisy latents where the scorer looks at them.
        """
        if trajectory.x0 is None:
            raise InputError("the trajectory holds no x0: record it with latents, they are what is scored")
        batch = len(trajectory.x0)
        finite = trajectory.x0.isfinite().flatten(2).all(-1).cummin(dim=1).values  # batch step; stays False
        embedding, noisy = self._embed_recorded(trajectory.x0, trajectory.latents)
        prob, mass, _ = self.score_embedded(
            embedding,
            trajectory.log_snr.to(embedding).expand(batch, -1),
            self.embed_prompts(trajectory.prompts, batch),
            noisy,
        )
        done = accumulate(prob, mass)
        scores = {"artifact_prob": prob, **{name: getattr(done, name) for name in _ACCUMULATED}}
        scores = {name: torch.where(finite, value.cpu(), torch.nan) for name, value in scores.items()}
        return replace(trajectory, scores={**trajectory.scores, **scores})

    def _embed_recorded(
        self, x0: StepLatents, latents: StepLatents | None
    ) -> tuple[Float[Tensor, "batch step embed"], Float[Tensor, "batch step embed"] | None]:
        size = x0.shape[:2]
        shown = x0.flatten(0, 1).split(PREVIEWS_AT_ONCE)
        noisy = [None] * len(shown) if latents is None else latents.flatten(0, 1).split(PREVIEWS_AT_ONCE)
        seen = [
            self.embed_shown(a.float().nan_to_num(0, 0, 0), None if b is None else b.float())
            for a, b in zip(shown, noisy, strict=True)
        ]
        embedding = torch.cat([part for part, _ in seen]).unflatten(0, size)
        others = [part for _, part in seen if part is not None]
        return embedding, torch.cat(others).unflatten(0, size) if others else None

    def score_embedded(
        self,
        embedding: Float[Tensor, "batch step embed"],
        log_snr: Float[Tensor, "batch step"],
        prompt: Embedding | None,
        noisy: Float[Tensor, "batch step embed"] | None = None,
    ) -> tuple[StepProbs, Float[Tensor, "batch step"], Float[Tensor, "batch step hidden"]]:
        """Posterior, exit mass and mixed state of whole trajectories from cached embeddings."""
        batch, steps = log_snr.shape
        at = progress(log_snr, self.config.log_snr_range)
        before = torch.cat([torch.zeros_like(at[:, :1]), at[:, :-1]], dim=1)
        previous = torch.cat([embedding[:, :1], embedding[:, :-1]], dim=1)
        if prompt is not None:
            prompt = prompt[:, None].expand(-1, steps, -1).flatten(0, 1)
        prob, state, _ = self.judge_step(
            embedding.flatten(0, 1),
            previous.flatten(0, 1),
            log_snr.flatten(),
            (at - before).flatten(),
            prompt,
            None if noisy is None else noisy.flatten(0, 1),
        )
        state = state.unflatten(0, (batch, steps))
        previous_state = torch.cat([torch.zeros_like(state[:, :1]), state[:, :-1]], dim=1)
        return prob.unflatten(0, (batch, steps)), step_mass(self.exit_head(state, previous_state), at, before), state


_ACCUMULATED = ("exit_prob", "exit_cdf", "cumulative_artifact_prob", "cumulative_clean_prob")


class Session:
    """One running batch; made by :meth:`ArtifactScorer.session`."""

    def __init__(self, scorer: ArtifactScorer, batch_size: int, prompt: Embedding | None) -> None:
        self._scorer = scorer
        self._prompt = prompt
        self._accumulator = Accumulator(batch_size)
        self._rows = batch_size
        self._progress = 0.0
        self._embedding: Tensor | None = None  # of the last scored step
        self._state: Tensor | None = None
        self._finite = torch.ones(batch_size, dtype=torch.bool)

    @torch.no_grad()
    def step(self, *, x0: Latents, log_snr: float, latents: Latents | None = None) -> StepScore:
        """Score one step.

        Args:
            x0: Prediction of the clean latents, as the scheduler holds them; any float dtype.
            log_snr: Of the sample that entered the step, in nats.
            latents: That sample, scaled to alpha^2 + sigma^2 = 1; needed only if the scorer looks at it.
        Raises:
            LatentSpaceError: If the latents have the wrong number of channels.
            InputError: If the number of rows is not the one of the living images.
        """
        scorer, config = self._scorer, self._scorer.config
        if len(x0) != self._rows:
            raise InputError(
                f"x0 must have {self._rows} rows, the living images, got {len(x0)}; call keep after a drop"
            )
        self._finite = self._finite & x0.isfinite().flatten(1).all(dim=-1).cpu()
        bad = ~self._finite.to(x0.device)[:, None, None, None]
        clean_rows = x0.float().masked_fill(bad, 0)  # neighbours must not see the bad row
        if latents is not None:
            latents = latents.float().masked_fill(bad, 0)
        embedding, noisy = scorer.embed_shown(clean_rows, latents)
        finite = self._finite.to(embedding.device)  # the scorer may stand elsewhere than the pipeline
        previous = embedding if self._embedding is None else self._embedding
        now = progress(float(log_snr), config.log_snr_range)
        levels = torch.full((self._rows,), float(log_snr), device=embedding.device)
        stride = torch.full_like(levels, now - self._progress)
        prob, state, weights = scorer.judge_step(embedding, previous, levels, stride, self._prompt, noisy)
        previous_state = torch.zeros_like(state) if self._state is None else self._state
        mass = step_mass(
            scorer.exit_head(state, previous_state),
            torch.full_like(stride, now),
            torch.full_like(stride, self._progress),
        )
        prob = prob.masked_fill(~finite, torch.nan)
        done = self._accumulator.step(prob, mass.masked_fill(~finite, torch.nan))
        self._embedding, self._state, self._progress = embedding, state, now
        return StepScore(
            artifact_prob=prob,
            exit_prob=done.exit_prob,
            exit_cdf=done.exit_cdf,
            cumulative_artifact_prob=done.cumulative_artifact_prob,
            cumulative_clean_prob=done.cumulative_clean_prob,
            gate_weights=weights,
            finite=self._finite,
        )

    def keep(self, rows: Rows) -> None:
        """Go on with these of the living rows only."""
        self._accumulator.keep(rows)
        self._rows = len(rows)
        self._finite = self._finite[rows.cpu()]
        for name in ("_prompt", "_embedding", "_state"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[rows.to(value.device)])
