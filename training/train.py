"""Gate and experts on cached embeddings: the posterior. The exit head comes after it, in exit_head.py.

``python -m training.train`` writes ``heads/<name>.safetensors`` for the scorer and, with ``--ablations``, for every variant
that the evaluation compares. Steps are dropped at random while training, so that one scorer serves any set of checks.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_artifacts.config import ExpertsConfig, FeatureConfig, GateConfig
from moe_artifacts.experts import Experts
from moe_artifacts.files import atomic_path
from moe_artifacts.gate import Gate
from moe_artifacts.noise import progress as noise_progress
from moe_artifacts.scorer import ArtifactScorer, step_features
from training.clip import EMBED_DIM, PreviewClip, artifact_loss, embed_recorded, train_clip
from training.collect import LOG_SNR_RANGE, RECORD_SHARES, Recorded, load_split
from training.metrics import auroc_within
from training.state import step_generator
from training.workspace import Stage, progress, work_folder


@dataclass(frozen=True, kw_only=True)
class HeadRecipe:
    """One mixture (or single head) and how it is trained."""

    name: str
    seed: int = 40
    variant: Literal["soft", "hard", "single-head"] = "soft"
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
    patience: int = 4  # evaluations without a better validation AUROC before training stops


FEATURES = FeatureConfig(embed_dim=EMBED_DIM)


class Heads(nn.Module):
    """Gate and experts, with the auxiliary margin head that only training sees."""

    def __init__(self, recipe: HeadRecipe) -> None:
        super().__init__()
        gate, experts = head_configs(recipe)
        self.gate = Gate(gate)
        self.experts = Experts(experts)
        self.margin = nn.Linear(recipe.hidden_dim, 1)

    def forward(self, features: Tensor, embedding: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return self.experts(features, log_snr, self.gate(log_snr, embedding))


def head_configs(recipe: HeadRecipe) -> tuple[GateConfig, ExpertsConfig]:
    """Configurations of gate and experts. The single head gets the experts' parameters as extra width."""
    single = recipe.variant == "single-head"
    gate = GateConfig(
        num_experts=1 if single else recipe.num_experts,
        embed_dim=EMBED_DIM,
        log_snr_range=LOG_SNR_RANGE,
        top_k=1 if single else 2,
        kind="hard" if recipe.variant == "hard" else "soft",
    )
    experts = ExpertsConfig(
        num_experts=0 if single else recipe.num_experts,
        feature_dim=FEATURES.width,
        hidden_dim=recipe.hidden_dim,
        expert_dim=recipe.expert_dim,
        log_snr_range=LOG_SNR_RANGE,
        dropout=recipe.dropout,
    )
    return gate, experts


def equal_single_width(recipe: HeadRecipe) -> int:
    """Hidden width at which a single head has as many parameters as the mixture of ``recipe``."""

    def size(r: HeadRecipe) -> int:
        with torch.device("meta"):
            gate, experts = head_configs(r)
            return sum(p.numel() for m in (Gate(gate), Experts(experts)) for p in m.parameters())

    target = size(recipe)
    widths = range(recipe.hidden_dim, 4 * recipe.hidden_dim)
    single = dataclasses.replace(recipe, variant="single-head")
    return min(widths, key=lambda w: abs(size(dataclasses.replace(single, hidden_dim=w)) - target))


@dataclass(frozen=True)
class Embedded:
    """A split after the frozen embedder: everything the heads need."""

    embedding: Tensor  # float16 [image check embed]
    prompt: Tensor  # [image embed]
    log_snr: Tensor  # [image check], NaN: no such check
    spent: Tensor  # [image check], share of the denoiser calls spent by this check
    label: Tensor
    margin: Tensor

    @property
    def bad(self) -> Tensor:
        return (self.margin > 0).float()


def embed_split(name: str) -> Embedded:
    """Embeddings of a split, computed once and kept beside its trajectories."""
    path = work_folder() / "embedded" / f"{name}.safetensors"
    data = load_split(name)
    if path.exists():
        cached = load_file(path)
    else:
        model = PreviewClip()
        model.load_state_dict(load_file(train_clip()))
        embedding, prompt = embed_recorded(model, data)
        cached = {"embedding": embedding, "prompt": prompt}
        with atomic_path(path) as temporary:
            save_file(cached, temporary)
    spent = (data.step + 1) / data.num_steps[:, None]
    return Embedded(**cached, log_snr=data.log_snr, spent=spent, label=data.label, margin=data.margin)


def embed_with(scorer: ArtifactScorer, data: Recorded) -> Embedded:
    """The same from a finished scorer, for trajectories that no stage has embedded."""
    flat = data.x0.flatten(0, 1)
    with torch.no_grad():
        parts = [scorer.embed(part.float()).half() for part in flat.split(1_000)]
    embedding = torch.cat(parts).unflatten(0, data.x0.shape[:2])
    prompt = scorer.embed_prompts(data.prompts, len(data.prompts))
    assert prompt is not None
    spent = (data.step + 1) / data.num_steps[:, None]
    return Embedded(embedding, prompt, data.log_snr, spent, data.label, data.margin)


def sequence(data: Embedded, rows: Tensor, checks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [row step feature], progress, its value at the scored step before, and which steps exist [row step].

    Checks that a short run does not have are missing at the front: there, and at the first check, the change is 0.
    """
    embedding = data.embedding[rows][:, checks].float()
    log_snr = data.log_snr[rows][:, checks]
    present = ~log_snr.isnan()
    at = noise_progress(log_snr.nan_to_num(LOG_SNR_RANGE[0]), LOG_SNR_RANGE)
    before = torch.cat([torch.zeros_like(at[:, :1]), at[:, :-1]], dim=1)
    previous = torch.cat([embedding[:, :1], embedding[:, :-1]], dim=1)
    first = present & ~torch.cat([torch.zeros_like(present[:, :1]), present[:, :-1]], dim=1)
    previous = torch.where(first[..., None], embedding, previous)
    prompt = data.prompt[rows][:, None].expand(-1, len(checks), -1)
    flat = step_features(
        FEATURES,
        embedding.flatten(0, 1),
        previous.flatten(0, 1),
        (at - before).flatten()[:, None],
        prompt.flatten(0, 1),
    )
    return flat.unflatten(0, (len(rows), len(checks))), at, before, present


def draw_subset(generator: torch.Generator, count: int) -> Tensor:
    """Which checks to look at: all of them half of the time, else a random subset of at least three with the last."""
    if torch.rand((), generator=generator) < 0.5 or count <= 3:
        return torch.arange(count)
    size = int(torch.randint(3, count, (1,), generator=generator))
    chosen = torch.randperm(count - 1, generator=generator)[: size - 1].sort().values
    return torch.cat([chosen, torch.tensor([count - 1])])


def train_posterior(recipe: HeadRecipe, data: Embedded, validation: Embedded) -> Path:
    """Gate and experts; keeps the weights with the best mean within-class AUROC on validation."""
    stage = Stage("heads")
    result = stage.folder / f"{recipe.name}.safetensors"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)
    if recipe.variant == "single-head":
        recipe = dataclasses.replace(recipe, hidden_dim=equal_single_width(dataclasses.replace(recipe, variant="soft")))
    heads = Heads(recipe)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    best, best_state, waited = -1.0, heads.state_dict(), 0
    count = data.log_snr.shape[1]
    with progress(recipe.steps, 0, f"heads {recipe.name}") as bar:
        for step in range(recipe.steps):
            generator = step_generator(recipe.seed, step)
            factor = min(1.0, (step + 1) / 100) * (1 - step / recipe.steps)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * factor
            rows = torch.randint(len(data.label), (recipe.batch,), generator=generator)
            checks = draw_subset(generator, count)
            features, _, _, present = sequence(data, rows, checks)
            log_snr = data.log_snr[rows][:, checks][present]
            heads.train()
            logit, state = heads(features[present], features[present][:, :EMBED_DIM], log_snr)
            margins = data.margin[rows][:, None].expand(-1, len(checks))[present]
            loss = artifact_loss(logit, heads.margin(state).squeeze(-1), margins, recipe.margin_weight)
            loss = loss + recipe.expert_penalty * heads.experts.expert_penalty()
            if not loss.isfinite():
                raise RuntimeError(f"the loss became {loss.item()} at step {step}: lower lr and start again")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
            optimizer.step()
            bar.update()
            if (step + 1) % 100 == 0:
                score = float(torch.tensor(posterior_auroc(heads, validation)).mean())
                stage.track(step + 1, loss=loss.item(), auroc=score)
                best, waited, best_state = (
                    (score, 0, {k: v.clone() for k, v in heads.state_dict().items()})
                    if score > best
                    else (best, waited + 1, best_state)
                )
                if waited >= recipe.patience:
                    break
    stage.log.info("%s: best validation AUROC %.4f", recipe.name, best)
    with atomic_path(result) as temporary:  # in float16, as it is shipped
        save_file(
            {k: v.half().contiguous() for k, v in best_state.items()},
            temporary,
            {"hidden_dim": str(recipe.hidden_dim), "auroc": str(best)},
        )
    return result


def load_heads(recipe: HeadRecipe, path: Path) -> Heads:
    """The heads of a recipe from their file."""
    if recipe.variant == "single-head":
        recipe = dataclasses.replace(recipe, hidden_dim=equal_single_width(dataclasses.replace(recipe, variant="soft")))
    heads = Heads(recipe)
    heads.load_state_dict(load_file(path))
    return heads.eval()


@torch.no_grad()
def states_of(heads: Heads, data: Embedded, checks: Tensor, batch: int = 2_000) -> tuple[Tensor, Tensor]:
    """Logits and mixed states of every image at ``checks``; 0 where a short run has no such check."""
    heads.eval()
    logits, states = [], []
    for rows in torch.arange(len(data.label)).split(batch):
        features, _, _, present = sequence(data, rows, checks)
        log_snr = data.log_snr[rows][:, checks].nan_to_num(LOG_SNR_RANGE[0])
        flat = features.flatten(0, 1)
        logit, state = heads(flat, flat[:, :EMBED_DIM], log_snr.flatten())
        shape = (len(rows), len(checks))
        logits.append(torch.where(present, logit.unflatten(0, shape), 0.0))
        states.append(torch.where(present[..., None], state.unflatten(0, shape), 0.0))
    return torch.cat(logits), torch.cat(states)


def posterior_auroc(heads: Heads, data: Embedded) -> list[float]:
    """Within-class AUROC at every check."""
    checks = torch.arange(data.log_snr.shape[1])
    logit, _ = states_of(heads, data, checks)
    bad, label = data.bad.numpy(), data.label.numpy()
    return [auroc_within(logit[:, c].numpy(), bad, label) for c in range(len(checks))]


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def round_to_half(module: ModuleT) -> ModuleT:
    """Weights rounded to what float16 can hold, as they are shipped, and kept in float32."""
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                value.copy_(value.half())
    return module


MAIN = HeadRecipe(name="soft-40")
ABLATIONS = tuple(
    HeadRecipe(name=f"{variant}-{seed}", variant=variant, seed=seed)
    for seed in (40, 41, 42)
    for variant in ("soft", "hard", "single-head")
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablations", action="store_true", help="also train the variants that the evaluation compares")
    args = parser.parse_args()
    assert len(RECORD_SHARES) >= 3
    data, validation = embed_split("train"), embed_split("validation")
    for recipe in ABLATIONS if args.ablations else (MAIN,):
        print(train_posterior(recipe, data, validation))


if __name__ == "__main__":
    main()
