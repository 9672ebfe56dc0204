"""Training of the bundled CLIP model, where it breaks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import training.clip
from moe_artifacts.errors import ConfigError
from moe_artifacts.preview import LinearPreview
from training.clip import ClipRecipe, PreviewClip, finetune, train_contrastive
from training.collect import Recorded
from training.data.fashion import LabelledImages

SHORT = ClipRecipe(contrastive_steps=2, contrastive_batch=66, finetune_steps=2, finetune_batch=2)  # 64 are real images


@pytest.fixture(autouse=True)
def _denormals_again() -> Iterator[None]:
    """Training flushes them for the whole process; hypothesis, in other tests, needs them."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder, and real images without a VAE."""
    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(tmp_path))
    monkeypatch.setenv("MOE_ARTIFACTS_TRACKER", "none")
    real = LabelledImages(torch.zeros(9, 28, 28, dtype=torch.uint8), torch.arange(9))
    monkeypatch.setattr(training.clip, "load_pipeline", lambda: SimpleNamespace(vae=None))
    monkeypatch.setattr(training.clip, "load_fashion", lambda split: real)
    monkeypatch.setattr(training.clip, "fit_preview", lambda pipe, stage: LinearPreview(4, patch=4))
    monkeypatch.setattr(training.clip, "encode_images", lambda vae, images: torch.randn(len(images), 4, 8, 8))
    return tmp_path


def recorded() -> Recorded:
    """Four images of one check."""
    latents = torch.randn(4, 4, 8, 8).half()
    return Recorded(
        x0=latents[:, None],
        log_snr=torch.zeros(4, 1),
        step=torch.zeros(4, 1, dtype=torch.int64),
        num_steps=torch.ones(4, dtype=torch.int64),
        prompts=["a bag"] * 4,
        label=torch.full((4,), 8),
        margin=torch.tensor([-1.0, 1.0, -1.0, 1.0]),
        margin_second=torch.zeros(4),
        seeds=torch.arange(4),
        noisy=latents,
        final=latents,
    )


def break_at_the_second_step(what: str, loss_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss NaN, or leave it finite and make its gradient infinite."""
    real_loss, steps = getattr(training.clip, loss_name), iter(range(2))

    def broken(*args: Any) -> Tensor:
        loss = real_loss(*args)
        if next(steps) == 1:
            if what == "loss":
                return loss * math.nan
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(training.clip, loss_name, broken)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_both_parts_before_anything_is_saved(
    work: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    for part, rate, loss_name in (
        ("contrastive", "contrastive_lr", "multi_positive_loss"),
        ("finetune", "finetune_lr", "artifact_loss"),
    ):
        break_at_the_second_step(what, loss_name, monkeypatch)
        folder = work / f"clip-{part}"
        told = (
            rf"the {what} became (nan|inf) at step 1: lower {rate} of ClipRecipe, delete {re.escape(str(folder))} and"
        )
        with pytest.raises(ConfigError, match=told):
            if part == "contrastive":
                train_contrastive(SHORT, recorded())
            else:
                training.clip._save(PreviewClip(), work / "start.safetensors")
                finetune(SHORT, recorded(), recorded(), work / "start.safetensors")
        assert not list(folder.glob("*.safetensors"))
