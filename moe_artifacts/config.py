"""One frozen dataclass per stage, checked where it is built and stored as JSON in the checkpoint.

A field with no safe default has none. Unknown keys in a stored config are refused, so that a typing error or a file of
a newer version is never half understood.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from moe_artifacts.errors import ConfigError

FORMAT_VERSION = 1
MAX_WIDTH = 65_536  # of any layer: a damaged config must fail before memory is taken for it
MAX_EXPERTS = 1_024

# How a pipeline lays out the latents that its scheduler holds, and what they become:
# 2x2: (batch, height/2 * width/2, 4 * channels) tokens (Flux, Chroma, Qwen), to (batch, channels, height, width);
# tokens: (batch, height * width, channels) (Flux 2, its 2x2 patches being channels), to (batch, channels, height, width).
Packing = Literal["none", "2x2", "tokens"]

ConfigT = TypeVar("ConfigT")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_width(name: str, value: int, most: int = MAX_WIDTH) -> None:
    _require(isinstance(value, int) and 1 <= value <= most, f"{name} must be between 1 and {most}, got {value!r}")


def _require_range(name: str, value: tuple[float, float]) -> None:
    ok = len(value) == 2 and all(math.isfinite(v) for v in value) and value[0] < value[1]
    _require(ok, f"{name} must be two finite numbers, low before high, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpaceConfig:
    """What makes two sets of latents comparable; a scorer is refused for a pipeline of another latent space.

    Not a hash of weights: fine-tuned VAEs share a space.
    """

    name: str  # for messages, e.g. "fashion" or "sd1"
    vae_class: str  # e.g. "AutoencoderKL"
    channels: int  # once unpacked
    scaling_factor: float  # latents = ((encoded - shift_factor) - mean) / std * scaling_factor
    shift_factor: float = 0.0
    downsampling: int = 8  # pixels per latent, along one side, once unpacked
    packing: Packing = "none"
    mean: tuple[float, ...] | None = (
        None  # per channel, of what is encoded: with std, where a pipeline normalises by it
    )
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _require_width("latent_space.channels", self.channels, 4_096)
        _require_width("latent_space.downsampling", self.downsampling, 1_024)
        ok = math.isfinite(self.scaling_factor) and self.scaling_factor > 0
        _require(ok, f"latent_space.scaling_factor must be a positive number, got {self.scaling_factor!r}")
        ok = math.isfinite(self.shift_factor)
        _require(ok, f"latent_space.shift_factor must be a finite number, got {self.shift_factor!r}")
        packings = typing.get_args(Packing)
        ok = self.packing in packings
        _require(ok, f"latent_space.packing must be one of {', '.join(packings)}, got {self.packing!r}")
        _require((self.mean is None) == (self.std is None), "latent_space.mean and latent_space.std come together")
        for name, what in (("mean", "finite"), ("std", "positive")):
            values = getattr(self, name)
            if values is None:
                continue
            low = 0.0 if what == "positive" else -math.inf
            ok = len(values) == self.channels and all(math.isfinite(v) and v > low for v in values)
            _require(ok, f"latent_space.{name} must be {self.channels} {what} numbers, one per channel, got {values!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig:
    """How x0 latents become an RGB preview."""

    kind: Literal["linear", "tiny", "vae"]
    channels: int  # of the latents
    patch: int = 1  # linear only: side, in pixels, of the patch made from one latent pixel

    def __post_init__(self) -> None:
        _require(self.kind in ("linear", "tiny", "vae"), f"preview.kind must be linear, tiny or vae, got {self.kind!r}")
        _require_width("preview.channels", self.channels, 4_096)
        _require_width("preview.patch", self.patch, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedderConfig:
    """Which open_clip model embeds previews and prompts, and the identity of its weights.

    ``model`` is an open_clip name ("ViT-B-32"), a Hub id ("hf-hub:owner/name"), or "custom", in which case
    ``model_config`` holds the open_clip model configuration itself.
    """

    model: str
    embed_dim: int  # width of the embedding, e.g. 512 for ViT-B-32
    model_config: dict[str, Any] | None = None
    pretrained: str | None = (
        None  # open_clip's pretrained tag; None: the weights are in the checkpoint, or of the Hub id
    )
    weights_sha256: str | None = None  # of the weights the scorer was trained with

    def __post_init__(self) -> None:
        _require_width("embedder.embed_dim", self.embed_dim)
        custom = self.model == "custom"
        _require(custom == (self.model_config is not None), 'embedder.model_config belongs to model="custom", only')

    @property
    def is_named(self) -> bool:
        """Whether the weights come from where ``model`` and ``pretrained`` say; else they are in the checkpoint."""
        return self.pretrained is not None or self.model.startswith("hf-hub:")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """What the experts see of one step besides the embedding of the x0 preview."""

    embed_dim: int
    use_delta: bool = True  # change of the embedding since the last scored step, per unit of progress
    use_prompt: bool = True  # the prompt's CLIP text embedding
    use_noisy: bool = False  # the embedding of the preview of x_t

    def __post_init__(self) -> None:
        _require_width("features.embed_dim", self.embed_dim)

    @property
    def width(self) -> int:
        return self.embed_dim * (1 + self.use_delta + self.use_prompt + self.use_noisy)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """How one step is shared out between experts."""

    num_experts: int  # no default: must match the experts it is trained with
    embed_dim: int  # CLIP width, e.g. 512 for ViT-B-32
    log_snr_range: tuple[float, float]  # nats; no default: belongs to the data; values outside are clamped
    top_k: int = 2  # experts mixed per step; num_experts for a dense mixture
    kind: Literal["soft", "hard"] = "soft"  # hard: the nearest band alone, an ablation

    def __post_init__(self) -> None:
        _require_width("gate.num_experts", self.num_experts, MAX_EXPERTS)
        _require_width("gate.embed_dim", self.embed_dim)
        _require_range("gate.log_snr_range", self.log_snr_range)
        _require(self.kind in ("soft", "hard"), f"gate.kind must be soft or hard, got {self.kind!r}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k must be between 1 and num_experts={self.num_experts}, got {self.top_k}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """The shared head and the experts that correct it. ``num_experts=0`` is the single head, an ablation."""

    num_experts: int
    feature_dim: int
    hidden_dim: int
    expert_dim: int = 64  # hidden width of one expert
    log_snr_range: tuple[float, float]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        ok = isinstance(self.num_experts, int) and 0 <= self.num_experts <= MAX_EXPERTS
        _require(ok, f"experts.num_experts must be between 0 and {MAX_EXPERTS}, got {self.num_experts!r}")
        for name in ("feature_dim", "hidden_dim", "expert_dim"):
            _require_width(f"experts.{name}", getattr(self, name))
        _require_range("experts.log_snr_range", self.log_snr_range)
        _require(0 <= self.dropout < 1, f"experts.dropout must be in [0, 1), got {self.dropout!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitHeadConfig:
    """The head that turns the mixed states of this and the previous step into an exit rate."""

    state_dim: int
    hidden_dim: int = 64

    def __post_init__(self) -> None:
        _require_width("exit_head.state_dim", self.state_dim)
        _require_width("exit_head.hidden_dim", self.hidden_dim)


RuleName = Literal["cumulative", "q-exit", "posterior", "patience", "economic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ThresholdConfig:
    """A threshold and where it comes from: without its provenance a threshold promises nothing.

    The first block is the rule itself; the second the promise; the third the setting in which it was calibrated.
    """

    rule: RuleName
    threshold: float  # in [0, 1]: abort at the first step whose statistic is >= this
    clear_threshold: float | None = None  # cumulative rule only: stop scoring once cumulative_clean_prob >= this
    q: float | None = None  # q-exit only: decide once exit_cdf > q
    patience: int | None = None  # patience only: this many alarms in a row
    boundary: tuple[tuple[float, ...], ...] | None = None  # economic only: (progress, abort at, clear below), in order

    risk: str = "false_abort_rate"
    max_risk: float | None = None
    confidence: float | None = None
    unit: Literal["image", "prompt"] | None = None
    num_clean: int | None = None  # clean images, or prompts, it was certified on

    scheduler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scored_steps: tuple[int, ...] | None = None
    eta: float | None = None  # share of fresh noise at each step, of schedulers that take one (DDIM)
    image_size: tuple[int, ...] | None = None  # height and width in pixels
    denoiser: str | None = None  # its fingerprint: moe_artifacts/guard/fingerprint.py
    prompt_mix: str | None = None

    def __post_init__(self) -> None:
        rules = typing.get_args(RuleName)
        _require(self.rule in rules, f"rule must be one of {', '.join(rules)}, got {self.rule!r}")
        for name in ("threshold", "clear_threshold", "q"):
            value = getattr(self, name)
            if value is None and name != "threshold":
                continue
            ok = isinstance(value, (int, float)) and 0 <= value <= 1
            _require(ok, f"{name} must be in [0, 1], got {value!r}")
        _require(self.rule != "q-exit" or self.q is not None, "the q-exit rule needs q, e.g. 0.5")
        ok = self.rule != "patience" or (self.patience is not None and self.patience >= 1)
        _require(ok, f"the patience rule needs patience >= 1, got {self.patience!r}")
        _require(
            (self.rule == "economic") == (self.boundary is not None), "boundary belongs to the economic rule, only"
        )
        if self.boundary is not None:
            points = self.boundary
            ok = len(points) > 0 and all(
                len(p) == 3 and 0 <= p[0] <= 1 and 0 <= p[1] <= 2 and 0 <= p[2] <= 1 for p in points
            )
            ok = ok and all(a[0] < b[0] for a, b in itertools.pairwise(points))
            _require(
                ok,
                "boundary must be (progress, abort at, clear below) points in [0, 1], [0, 2] and [0, 1], progress rising, "
                f"got {points!r}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerConfig:
    """Everything about a scorer but its weights: ``config.json`` of a checkpoint."""

    name: str
    label: str  # what "has artifacts" means, in words
    latent_space: LatentSpaceConfig
    preview: PreviewConfig
    embedder: EmbedderConfig
    features: FeatureConfig
    gate: GateConfig
    experts: ExpertsConfig
    exit_head: ExitHeadConfig
    log_snr_range: tuple[float, float]  # nats: progress is 0 at the first and 1 at the second
    check_progress: tuple[float, ...]  # score the first step at or past each of these, and the last step
    shows: Literal["x0", "noisy"] = "x0"  # what the previews are of: the prediction, or the sample x_t itself
    threshold: ThresholdConfig | None = None  # the default decision; None: record only
    provenance: dict[str, Any] = field(default_factory=dict)  # commit, seed, data, parents: for people
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        version = self.format_version
        _require(
            version == FORMAT_VERSION, f"format_version {version!r} is unknown, this release reads {FORMAT_VERSION}"
        )
        _require_range("log_snr_range", self.log_snr_range)
        checks = self.check_progress
        ok = len(checks) > 0 and all(0 <= c <= 1 for c in checks) and list(checks) == sorted(set(checks))
        _require(ok, f"check_progress must rise within [0, 1], got {checks!r}")
        _require(self.shows in ("x0", "noisy"), f'shows must be "x0" or "noisy", got {self.shows!r}')
        _require(
            self.features.width == self.experts.feature_dim,
            f"experts.feature_dim must be {self.features.width}, the width of the features, got {self.experts.feature_dim}",
        )
        _require(
            self.features.embed_dim == self.embedder.embed_dim == self.gate.embed_dim,
            "features.embed_dim, embedder.embed_dim and gate.embed_dim must be equal",
        )

    @property
    def uses_prompt(self) -> bool:
        return self.features.use_prompt

    @property
    def uses_noisy(self) -> bool:
        return self.features.use_noisy or self.shows == "noisy"

    @property
    def rules(self) -> tuple[RuleName, ...]:
        """The rules that can decide by its scores."""
        return typing.get_args(RuleName)

    @property
    def checks_last(self) -> bool:
        """Whether the last step is always scored."""
        return True


@runtime_checkable  # for `make shapes`
class WatchedConfig(Protocol):
    """What the guard reads of the config of a scorer; see :class:`ScorerConfig`."""

    @property
    def name(self) -> str: ...
    @property
    def latent_space(self) -> LatentSpaceConfig: ...
    @property
    def threshold(self) -> ThresholdConfig | None: ...
    @property
    def rules(self) -> tuple[RuleName, ...]: ...
    @property
    def log_snr_range(self) -> tuple[float, float]: ...
    @property
    def check_progress(self) -> tuple[float, ...] | None: ...  # None: every step
    @property
    def checks_last(self) -> bool: ...
    @property
    def uses_prompt(self) -> bool: ...
    @property
    def uses_noisy(self) -> bool: ...


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


_type_hints = functools.cache(typing.get_type_hints)  # 1 ms a call, and a run folder reads one config per attempt


def from_dict(kind: type[ConfigT], values: Any, where: str = "config") -> ConfigT:
    """Build a config from plain JSON values, refusing unknown keys, missing keys and wrong types.

    Raises:
        ConfigError: Naming the field, what came and what was expected.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a JSON object, got {type(values).__name__}")
    hints = _type_hints(kind)  # type: ignore[arg-type]  # a class is hashable
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # only dataclasses come here
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(
            f"{where} has unknown keys {unknown}; known: {sorted(fields)}. Was it made by a newer release?"
        )
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise ConfigError(f"{where} lacks the keys {missing}")
    return kind(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type: only what JSON can hold, and nothing guessed."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} must be one of {args}, got {value!r}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a JSON object, got {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53:
        return float(value)  # exact up to there; JSON integers have no limit, and beyond 1e308 float() overflows
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value
