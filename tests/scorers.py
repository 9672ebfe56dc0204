"""A scorer with random weights, small enough for a test."""

from __future__ import annotations

from typing import Any, get_args

import torch

from moe_artifacts.config import (
    EmbedderConfig,
    ExitHeadConfig,
    ExpertsConfig,
    FeatureConfig,
    GateConfig,
    LatentSpaceConfig,
    PreviewConfig,
    RuleName,
    ScorerConfig,
    ThresholdConfig,
)
from moe_artifacts.scorer import ArtifactScorer

EMBED_DIM = 8
LOG_SNR_RANGE = (-5.0, 7.0)
TINY_CLIP: dict[str, Any] = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1},
}
# What each rule needs beside its threshold.
RULE_FIELDS: dict[RuleName, dict[str, Any]] = {
    "cumulative": {"clear_threshold": 0.3},
    "q-exit": {"q": 0.3},
    "posterior": {},
    "patience": {"patience": 2},
    "economic": {"boundary": ((0.0, 0.4, 0.1), (1.0, 0.6, 0.3))},
}
assert set(RULE_FIELDS) == set(get_args(RuleName))
EVERY_RULE = [ThresholdConfig(rule=name, threshold=0.5, **fields) for name, fields in RULE_FIELDS.items()]


def tiny_config(*, use_prompt: bool = True, use_noisy: bool = False, **changes: Any) -> ScorerConfig:
    """Four channels, three experts, checks at 30, 60 and 90 % of the progress."""
    features = FeatureConfig(embed_dim=EMBED_DIM, use_prompt=use_prompt, use_noisy=use_noisy)
    values: dict[str, Any] = {
        "name": "tiny",
        "label": "a test",
        "latent_space": LatentSpaceConfig(name="tiny", vae_class="AutoencoderKL", channels=4, scaling_factor=0.5),
        "preview": PreviewConfig(kind="linear", channels=4, patch=2),
        "embedder": EmbedderConfig(model="custom", embed_dim=EMBED_DIM, model_config=TINY_CLIP),
        "features": features,
        "gate": GateConfig(num_experts=3, embed_dim=EMBED_DIM, log_snr_range=LOG_SNR_RANGE),
        "experts": ExpertsConfig(
            num_experts=3, feature_dim=features.width, hidden_dim=12, expert_dim=4, log_snr_range=LOG_SNR_RANGE
        ),
        "exit_head": ExitHeadConfig(state_dim=12, hidden_dim=8),
        "log_snr_range": LOG_SNR_RANGE,
        "check_progress": (0.3, 0.6, 0.9),
        "threshold": ThresholdConfig(rule="cumulative", threshold=0.4),
    }
    return ScorerConfig(**{**values, **changes})


def tiny_scorer(seed: int = 0, **options: Any) -> ArtifactScorer:
    """Random weights, also where training starts from zero, so that every part has an effect."""
    torch.manual_seed(seed)
    scorer = ArtifactScorer(tiny_config(**options))
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            if not name.startswith("embedder") and parameter.abs().max() == 0:
                parameter.normal_(std=0.3)
    return scorer.requires_grad_(False)
