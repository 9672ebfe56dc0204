"""Previews and prompts to CLIP embeddings of length 1: stage 3, and the only file that knows open_clip.

The preprocessing is open_clip's for PIL images, written for tensors, so that gradients pass through it. PIL clamps what
a bicubic filter overshoots, and so do we. PIL does so after each of its two passes, and rounds to 8 bits: a pixel
differs by 1/255 or so, and by up to 0.08 at edges that overshoot in both directions.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from jaxtyping import Int
from torch import Tensor, nn

from moe_artifacts.config import MAX_WIDTH, EmbedderConfig
from moe_artifacts.errors import CheckpointError, ConfigError, InputError
from moe_artifacts.shapes import Embedding, Preview, PreviewBytes, TowerInput

MAX_LAYERS = 512
PROMPTS_KEPT = 20_000  # tokens of the last ones: 12 MB of CLIP's own length
MAX_PARAMETERS = 20_000_000_000  # the largest open_clip model has 5 billion


class ClipEmbedder(nn.Module):
    """An open_clip model, with the preprocessing and the tokenizer that belong to it, in evaluation mode.

    ``model="custom"`` builds ``model_config``, an open_clip model configuration (``embed_dim``, ``vision_cfg``,
    ``text_cfg``, optionally ``preprocess_cfg``), with random weights and without network. An open_clip name with a
    ``pretrained`` tag, and a Hub id, load their weights as open_clip does; a name without a tag has random weights.

    Attributes:
        clip: The open_clip model, e.g. for its ``logit_scale`` in contrastive training.

    Raises:
        ConfigError: If the configuration is not one that open_clip can build.
        CheckpointError: If weights cannot be loaded, are not finite or are not those named by ``weights_sha256``.
    """

    clip: Any  # open_clip's models share no class

    def __init__(self, config: EmbedderConfig, cache_dir: str | None = None) -> None:
        super().__init__()
        self.config = config
        if config.model == "custom":
            assert config.model_config is not None  # EmbedderConfig makes sure of it
            self.clip = _build_custom(config.model_config)
            self.tokenizer = _custom_tokenizer(config.model_config["text_cfg"])
            width = config.model_config["embed_dim"]
        else:
            self.clip, self.tokenizer, width = _load_named(config, cache_dir)
        if width != config.embed_dim:
            raise ConfigError(
                f"embedder.embed_dim must be {width}, the width of {config.model}, got {config.embed_dim}"
            )
        self._tokens: dict[str, Tensor] = {}
        self._preprocess_config = self.clip.visual.preprocess_cfg
        self.eval()  # open_clip hands out models in training mode
        if config.model.startswith("hf-hub:") or config.pretrained is not None:
            self.verify_weights()

    def embed_images(self, preview: Preview | PreviewBytes) -> Embedding:
        """Embed RGB previews in [0, 1] or as bytes, of any size; gradients reach both the weights and the previews.

        The tower computes in the precision of its weights: ``embedder.clip.visual.to(torch.bfloat16)`` halves the time of a
        ViT-B/32 on a CPU with AVX-512 bf16 (benchmarks/overhead.py).

        Returns:
            Float32 of length 1, on the device of the model. A row that is not finite gives a row that is not finite, its
            neighbours are untouched.
        Raises:
            InputError: If ``preview`` is neither float nor uint8, or not of shape (batch, 3, height, width).
        """
        if preview.ndim != 4 or preview.shape[1] != 3 or 0 in preview.shape[2:]:
            raise InputError(f"preview must be (batch, 3, height, width), got shape {tuple(preview.shape)}")
        if not preview.is_floating_point() and preview.dtype != torch.uint8:
            raise InputError(f"preview must be float, in [0, 1], or uint8, got {preview.dtype}")
        weight = next(self.clip.visual.parameters())
        pixels, white = preview.to(weight.device).float(), 1.0 if preview.is_floating_point() else 255.0
        if len(pixels) == 0:
            return pixels.new_zeros(0, self.config.embed_dim)  # torch does not resize an empty batch
        pixels = resize_and_crop(pixels, self._preprocess_config, white)
        mean, std = (tuple(self._preprocess_config[name]) for name in ("mean", "std"))
        shift, scale = _normalisation(mean, std, white, tuple(pixels.shape[1:]), pixels.device)
        # In one pass over the pixels; in place where they are a copy of bytes.
        pixels = torch.addcmul(shift, pixels, scale, out=None if preview.is_floating_point() else pixels)
        features = self.clip.encode_image(pixels.to(weight.dtype))
        return F.normalize(features.float(), dim=-1)

    def embed_texts(self, prompts: list[str]) -> Embedding:
        """Embed prompts; what exceeds the context length is cut off, as open_clip does.

        Returns:
            Float32 of length 1, on the device of the model.
        Raises:
            InputError: If ``prompts`` is not a list of strings.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompts must be a list of strings, got {prompts!r}")
        device = self.clip.logit_scale.device
        if len(prompts) == 0:
            return torch.zeros(0, self.config.embed_dim, device=device)
        features = self.clip.encode_text(self._tokenize(prompts).to(device))
        return F.normalize(features.float(), dim=-1)

    def _tokenize(self, prompts: list[str]) -> Int[Tensor, "batch token"]:
        """Each prompt once: in training the same ones come again and again, and a small text tower is as fast as a tokenizer."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._tokens]
        if len(self._tokens) + len(unknown) > PROMPTS_KEPT:
            self._tokens, unknown = {}, list(dict.fromkeys(prompts))
        if unknown:
            self._tokens.update(zip(unknown, self.tokenizer(unknown), strict=True))
        return torch.stack([self._tokens[prompt] for prompt in prompts])

    def weights_sha256(self) -> str:
        """Identity of the weights of both towers: names, dtypes, shapes and bytes."""
        return state_sha256(self.clip.state_dict())

    def verify_weights(self) -> None:
        """Check that all weights are finite and, where the configuration names a hash, that they are the ones meant.

        Raises:
            CheckpointError: Naming the tensor, or both hashes.
        """
        for name, tensor in self.clip.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CheckpointError(f"the CLIP weights {name!r} hold NaN or infinity; fetch or train them again")
        expected = self.config.weights_sha256
        if expected is not None and (found := self.weights_sha256()) != expected:
            raise CheckpointError(
                f"the scorer was trained on CLIP weights with SHA-256 {expected}, but {self.config.model} "
                f"has {found}; its scores would mean nothing"
            )


def require_offline(config: EmbedderConfig) -> None:
    """open_clip has no option that keeps it off the network.

    Raises:
        ConfigError: Unless the Hub is switched off for the whole process.
    """
    from huggingface_hub import is_offline_mode

    if not is_offline_mode():
        raise ConfigError(
            f"local_files_only: open_clip would look for {config.model} ({config.pretrained}) in the network; set "
            "HF_HUB_OFFLINE=1 in the environment before Python starts, and it takes the weights from the cache"
        )


def resize_and_crop(preview: Preview, preprocess_config: Mapping[str, Any], white: float = 1.0) -> TowerInput:
    """Bring a preview to the size of the image tower, as open_clip does with PIL images.

    Args:
        preview: Float, in [0, ``white``].
        preprocess_config: open_clip's: ``size``, ``interpolation`` and ``resize_mode``, which is "shortest" (fill the
            target and crop), "longest" (fit into it and pad with black) or "squash".
    Returns:
        In [0, ``white``]; ``preview`` itself where it has the size already.
    """
    source, mode = preview.shape[2:], preprocess_config["resize_mode"]
    size = preprocess_config["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    # The two ways of rounding are those of torchvision's Resize and of open_clip's ResizeKeepRatio.
    if mode == "squash":
        resized = size
    elif mode == "shortest" and size[0] == size[1]:
        resized = tuple(int(size[0] * side / min(source)) for side in source)
    else:
        ratios = [side / target for side, target in zip(source, size, strict=True)]
        ratio = max(ratios) if mode == "longest" else min(ratios)
        resized = tuple(max(1, round(side / ratio)) for side in source)
    if resized != tuple(source):
        bilinear = (
            preprocess_config["interpolation"] == "bilinear"
        )  # "random", which is for training, means bicubic here
        interpolation = TF.InterpolationMode.BILINEAR if bilinear else TF.InterpolationMode.BICUBIC
        preview = TF.resize(preview, list(resized), interpolation, antialias=True).clamp(0, white)
    return preview if resized == size else TF.center_crop(preview, list(size))


@lru_cache(maxsize=64)
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], white: float, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Shift and scale of (pixels / white - mean) / std, of the shape of a picture: broadcasting them takes twice as long."""
    with torch.inference_mode(False):  # they outlive the call, and one with gradients may be next
        means, stds = (
            torch.tensor(values, dtype=torch.float32, device=device)[:, None, None].expand(shape)
            for values in (mean, std)
        )
        return (-means / stds).contiguous(), (1 / (white * stds)).contiguous()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names.

    Example:
        >>> a, b = torch.zeros(2), torch.ones(())
        >>> state_sha256({"a": a, "b": b}) == state_sha256({"b": b, "a": a})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # as bytes: numpy has no bfloat16
    return digest.hexdigest()


def _build_custom(model_config: dict[str, Any]) -> Any:
    """The model of a configuration that may come from a stranger: no network, and no more memory than is sensible."""
    from open_clip.model import CLIP, CustomTextCLIP

    import moe_artifacts.towers  # noqa: F401  # registers the name preview_resnet with timm

    values = copy.deepcopy(model_config)
    _check_custom(values)
    preprocess = values.pop("preprocess_cfg", {})
    kind = CustomTextCLIP if values.pop("custom_text", False) else CLIP
    try:
        with torch.device("meta"):  # shapes only: a damaged width must fail before memory is taken for it
            size = sum(p.numel() for p in kind(**copy.deepcopy(values)).parameters())
        if size > MAX_PARAMETERS:
            raise ConfigError(f"embedder.model_config asks for {size:,} parameters, the limit is {MAX_PARAMETERS:,}")
        model = kind(**values)
        _set_preprocessing(model, preprocess)
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"open_clip cannot build embedder.model_config: {error!r}") from error
    return model


def _check_custom(values: dict[str, Any]) -> None:
    if missing := sorted({"embed_dim", "vision_cfg", "text_cfg"} - set(values)):
        raise ConfigError(f"embedder.model_config lacks {missing}; see open_clip/model_configs for examples")
    for tower in ("vision_cfg", "text_cfg"):
        if not isinstance(values[tower], dict):
            raise ConfigError(f"embedder.model_config.{tower} must be a JSON object, got {values[tower]!r}")
    vision, text = values["vision_cfg"], values["text_cfg"]
    elsewhere = [key for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key)]
    elsewhere += ["timm_model_pretrained"] if vision.get("timm_model_pretrained") else []
    elsewhere += ["timm_model_name"] if ":" in str(vision.get("timm_model_name") or "") else []
    if elsewhere:
        raise ConfigError(
            f"embedder.model_config must be complete in itself, but {elsewhere} would load more from the Hub"
        )
    for name, number in _numbers(values):
        most = MAX_LAYERS if name == "layers" else MAX_WIDTH
        if number > most:
            raise ConfigError(f"embedder.model_config: {name} must be at most {most}, got {number}")


def _numbers(values: Any, name: str = "") -> list[tuple[str, int | float]]:
    """All numbers of nested JSON values, each with the nearest key above it."""
    if isinstance(values, dict):
        return [pair for key, value in values.items() for pair in _numbers(value, key)]
    if isinstance(values, list):
        return [pair for value in values for pair in _numbers(value, name)]
    return [(name, values)] if isinstance(values, (int, float)) else []


def _set_preprocessing(model: Any, preprocess: dict[str, Any]) -> None:
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(**{"size": model.visual.image_size, **preprocess})
    image_transform_v2(config, is_train=False)  # open_clip asserts here that it knows the modes
    set_model_preprocess_cfg(model, asdict(config))


def _custom_tokenizer(text_config: dict[str, Any]) -> Any:
    """CLIP's tokenizer, cut to the vocabulary of the text tower.

    Its merges are ordered by frequency: the first n are a smaller vocabulary that still spells every text. The two
    special tokens stay the last ones, which open_clip's text pooling relies on.
    """
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    length = text_config.get("context_length", 77)
    size = text_config.get("vocab_size", 49_408)
    letters = 2 * 256  # each byte, inside a word and at its end
    if not letters + 2 <= size <= 49_408:
        raise ConfigError(f"text_cfg.vocab_size must be between {letters + 2} and 49408, CLIP's own, got {size}")
    if size == 49_408:
        return SimpleTokenizer(context_length=length)
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as stream:
        header_and_merges = stream.read().split("\n")[: 1 + size - letters - 2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "merges.txt.gz")
        path.write_bytes(gzip.compress("\n".join(header_and_merges).encode("utf-8")))
        return SimpleTokenizer(bpe_path=str(path), context_length=length)


def _load_named(config: EmbedderConfig, cache_dir: str | None) -> tuple[Any, Any, int]:
    """The model, tokenizer and width of an open_clip name or a Hub id."""
    import open_clip

    if config.model.startswith("local-dir:"):
        raise ConfigError(f'embedder.model must not name a folder of one machine, got {config.model!r}; use "custom"')
    if not config.model.startswith("hf-hub:") and config.model not in open_clip.list_models():
        raise ConfigError(f"open_clip knows no model {config.model!r}; see open_clip.list_models()")
    try:
        width = open_clip.get_model_config(config.model)["embed_dim"]
        # pretrained_text=False: without a tag the text tower would fetch its default weights from the Hub.
        model = open_clip.create_model(config.model, config.pretrained, pretrained_text=False, cache_dir=cache_dir)
        tokenizer = open_clip.get_tokenizer(config.model, cache_dir=cache_dir)
    except Exception as error:  # network, disk, tags and damaged files: open_clip raises nearly everything
        raise CheckpointError(f"open_clip cannot load {config.model} ({config.pretrained}): {error}") from error
    return model, tokenizer, width
