"""Tiny randomly initialised pipelines and a scorer that follows a script: nothing is downloaded, a run takes 0.1 s."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from moe_artifacts.config import (
    EmbedderConfig,
    ExitHeadConfig,
    ExpertsConfig,
    FeatureConfig,
    GateConfig,
    LatentSpaceConfig,
    PreviewConfig,
    ScorerConfig,
    ThresholdConfig,
)

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {  # every one that StableDiffusionPipeline and the guard support
    "ddim": lambda: DDIMScheduler(**_BETAS, clip_sample=False),
    "ddpm": lambda: DDPMScheduler(**_BETAS, clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(**_BETAS),
    "euler-a": lambda: EulerAncestralDiscreteScheduler(**_BETAS),
    "dpm": lambda: DPMSolverMultistepScheduler(**_BETAS),
    "unipc": lambda: UniPCMultistepScheduler(**_BETAS),
    "pndm": lambda: PNDMScheduler(**_BETAS, skip_prk_steps=True),
}
STOCHASTIC = ("ddpm", "euler-a")


def stable_diffusion(scheduler: str = "ddim", **unet: Any) -> StableDiffusionPipeline:
    """16x16 images from 8x8 latents, always the same weights; ``unet`` changes the U-Net's configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = StableDiffusionPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                latent_channels=4,
                sample_size=16,
            ).eval(),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(_vocabulary()),
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    max_position_embeddings=24,
                    projection_dim=16,
                    bos_token_id=0,
                    eos_token_id=1,
                    pad_token_id=1,
                )
            ).eval(),
            tokenizer=_tokenizer(),
            unet=UNet2DConditionModel(
                **{
                    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                    "block_out_channels": (8, 16),
                    "layers_per_block": 1,
                    "norm_num_groups": 4,
                    "attention_head_dim": 8,
                    "cross_attention_dim": 16,
                    "sample_size": 8,
                    **unet,
                }
            ).eval(),
            scheduler=SCHEDULERS[scheduler](),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int, first_seed: int = 100) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first_seed + i) for i in range(count)]


def scorer_config(**changes: Any) -> ScorerConfig:
    """Fits the latents of :func:`stable_diffusion`; scores every step unless told otherwise."""
    log_snr_range = (-6.0, 8.0)
    values: dict[str, Any] = {
        "name": "scripted",
        "label": "none",
        "latent_space": LatentSpaceConfig(
            name="tiny", vae_class="AutoencoderKL", channels=4, scaling_factor=0.18215, downsampling=2
        ),
        "preview": PreviewConfig(kind="linear", channels=4),
        "embedder": EmbedderConfig(model="custom", embed_dim=8, model_config={}),
        "features": FeatureConfig(embed_dim=8, use_delta=False, use_prompt=False),
        "gate": GateConfig(num_experts=2, embed_dim=8, log_snr_range=log_snr_range),
        "experts": ExpertsConfig(num_experts=2, feature_dim=8, hidden_dim=4, log_snr_range=log_snr_range),
        "exit_head": ExitHeadConfig(state_dim=4),
        "log_snr_range": log_snr_range,
        "check_progress": tuple(i / 64 for i in range(65)),
        "threshold": ThresholdConfig(rule="cumulative", threshold=0.5, clear_threshold=0.9),
    }
    return ScorerConfig(**values | changes)


@dataclass
class Score:
    """A ``StepScore`` whose numbers come from a script."""

    artifact_prob: Tensor
    exit_prob: Tensor
    exit_cdf: Tensor
    cumulative_artifact_prob: Tensor
    cumulative_clean_prob: Tensor
    gate_weights: Tensor
    finite: Tensor


class ScriptedScorer:
    """Reaches the threshold for image i at the scored step ``abort_at[i]``, and clears it at ``clear_at[i]``.

    Its sessions keep what they were shown in ``seen``: (images still scored, x0, log-SNR, noisy latents) per step.
    """

    def __init__(
        self, abort_at: dict[int, int] | None = None, clear_at: dict[int, int] | None = None, **config: Any
    ) -> None:
        self.config = scorer_config(**config)
        self.abort_at, self.clear_at = abort_at or {}, clear_at or {}
        self.seen: list[tuple[list[int], Tensor, float, Tensor | None]] = []
        self.prompts: list[str] | None = None

    def preview(self, latents: Tensor) -> Tensor:
        """Three channels of the latents."""
        return (0.5 + 0.1 * latents[:, :3]).clamp(0, 1)

    def session(self, batch_size: int, prompts: list[str] | None = None) -> ScriptedSession:
        self.prompts, self.seen = prompts, []
        return ScriptedSession(self, batch_size)


class ScriptedSession:
    def __init__(self, scorer: ScriptedScorer, batch_size: int) -> None:
        self.scorer, self.images, self.calls = scorer, torch.arange(batch_size), 0

    def step(self, *, x0: Tensor, log_snr: float, latents: Tensor | None = None) -> Score:
        assert len(x0) == len(self.images), "the guard must show exactly the rows that were kept"
        images = self.images.tolist()
        self.scorer.seen.append((images, x0.clone(), log_snr, latents))
        finite = x0.isfinite().flatten(1).all(dim=1)
        artifact = torch.tensor([0.9 if self.calls >= self.scorer.abort_at.get(i, 10**6) else 0.1 for i in images])
        clean = torch.tensor([0.95 if self.calls >= self.scorer.clear_at.get(i, 10**6) else 0.0 for i in images])
        artifact[~finite] = torch.nan
        self.calls += 1
        x0.zero_()  # a scorer that spoils its input must not be able to spoil the run
        return Score(
            artifact_prob=artifact,
            exit_prob=torch.full_like(artifact, 0.5),
            exit_cdf=torch.full_like(artifact, 0.5),
            cumulative_artifact_prob=artifact,
            cumulative_clean_prob=clean,
            gate_weights=torch.full((len(images), 2), 0.5),
            finite=finite,
        )

    def keep(self, rows: Tensor) -> None:
        self.images = self.images[rows]


def _vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return {token: i for i, token in enumerate(tokens)}


def _tokenizer() -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps(_vocabulary()))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=24)
