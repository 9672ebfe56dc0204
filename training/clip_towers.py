"""A CLIP model under training, with the preview before it and the head behind it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from moe_artifacts.checkpoint import load_state_strict, read_weights
from moe_artifacts.config import EmbedderConfig, ExpertsConfig
from moe_artifacts.embedder import ClipEmbedder
from moe_artifacts.errors import ConfigError, InputError
from moe_artifacts.experts import Experts
from moe_artifacts.files import read_json
from moe_artifacts.preview import LinearPreview, TinyPreview, VaePreview
from moe_artifacts.shapes import Embedding, PerImage
from training.data.pairs import PairBatch
from training.fit_preview import load_vae


class Towers(nn.Module):
    """A preview that stays as it is, and the CLIP model that is tuned to it."""

    def __init__(self, embedder: ClipEmbedder, preview: nn.Module | None, precision: str) -> None:
        super().__init__()
        self.embedder = embedder
        self.preview = preview.requires_grad_(False).eval() if preview is not None else None
        self.precision = precision

    def forward(self, batch: PairBatch) -> tuple[Embedding, Embedding]:
        """Image and text embeddings of some rows."""
        images = batch.images.to(self.embedder.clip.logit_scale.device)
        if self.preview is not None:
            with torch.no_grad():
                images = self.preview(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.embedder.embed_images(images), self.embedder.embed_texts(batch.prompts)

    def train(self, mode: bool = True) -> Towers:
        """Training mode, except of the preview and of BatchNorm.

        Statistics of a micro-batch are not those of the batch, and images of all noise levels in one batch would share them.
        """
        self.training = mode
        self.embedder.train(mode)
        for module in self.embedder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


class Head(nn.Module):
    """Artifact logit and the judge's margin from image and prompt embedding, told the log-SNR; only part 2 sees it."""

    def __init__(self, embed_dim: int, hidden_dim: int, log_snr_range: tuple[float, float]) -> None:
        super().__init__()
        self.experts = Experts(
            ExpertsConfig(
                num_experts=0,
                feature_dim=2 * embed_dim,
                hidden_dim=hidden_dim,
                log_snr_range=log_snr_range,
                dropout=0.1,
            )
        )
        self.margin = nn.Linear(hidden_dim, 1)

    def forward(self, image: Embedding, text: Embedding, log_snr: PerImage) -> tuple[PerImage, PerImage]:
        features = torch.cat([image, text], dim=-1)
        logit, state = self.experts(features, log_snr.to(image.device), image.new_zeros(len(image), 0))
        return logit, self.margin(state).squeeze(-1)


def chosen_weights(model: str, pretrained: str | None) -> str | None:
    """What ``--pretrained`` says, for :func:`build_embedder`.

    Args:
        pretrained: Also "none", for random weights, as a configuration has without it.
    Raises:
        InputError: If a model by its name comes without: with random weights it would be trained for nothing.
    """
    if pretrained is None and not model.endswith(".json"):
        import open_clip

        if open_clip.get_model_config(model) is not None:  # otherwise build_embedder says that there is none
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)[:6])
            raise InputError(
                f"{model} needs --pretrained: a tag of open_clip{tags and f', such as {tags}'}; a .safetensors file of its "
                "weights; or none, for random ones"
            )
    return None if pretrained == "none" else pretrained


def build_embedder(model: str, pretrained: str | None = None, seed: int = 0) -> ClipEmbedder:
    """An open_clip model by its name, or of a configuration in a JSON file.

    Args:
        pretrained: A tag of open_clip, or a safetensors file of the model's weights; None: random weights, by ``seed``.
    Raises:
        ConfigError: If open_clip has no such model, or cannot build it.
        CheckpointError: If the weights cannot be loaded or do not belong to it.
    """
    file = pretrained if pretrained is not None and pretrained.endswith(".safetensors") else None
    tag = pretrained if file is None else None
    torch.manual_seed(seed)
    if model.endswith(".json"):
        if tag is not None:
            raise ConfigError(f"pretrained must be a .safetensors file for a configuration of one's own, got {tag!r}")
        values = read_json(model)
        if not isinstance(values, dict) or not isinstance(values.get("embed_dim"), int):
            raise ConfigError(f"{model} is not a configuration of open_clip: a JSON object with embed_dim is expected")
        config = EmbedderConfig(model="custom", embed_dim=values["embed_dim"], model_config=values)
    else:
        import open_clip

        known = open_clip.get_model_config(model)
        if known is None:
            raise ConfigError(f"open_clip has no model {model!r}; see open_clip.list_models(), or give a .json file")
        config = EmbedderConfig(model=model, embed_dim=known["embed_dim"], pretrained=tag)
    embedder = ClipEmbedder(config)
    if file is not None:
        load_state_strict(embedder.clip, read_weights(Path(file)), name=file)
    return embedder


def load_preview(name: str | None, kind: str) -> nn.Module | None:
    """What makes RGB of the data's latents: a file of ``training.fit_preview``, "sdxl", or a VAE of any size.

    Raises:
        InputError: If latents have no preview, or previews have one.
    """
    if (name is None) != (kind == "previews"):
        needed = "hold previews already: leave preview out" if name else "are latents: name a preview"
        raise InputError(f"the pictures of the data {needed}")
    if name is None:
        return None
    if name == "sdxl":
        return LinearPreview.sdxl()
    if name.endswith(".safetensors"):
        return LinearPreview.from_file(name)
    vae = load_vae(name)
    return TinyPreview(vae) if type(vae).__name__ == "AutoencoderTiny" else VaePreview(vae)
