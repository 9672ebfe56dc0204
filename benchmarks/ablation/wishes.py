"""The wishes of the ancestor's author as rows of a table, each compared with the same design without the wish.

Only one thing differs between a row and the one it is compared with. Where that is what the head learns from (samples, schedulers,
noise), the backbone is plain: one that has learned from previews has seen more labels, levels and noises than such a row is about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.ablation.designs import Design, Rule, Samples, Tower


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table."""

    wish: str
    name: str
    design: Design
    against: str | None = None  # the row of the same wish that it is compared with


OWN = Design()
FORWARD = Design(tower=Tower(view="x_t"), samples=Samples(view="x_t"), tested_on="x_t")
FORWARD_PLAIN = replace(FORWARD, tower=Tower(tuning="plain"))


def single_previews(images: int, levels: int, schedulers: str = "ddim:50", one_level: bool = False) -> Design:
    """Forward noise as the ancestor had it: nothing ties together the previews of one image."""
    samples = Samples(view="x_t", images=images, levels=levels, schedulers=schedulers, one_level=one_level)
    return replace(FORWARD_PLAIN, samples=samples, alone=True)


def with_tower(**changes: Any) -> Design:
    """One's own runs through another backbone."""
    return replace(OWN, tower=replace(OWN.tower, **changes))


def with_rule(rule: Rule) -> Design:
    """One's own runs, the full mixture, and another way to decide."""
    return replace(OWN, head="soft", rule=rule)


FRESH = replace(FORWARD_PLAIN, samples=replace(FORWARD_PLAIN.samples, noise="fresh"))
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
            ("one noise per trajectory", FORWARD_PLAIN, None),
            ("fresh noise at every step", FRESH, "one noise per trajectory"),
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
