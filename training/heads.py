"""Gate and experts on cached embeddings: how wide they are, what they see, and what they say of whole trajectories."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from moe_artifacts.checkpoint import load_state_strict, read_weights
from moe_artifacts.config import ExpertsConfig, FeatureConfig, GateConfig
from moe_artifacts.errors import ConfigError
from moe_artifacts.experts import Experts
from moe_artifacts.gate import Gate
from moe_artifacts.noise import progress as noise_progress
from moe_artifacts.scorer import step_features
from moe_artifacts.shapes import Embedding, Features, PerImage, State, StepFeatures, StepState, StepValues
from training.embedded import EmbeddedBatch
from training.head_data import HeadData, on_device

Checks = Int64[Tensor, " step"]  # columns of the data, rising
Variant = Literal["soft", "hard", "single-head"]


@dataclass(frozen=True, kw_only=True)
class HeadRecipe:
    """One mixture (or single head) and how it is trained."""

    name: str
    seed: int = 40
    variant: Variant = "soft"
    num_experts: int = 5
    hidden_dim: int = 128
    expert_dim: int = 16
    dropout: float = 0.2
    steps: int = 800
    batch: int = 512
    lr: float = 2e-3
    weight_decay: float = 0.05
    margin_weight: float = 1.0
    expert_penalty: float = 0.1
    rare_weight: float = 1.0  # the most that an image of the rarer kind counts; 1: all count the same
    evaluate_every: int = 100
    patience: int = 4  # evaluations without a better validation AUROC before training stops

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ConfigError(f"variant must be one of {', '.join(get_args(Variant))}, got {self.variant!r}")
        for name in ("num_experts", "steps", "batch", "rare_weight", "evaluate_every", "patience"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "margin_weight", "expert_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number of at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class HeadSpace:
    """What heads must share with the data they see."""

    embed_dim: int
    log_snr_range: tuple[float, float]  # nats; progress is 0 at the first and 1 at the second

    @property
    def features(self) -> FeatureConfig:
        return FeatureConfig(embed_dim=self.embed_dim)


class Heads(nn.Module):
    """Gate and experts, with the auxiliary margin head that only training sees."""

    def __init__(self, recipe: HeadRecipe, space: HeadSpace) -> None:
        super().__init__()
        if recipe.variant == "single-head":
            recipe = dataclasses.replace(recipe, hidden_dim=equal_single_width(recipe, space))
        self.space = space
        gate, experts = head_configs(recipe, space)
        self.gate = Gate(gate)
        self.experts = Experts(experts)
        self.margin = nn.Linear(recipe.hidden_dim, 1)

    def forward(self, features: Features, embedding: Embedding, log_snr: PerImage) -> tuple[PerImage, State]:
        return self.experts(features, log_snr, self.gate(log_snr, embedding))


def head_configs(recipe: HeadRecipe, space: HeadSpace) -> tuple[GateConfig, ExpertsConfig]:
    """Configurations of gate and experts. The single head has the hidden width of the recipe."""
    single = recipe.variant == "single-head"
    gate = GateConfig(
        num_experts=1 if single else recipe.num_experts,
        embed_dim=space.embed_dim,
        log_snr_range=space.log_snr_range,
        top_k=1 if single else min(2, recipe.num_experts),
        kind="hard" if recipe.variant == "hard" else "soft",
    )
    experts = ExpertsConfig(
        num_experts=0 if single else recipe.num_experts,
        feature_dim=space.features.width,
        hidden_dim=recipe.hidden_dim,
        expert_dim=recipe.expert_dim,
        log_snr_range=space.log_snr_range,
        dropout=recipe.dropout,
    )
    return gate, experts


@functools.lru_cache
def equal_single_width(recipe: HeadRecipe, space: HeadSpace) -> int:
    """Hidden width at which a single head has as many parameters as the mixture of ``recipe``."""

    def size(r: HeadRecipe) -> int:
        with torch.device("meta"):
            gate, experts = head_configs(r, space)
            return sum(p.numel() for m in (Gate(gate), Experts(experts)) for p in m.parameters())

    target = size(dataclasses.replace(recipe, variant="soft"))
    widths = range(recipe.hidden_dim, 4 * recipe.hidden_dim)
    single = dataclasses.replace(recipe, variant="single-head")
    return min(widths, key=lambda w: abs(size(dataclasses.replace(single, hidden_dim=w)) - target))


def load_heads(recipe: HeadRecipe, space: HeadSpace, path: Path) -> Heads:
    """The heads of a recipe from their file.

    Raises:
        CheckpointError: If it is missing or damaged, or of another recipe or space.
    """
    heads = Heads(recipe, space)
    load_state_strict(heads, read_weights(path), name=str(path))
    return heads.eval()


@dataclass(frozen=True)
class Sequence:
    """Some images at some checks, as the heads see them.

    Checks that a short run does not have are missing at the front: there, and at the first check, the change is 0.
    """

    features: StepFeatures
    at: StepValues  # progress
    before: StepValues  # progress at the scored step before; 0 at the first
    log_snr: StepValues  # within the range, also where missing
    present: Bool[Tensor, "batch step"]


def sequence(batch: EmbeddedBatch, checks: Checks, space: HeadSpace) -> Sequence:
    """Features and progress of the images at ``checks``."""
    embedding, log_snr = batch.embedding[:, checks].float(), batch.log_snr[:, checks]
    at, before, present = strides(log_snr, space.log_snr_range)
    previous = torch.cat([embedding[:, :1], embedding[:, :-1]], dim=1)
    first = present & ~torch.cat([torch.zeros_like(present[:, :1]), present[:, :-1]], dim=1)
    previous = torch.where(first[..., None], embedding, previous)
    text = batch.text.float()[:, None].expand(-1, len(checks), -1)
    flat = step_features(
        space.features,
        embedding.flatten(0, 1),
        previous.flatten(0, 1),
        (at - before).flatten()[:, None],
        text.flatten(0, 1),
    )
    low, high = space.log_snr_range
    return Sequence(
        features=flat.unflatten(0, log_snr.shape),
        at=at,
        before=before,
        log_snr=log_snr.nan_to_num(low, high, low).clamp(low, high),
        present=present,
    )


def strides(
    log_snr: Float[Tensor, "batch step"], log_snr_range: tuple[float, float]
) -> tuple[StepValues, StepValues, Bool[Tensor, "batch step"]]:
    """Progress, progress at the scored step before, and which steps exist.

    NaN is a step that does not, one of the first: its progress is 0, and so is its stride.
    """
    present = ~log_snr.isnan()
    at = noise_progress(log_snr.nan_to_num(log_snr_range[0]), log_snr_range)  # infinite levels are clamped
    before = torch.cat([torch.zeros_like(at[:, :1]), at[:, :-1]], dim=1)
    return at, before, present


def draw_subset(generator: torch.Generator, count: int) -> Checks:
    """Which checks to look at: all of them half of the time, else a random subset of at least three with the last."""
    if torch.rand((), generator=generator) < 0.5 or count <= 3:
        return torch.arange(count)
    size = int(torch.randint(3, count, (1,), generator=generator))
    chosen = torch.randperm(count - 1, generator=generator)[: size - 1].sort().values
    return torch.cat([chosen, torch.tensor([count - 1])])


def iter_states(
    heads: Heads, data: HeadData, checks: Checks, batch: int = 2_000
) -> Iterator[tuple[EmbeddedBatch, StepValues, StepState]]:
    """Some images at a time: what was read of them, logits, and mixed states; 0 where an image has no such check.

    Computed where the heads are, handed out on the CPU.
    """
    heads.eval()
    device = heads.margin.weight.device
    for rows in torch.arange(len(data)).split(batch):
        part = data.take(rows)
        with torch.no_grad():  # not around the function: whoever asks for the next images may need gradients
            seen = sequence(on_device(part, device), checks.to(device), heads.space)
            flat = seen.features.flatten(0, 1)
            logit, state = heads(flat, flat[:, : heads.space.embed_dim], seen.log_snr.flatten())
            shape = seen.present.shape
            logit = torch.where(seen.present, logit.unflatten(0, shape), 0.0)
            state = torch.where(seen.present[..., None], state.unflatten(0, shape), 0.0)
        yield part, logit.cpu(), state.cpu()


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def round_to_half(module: ModuleT) -> ModuleT:
    """Weights rounded to what float16 can hold, as they are shipped, and kept in float32."""
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                value.copy_(value.half())
    return module
