from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import training.clip_tune
from moe_artifacts.config import EmbedderConfig, from_dict
from moe_artifacts.embedder import ClipEmbedder, state_sha256
from moe_artifacts.errors import CheckpointError, ConfigError, InputError
from moe_artifacts.files import read_json, write_json
from moe_artifacts.preview import LinearPreview
from tests.some_pairs import trajectory_folders
from training.band_probe import Bands, Embedded, band_scores, bands_with_both_kinds
from training.clip_towers import Towers, build_embedder, chosen_weights, load_preview
from training.clip_tune import TuneRecipe, Tuning, main
from training.data.pairs import PreviewPairs, read_pairs
from training.wise_ft import read_provenance

MODEL: dict[str, Any] = {
    "embed_dim": 16,
    # Patches are dropped at random while training: a resumed run must drop the same.
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4, "patch_dropout": 0.2},
    "text_cfg": {"context_length": 12, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
    "init_logit_bias": -10.0,
}
SHORT = TuneRecipe(
    noise_steps=4,
    noise_lr=1e-3,
    batch=24,
    micro_batch=8,
    classify_steps=4,
    classify_lr=1e-3,
    classify_batch=24,
    hidden_dim=16,
    bands=3,
    mixes=(0.0, 0.5, 1.0),
    save_every=2,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trajectory_folders(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pairs(data: Path) -> PreviewPairs:
    return read_pairs(data)


def towers(model: dict[str, Any] | None = None, precision: str = "fp32") -> Towers:
    torch.manual_seed(0)
    preview = LinearPreview(channels=4, patch=2)
    embedder = ClipEmbedder(EmbedderConfig(model="custom", embed_dim=16, model_config=model or MODEL))
    return Towers(embedder, preview, precision)


def state(path: Path) -> str:
    return state_sha256(load_file(path))


# --- the whole run ---------------------------------------------------------------------------------------------------


def test_the_command_line_tunes_and_mixes_and_says_of_what(data: Path, tmp_path: Path) -> None:
    model, preview, out = tmp_path / "model.json", tmp_path / "preview.safetensors", tmp_path / "out"
    write_json(model, MODEL)
    linear = LinearPreview.sdxl()
    assert linear.space is not None
    linear.save(preview, linear.space, {})
    words = ["--model", str(model), "--data", str(data), "--preview", str(preview), "--out", str(out)]
    words += ["--noise-steps", "3", "--classify-steps", "3", "--batch", "24", "--micro-batch", "8", "--bands", "3"]
    words += ["--classify-batch", "16", "--mixes", "0,0.5,1", "--tracker", "none"]
    assert main(words) == 0

    names = ("plain", "noise_tuned", "classified", "embedder")
    hashes = {name: state(out / f"{name}.safetensors") for name in names}
    assert len({hashes[name] for name in names[:3]}) == 3
    table = read_json(out / "wise_ft.json")
    assert [row["mix"] for row in table["rows"]] == [0, 0.5, 1]
    assert all(len(row["bands"]) == 3 and 0 <= row["mean"] <= 1 for row in table["rows"])
    assert table["mix"] == max(table["rows"], key=lambda row: (row["mean"], -row["mix"]))["mix"]
    assert read_provenance(out / "embedder.safetensors") == {
        "mix": table["mix"],
        "pretrained_sha256": hashes["noise_tuned"],
        "finetuned_sha256": hashes["classified"],
    }
    config = from_dict(EmbedderConfig, read_json(out / "embedder.json"))
    embedder = ClipEmbedder(config)
    embedder.clip.load_state_dict(load_file(out / "embedder.safetensors"))
    embedder.verify_weights()
    assert not list(out.glob("*.state.safetensors"))

    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert main(words) == 0  # finished: nothing to do
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
    # Its weights are a start for another run, which may have a validation set of its own.
    words += ["--validation", str(trajectory_folders(tmp_path / "validation", prompts=12))]
    words[words.index(str(out))] = str(tmp_path / "further")
    assert main([*words, "--pretrained", str(out / "embedder.safetensors")]) == 0
    assert state(tmp_path / "further" / "plain.safetensors") == hashes["embedder"]


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_both_losses_fall(pairs: PreviewPairs, tmp_path: Path, loss: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    recipe = dataclasses.replace(SHORT, loss=loss, noise_steps=16, noise_lr=3e-3, classify_steps=0, save_every=1)
    Tuning(towers(), pairs, recipe, tmp_path).run()
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("noise_tuned step")]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert len(losses) == 16 and sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_batches_are_trained_in_micro_batches_as_in_one(
    pairs: PreviewPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_dropout = MODEL | {"vision_cfg": MODEL["vision_cfg"] | {"patch_dropout": 0.0}}
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)  # the head's
    told: dict[int, list[tuple[float, ...]]] = {8: [], 96: []}
    for micro_batch, numbers in told.items():
        recipe = dataclasses.replace(SHORT, batch=96, classify_batch=90, micro_batch=micro_batch, save_every=1)
        run = Tuning(towers(without_dropout), pairs, recipe, tmp_path / str(micro_batch))
        monkeypatch.setattr(run, "_track", lambda _, step, to=numbers, **values: to.append((step, *values.values())))
        run.run()
    assert len(told[8]) == SHORT.noise_steps + SHORT.classify_steps
    for parts, whole in zip(told[8], told[96], strict=True):
        # Loss and norm of the gradient. Adam takes rounding for a direction where a gradient is zero: more with each step.
        assert parts == pytest.approx(whole, rel=1e-3)


def test_4096_pairs_in_micro_batches_of_64(pairs: PreviewPairs, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT, batch=4096, micro_batch=64, noise_steps=1, classify_steps=0, mixes=(1.0,))
    Tuning(towers(), pairs, recipe, tmp_path).run()
    assert state(tmp_path / "noise_tuned.safetensors") != state(tmp_path / "plain.safetensors")


# --- resumed runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", [1, 3, 5, 7])
def test_a_run_killed_anywhere_goes_on_to_the_same_weights(
    pairs: PreviewPairs, tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, str]
) -> None:
    steps = 0
    clip = nn.utils.clip_grad_norm_

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == killed_at:
            raise KeyboardInterrupt
        return clip(*args, **kwargs)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", killing)
    with pytest.raises(KeyboardInterrupt):
        Tuning(towers(), pairs, SHORT, tmp_path).run()
    monkeypatch.undo()
    torch.rand(killed_at)  # the global generator is elsewhere in another process
    Tuning(towers(), pairs, SHORT, tmp_path).run()
    assert {name: state(tmp_path / f"{name}.safetensors") for name in uninterrupted} == uninterrupted


@pytest.fixture(scope="module")
def uninterrupted(pairs: PreviewPairs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("uninterrupted")
    Tuning(towers(), pairs, SHORT, out).run()
    return {name: state(out / f"{name}.safetensors") for name in ("noise_tuned", "classified", "embedder")}


def test_a_folder_is_not_continued_with_other_options_data_or_weights(
    data: Path, pairs: PreviewPairs, tmp_path: Path
) -> None:
    Tuning(towers(), pairs, SHORT, tmp_path)
    Tuning(towers(), pairs, SHORT, tmp_path)
    with pytest.raises(ConfigError, match="holds a run that differs in noise_lr, mixes;"):
        Tuning(towers(), pairs, dataclasses.replace(SHORT, noise_lr=1.0, mixes=(0.5,)), tmp_path)
    with pytest.raises(ConfigError, match="differs in rows, columns_sha256;"):
        Tuning(towers(), pairs.subset(torch.arange(200)), SHORT, tmp_path)
    with pytest.raises(ConfigError, match="differs in pictures;"):
        Tuning(towers(), read_pairs(data, "latents"), SHORT, tmp_path)
    other = towers()
    nn.init.zeros_(other.embedder.clip.logit_scale)
    with pytest.raises(ConfigError, match="differs in plain_sha256;"):
        Tuning(other, pairs, SHORT, tmp_path)


@pytest.mark.slow  # each process imports torch
def test_two_processes_tune_as_one(data: Path, tmp_path: Path) -> None:
    model, preview = tmp_path / "model.json", tmp_path / "preview.safetensors"
    write_json(model, MODEL | {"vision_cfg": MODEL["vision_cfg"] | {"patch_dropout": 0.0}})
    linear = LinearPreview.sdxl()
    assert linear.space is not None
    linear.save(preview, linear.space, {})
    words = ["--model", str(model), "--data", str(data), "--preview", str(preview), "--tracker", "none"]
    words += ["--noise-steps", "6", "--classify-steps", "4", "--batch", "24", "--micro-batch", "8", "--bands", "3"]
    words += ["--classify-batch", "24", "--noise-lr", "1e-3", "--mixes", "0,0.5,1"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", "training.clip_tune", *words, "--out", str(tmp_path / "two")],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "noise_tuned.safetensors") for name in ("one", "two"))
    plain = load_file(tmp_path / "one" / "plain.safetensors")
    moved = max((one[key] - plain[key]).abs().max().item() for key in one)
    # Adam takes rounding for a direction where a gradient is zero: a few weights move otherwise.
    apart = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
    assert moved > 3e-3 and apart.median() < 1e-6 and apart.quantile(0.99) < 1e-4
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    # Each process draws its own dropout in part 2, so that they do not agree; they do get to its end.
    assert state(tmp_path / "two" / "classified.safetensors") != state(tmp_path / "two" / "noise_tuned.safetensors")


# --- parts left out, and what goes wrong -----------------------------------------------------------------------------


def test_without_labels_there_is_noise_tuning_alone(tmp_path: Path) -> None:
    unlabelled = read_pairs(trajectory_folders(tmp_path / "data", prompts=8, labelled=False))
    with pytest.raises(InputError, match=r"needs labels of images with and without artifacts.*got 0 and 0 labels"):
        Tuning(towers(), unlabelled, SHORT, tmp_path / "out")
    out = tmp_path / "out"
    Tuning(towers(), unlabelled, dataclasses.replace(SHORT, classify_steps=0), out).run()
    assert state(out / "classified.safetensors") == state(out / "noise_tuned.safetensors")
    assert state(out / "embedder.safetensors") == state(out / "noise_tuned.safetensors")
    assert read_json(out / "wise_ft.json")["rows"] == []


def test_labels_of_one_kind_are_refused_before_training_and_a_band_of_one_kind_has_no_score(
    pairs: PreviewPairs, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"got \d+ and \d+ labels\. Label more images, let the judge .* or set classify_steps=0"
    ):
        Tuning(towers(), dataclasses.replace(pairs, label=pairs.label * 0.3), SHORT, tmp_path / "clean")
    label = torch.where(pairs.log_snr == 0, 1.0, pairs.label)  # all bad in the middle band
    Tuning(towers(), dataclasses.replace(pairs, label=label), SHORT, tmp_path / "middle").run()
    table = read_json(tmp_path / "middle" / "wise_ft.json")
    assert table["best_per_band"][1] is None and None not in (table["best_per_band"][0], table["best_per_band"][2])
    for row in table["rows"]:
        assert row["bands"][1] is None
        assert row["mean"] == pytest.approx((row["bands"][0] + row["bands"][2]) / 2)


def test_rows_without_a_label_are_for_noise_tuning_alone(pairs: PreviewPairs, tmp_path: Path) -> None:
    label = pairs.label.clone()
    label[::3] = math.nan  # one noise level of every image
    Tuning(towers(), dataclasses.replace(pairs, label=label), SHORT, tmp_path).run()
    assert read_json(tmp_path / "wise_ft.json")["rows"][0]["bands"][0] is None


def test_part_2_learns_how_bad_an_image_is_where_the_judge_says(pairs: PreviewPairs, tmp_path: Path) -> None:
    unknown = dataclasses.replace(pairs, margin=torch.full_like(pairs.margin, math.nan))
    runs = {"all": (pairs, 1.0), "no weight": (pairs, 0.0), "unknown": (unknown, 1.0)}
    found = {}
    for name, (data, weight) in runs.items():
        Tuning(towers(), data, dataclasses.replace(SHORT, margin_weight=weight), tmp_path / name).run()
        found[name] = state(tmp_path / name / "classified.safetensors")
    assert found["all"] != found["no weight"] == found["unknown"]


def test_with_a_validation_set_all_rows_are_trained_on(pairs: PreviewPairs, tmp_path: Path) -> None:
    validation = pairs.subset(torch.arange(0, len(pairs), 5))
    run = Tuning(towers(), pairs, SHORT, tmp_path, validation=validation)
    assert run.train is pairs and run.validation is validation
    run.run()
    with pytest.raises(ConfigError, match="differs in validation;"):
        Tuning(towers(), pairs, SHORT, tmp_path, validation=dataclasses.replace(validation, label=1 - validation.label))
    with pytest.raises(ConfigError, match="differs in validation;"):
        Tuning(towers(), pairs, SHORT, tmp_path)
    with pytest.raises(InputError, match="validation must hold latents as the data do, got previews"):
        Tuning(towers(), pairs, SHORT, tmp_path, validation=dataclasses.replace(validation, kind="previews"))
    with pytest.raises(InputError, match="validation must be other images than those trained on, got the same"):
        Tuning(towers(), pairs, SHORT, tmp_path, validation=pairs)


def test_without_noise_tuning_the_parents_are_the_plain_and_the_classified_one(
    pairs: PreviewPairs, tmp_path: Path
) -> None:
    Tuning(towers(), pairs, dataclasses.replace(SHORT, noise_steps=0), tmp_path).run()
    assert state(tmp_path / "noise_tuned.safetensors") == state(tmp_path / "plain.safetensors")
    provenance = read_provenance(tmp_path / "embedder.safetensors")
    assert provenance["pretrained_sha256"] == state(tmp_path / "plain.safetensors")
    assert provenance["finetuned_sha256"] == state(tmp_path / "classified.safetensors")


def test_a_loss_that_is_not_finite_stops_the_run_with_its_last_good_state(
    pairs: PreviewPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 1.0, 1.0, math.nan])
    real = training.clip_tune.clip_loss
    monkeypatch.setattr(training.clip_tune, "clip_loss", lambda *args: real(*args) * next(losses))
    with pytest.raises(
        ConfigError, match=r"noise_tuned: the loss became nan at step 3: lower its learning rate.*step 2"
    ):
        Tuning(towers(), pairs, SHORT, tmp_path).run()
    saved = load_file(tmp_path / "noise_tuned.state.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    assert not (tmp_path / "noise_tuned.safetensors").exists()


def test_siglip_needs_a_bias(pairs: PreviewPairs, tmp_path: Path) -> None:
    without = {key: value for key, value in MODEL.items() if key != "init_logit_bias"}
    with pytest.raises(ConfigError, match='"init_logit_bias": -10'):
        Tuning(towers(without), pairs, dataclasses.replace(SHORT, loss="siglip"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"noise_steps": -1}, "noise_steps must not be negative"),
        ({"margin_weight": -1.0}, "margin_weight must not be negative"),
        ({"mixes": ()}, r"mixes must be numbers in \[0, 1\], at least one, got \(\)"),
        ({"mixes": (0.0, 1.1)}, r"mixes must be numbers in \[0, 1\]"),
        ({"loss": "mse"}, "loss must be one of clip, siglip, got 'mse'"),
    ],
)
def test_recipes_that_cannot_be_run_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(SHORT, **changes)


def test_errors_are_one_line_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--model", "x.json", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--tracker", "none"]) == 2
    )
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("error: ") and not (tmp_path / "out").exists()
    given = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--tracker", "none"]
    for more, expected in (
        (["--model", "ViT-B-32"], "error: ViT-B-32 needs --pretrained"),
        (["--model", "x.json", "--device", "gpu"], "error: device 'gpu'"),
    ):
        assert main([*given, *more]) == 2
        assert capsys.readouterr().err.startswith(expected)


# --- towers, models and previews -------------------------------------------------------------------------------------


def test_batch_norm_and_the_preview_stay_in_evaluation_mode() -> None:
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    model = towers(MODEL | {"vision_cfg": resnet}).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    assert model.preview is not None and not model.preview.training
    assert not any(p.requires_grad for p in model.preview.parameters())
    assert model.embedder.clip.transformer.training and model.training


def test_bf16_gives_float32_embeddings_near_those_of_float32(pairs: PreviewPairs) -> None:
    batch = pairs.batch(torch.arange(4))
    for one, other in zip(towers().eval()(batch), towers(precision="bf16").eval()(batch), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.03, rtol=0)  # 8 bits, through two blocks
        assert not torch.equal(one, other)


def test_models_by_name_and_by_file(tmp_path: Path) -> None:
    write_json(tmp_path / "model.json", MODEL)
    model = str(tmp_path / "model.json")
    first, again, other = (build_embedder(model, seed=seed).weights_sha256() for seed in (1, 1, 2))
    assert first == again != other
    with pytest.raises(
        ConfigError, match=r"must be a .safetensors file for a configuration of one's own, got 'openai'"
    ):
        build_embedder(model, "openai")
    with pytest.raises(ConfigError, match="open_clip has no model 'ViT-Z'"):
        build_embedder("ViT-Z")
    write_json(tmp_path / "list.json", [1])
    with pytest.raises(ConfigError, match="a JSON object with embed_dim is expected"):
        build_embedder(str(tmp_path / "list.json"))
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together"):
        build_embedder(model, str(tmp_path / "other.safetensors"))


def test_a_model_by_its_name_has_random_weights_only_when_asked_for() -> None:
    with pytest.raises(
        InputError, match=r"ViT-B-32 needs --pretrained: .*, such as openai, .*; or none, for random ones"
    ):
        chosen_weights("ViT-B-32", None)
    for pretrained in ("openai", "my.safetensors"):
        assert chosen_weights("ViT-B-32", pretrained) == pretrained
    assert chosen_weights("ViT-B-32", "none") is None
    assert chosen_weights("model.json", None) is None and chosen_weights("model.json", "none") is None
    assert chosen_weights("ViT-Z", None) is None  # build_embedder knows of none


def test_latents_need_a_preview_and_previews_none() -> None:
    assert load_preview(None, "previews") is None
    assert isinstance(load_preview("sdxl", "latents"), LinearPreview)
    with pytest.raises(InputError, match="are latents: name a preview"):
        load_preview(None, "latents")
    with pytest.raises(InputError, match="hold previews already: leave preview out"):
        load_preview("sdxl", "previews")


# --- the probe -------------------------------------------------------------------------------------------------------


def embedded(bad: list[int], prompt: list[int], band: list[int], seed: int = 0) -> Embedded:
    """Features whose first number tells bad images in band 0, and nothing does in band 1."""
    noise = np.random.default_rng(seed).normal(size=(len(bad), 4))
    noise[:, 0] += 6 * (np.array(bad) - 0.5) * (np.array(band) == 0)
    return Embedded(noise, np.array(bad, dtype=bool), np.array(prompt), np.array(band))


def test_each_band_has_its_own_score_and_an_empty_one_has_none() -> None:
    bad, prompt, band = [0, 1] * 100, [i // 20 for i in range(200)], [0] * 100 + [1] * 100
    scores = band_scores(embedded(bad, prompt, band, 0), embedded(bad, prompt, band, 1), Bands(3, (-1.0, 1.0)))
    assert scores[0] > 0.99 and 0.3 < scores[1] < 0.7 and math.isnan(scores[2])
    clean = embedded([0] * 200, prompt, band)
    assert all(math.isnan(score) for score in band_scores(clean, clean, Bands(3, (-1.0, 1.0))))


def test_the_score_is_within_prompts_where_a_prompt_has_both_kinds() -> None:
    # Prompt 0 is all bad and stands out, prompt 1 has both kinds that features do not tell apart.
    features = np.array([[5.0]] * 20 + [[0.0]] * 20)
    bad = np.array([True] * 20 + [True, False] * 10)
    mixed = Embedded(features, bad, np.repeat([0, 1], 20), np.zeros(40, dtype=int))
    bands = Bands(1, (-1.0, 1.0))
    assert band_scores(mixed, mixed, bands) == [0.5]
    apart = dataclasses.replace(mixed, prompt=np.arange(40))  # none has both: over all rows
    assert band_scores(mixed, apart, bands)[0] == pytest.approx(0.5 + 20 / 30 / 2)  # 20 of 30 bad above all clean ones


def test_an_image_is_bad_where_more_than_half_of_the_raters_saw_artifacts(pairs: PreviewPairs) -> None:
    rows, bands = torch.arange(6), Bands(1, (-1.0, 1.0))
    for labels, expected in (([0.5] * 3 + [0.6] * 3, {0}), ([0.5] * 3 + [0.4] * 3, set())):
        some = dataclasses.replace(pairs.subset(rows), label=torch.tensor(labels))
        assert bands_with_both_kinds(some, rows, bands) == expected


def test_bands_take_in_what_lies_beyond_their_range() -> None:
    bands = Bands(4, (-4.0, 4.0))
    log_snr = torch.tensor([-100.0, -4.0, -2.1, -1.9, 1.9, 4.0, 100.0])
    assert bands.of(log_snr).tolist() == [0, 0, 0, 1, 2, 3, 3]
