"""What a scorer is made of, and how much of everything there is.

One setting serves all: a frozen CLIP backbone, a small head on its embeddings that is told the noise level, a flat threshold on
the posterior.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from training.forward_chain import NoiseKind

# Noisy latents: finished ones with noise added, or those of a run; and x0 predictions of a run.
View = Literal["x_t", "x0"]
PreviewKind = Literal["linear", "tiny", "vae"]
Rule = Literal["one-check", "posterior", "cumulative", "cumulative-palbert"]


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The backbone. All of one seed begin with the same plain one and see as many previews in each further part.

    A plain one has seen no preview, whatever it will look at: the other fields say nothing then.
    """

    tuning: Literal["plain", "prompts", "verdicts", "classified", "wise-ft"] = "verdicts"  # captions: "a bag, broken"
    view: View = "x0"
    preview: PreviewKind = "linear"
    batch: int = 512  # of the contrastive part

    @property
    def tuned(self) -> bool:
        """Whether it has seen previews of generated images."""
        return self.tuning != "plain"

    @property
    def judged(self) -> bool:
        """Whether it has seen what the judge says of them."""
        return self.tuning not in ("plain", "prompts")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the head learns from: previews of ``images`` finished images, at ``levels`` noise levels each."""

    view: View = "x0"
    images: int = 20_000
    levels: int = 5
    schedulers: str = "ddim:50"  # of forward noise, as training/noise_grids.py has them
    one_level: bool = False  # of forward noise: always that of half of the steps
    noise: NoiseKind = "trajectory"


@dataclass(frozen=True, kw_only=True)
class Design:
    """A scorer, and what it looks at in a run."""

    tower: Tower = Tower()
    samples: Samples = Samples()
    alone: bool = False  # each preview by itself; otherwise the head also sees the change since the check before
    head: Literal["single-head", "soft", "hard"] = "single-head"
    rule: Rule = "posterior"
    tested_on: View = "x0"

    @property
    def key(self) -> str:
        """Names its files."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.samples.view}-{self.head}-{self.rule}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    folder: str = "ablation"  # in the work folder
    seeds: tuple[int, ...] = (0, 1, 2)  # of the table
    share: float = 1.0  # of the images of every design
    tower_samples: int = 131_072  # previews seen in each part of a backbone's training: 2048, 256 or 32 batches
    train: int | None = None  # runs of the split; None: all of them
    test: int = 5_000
    calibration: int = 2_500
    validation: int = 1_500
    head_steps: int = 1_000
    head_batch: int = 1_024  # previews
    decoder_steps: int = 400  # of the tiny autoencoder
    repeats: int = 40  # of a check and a denoiser call, to compare their times

    def images(self, samples: Samples) -> int:
        """How many finished images a head learns from; as many as of ``Samples()`` a backbone."""
        return max(64, round(self.share * samples.images))


FULL = Scale()
QUICK = Scale(
    folder="ablation-quick",
    seeds=(0,),
    share=0.01,
    tower_samples=1_024,
    train=2_000,
    test=48,
    calibration=80,
    validation=48,
    head_steps=50,
    head_batch=256,
    decoder_steps=10,
    repeats=5,
)
