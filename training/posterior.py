"""Training of gate and experts: the posterior. The exit head comes after it, in exit_head.py.

Steps are dropped at random while training, so that one scorer serves any set of checks.

Where one kind of image is rare, the logit starts at the log-odds of the data, so that no step is spent on learning the rate. Images
of the rare kind may count more (``rare_weight``); the logit is then shifted by as much as that moves the optimum, so that what is
learned stays the posterior at the data's own rate, for soft labels too (logit adjustment, Menon et al., arXiv:2007.07314, with
weights in place of sampling). By default they do not: with 100 bad images of 5,350, two seeds, weights up to 1, 5 and 20 gave an
AUROC of .910, .909 and .907.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from moe_artifacts.files import atomic_path
from moe_artifacts.shapes import PerImage
from training.head_data import HeadData, is_bad, on_device
from training.heads import HeadRecipe, Heads, HeadSpace, draw_subset, iter_states, sequence
from training.loop import StepBatch, TrainingLoop, linear_schedule
from training.margins import margin_loss, margin_scale
from training.metrics import auroc, auroc_within, rarer_in_mixed_groups
from training.processes import Processes

FEWEST_MIXED = 10  # images of the rarer kind, in prompts with both: with fewer, AUROC within prompts says too little
SAVE_EVERY = 100  # steps


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the loss takes from the whole training set."""

    positive_weight: float  # of an image with artifacts; 1 for a clean one
    margin_scale: float  # typical spread of the judge's margins: the auxiliary target is of order one

    @classmethod
    def of(cls, data: HeadData, rare_weight: float) -> Targets:
        """Weights such that both kinds weigh the same, as far as ``rare_weight`` allows."""
        rate = _rate(data)
        return cls(
            positive_weight=min(max((1 - rate) / rate, 1 / rare_weight), rare_weight),
            margin_scale=margin_scale(data.margin),
        )

    def loss(self, logit: PerImage, margin_head: PerImage, label: PerImage, margin: PerImage, weight: float) -> Tensor:
        """Cross entropy on the label, and the judge's margin, where it is known, as an auxiliary target.

        Args:
            logit: Of the posterior at the data's own rate.
            margin_head: What the auxiliary head says.
            label: In [0, 1].
            margin: NaN: not known.
            weight: Of the auxiliary target.
        """
        rare = torch.tensor(self.positive_weight, device=logit.device)
        bce = F.binary_cross_entropy_with_logits(logit + rare.log(), label, pos_weight=rare)
        return bce + weight * margin_loss(margin_head, margin, self.margin_scale)


def train_posterior(
    recipe: HeadRecipe,
    space: HeadSpace,
    data: HeadData,
    validation: HeadData,
    path: Path,
    *,
    targets: Targets | None = None,
    device: str | torch.device = "cpu",
    track: Callable[..., None] | None = None,
) -> Path:
    """Train heads; write those with the best AUROC on validation, mean over the checks, to ``path``, in float16.

    A run that was killed goes on where it was; one that is done is not repeated.

    Args:
        data: Every label known. Read a batch at a time.
        validation: Every label known, both kinds among them; its logits are held in memory.
        targets: By default from the data and ``recipe.rare_weight``.
        track: Called with a step and figures.
    Raises:
        ConfigError: If the loss is no longer finite, or the folder holds the state of another run.
    """
    if path.exists():
        return path
    targets = targets or Targets.of(data, recipe.rare_weight)
    torch.manual_seed(recipe.seed)
    processes = Processes(torch.device(device))
    heads = Heads(recipe, space)
    rate = _rate(data)
    with torch.no_grad():  # the first steps need not learn how many images are bad
        heads.experts.logit.bias.fill_(math.log(rate / (1 - rate)))
    heads.to(processes.device)
    loop = TrainingLoop(
        modules={"heads": heads},
        optimizer=torch.optim.AdamW(heads.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay),
        steps=recipe.steps,
        seed=recipe.seed,
        name=f"heads {recipe.name}",
        schedule=linear_schedule(recipe.steps, min(100, recipe.steps // 4)),
        state=path.with_suffix(".state.safetensors"),
        save_every=SAVE_EVERY,
        evaluate_every=recipe.evaluate_every,
        options={"recipe": vars(recipe) | vars(space) | vars(targets), "images": len(data)},
        track=track,
        accelerator=processes.accelerator,
    )

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(len(data), (recipe.batch,), generator=generator)

    def loss_of(batch: StepBatch) -> tuple[Tensor, float]:
        part = on_device(data.take(batch.rows), batch.device)
        checks = draw_subset(batch.generator, data.checks)
        seen = sequence(part, checks.to(batch.device), space)
        features = seen.features[seen.present]
        logit, state = heads(features, features[:, : space.embed_dim], seen.log_snr[seen.present])
        label, margin = (v[:, None].expand_as(seen.present)[seen.present] for v in (part.label, part.margin))
        loss = targets.loss(logit, heads.margin(state).squeeze(-1), label, margin, recipe.margin_weight)
        return loss + recipe.expert_penalty * heads.experts.expert_penalty(), float(len(logit))

    torch.set_flush_denormal(True)
    try:
        result = loop(
            loss_of, draw, lambda: validation_figures(heads, validation), monitor="auroc", patience=recipe.patience
        )
    finally:
        torch.set_flush_denormal(False)  # a threshold just above 0 would be 0

    def write() -> None:
        state = {name: value.half().contiguous().cpu() for name, value in heads.state_dict().items()}
        with atomic_path(path) as temporary:
            save_file(state, temporary, {"auroc": str(result.best["auroc"])})

    processes.on_main(write)
    loop.forget()
    return path


def validation_figures(heads: Heads, data: HeadData) -> dict[str, float]:
    """Mean over the checks of the AUROC: within prompts where enough prompts have images of both kinds, else pooled."""
    bad, prompt = is_bad(data.label), data.prompt_id.numpy()
    within = rarer_in_mixed_groups(bad, prompt) >= FEWEST_MIXED
    values = _by_check(heads, data, auroc_within if within else lambda score, bad, prompt: auroc(score, bad))
    found = [value for value in values if not math.isnan(value)]
    return {"auroc": float(np.mean(found)) if found else math.nan}


def posterior_auroc(heads: Heads, data: HeadData) -> list[float]:
    """AUROC within prompts at every check; NaN at one where no prompt has images of both kinds."""
    return _by_check(heads, data, auroc_within)


def _by_check(
    heads: Heads, data: HeadData, measure: Callable[[np.ndarray, np.ndarray, np.ndarray], float]
) -> list[float]:
    parts = [(logit, part.log_snr.isnan()) for part, logit, _ in iter_states(heads, data, torch.arange(data.checks))]
    logits, missing = (torch.cat(values).numpy() for values in zip(*parts, strict=True))
    bad, prompt = is_bad(data.label), data.prompt_id.numpy()
    found = []
    for check in range(data.checks):
        rows = ~missing[:, check]
        found.append(measure(logits[rows, check], bad[rows], prompt[rows]) if rows.any() else math.nan)
    return found


def _rate(data: HeadData) -> float:
    """Share of bad images, away from 0 and 1."""
    return min(max(data.label.mean().item(), 1e-4), 1 - 1e-4)
