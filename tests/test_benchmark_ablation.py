"""The table of the ancestor's wishes: its arithmetic, and the whole of it on a tiny random pipeline."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

import benchmarks.ablation.__main__ as ablation
from benchmarks.ablation import figures, inputs, page, pictures, samples, towers
from benchmarks.ablation.designs import QUICK, Design, Samples, Scale, Tower
from benchmarks.ablation.figures import FIGURES, REPEATS, Measured, Result
from benchmarks.ablation.inputs import Inputs, Runs
from benchmarks.ablation.noisy_runs import record_noisy
from benchmarks.ablation.pictures import Pictures
from benchmarks.ablation.scores import Bench
from benchmarks.ablation.table import half_widths, table
from benchmarks.ablation.wishes import FORWARD, OWN, VARIANTS, Variant
from moe_artifacts.errors import InputError
from moe_artifacts.noise import noise_levels
from moe_artifacts.policy import Run, apply_rule
from training import heads
from training.collect import DEFAULT, Recorded, record_batch
from training.data.fashion import LabelledImages
from training.data.prompts import CLASS_NAMES

# --- the rows of the table -------------------------------------------------------------------------------------------


def differences(one: Any, other: Any) -> set[str]:
    """Paths of the fields in which two designs differ."""
    found = set()
    for name, value in asdict(one).items():
        rival = asdict(other)[name]
        if isinstance(value, dict):
            found |= {f"{name}.{key}" for key in value if value[key] != rival[key]}
        elif value != rival:
            found.add(name)
    return found


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.against], ids=lambda v: f"{v.wish}-{v.name}")
def test_a_row_differs_from_the_one_it_is_compared_with_in_its_wish_alone(variant: Variant) -> None:
    (other,) = (v for v in VARIANTS if (v.wish, v.name) == (variant.wish, variant.against))
    allowed = {
        "samples": {"samples.images", "samples.levels"},
        "preview": {"tower.preview"},
        "backbone": {"tower.tuning"},
        "schedulers": {"samples.schedulers", "samples.one_level"},
        "noise": {"samples.noise"},
        "batch": {"tower.batch"},
        "trajectories": {"tower.view", "samples.view", "tested_on"},
        "experts": {"head"},
        "cumulative": {"rule"},
    }[variant.wish]
    changed = differences(variant.design, other.design)
    assert changed and changed <= allowed


NUMBERED = Scale(folder="numbered", share=1 / 600)  # 64, 83 or 100 images in place of 20, 50 or 60 thousand


def image_numbers(means: torch.Tensor, log_snr: torch.Tensor, view: str) -> list[int]:
    """Which images of ``numbered`` were looked at, by the means of their latents."""
    alpha = torch.sigmoid(log_snr).sqrt() if view == "x_t" else 1.0
    return sorted(set((means / alpha / 100).round().long().flatten().tolist()))  # the noise is small beside a hundred


@pytest.fixture
def numbered(work: Any, recorded: dict[str, Recorded], monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """All latents of an image are a hundred times its number, and nothing is decoded."""
    train = recorded["train"]
    number = 100 * torch.arange(len(train.label)).half()
    final, x0 = (
        number[:, None, None, None].expand_as(train.final),
        number[:, None, None, None, None].expand_as(train.x0),
    )
    split = replace(train, final=final.contiguous(), x0=x0.contiguous())
    monkeypatch.setattr(inputs, "load_split", lambda name, limit=None: split)
    for module in (pictures, samples, towers):
        monkeypatch.setattr(module, "build_preview", lambda inputs, kind: torch.nn.Identity())
    return Inputs(NUMBERED)


class MeanEmbedder:
    """Embeds latents as their mean."""

    def embed_images(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.mean(dim=(1, 2, 3))[:, None]

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 1)


def seen_by_the_backbone(shared: Inputs, tower: Tower) -> list[int]:
    if not tower.tuned:
        return []
    pool, _ = towers._previews(shared, tower, seed=1)
    latents, log_snr = pool.take(torch.arange(len(pool.label)), torch.Generator().manual_seed(0))
    train, rows = shared.split("train"), shared.tower_rows(tower, 1)
    assert torch.equal(pool.label, train.label[rows]) and torch.equal(pool.margin, train.margin[rows])
    return image_numbers(latents.mean(dim=(1, 2, 3)), log_snr, tower.view)


def seen_by_the_head(shared: Inputs, design: Design) -> list[int]:
    embedder: Any = MeanEmbedder()
    data = samples.embed_samples(shared, embedder, design.tower, design.samples, seed=1)
    assert samples.count(data) == len(data) * design.samples.levels
    return image_numbers(data.embedding[..., 0].float(), data.log_snr, design.samples.view)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.wish}-{v.name}")
def test_rows_compared_learn_from_the_same_images_but_where_images_are_the_wish(
    variant: Variant, numbered: Inputs
) -> None:
    design = replace(variant.design, tower=replace(variant.design.tower, preview="linear"))  # others keep pixels
    backbone, head = seen_by_the_backbone(numbered, design.tower), seen_by_the_head(numbered, design)
    about_the_head = variant.wish in ("samples", "schedulers", "noise")
    assert len(backbone) == (0 if about_the_head or variant.name == "plain" else 64)
    assert len(head) == {"100k": 83, "1M": 100}.get(variant.name, 100 if variant.wish == "schedulers" else 64)
    assert set(backbone) <= set(head)  # or the head's images would not be all that the row has learned from
    facts = Bench(numbered, seed=1)._images(design)
    labelled = 0 if design.tower.tuning == "prompts" else len(backbone)
    assert facts == {"images": len(head), "labels": len(head), "backbone_labels": labelled}


@pytest.mark.parametrize("tuning", ["plain", "prompts", "verdicts", "classified"])
def test_a_backbone_knows_verdicts_only_where_its_row_says_so(
    tuning: Any, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, recorded = Tower(tuning=tuning), inputs.load_split("train")
    found = []
    for margin in (recorded.margin, recorded.margin.flip(0)):
        split = replace(recorded, margin=margin)
        monkeypatch.setattr(inputs, "load_split", lambda name, limit=None, split=split: split)
        shared = Inputs(replace(SMALL, folder=f"margin-{len(found)}"))
        found.append(load_file(towers.train_tower(shared, tower, 0)[0]))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items()) is not tower.judged


def test_every_wish_of_the_ancestor_has_its_rows() -> None:
    sizes = [v.design.samples.images * v.design.samples.levels for v in VARIANTS if v.wish == "samples"]
    assert sizes == [10_000, 100_000, 1_020_000]
    assert [v.design.tower.batch for v in VARIANTS if v.wish == "batch"] == [64, 512, 4_096]
    assert len({(v.wish, v.name) for v in VARIANTS}) == len(VARIANTS)
    assert len({v.design.key for v in VARIANTS}) == len({v.design for v in VARIANTS})  # no two share a file


# --- figures ---------------------------------------------------------------------------------------------------------


def measured(images: int = 300) -> Measured:
    rng = np.random.default_rng(0)
    bad = rng.random(images) < 0.3
    prob = np.clip(0.3 * bad[:, None] + rng.random((images, 5)) * 0.7, 0, 1).astype(np.float32)
    run = Run(bad, np.array([7, 12, 17, 25, 50]), 0.1, 50)
    return Measured(prob, np.maximum.accumulate(prob, axis=1), 0.8, run, rng.integers(0, 4, images))


def test_the_figures_are_those_of_scikit_learn_and_of_the_policy() -> None:
    found, rows = measured(), np.arange(300)
    values = dict(zip(FIGURES, figures.figures(found, rows), strict=True))
    bad, group = found.run.bad, found.group
    within = []
    for share, check in (("14%", 0), ("34%", 2), ("100%", 4)):
        parts = [roc_auc_score(bad[group == g], found.prob[group == g, check]) for g in range(4)]
        within.append(np.mean(parts))
        assert values[f"auroc_within_{share}"] == pytest.approx(within[-1])
    assert values["auroc_within"] == pytest.approx(np.mean(within))
    pooled = [roc_auc_score(bad, found.prob[:, check]) for check in (0, 2, 4)]
    assert values["auroc_pooled"] == pytest.approx(np.mean(pooled))
    deployed = apply_rule(found.run, found.statistic, 0.8)
    assert values["cost_per_clean_deployed"] == pytest.approx(deployed.cost_per_clean)
    # Matched: of 300 images as many clean ones are aborted as 5 % allows, whatever was calibrated.
    clean = np.sort(found.statistic[~bad, 3])[::-1]
    threshold = float(np.nextafter(clean[int(0.05 * len(clean))], np.float32(np.inf)))
    matched = apply_rule(found.run, found.statistic, threshold)
    assert matched.false_abort_rate == pytest.approx(0.05, abs=1 / len(clean))
    assert values["cost_per_clean_matched"] == pytest.approx(matched.cost_per_clean)


def results(shift: float, cost: float, seed: int) -> dict[int, Result]:
    """Three seeds of a design whose AUROC is 0.8 and cost -0.1, shifted; what the images add is the same for all."""
    images = np.random.default_rng(0).normal(0, 0.02, (REPEATS, 1))
    found = {}
    for k in range(3):
        point = np.full(len(FIGURES), 0.8 + shift + 0.001 * k)
        point[FIGURES.index("cost_per_clean_matched")] = -0.1 + cost
        noise = np.random.default_rng(seed + k).normal(0, 0.0005, (REPEATS, len(FIGURES)))
        found[k] = Result(point, point + images + noise, {"samples": 10.0 * (k + 1)})
    return found


def test_differences_are_taken_image_by_image_and_say_what_helps() -> None:
    base, better, dearer, mixed = (replace(OWN, samples=replace(OWN.samples, images=n)) for n in (1, 2, 3, 4))
    variants = [
        Variant(wish="w", name="base", design=base),
        Variant(wish="w", name="same", design=base, against="base"),
        Variant(wish="w", name="better", design=better, against="base"),
        Variant(wish="w", name="dearer", design=dearer, against="base"),
        Variant(wish="w", name="mixed", design=mixed, against="base"),
    ]
    known = {
        (design.key, seed): result
        for design, made in (
            (base, results(0, 0, 1)),
            (better, results(0.01, 0, 11)),
            (dearer, results(0, 0.01, 21)),
            (mixed, results(0.01, 0.01, 31)),
        )
        for seed, result in made.items()
    }
    rows = table(variants, (0, 1, 2), known)
    assert [row["variant"] for row in rows if row["table"] == "runs" and row["seed"] == 1] == [
        "base", "same", "better", "dearer", "mixed",
    ]  # fmt: skip
    means = {row["variant"]: row for row in rows if row["table"] == "variants"}
    assert means["base"]["samples"] == 20 and means["base"]["auroc_within"] == pytest.approx(0.801)
    assert "helps" not in means["base"]
    # Alone, both intervals are as wide as the images make them; their difference is not.
    assert means["better"]["auroc_within_high"] - means["better"]["auroc_within_low"] > 0.06
    assert means["better"]["auroc_within_low"] < means["base"]["auroc_within_high"]
    assert means["better"]["minus_auroc_within"] == pytest.approx(0.01)
    assert 0.007 < means["better"]["minus_auroc_within_low"] < 0.01 < means["better"]["minus_auroc_within_high"] < 0.013
    assert {name: row.get("helps") for name, row in means.items()} == {
        "base": None, "same": "no", "better": "yes", "dearer": "worse", "mixed": "mixed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("over_images", "over_seeds", "of_both"), [(1, 0, 0), (1, 0.5, 0), (1, 1, 1), (0.5, 1, 0), (0.2, 1, 0), (0, 1, 0.2)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(over_images: float, over_seeds: float, of_both: float) -> None:
    """The figure is a mean over images; its truth is 0. Each number is a standard error of the mean over three seeds."""
    rng, tries, images = np.random.default_rng(0), 2_000, 100
    value = over_images * images**0.5 * rng.normal(size=(images, 1, tries))
    value = value + of_both * (3 * images) ** 0.5 * rng.normal(size=(images, 3, tries))
    value += over_seeds * 3**0.5 * rng.normal(size=(1, 3, tries))
    points = value.mean(axis=0)
    drawn = rng.integers(images, size=(REPEATS, images))
    times = np.stack([np.bincount(rows, minlength=images) for rows in drawn])
    draws = np.tensordot(times / images, value, axes=1)
    held = np.abs(points.mean(axis=0)) <= half_widths(points, draws)
    assert 0.93 <= held.mean() <= 0.99  # of 95 %: four standard errors down, and no wider than seeds make it


def test_resampled_figures_follow_the_images_they_were_drawn_from() -> None:
    found = measured()
    draws = figures.bootstrap_draws(found, repeats=20)
    assert np.array_equal(draws, figures.bootstrap_draws(found, repeats=20))
    rows = np.random.default_rng(0).integers(300, size=300)
    assert np.array_equal(draws[0], figures.figures(found, rows))
    # The standard error of an AUROC of 90 bad among 300 in four classes is about 0.03.
    assert 0.01 < draws[:, FIGURES.index("auroc_within_14%")].std() < 0.06


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def recorded(pipe: Any) -> dict[str, Recorded]:
    """Runs of a random pipeline whose label can be told from the brightness of the finished latents."""
    return {name: some_runs(pipe, count, first) for name, (count, first) in SPLITS.items()}


SPLITS = {"train": (100, 0), "validation": (64, 200), "calibration": (80, 300), "test": (64, 400)}
SMALL = Scale(
    folder="small",
    seeds=(0,),
    share=0.001,
    tower_samples=128,
    test=64,
    calibration=80,
    validation=64,
    head_steps=20,
    head_batch=64,
    decoder_steps=2,
    repeats=1,
)


def some_runs(pipe: Any, count: int, first: int) -> Recorded:
    label = torch.arange(count) % len(CLASS_NAMES)
    prompts = [CLASS_NAMES[k] for k in label.tolist()]
    seeds = list(range(first, first + count))
    run, noisy, final = record_batch(pipe, prompts, seeds, DEFAULT)
    assert run.x0 is not None
    bright = final.mean(dim=(1, 2, 3))
    margin = (bright - bright.mean()) / bright.std() - 0.8
    return Recorded(
        x0=run.x0,
        log_snr=run.log_snr.expand(count, -1),
        step=torch.tensor(run.step).expand(count, -1),
        num_steps=torch.full((count,), run.num_steps),
        prompts=prompts,
        label=label,
        margin=margin,
        margin_second=margin,
        seeds=torch.tensor(seeds),
        noisy=noisy,
        final=final.half(),
    )


@pytest.fixture
def work(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, pipe: Any, recorded: dict[str, Recorded]) -> Any:
    """A work folder where the runs are known, and pictures that stand in for Fashion-MNIST."""

    def load_split(name: str, limit: int | None = None) -> Recorded:
        return recorded[name]

    def load_fashion(name: str) -> LabelledImages:
        pixels = torch.randint(256, (200, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return LabelledImages(pixels, torch.arange(200) % 10)

    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(tmp_path))
    monkeypatch.setattr(inputs, "load_split", load_split)
    monkeypatch.setattr(inputs, "load_fashion", load_fashion)
    monkeypatch.setattr(inputs, "load_pipeline", lambda: pipe)
    yield tmp_path
    log = logging.getLogger(f"training.{SMALL.folder}")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = True  # pytest hangs a handler of its own on loggers that keep to themselves


def test_x_t_is_what_enters_the_steps_of_the_recorded_runs(work: Any, pipe: Any, recorded: dict[str, Recorded]) -> None:
    data = Runs.of(recorded["test"]).first(3)
    steps = data.step[0].tolist()
    noisy = record_noisy(pipe, data.prompts, data.seeds.tolist(), steps, data.final, work / "x_t")
    entering: list[torch.Tensor] = []

    def keep(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step + 1 in steps:
            entering.append(values["latents"].clone())
        return values

    pipe(
        data.prompts,
        num_inference_steps=50,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in data.seeds.tolist()],
        output_type="latent",
        callback_on_step_end=keep,
    )
    assert torch.equal(noisy, torch.stack(entering, dim=1).half())
    with pytest.raises(InputError, match=r"runs from 0 on end [\d.]+ off the recorded ones: is it another pipeline"):
        record_noisy(pipe, data.prompts, [1, 2, 3], steps, data.final, work / "other")


def test_forward_noise_of_an_image_depends_on_the_seed_and_the_image_alone(work: Any, pipe: Any) -> None:
    shared = Inputs(SMALL)
    several = Samples(view="x_t", levels=3, schedulers="ddim:50,dpm:20")
    rows = torch.arange(40)
    latents, log_snr, spent = next(samples.noised(shared, several, rows, seed=1))
    again = next(samples.noised(shared, several, rows.flip(0), seed=1))
    assert torch.equal(latents, again[0].flip(0)) and torch.equal(log_snr, again[1].flip(0))
    assert not torch.equal(latents, next(samples.noised(shared, several, rows, seed=2))[0])
    assert len(log_snr.unique(dim=0)) > 30  # of 40 images
    assert (log_snr.diff(dim=1) > 0).all() and (spent.diff(dim=1) > 0).all() and spent.max() <= 1
    # x_t = alpha x0 + sigma noise: what is left of x_t without x0 is sigma times a standard normal, the same at all levels.
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    x0 = shared.split("train").final[:40, None].float()
    noise = (latents - alpha[..., None, None, None] * x0) / sigma[..., None, None, None]
    assert noise.std().item() == pytest.approx(1, abs=0.03)  # of 256 * 40 independent numbers: four standard errors
    torch.testing.assert_close(noise[:, 0], noise[:, 2], atol=1e-3, rtol=0)  # float32 at a sigma of 0.03


def test_one_level_is_that_of_half_of_the_steps(work: Any, pipe: Any) -> None:
    single = Samples(view="x_t", levels=1, schedulers="ddim:20", one_level=True)
    _, log_snr, spent = next(samples.noised(Inputs(SMALL), single, torch.arange(5), seed=0))
    pipe.scheduler.set_timesteps(20)
    expected = noise_levels(pipe.scheduler)[10].log_snr  # step 10 of 20, as the ancestor had it
    assert log_snr.flatten().tolist() == pytest.approx([expected] * 5)
    assert spent.flatten().tolist() == pytest.approx([11 / 20] * 5)


def test_each_preview_alone_and_back_again() -> None:
    data = samples.Embedded(
        embedding=torch.arange(12.0).reshape(2, 3, 2).half(),
        log_snr=torch.tensor([[-1.0, 0, 1], [-2, 0, 2]]),
        spent=torch.tensor([[0.1, 0.5, 1], [0.2, 0.6, 1]]),
        text=torch.eye(2),
        prompt=torch.tensor([1, 0]),
        prompt_id=torch.tensor([7, 8]),
        margin=torch.tensor([0.5, -0.5]),
    )
    alone = data.singly()
    assert (len(alone), alone.checks, alone.embed_dim) == (6, 1, 2)
    batch = alone.take(torch.tensor([4]))  # the second check of the second image
    whole = data.take(torch.tensor([1]))
    for name in ("embedding", "log_snr", "spent"):
        assert torch.equal(getattr(batch, name)[0, 0], getattr(whole, name)[0, 1])
    for name in ("text", "label", "margin"):
        assert torch.equal(getattr(batch, name), getattr(whole, name))
    assert torch.equal(alone.log_snr.reshape(-1, 3), data.log_snr)


def test_fewer_images_are_a_part_of_more(work: Any) -> None:
    shared = Inputs(SMALL)
    assert torch.equal(shared.rows(100, 3)[:20], shared.rows(20, 3))
    assert not torch.equal(shared.rows(20, 3), shared.rows(20, 4))
    assert len(set(shared.rows(100, 3).tolist())) == 100


def test_previews_kept_as_pixels_are_those_of_the_decoder(work: Any, pipe: Any) -> None:
    shared = Inputs(SMALL)
    latents = shared.split("test").x0[:4]
    images, checks = torch.tensor([0, 3]), torch.tensor([1, 4])
    for made in (pictures.pictures(shared, "vae", latents, "some") for _ in range(2)):
        assert made.values.dtype == torch.uint8
        shown = pipe.vae.decode(latents[images, checks].float() / pipe.vae.config.scaling_factor).sample
        expected = (shown / 2 + 0.5).clamp(0, 1)
        # Half of one of 255 steps, and the 8 bits of bfloat16 on the way.
        torch.testing.assert_close(made.take(images, checks), expected, atol=0.02, rtol=0)
    tiny_one = pictures.pictures(shared, "tiny", latents, "some")
    assert tiny_one.take(images, checks).shape == (2, 3, 16, 16) and tiny_one.seconds > 0
    linear: Pictures = pictures.pictures(shared, "linear", latents, "some")
    assert linear.take(images, checks).shape == (2, 3, 16, 16)


# --- the whole of it -------------------------------------------------------------------------------------------------

FEW = [
    next(v for v in VARIANTS if (v.wish, v.name) == wanted)
    for wanted in (
        ("schedulers", "one scheduler, one timestep"),
        ("noise", "fresh noise at every step"),
        ("trajectories", "forward noise, on x0 predictions"),
        ("preview", "linear"),
        ("preview", "full VAE"),
        ("backbone", "WiSE-FT"),
        ("cumulative", "last step, one check"),
        ("cumulative", "cumulative, economic loss"),
    )
]


def files(folder: Any) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_killed_run_goes_on_where_it_was(work: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(ablation, "VARIANTS", tuple(FEW))
    monkeypatch.setattr(ablation, "QUICK", SMALL)
    monkeypatch.setattr(heads, "equal_single_width", lambda recipe, space: recipe.hidden_dim)  # which takes a second
    monkeypatch.setattr(ablation, "WISHES", tuple(dict.fromkeys(v.wish for v in FEW)))
    out = work / "table.json"
    arguments = ["--quick", "--out", str(out)]
    made: list[Design] = []
    measure = Bench._measure

    def killed_in_the_sixth(self: Bench, design: Design) -> Result:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(design)
        return measure(self, design)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Bench, "_measure", killed_in_the_sixth)
        ablation.main(arguments)
    done = files(work / SMALL.folder / "results")
    assert len(done) == 5 and not out.exists()
    monkeypatch.setattr(Bench, "_measure", lambda self, design: made.append(design) or measure(self, design))
    assert ablation.main(arguments) == 0
    assert len(made) == len({v.design for v in FEW}) == len(set(made))  # each once
    assert done.items() <= files(work / SMALL.folder / "results").items()

    rows = json.loads(out.read_text())["rows"]
    assert [(r["wish"], r["variant"]) for r in rows if r["table"] == "runs"] == [(v.wish, v.name) for v in FEW]
    means = [r for r in rows if r["table"] == "variants"]
    for row in means:
        assert all(0 <= row[name] <= 1 for name in FIGURES if name.startswith("auroc"))
        assert row["auroc_within_low"] <= row["auroc_within"] <= row["auroc_within_high"]
        assert row["train_seconds"] > 0 and row["previews_seen"] >= 128 + 64 and row["check_cost"] > 0
    by_name = {(r["wish"], r["variant"]): r for r in means}
    vae, linear = by_name["preview", "full VAE"], by_name["preview", "linear"]
    assert vae["minus_auroc_within"] == pytest.approx(vae["auroc_within"] - linear["auroc_within"])
    assert vae["helps"] in ("yes", "no", "worse", "mixed")
    # WiSE-FT saw what its parents saw, and its sweep.
    assert by_name["backbone", "WiSE-FT"]["previews_seen"] > linear["previews_seen"] + 128
    single = by_name["schedulers", "one scheduler, one timestep"]
    assert (single["samples"], single["labels"], single["backbone_labels"]) == (64, 64, 0)
    assert single["previews_seen"] == 128 + 64  # its backbone is plain
    assert not [p for p in work.rglob("*") if p.suffix in (".pt", ".pkl", ".bin")]


def test_the_page_shows_the_table_or_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert page.ablation() == page.wishes() == page.NOT_YET
    base, other = replace(OWN, head="soft"), FORWARD
    variants = [Variant(wish="w", name="a", design=base), Variant(wish="w", name="b", design=other, against="a")]
    facts = {"samples": 1e5, "labels": 2e4, "backbone_labels": 0, "check_cost": 0.1, "train_seconds": 10.0}
    known = {
        (design.key, seed): dataclasses.replace(result, facts=facts)
        for design, made in ((base, results(0, 0, 1)), (other, results(-0.01, 0, 5)))
        for seed, result in made.items()
    }
    rows = table(variants, (0, 1, 2), known)
    monkeypatch.setattr(page, "_rows", lambda: [row for row in rows if row["table"] == "variants"])
    assert "| w | a | 100,000 | 20,000 | 0 | 0.801 (" in page.ablation()
    assert page.wishes().splitlines()[2].startswith("| w | b | a | -0.010 (") and page.wishes().endswith("| worse |")


def test_quick_is_a_hundredth() -> None:
    assert QUICK.images(Samples(images=60_000)) == 600 and QUICK.images(Samples(images=1)) == 64
    assert QUICK.folder != Scale().folder
