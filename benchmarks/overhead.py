"""What the guard costs on a U-Net of the size of Stable Diffusion 1.5, and what dropping rows saves in time.

``python -m benchmarks.overhead`` writes ``benchmarks/results/overhead.json``: random weights, nothing is downloaded; 5 minutes on two
quiet CPU cores. Plain and guarded calls of the pipeline alternate, so that a machine that slows down slows both. Each
number is the median over the repeats, with the lowest and the highest. Three tables:

    cost     shares of a denoiser call, batch 1, no guidance: the tap with its bookkeeping, and scoring one step, also with
             the image tower in bfloat16. What is spent inside the denoiser is taken away on both sides, so its noise, of
             seconds, does not hide milliseconds:
             tap = guarded run - its denoiser calls - its scoring - (plain run - its denoiser calls)
    saving   time saved by a batch that shrinks from 4 to 2 to 1 rows and is scored at every step, over steps saved;
             ``unscored`` is the same with the time of scoring taken away
    calls    a denoiser call per row, by batch size: where this is not flat, steps and time saved differ
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.results import write_results
from moe_artifacts import ArtifactGuard, ArtifactScorer, StepScore, ThresholdConfig
from moe_artifacts.config import (
    EmbedderConfig,
    ExitHeadConfig,
    ExpertsConfig,
    FeatureConfig,
    GateConfig,
    PreviewConfig,
    ScorerConfig,
)
from moe_artifacts.latent_spaces import LATENT_SPACES
from moe_artifacts.preview import TinyPreview
from moe_artifacts.scorer import Session

Row = dict[str, Any]

STEPS = 2  # of a run of the cost table
ROWS_RUN = (4, 2, 1)  # at each step of the run of the saving table
TAP_GOAL, SCORING_GOAL, SAVING_GOAL = 0.01, 0.02, 0.05
LOG_SNR_RANGE = (-6.0, 8.0)
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Size:
    """The models of one measurement."""

    unet: dict[str, Any]
    embedder: EmbedderConfig
    taesd: dict[str, Any]


SIZES = {
    "sd15": Size(
        unet={  # unet/config.json of Stable Diffusion 1.5; what it has beyond these are diffusers' defaults
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        },
        embedder=EmbedderConfig(model="ViT-B-32", embed_dim=512),
        taesd={},  # diffusers' defaults are TAESD
    ),
    "tiny": Size(
        unet={
            "sample_size": 8,
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 4,
        },
        embedder=EmbedderConfig(
            model="custom",
            embed_dim=16,
            model_config={
                "embed_dim": 16,
                "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
                "text_cfg": {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1},
            },
        ),
        taesd={"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
    ),
}


def build_pipeline(size: Size, device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Without text encoder, and with a VAE that is never run: embeddings go in, latents come out."""
    unet = UNet2DConditionModel(**size.unet).eval().requires_grad_(False)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**blocks, block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4).eval(),
        text_encoder=None,
        tokenizer=None,
        unet=unet if dtype is torch.float32 else unet.to(dtype),
        scheduler=DDIMScheduler(**_BETAS, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def build_scorer(size: Size, preview: nn.Module | None, device: str) -> ArtifactScorer:
    """A scorer that looks at every step and never reaches its threshold; a linear preview where none is given."""
    width = size.embedder.embed_dim
    features = FeatureConfig(embed_dim=width, use_prompt=False)
    config = ScorerConfig(
        name="overhead",
        label="none: random weights",
        latent_space=LATENT_SPACES["sd1"],
        preview=PreviewConfig(kind="linear" if preview is None else "tiny", channels=4),
        embedder=size.embedder,
        features=features,
        gate=GateConfig(num_experts=6, embed_dim=width, log_snr_range=LOG_SNR_RANGE),
        experts=ExpertsConfig(num_experts=6, feature_dim=features.width, hidden_dim=256, log_snr_range=LOG_SNR_RANGE),
        exit_head=ExitHeadConfig(state_dim=256),
        log_snr_range=LOG_SNR_RANGE,
        check_progress=tuple(i / 1000 for i in range(1001)),
        threshold=ThresholdConfig(rule="cumulative", threshold=1.0),
    )
    return ArtifactScorer(config, preview).to(device).requires_grad_(False)


class Shrinking:
    """A scorer around another one, which is really run, that then aborts all but the first ``ROWS_RUN[i + 1]`` rows."""

    def __init__(self, scorer: ArtifactScorer) -> None:
        self.config, self._scorer = scorer.config, scorer

    def session(self, batch_size: int, prompts: list[str] | None = None) -> ShrinkingSession:
        return ShrinkingSession(self._scorer.session(batch_size, prompts))


class ShrinkingSession:
    def __init__(self, session: Session) -> None:
        self._session, self._staying = session, iter((*ROWS_RUN[1:], ROWS_RUN[-1]))

    def step(self, **shown: Any) -> StepScore:
        score = self._session.step(**shown)
        alarm = (torch.arange(len(score.artifact_prob)) >= next(self._staying)).to(score.artifact_prob)
        return dataclasses.replace(score, cumulative_artifact_prob=alarm)

    def keep(self, rows: Tensor) -> None:
        self._session.keep(rows)


@dataclass
class Run:
    """Seconds of one call of the pipeline."""

    total: float
    scoring: float  # spent in the scorer
    calls: list[tuple[int, float]] = field(default_factory=list)  # of the denoiser: rows and seconds

    @property
    def denoiser(self) -> float:
        return sum(seconds for _, seconds in self.calls)

    @property
    def elsewhere(self) -> float:
        return self.total - self.denoiser - self.scoring


@contextmanager
def timed(owner: Any, name: str, record: Callable[[tuple[Any, ...], float], object], sync: Callable) -> Iterator[None]:
    """Time every call of a method while the block runs, with what a GPU has been asked for before and in it."""
    own, original = vars(owner).get(name), getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        sync()
        start = time.perf_counter()
        result = original(*args, **kwargs)
        sync()
        record(args, time.perf_counter() - start)
        return result

    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


def run(pipe: StableDiffusionPipeline, batch: int, steps: int, guard: ArtifactGuard | None = None) -> Run:
    """One call of the pipeline, plain or guarded."""
    device, dtype = pipe.unet.device, pipe.unet.dtype
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    embeds = torch.randn(batch, 77, pipe.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(0))
    asked = {
        "prompt_embeds": embeds.to(device, dtype),
        "generator": [torch.Generator().manual_seed(i) for i in range(batch)],
        "guidance_scale": 1.0,
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    scoring: list[float] = []
    calls: list[tuple[int, float]] = []
    with ExitStack() as stack:
        stack.enter_context(timed(pipe.unet, "forward", lambda args, s: calls.append((len(args[0]), s)), sync))
        stack.enter_context(timed(Session, "step", lambda args, s: scoring.append(s), sync))
        sync()
        start = time.perf_counter()
        pipe(**asked) if guard is None else guard(pipe, **asked)
        sync()
        return Run(time.perf_counter() - start, sum(scoring), calls)


def measure(name: str, device: str, dtype: torch.dtype, repeats: int, seed: int) -> list[Row]:
    """The rows of the three tables."""
    torch.manual_seed(seed)
    size = SIZES[name]
    pipe = build_pipeline(size, device, dtype)
    taesd = TinyPreview(AutoencoderTiny(**size.taesd).eval().to(device))
    scorers = {"linear preview": build_scorer(size, None, device), "TAESD": build_scorer(size, taesd, device)}
    scorers["linear preview, bfloat16"] = build_scorer(size, None, device)
    scorers["linear preview, bfloat16"].embedder.clip.visual.to(torch.bfloat16)
    guards = {preview: ArtifactGuard(scorer) for preview, scorer in scorers.items()}
    shrinking = ArtifactGuard(Shrinking(scorers["linear preview"]), threshold=0.5)

    for guard in (None, *guards.values()):  # warm-up
        run(pipe, 1, 1, guard)
    plain: list[Run] = []
    guarded: dict[str, list[Run]] = {preview: [] for preview in guards}
    full, dropped = [], []
    for _ in range(repeats):
        plain.append(run(pipe, 1, STEPS))
        for preview, guard in guards.items():
            guarded[preview].append(run(pipe, 1, STEPS, guard))
        full.append(run(pipe, ROWS_RUN[0], len(ROWS_RUN)))
        dropped.append(run(pipe, ROWS_RUN[0], len(ROWS_RUN), shrinking))
    assert all([rows for rows, _ in shrunk.calls] == list(ROWS_RUN) for shrunk in dropped)

    tower = size.embedder.model
    setting = {"size": name, "device": device, "dtype": str(dtype).removeprefix("torch.")}
    cheap = guarded["linear preview"]
    tap = [(g.elsewhere - p.elsewhere) / STEPS for p, g in zip(plain, cheap, strict=True)]
    # The calls that stand beside each other in time.
    call = [(p.denoiser + g.denoiser) / (2 * STEPS) for p, g in zip(plain, cheap, strict=True)]
    rows = [cost_row("tap and bookkeeping", tap, call, TAP_GOAL)]
    for preview, runs in guarded.items():
        goal = None if preview == "TAESD" else SCORING_GOAL  # which is reported only
        rows.append(cost_row(f"scoring, {preview}, {tower}", [g.scoring / STEPS for g in runs], call, goal))
    rows += [saving_row(full, dropped), *call_rows([*plain, *cheap, *full, *dropped])]
    return [{"table": row.pop("table"), **setting, **row} for row in rows]


def cost_row(what: str, seconds: list[float], call: list[float], goal: float | None) -> Row:
    shares = [spent / denoiser for spent, denoiser in zip(seconds, call, strict=True)]
    return {
        "table": "cost",
        "what": what,
        "seconds": statistics.median(seconds),
        "of_denoiser_call": statistics.median(shares),
        "low": min(shares),
        "high": max(shares),
        "goal": goal,
        "met": None if goal is None else statistics.median(shares) <= goal,
    }


def saving_row(full: list[Run], dropped: list[Run]) -> Row:
    steps_saved = 1 - sum(ROWS_RUN) / (ROWS_RUN[0] * len(ROWS_RUN))
    saved = [1 - d.total / f.total for f, d in zip(full, dropped, strict=True)]
    unscored = [1 - (d.total - d.scoring) / f.total for f, d in zip(full, dropped, strict=True)]
    share = statistics.median(saved) / steps_saved
    return {
        "table": "saving",
        "rows_run": " ".join(map(str, ROWS_RUN)),
        "steps_saved": steps_saved,
        "wall_clock_saved": statistics.median(saved),
        "low": min(saved),
        "high": max(saved),
        "unscored": statistics.median(unscored),
        "of_steps_saved": share,
        "goal": SAVING_GOAL,
        "met": abs(1 - share) <= SAVING_GOAL,
    }


def call_rows(runs: list[Run]) -> list[Row]:
    per_row: dict[int, list[float]] = {}
    for rows, seconds in (call for run in runs for call in run.calls):
        per_row.setdefault(rows, []).append(seconds / rows)
    largest = statistics.median(per_row[ROWS_RUN[0]])
    return [
        {
            "table": "calls",
            "batch": batch,
            "seconds_per_row": statistics.median(found),
            "low": min(found),
            "high": max(found),
            "of_largest_batch": statistics.median(found) / largest,
        }
        for batch, found in sorted(per_row.items())
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the U-Net")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = measure(args.size, args.device, getattr(torch, args.dtype), args.repeats, args.seed)
    write_results("overhead", rows, seed=args.seed, out=args.out)


if __name__ == "__main__":
    main()
