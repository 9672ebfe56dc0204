"""Does watching change a run, and do rows that stay come out as if nothing had left?

``python -m benchmarks.compatibility --pipeline tiny|fashion|FOLDER`` writes ``benchmarks/results/compatibility.json``, one
row per scheduler, with and without guidance:

* ``record``: "equal" if the images of the watched run are bit-identical to those of the unwatched one;
* ``drop``: "equal" if the images that are kept equal the same rows of the unwatched run (float32, atol 1e-4), while the
  batch shrinks from all rows to one, in one case, and to none, in another; "refused" where the guard says so itself;
* ``max_abs_difference``: the largest of those differences; ``why``: what went wrong, if anything.

The verdicts follow a script, so that what is compared does not depend on a scorer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import write_results
from moe_artifacts import ArtifactGuard, GuardedOutput, UnsupportedPipelineError
from moe_artifacts.config import (
    EmbedderConfig,
    ExitHeadConfig,
    ExpertsConfig,
    FeatureConfig,
    GateConfig,
    LatentSpaceConfig,
    PreviewConfig,
    ScorerConfig,
    ThresholdConfig,
)
from moe_artifacts.schedulers import SCHEDULERS, set_scheduler
from moe_artifacts.scorer import StepScore

ATOL = 1e-4  # float32: a smaller batch sums in another order
PROMPTS = ("an ankle boot", "a pullover", "a bag", "a shirt")


@dataclass
class Script:
    """Stands for a scorer: image i reaches the threshold at the scored step ``abort_at[i]``, counted from 0."""

    config: ScorerConfig
    abort_at: dict[int, int]

    def session(self, batch_size: int, prompts: list[str] | None = None) -> Session:
        return Session(self.abort_at, torch.arange(batch_size))


@dataclass
class Session:
    abort_at: dict[int, int]
    images: Tensor
    calls: int = 0

    def step(self, *, x0: Tensor, log_snr: float, latents: Tensor | None = None) -> StepScore:
        last = self.calls
        self.calls += 1
        prob = torch.tensor([float(self.abort_at.get(i, last + 1) <= last) for i in self.images.tolist()])
        finite = x0.isfinite().flatten(1).all(dim=1)
        return StepScore(prob, prob, prob, prob, torch.zeros_like(prob), torch.ones(len(prob), 1), finite)

    def keep(self, rows: Tensor) -> None:
        self.images = self.images[rows]


def script_config(pipe: Any) -> ScorerConfig:
    """For the pipeline's own latent space, scoring every step."""
    vae, levels = pipe.vae.config, (-20.0, 20.0)
    return ScorerConfig(
        name="script",
        label="none",
        latent_space=LatentSpaceConfig(
            name="the pipeline's own",
            vae_class=type(pipe.vae).__name__,
            channels=vae.latent_channels,
            scaling_factor=vae.scaling_factor,
            shift_factor=vae.get("shift_factor") or 0.0,
            downsampling=pipe.vae_scale_factor,
        ),
        preview=PreviewConfig(kind="linear", channels=vae.latent_channels),
        embedder=EmbedderConfig(model="custom", embed_dim=1, model_config={}),
        features=FeatureConfig(embed_dim=1, use_delta=False, use_prompt=False),
        gate=GateConfig(num_experts=1, embed_dim=1, log_snr_range=levels, top_k=1),
        experts=ExpertsConfig(num_experts=1, feature_dim=1, hidden_dim=1, log_snr_range=levels),
        exit_head=ExitHeadConfig(state_dim=1),
        log_snr_range=levels,
        check_progress=tuple(i / 1000 for i in range(1001)),
        threshold=ThresholdConfig(rule="cumulative", threshold=0.5),
    )


def load_pipeline(name: str) -> Any:
    if name == "tiny":
        from tests.tiny import stable_diffusion

        return stable_diffusion()
    if name == "fashion":
        from moe_artifacts import bundled_pipeline

        return bundled_pipeline("fashion")[0]
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(pipe: Any, guidance_scale: float, images: int, steps: int, seed: int) -> dict[str, Any]:
    """One row of the table, for the scheduler that is in the pipeline."""

    def arguments() -> dict[str, Any]:
        return {
            "prompt": [PROMPTS[i % len(PROMPTS)] for i in range(images)],
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "generator": [torch.Generator().manual_seed(seed + i) for i in range(images)],
            "output_type": "pt",
        }

    def guarded(on_abort: Any, abort_at: dict[int, int]) -> GuardedOutput:
        return ArtifactGuard(Script(script_config(pipe), abort_at), on_abort=on_abort)(pipe, **arguments())

    # One image leaves at a time, from either end of the batch in turn, until one is left, or until that one leaves too.
    leaving = [i // 2 if i % 2 else images - 1 - i // 2 for i in range(images)]
    last = max(steps - 2, 0)
    to_none = {image: min(k * steps // (images + 1) + 1, last) for k, image in enumerate(leaving)}
    to_one = dict(list(to_none.items())[:-1])

    full = pipe(**arguments()).images
    row: dict[str, Any] = {"record": "equal", "drop": "equal", "max_abs_difference": 0.0, "why": ""}
    for on_abort, abort_at in (("record", to_none), ("drop", to_one), ("drop", to_none)):
        try:
            output = guarded(on_abort, abort_at)
        except UnsupportedPipelineError as error:
            row |= {on_abort: "refused", "why": str(error)}
            continue
        expected = list(range(images)) if on_abort == "record" else [i for i in range(images) if i not in abort_at]
        found = (output.images - full[expected]).abs().max().item() if expected else 0.0
        if output.kept_indices != expected or found > (0.0 if on_abort == "record" else ATOL):
            why = f"kept {output.kept_indices}, expected {expected}; difference {found:.2g}"
            row |= {on_abort: "different", "why": why}
        row["max_abs_difference"] = max(row["max_abs_difference"], found)
    return row


def measure(name: str, images: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """One row per scheduler, with guidance and without."""
    pipe = load_pipeline(name)
    rows = []
    for scheduler in SCHEDULERS:
        set_scheduler(pipe, scheduler)
        for guidance_scale in (1.0, 3.0):
            found = compare(pipe, guidance_scale, images, steps, seed)
            rows.append({"pipeline": name, "scheduler": scheduler, "guidance_scale": guidance_scale, **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="fashion", help="tiny, fashion, or a folder")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.images < 2 or args.steps < 2:
        parser.error("--images and --steps must be at least 2")
    rows = measure(args.pipeline, args.images, args.steps, args.seed)
    write_results("compatibility", rows, seed=args.seed, out=args.out)
    if any("different" in (row["record"], row["drop"]) for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
