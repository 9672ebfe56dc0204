"""Trained parts to one scorer."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import nn

from moe_artifacts.accumulator import ExitHead
from moe_artifacts.calibration import Calibration
from moe_artifacts.config import LatentSpaceConfig, PreviewConfig, ScorerConfig
from moe_artifacts.embedder import ClipEmbedder
from moe_artifacts.preview import LinearPreview, TinyPreview
from moe_artifacts.scorer import ArtifactScorer
from training.heads import Heads


def assemble(
    *,
    name: str,
    label: str,
    latent_space: LatentSpaceConfig,
    preview: nn.Module,
    embedder: ClipEmbedder,
    heads: Heads,
    calibration: Calibration,
    exit_head: ExitHead,
    check_progress: tuple[float, ...],
    shows: Literal["x0", "noisy"] = "x0",
    provenance: dict[str, Any] | None = None,
) -> ArtifactScorer:
    """All parts in one scorer, without a threshold.

    Args:
        label: What "has artifacts" means, in words.
        preview: Of ``moe_artifacts.preview``; linear factors become part of the scorer, an autoencoder stays the user's own.
        shows: What the previews are of.
        check_progress: Where to look, rising in [0, 1]; the last step is looked at in any case.
    """
    space = heads.space
    config = ScorerConfig(
        name=name,
        label=label,
        latent_space=latent_space,
        preview=preview_config(preview),
        embedder=embedder.config,
        features=space.features,
        gate=heads.gate.config,
        experts=dataclasses.replace(heads.experts.config, dropout=0.0),
        exit_head=exit_head.config,
        log_snr_range=space.log_snr_range,
        check_progress=check_progress,
        shows=shows,
        provenance=provenance or {},
    )
    linear = isinstance(preview, LinearPreview)
    scorer = ArtifactScorer(config, None if linear else preview)
    if linear:
        scorer.preview.load_state_dict(preview.state_dict())
    for part, trained in (
        (scorer.embedder, embedder),
        (scorer.gate, heads.gate),
        (scorer.experts, heads.experts),
        (scorer.exit_head, exit_head),
        (scorer.calibration, calibration),
    ):
        part.load_state_dict(trained.state_dict())
    return scorer.eval().requires_grad_(False)


def preview_config(preview: Any) -> PreviewConfig:
    """What a scorer's configuration says of a preview."""
    if isinstance(preview, LinearPreview):
        return PreviewConfig(kind="linear", channels=preview.channels, patch=preview.patch)
    return PreviewConfig(kind="tiny" if isinstance(preview, TinyPreview) else "vae", channels=preview.channels)


def self_contained(embedder: ClipEmbedder) -> ClipEmbedder:
    """An embedder whose weights go into the scorer, unless open_clip can fetch them by a tag.

    Weights of a named model without a tag, as tuning leaves them, are nowhere else: the model's configuration takes the place of
    its name. The hash of the weights is noted in either case.

    Raises:
        ConfigError: If the configuration needs more from the Hub, such as a tokenizer.
    """
    config = dataclasses.replace(embedder.config, weights_sha256=embedder.weights_sha256())
    if config.model == "custom" or config.pretrained is not None:
        embedder.config = config
        return embedder
    import open_clip

    values = dict(open_clip.get_model_config(config.model))
    shown = dict(embedder.clip.visual.preprocess_cfg)
    values["preprocess_cfg"] = {name: shown[name] for name in ("size", "mean", "std", "interpolation", "resize_mode")}
    custom = ClipEmbedder(dataclasses.replace(config, model="custom", model_config=values, weights_sha256=None))
    custom.load_state_dict(embedder.state_dict())
    custom.config = dataclasses.replace(config, model="custom", model_config=values)
    return custom
