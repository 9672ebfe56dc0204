"""The bundled CLIP model: contrastive training, fine-tuning for the classification, WiSE-FT between the two.

``python -m training.clip`` runs three parts, each resumable:

1. ``contrastive``: image and text tower on previews of all noise levels, with captions that state the class and, for
   generated images, whether the judge found artifacts (Radford et al., arXiv:2103.00020). Images of one class and verdict
   share a caption's meaning, so they count as positives of each other (Khosla et al., arXiv:2004.11362).
2. ``finetune``: both towers, the preview factors and a head that is told the log-SNR, end to end on the artifact label and,
   as an auxiliary target, on the judge's margin, which says how far an image is from the border.
3. ``wise_ft``: weights between the two (Wortsman et al., arXiv:2109.01903), chosen on validation.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_artifacts.config import EmbedderConfig, ExpertsConfig
from moe_artifacts.embedder import ClipEmbedder
from moe_artifacts.errors import ConfigError
from moe_artifacts.experts import Experts
from moe_artifacts.files import atomic_path, write_json
from moe_artifacts.preview import LinearPreview, r2
from training.collect import LOG_SNR_RANGE, Recorded, load_pipeline, load_split
from training.data.fashion import load_fashion
from training.data.prompts import CLASS_NAMES, prompts_of
from training.generator import encode_images
from training.metrics import auroc_within
from training.state import load_state, save_state, step_generator
from training.wise_ft import interpolate
from training.workspace import Stage, progress, work_folder

EMBED_DIM = 128
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {
        "timm_model_name": "preview_resnet",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 4096, "width": 64, "heads": 4, "layers": 2},
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
NUM_CLASSES = len(CLASS_NAMES)
MARGIN_SCALE = 0.35  # typical spread of the judge's log margins: the auxiliary target is of order one


@dataclass(frozen=True, kw_only=True)
class ClipRecipe:
    """How long and how fast."""

    seed: int = 30
    contrastive_steps: int = 400
    contrastive_batch: int = 512
    contrastive_lr: float = 1e-3
    finetune_steps: int = 6_000
    finetune_batch: int = 512
    finetune_lr: float = 1.5e-3
    weight_decay: float = 0.05
    margin_weight: float = 1.0
    mixes: tuple[float, ...] = (0.0, 0.5, 0.75, 0.9, 1.0)


class PreviewClip(nn.Module):
    """Preview factors and CLIP together: latents in, embeddings out."""

    def __init__(self) -> None:
        super().__init__()
        self.preview = LinearPreview(channels=4, patch=4)
        self.embedder = ClipEmbedder(EmbedderConfig(model="custom", embed_dim=EMBED_DIM, model_config=MODEL_CONFIG))

    def forward(self, latents: Tensor) -> Tensor:
        return self.embedder.embed_images(self.preview(latents))


class FinetuneHead(nn.Module):
    """One head for all noise levels on image and prompt embedding; gives the artifact logit and the judge's margin."""

    def __init__(self) -> None:
        super().__init__()
        config = ExpertsConfig(
            num_experts=0, feature_dim=2 * EMBED_DIM, hidden_dim=192, log_snr_range=LOG_SNR_RANGE, dropout=0.1
        )
        self.experts = Experts(config)
        self.margin = nn.Linear(192, 1)

    def forward(self, image: Tensor, text: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        logit, state = self.experts(torch.cat([image, text], dim=-1), log_snr, image.new_zeros(len(image), 0))
        return logit, self.margin(state).squeeze(-1)


def artifact_loss(logit: Tensor, margin: Tensor, true_margin: Tensor, margin_weight: float) -> Tensor:
    """Cross entropy on the label, and the judge's margin as an auxiliary target."""
    target = (true_margin / MARGIN_SCALE).clamp(-4, 4)
    bce = F.binary_cross_entropy_with_logits(logit, (true_margin > 0).float())
    return bce + margin_weight * F.smooth_l1_loss(margin, target)


def draw_checks(data: Recorded, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One recorded check of each row, uniformly among those it has: x0 float32 and log-SNR."""
    present = ~data.log_snr[rows].isnan()
    check = torch.multinomial(present.float(), 1, generator=generator)[:, 0]
    return data.x0[rows, check].float(), data.log_snr[rows, check]


def fit_preview(pipe: Any, stage: Stage) -> LinearPreview:
    """Least-squares factors from latents to the VAE's own decoding of real images."""
    images = load_fashion("train").images[:4000]
    latents = encode_images(pipe.vae, images)
    with torch.no_grad():
        decoded = [pipe.vae.decode(part / pipe.vae.config.scaling_factor).sample for part in latents.split(500)]
    rgb = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)
    preview = LinearPreview.fit(latents[:3000], rgb[:3000])
    stage.log.info("linear preview: held-out R2 %.4f", r2(preview, latents[3000:], rgb[3000:]))
    return preview


def train_contrastive(recipe: ClipRecipe, data: Recorded) -> Path:
    """Part 1; writes ``contrastive.safetensors``.

    Raises:
        ConfigError: If the loss or its gradient stops being a number.
    """
    stage = Stage("clip-contrastive")
    result = stage.folder / "contrastive.safetensors"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)
    model = PreviewClip()
    pipe = load_pipeline()
    model.preview.load_state_dict(fit_preview(pipe, stage).state_dict())
    model.preview.requires_grad_(False)
    real = load_fashion("train")
    real_latents = encode_images(pipe.vae, real.images[:10_000])
    captions = [
        [f"{p}, {kind}" for p in prompts_of(k, "train")] for k in range(NUM_CLASSES) for kind in ("clean", "broken")
    ]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.contrastive_lr, weight_decay=recipe.weight_decay)
    state_path = stage.folder / "state.safetensors"
    start = load_state(state_path, {"model": model}, optimizer)
    with progress(recipe.contrastive_steps, start, "contrastive") as bar:
        for step in range(start, recipe.contrastive_steps):
            generator = step_generator(recipe.seed, step)
            _set_lr(optimizer, recipe.contrastive_lr, step, recipe.contrastive_steps)
            rows = torch.randint(len(data.prompts), (recipe.contrastive_batch - 64,), generator=generator)
            x0, _ = draw_checks(data, rows, generator)
            real_rows = torch.randint(len(real_latents), (64,), generator=generator)
            x0 = torch.cat([x0, real_latents[real_rows]])
            group = torch.cat([2 * data.label[rows] + data.bad[rows].long(), 2 * real.labels[real_rows]])
            texts = [_pick(captions[g], generator) for g in group.tolist()]
            with torch.autocast("cpu", torch.bfloat16):
                image, text = model(x0), model.embedder.embed_texts(texts)
            scale = model.embedder.clip.logit_scale.exp().clamp(max=100)
            loss = multi_positive_loss(image.float(), text.float(), scale, group)
            _require_finite("loss", loss, step, "contrastive_lr", stage)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # clips nothing
            _require_finite("gradient", norm, step, "contrastive_lr", stage)
            optimizer.step()
            bar.update()
            if (step + 1) % 50 == 0:
                save_state(state_path, step + 1, {"model": model}, optimizer)
                stage.track(step + 1, loss=loss.item(), scale=scale.item())
    _save(model, result)
    return result


def multi_positive_loss(image: Tensor, text: Tensor, scale: Tensor, group: Tensor) -> Tensor:
    """CLIP's symmetric cross entropy where all pairs of one group are positives, in equal shares.

    Example:
        >>> e = torch.eye(2)
        >>> multi_positive_loss(e, e, torch.tensor(100.0), torch.tensor([0, 1])).item() < 1e-6
        True
    """
    target = (group[:, None] == group[None]).float()
    target = target / target.sum(dim=1, keepdim=True)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def finetune(recipe: ClipRecipe, data: Recorded, validation: Recorded, start_from: Path) -> Path:
    """Part 2; writes ``finetuned.safetensors``. WiSE-FT, not early stopping, keeps it from going too far.

    Raises:
        ConfigError: If the loss or its gradient stops being a number.
    """
    stage = Stage("clip-finetune")
    result = stage.folder / "finetuned.safetensors"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed + 1)
    torch.set_flush_denormal(True)
    model, head = PreviewClip(), FinetuneHead()
    model.load_state_dict(load_file(start_from))
    modules: dict[str, nn.Module] = {"model": model, "head": head}
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.finetune_lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    state_path = stage.folder / "state.safetensors"
    begin = load_state(state_path, modules, optimizer)
    with progress(recipe.finetune_steps, begin, "finetune") as bar:
        for step in range(begin, recipe.finetune_steps):
            generator = step_generator(recipe.seed + 1, step)
            _set_lr(optimizer, recipe.finetune_lr, step, recipe.finetune_steps)
            rows = torch.randint(len(data.prompts), (recipe.finetune_batch,), generator=generator)
            x0, log_snr = draw_checks(data, rows, generator)
            x0 = x0 + 0.03 * torch.randn(x0.shape, generator=generator)
            model.train(), head.train()
            with torch.autocast("cpu", torch.bfloat16):
                logit, margin = head(model(x0), _embed_texts(model, data, rows), log_snr)
                loss = artifact_loss(logit.float(), margin.float(), data.margin[rows], recipe.margin_weight)
            _require_finite("loss", loss, step, "finetune_lr", stage)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            _require_finite("gradient", norm, step, "finetune_lr", stage)
            optimizer.step()
            bar.update()
            if (step + 1) % 250 == 0 or step + 1 == recipe.finetune_steps:
                save_state(state_path, step + 1, modules, optimizer)
            if (step + 1) % 500 == 0 or step + 1 == recipe.finetune_steps:
                scores = validation_auroc(model, head, validation)
                stage.track(step + 1, loss=loss.item(), **{f"auroc_{k}": v for k, v in scores.items()})
    _save(model, result)
    return result


@torch.no_grad()
def validation_auroc(model: PreviewClip, head: FinetuneHead, data: Recorded) -> dict[int, float]:
    """Within-class AUROC at each recorded check, keyed by the step."""
    model.eval(), head.eval()
    text = _embed_texts(model, data, torch.arange(len(data.prompts)))
    scores = {}
    for check in range(data.x0.shape[1]):
        image = torch.cat([model(part.float()) for part in data.x0[:, check].split(500)])
        logit, _ = head(image, text, data.log_snr[:, check])
        scores[int(data.step[0, check])] = auroc_within(logit.numpy(), data.bad.numpy(), data.label.numpy())
    return scores


def _embed_texts(model: PreviewClip, data: Recorded, rows: Tensor) -> Tensor:
    """Text embeddings of rows, each distinct prompt once."""
    prompts = [data.prompts[i] for i in rows.tolist()]
    distinct = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    return model.embedder.embed_texts(list(distinct))[torch.tensor([distinct[p] for p in prompts])]


@torch.no_grad()
def embed_recorded(model: PreviewClip, data: Recorded, batch: int = 1000) -> tuple[Tensor, Tensor]:
    """Embeddings float16 [image check embed], zeros where there is no check, and prompt embeddings [image embed]."""
    model.eval()
    flat = data.x0.flatten(0, 1)
    out = torch.empty(len(flat), EMBED_DIM, dtype=torch.float16)
    for start in range(0, len(flat), batch):
        out[start : start + batch] = model(flat[start : start + batch].float()).half()
    out = out.unflatten(0, data.x0.shape[:2])
    out[data.log_snr.isnan()] = 0
    return out, _embed_texts(model, data, torch.arange(len(data.prompts)))


def choose_mix(recipe: ClipRecipe, data: Recorded, validation: Recorded, parents: tuple[Path, Path]) -> Path:
    """Part 3: for each mix, a fresh head on frozen embeddings, judged on validation; writes ``embedder.safetensors``."""
    stage = Stage("clip-wise-ft")
    result = stage.folder / "embedder.safetensors"
    if result.exists():
        return result
    few = torch.arange(0, len(data.prompts), max(1, len(data.prompts) // 6_000))
    subset = Recorded(
        prompts=[data.prompts[i] for i in few.tolist()],
        **{k: getattr(data, k)[few] for k in Recorded.__annotations__ if k != "prompts"},
    )
    table: list[dict[str, Any]] = []
    for mix in recipe.mixes:
        model = PreviewClip()
        model.load_state_dict(interpolate(load_file(parents[0]), load_file(parents[1]), mix))
        score = _probe(recipe, model, subset, validation)
        stage.track(len(table), mix=mix, auroc=score)
        table.append({"mix": mix, "auroc_within": score})
    best = max(table, key=lambda row: row["auroc_within"])
    write_json(stage.folder / "wise_ft.json", table)
    mixed = interpolate(load_file(parents[0]), load_file(parents[1]), best["mix"])
    # Rounded here, before anything is trained on its embeddings: the weights that are shipped are the ones measured.
    shipped = {k: v.half() if v.is_floating_point() else v for k, v in mixed.items()}
    with atomic_path(result) as temporary:
        save_file(shipped, temporary, {"mix": str(best["mix"])})
    return result


def _probe(recipe: ClipRecipe, model: PreviewClip, data: Recorded, validation: Recorded) -> float:
    """Mean within-class AUROC over the checks, of a head trained on frozen embeddings for a short while."""
    torch.manual_seed(recipe.seed + 2)
    embedding, text = embed_recorded(model, data)
    head = FinetuneHead()
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=recipe.weight_decay)
    head.train()
    steps = 400
    for step in range(steps):
        generator = step_generator(recipe.seed + 2, step)
        _set_lr(optimizer, 2e-3, step, steps)
        rows = torch.randint(len(text), (1024,), generator=generator)
        check = torch.multinomial((~data.log_snr[rows].isnan()).float(), 1, generator=generator)[:, 0]
        logit, margin = head(embedding[rows, check].float(), text[rows], data.log_snr[rows, check])
        loss = artifact_loss(logit, margin, data.margin[rows], recipe.margin_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = validation_auroc(model, head, validation)
    return sum(scores.values()) / len(scores)


def _require_finite(what: str, value: Tensor, step: int, rate: str, stage: Stage) -> None:
    if not value.isfinite():
        raise ConfigError(
            f"the {what} became {value.item()} at step {step}: lower {rate} of ClipRecipe, delete {stage.folder} and start again"
        )


def _pick(options: list[str], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def _set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, total: int) -> None:
    """A linear rise over a twentieth of the run, then linearly down to nothing."""
    warmup = max(1, total // 20)
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / warmup) * (1 - step / total)


def _save(model: nn.Module, path: Path) -> None:
    with atomic_path(path) as temporary:
        save_file({k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}, temporary)


def train_clip(recipe: ClipRecipe | None = None) -> Path:
    """All three parts; returns the file of the chosen embedder."""
    recipe = recipe or ClipRecipe()
    final = work_folder() / "clip-wise-ft" / "embedder.safetensors"
    if final.exists():
        return final
    data, validation = load_split("train"), load_split("validation")
    contrastive = train_contrastive(recipe, data)
    finetuned = finetune(recipe, data, validation, contrastive)
    return choose_mix(recipe, data, validation, (contrastive, finetuned))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(train_clip())


if __name__ == "__main__":
    main()
