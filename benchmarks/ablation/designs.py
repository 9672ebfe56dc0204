"""The wishes of the ancestor's author as designs of a scorer, each compared with the same design without the wish.

One setting serves all: a frozen CLIP backbone, a small head on its embeddings that is told the noise level, a flat threshold on
the posterior. Only one thing differs between a row and the one it is compared with.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

from training.forward_chain import NoiseKind

View = Literal[
    "x_t", "x0"
]  # noisy latents: finished ones with noise added, and those of a run; or predictions of a run
PreviewKind = Literal["linear", "tiny", "vae"]


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The backbone. All of one seed begin with the same plain one and see as many previews in each further part."""

    tuning: Literal["plain", "prompts", "verdicts", "classified", "wise-ft"] = "verdicts"  # captions: "a bag, broken"
    view: View = "x0"
    preview: PreviewKind = "linear"
    batch: int = 512  # of the contrastive part


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
    rule: Literal["one-check", "posterior", "cumulative", "cumulative-palbert"] = "posterior"
    tested_on: View = "x0"

    @property
    def key(self) -> str:
        """Names its files."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.samples.view}-{self.head}-{self.rule}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table."""

    wish: str
    name: str
    design: Design
    against: str | None = None  # the row of the same wish that it is compared with


OWN = Design()
FORWARD = Design(tower=Tower(view="x_t"), samples=Samples(view="x_t"), tested_on="x_t")


def single_previews(images: int, levels: int, schedulers: str = "ddim:50", one_level: bool = False) -> Design:
    """Forward noise as the ancestor had it: nothing ties together the previews of one image."""
    samples = Samples(view="x_t", images=images, levels=levels, schedulers=schedulers, one_level=one_level)
    return replace(FORWARD, samples=samples, alone=True)


def with_tower(**changes: object) -> Design:
    """One's own runs through another backbone."""
    return replace(OWN, tower=replace(OWN.tower, **changes))  # type: ignore[arg-type]


def with_rule(rule: str) -> Design:
    """One's own runs, the full mixture, and another way to decide."""
    return replace(OWN, head="soft", rule=rule)  # type: ignore[arg-type]


SEVERAL = "ddim:50,dpm:25,euler-a:25,unipc:20"
VARIANTS = tuple(
    Variant(wish=wish, name=name, design=design, against=against)
    for wish, rows in {
        "samples": (
            ("10k", single_previews(10_000, 1), None),
            ("100k", single_previews(50_000, 2), "10k"),
            ("1M", single_previews(60_000, 17), "100k"),
        ),
        "preview": (
            ("linear", OWN, None),
            ("tiny autoencoder", with_tower(preview="tiny"), "linear"),
            ("full VAE", with_tower(preview="vae"), "linear"),
        ),
        "backbone": (
            ("plain", with_tower(tuning="plain"), None),
            ("noise-tuned on prompts", with_tower(tuning="prompts"), "plain"),
            ("noise-tuned on prompts and verdicts", OWN, "plain"),
            ("classification-tuned", with_tower(tuning="classified"), "noise-tuned on prompts and verdicts"),
            ("WiSE-FT", with_tower(tuning="wise-ft"), "classification-tuned"),
        ),
        "schedulers": (
            ("one scheduler, one timestep", single_previews(60_000, 1, one_level=True), None),
            ("one scheduler, all timesteps", single_previews(60_000, 1), "one scheduler, one timestep"),
            ("four schedulers, all timesteps", single_previews(60_000, 1, SEVERAL), "one scheduler, all timesteps"),
        ),
        "noise": (
            ("one noise per trajectory", FORWARD, None),
            (
                "fresh noise at every step",
                replace(FORWARD, samples=replace(FORWARD.samples, noise="fresh")),
                "one noise per trajectory",
            ),
        ),
        "batch": (
            ("64", with_tower(batch=64), None),
            ("512", OWN, "64"),
            ("4096", with_tower(batch=4_096), "512"),
        ),
        "trajectories": (
            ("forward noise, on x_t", FORWARD, None),
            ("forward noise, on x0 predictions", replace(FORWARD, tested_on="x0"), "forward noise, on x_t"),
            ("own trajectories, on x0 predictions", OWN, "forward noise, on x_t"),
        ),
        "experts": (
            ("one head", OWN, None),
            ("experts, soft bands", replace(OWN, head="soft"), "one head"),
            ("experts, hard bands", replace(OWN, head="hard"), "one head"),
        ),
        "cumulative": (
            ("last step, one check", with_rule("one-check"), None),
            ("last step, every check", with_rule("posterior"), "last step, one check"),
            ("cumulative, economic loss", with_rule("cumulative"), "last step, every check"),
            ("cumulative, PALBERT's loss", with_rule("cumulative-palbert"), "last step, every check"),
        ),
    }.items()
    for name, design, against in rows
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    folder: str = "ablation"  # in the work folder
    share: float = 1.0  # of the images of every design
    tower_samples: int = 131_072  # previews seen in each part of a backbone's training: 2048, 256 or 32 batches
    train: int | None = None  # runs of the split; None: all of them
    test: int = 5_000
    calibration: int = 2_500
    validation: int = 1_500
    head_steps: int = 1_500
    head_batch: int = 1_024  # previews
    decoder_steps: int = 400  # of the tiny autoencoder
    repeats: int = 40  # of a check and a denoiser call, to compare their times

    def images(self, samples: Samples) -> int:
        """How many finished images a design learns from."""
        return max(64, round(self.share * samples.images))


FULL = Scale()
QUICK = Scale(
    folder="ablation-quick",
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
