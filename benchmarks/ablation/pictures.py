"""Latents to previews, in three ways; those of a decoder are made once and kept."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.ablation.designs import PreviewKind
from benchmarks.ablation.inputs import Inputs
from moe_artifacts.files import atomic_path
from moe_artifacts.preview import LinearPreview, TinyPreview, VaePreview
from moe_artifacts.shapes import Preview
from training.collect import decode
from training.loop import StepBatch, TrainingLoop, linear_schedule

CHUNK = 100  # latents decoded at once: with more, what is between two layers does not stay near the processor
FITTED_ON = 1_000  # finished images


@dataclass(frozen=True)
class Pictures:
    """Previews of the runs of a split."""

    values: Tensor  # [image check ...]: latents, or 8-bit pixels
    preview: nn.Module | None  # None: they are pixels
    seconds: float = 0.0  # CPU time it took to decode them

    @torch.no_grad()
    def take(self, images: Tensor, checks: Tensor) -> Preview:
        """Of some images, one check each."""
        values = self.values[images, checks]
        return values.float() / 255 if self.preview is None else self.preview(values.float())


def pictures(inputs: Inputs, kind: PreviewKind, latents: Tensor, name: str) -> Pictures:
    """Previews of ``latents``; ``name`` is that of the file that keeps them, unless they cost nothing."""
    preview = build_preview(inputs, kind)
    if kind == "linear":
        return Pictures(latents, preview)
    path = inputs.folder / "pixels" / f"{kind}-{name}.safetensors"
    if not path.exists():
        start = time.process_time()
        pixels = _decode_all(preview, latents)
        with atomic_path(path) as temporary:
            save_file({"pixels": pixels}, temporary, {"seconds": str(time.process_time() - start)})
    return Pictures(load_file(path)["pixels"], None, float(_metadata(path)["seconds"]))


@torch.no_grad()
def _decode_all(preview: nn.Module, latents: Tensor) -> Tensor:
    flat = latents.flatten(0, 1)
    found = []
    for part in flat.split(CHUNK):
        with torch.autocast("cpu", torch.bfloat16):
            found.append((255 * preview(part.float())).round().to(torch.uint8))
    return torch.cat(found).unflatten(0, latents.shape[:2]).contiguous()  # a decoder may have put channels last


def build_preview(inputs: Inputs, kind: PreviewKind) -> nn.Module:
    """The pipeline's VAE, or what was fitted to its decodings of finished images."""
    if kind == "vae":
        return VaePreview(inputs.pipe.vae)
    path = inputs.folder / "previews" / f"{kind}.safetensors"
    if not path.exists():
        start = time.process_time()
        module = _fit_linear(inputs) if kind == "linear" else _distil(inputs)
        with atomic_path(path) as temporary:
            state = {k: v.detach().contiguous() for k, v in module.state_dict().items()}
            save_file(state, temporary, {"seconds": str(time.process_time() - start)})
    preview: Any = LinearPreview(_channels(inputs), _factor(inputs)) if kind == "linear" else TinyPreview(_tiny(inputs))
    (preview if kind == "linear" else preview.autoencoder).load_state_dict(load_file(path))
    return preview.eval().requires_grad_(False)


def preview_seconds(inputs: Inputs, kind: PreviewKind) -> float:
    """CPU time that fitting it took."""
    build_preview(inputs, kind)
    return 0.0 if kind == "vae" else float(_metadata(inputs.folder / "previews" / f"{kind}.safetensors")["seconds"])


def _fit_linear(inputs: Inputs) -> LinearPreview:
    latents = inputs.split("train").final[:FITTED_ON].float()
    return LinearPreview.fit(latents, decode(inputs.pipe, latents))


def _distil(inputs: Inputs) -> nn.Module:
    """An ``AutoencoderTiny`` whose decoder copies the VAE's decoding of x0 predictions at all checks."""
    torch.manual_seed(0)
    tiny, vae, runs = _tiny(inputs).train(), VaePreview(inputs.pipe.vae), inputs.split("train")
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), lr=2e-3)

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(len(runs), (64,), generator=generator)

    def loss_of(batch: StepBatch) -> Tensor:
        checks = torch.randint(runs.x0.shape[1], (batch.count,), generator=batch.generator)
        latents = runs.x0[batch.rows, batch.own(checks)].float()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = vae(latents)
            decoded = tiny.decode(latents, return_dict=False)[0]
        return (0.5 + 0.5 * decoded.float() - wanted).abs().mean()

    steps = inputs.scale.decoder_steps
    TrainingLoop(
        modules={"tiny": tiny},
        optimizer=optimizer,
        steps=steps,
        seed=0,
        name="tiny autoencoder",
        schedule=linear_schedule(steps, steps // 20),
    )(loss_of, draw)
    return tiny


def _tiny(inputs: Inputs) -> Any:
    from diffusers import AutoencoderTiny

    blocks = round(math.log2(_factor(inputs))) + 1
    sizes: Any = {f"{part}_block_out_channels": (32,) * blocks for part in ("encoder", "decoder")} | {
        f"num_{part}_blocks": (1,) * blocks for part in ("encoder", "decoder")
    }
    return AutoencoderTiny(latent_channels=_channels(inputs), **sizes)


def _channels(inputs: Inputs) -> int:
    return int(inputs.pipe.vae.config.latent_channels)


def _factor(inputs: Inputs) -> int:
    return int(inputs.pipe.vae_scale_factor)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()
