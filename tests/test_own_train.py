"""The heads of one's own: what is learned of which data, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.errors import ConfigError, InputError
from moe_artifacts.files import read_json, write_json
from tests.own_data import EMBED_DIM, LEVELS, Made, truth, write_embedded
from training.embedded import EmbeddedRows
from training.head_data import Subset, at_most, labelled, log_snr_range_of, rows_per_band
from training.heads import HeadRecipe, Heads, HeadSpace, iter_states, sequence
from training.own import train as own
from training.own.heads_folder import read_heads
from training.posterior import Targets, posterior_auroc, validation_figures
from training.row_jobs import META

NAN = math.nan
SMALL = dataclasses.replace(
    own.RECIPE, num_experts=2, hidden_dim=16, expert_dim=4, steps=60, batch=128, evaluate_every=20, lr=1e-2
)


def splits(folder: Path, **changes: object) -> Path:
    """EMBEDDED with the splits train and validation."""
    write_embedded(folder / "train", dataclasses.replace(Made(), **changes))  # type: ignore[arg-type]
    write_embedded(folder / "validation", dataclasses.replace(Made(images=300, seed=1), **changes))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return splits(tmp_path_factory.mktemp("embedded"))


# --- the loss --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=30).filter(lambda v: 0 < sum(v) < len(v)),
    st.floats(1 / 20, 20),
)
def test_however_much_a_kind_counts_the_loss_is_least_at_the_rate_of_the_data(
    label: list[float], weight: float
) -> None:
    rate = sum(label) / len(label)
    logit = torch.full((len(label),), math.log(rate / (1 - rate)), dtype=torch.float64, requires_grad=True)
    nothing = torch.full((len(label),), NAN)
    targets = Targets(positive_weight=weight, margin_scale=1.0)
    targets.loss(logit, torch.zeros(len(label)), torch.tensor(label, dtype=torch.float64), nothing, 1.0).backward()
    assert logit.grad is not None and abs(logit.grad.sum().item()) < 1e-6  # weights are float32


def test_without_weights_and_margins_the_loss_is_cross_entropy() -> None:
    logit, label = torch.randn(9), torch.rand(9)
    targets = Targets(positive_weight=1.0, margin_scale=1.0)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logit, label)
    assert targets.loss(logit, torch.randn(9), label, torch.full((9,), NAN), 5.0) == expected


def test_images_without_a_margin_teach_the_margin_head_nothing() -> None:
    head = torch.randn(4, requires_grad=True)
    margin = torch.tensor([0.3, NAN, -0.2, NAN])
    Targets(positive_weight=1.0, margin_scale=0.1).loss(torch.zeros(4), head, torch.zeros(4), margin, 1.0).backward()
    assert head.grad is not None
    assert (head.grad != 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize(("bad_rate", "expected"), [(0.5, 1.0), (0.2, 4.0), (0.8, 0.25), (0.01, 20.0), (0.99, 0.05)])
def test_the_kinds_weigh_the_same_as_far_as_is_allowed(embedded: Path, bad_rate: float, expected: float) -> None:
    rows = EmbeddedRows(embedded / "train")
    rows.label = torch.zeros(len(rows))
    rows.label[: round(bad_rate * len(rows))] = 1
    found = Targets.of(rows, rare_weight=20.0)
    assert found.positive_weight == pytest.approx(expected, rel=0.01)
    assert found.margin_scale == pytest.approx(0.15)  # of margins that are 0.15 on either side


# --- the data --------------------------------------------------------------------------------------------------------


def test_images_without_a_label_are_left_out(tmp_path: Path) -> None:
    label = torch.tensor([0.0, 1.0, NAN, 0.5, NAN, 1.0])
    rows = EmbeddedRows(write_embedded(tmp_path, Made(label=label, prompts=3)))
    data = labelled(rows, "train")
    assert data.rows.tolist() == [0, 1, 3, 5]
    assert torch.equal(data.take(torch.tensor([3, 2])).label, torch.tensor([1.0, 0.5]))
    assert torch.equal(data.take(torch.tensor([1])).embedding, rows.take(torch.tensor([1])).embedding)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.full((8,), NAN), "no label among 8 images"),
        (torch.zeros(8), "all 8 labelled images of 'validation' are clean"),
        (torch.tensor([1.0, 0.9] * 4), "are bad: both kinds are needed"),
        (torch.tensor([0.0, 3.0] * 4), r"must be in \[0, 1\], got 0 to 3"),
    ],
)
def test_labels_that_cannot_teach_are_refused(tmp_path: Path, label: torch.Tensor, message: str) -> None:
    rows = EmbeddedRows(write_embedded(tmp_path, Made(label=label)))
    with pytest.raises(InputError, match=message):
        labelled(rows, "validation")


@given(st.integers(1, 400), st.integers(0, 50))
def test_fewer_images_are_whole_prompts_but_for_the_last(embedded: Path, count: int, seed: int) -> None:
    rows = EmbeddedRows(embedded / "train")
    chosen = at_most(rows, count, seed)
    assert len(chosen) == count
    kept, all_of = chosen.prompt_id.bincount(minlength=100), rows.prompt_id.bincount(minlength=100)
    assert ((kept != 0) & (kept != all_of)).sum() <= 1


def test_progress_begins_before_the_first_check_and_ends_at_the_last(embedded: Path) -> None:
    low, high = log_snr_range_of(EmbeddedRows(embedded / "train"))
    assert (low, high) == pytest.approx((LEVELS[0] - 9 / 4, LEVELS[-1]))
    counts = rows_per_band(EmbeddedRows(embedded / "train"), (low, high))
    assert sum(counts) == 400 * 4 and counts[0] == 0 and counts[-1] == 400


def test_pure_noise_and_a_single_level_have_a_range_too(tmp_path: Path) -> None:
    levels = (-math.inf, -1.0, 2.0, 5.0)
    assert log_snr_range_of(EmbeddedRows(write_embedded(tmp_path / "a", Made(levels=levels)))) == (-2.5, 5.0)
    assert log_snr_range_of(EmbeddedRows(write_embedded(tmp_path / "b", Made(levels=(1.5,))))) == (0.5, 1.5)


def test_pure_noise_is_seen_as_the_noisiest_level_of_the_range(tmp_path: Path) -> None:
    rows = EmbeddedRows(write_embedded(tmp_path, Made(levels=(-math.inf, 2.0))))
    space = HeadSpace(embed_dim=EMBED_DIM, log_snr_range=(-3.0, 4.0))
    seen = sequence(rows.take(torch.arange(5)), torch.tensor([0, 1]), space)
    assert seen.present.all() and seen.features.isfinite().all()
    assert (seen.log_snr[:, 0] == -3).all() and (seen.at[:, 0] == 0).all()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"margins": False, "bad_rate": 0.06},
        {"levels": (1.0,)},
        {"prompts": 400},  # one image of each: no AUROC within prompts
        {"levels": (-math.inf, -1.0, 2.0, 5.0)},
    ],
    ids=["plain", "rare, no margins", "one check", "one image a prompt", "pure noise"],
)
def test_bad_images_are_told(tmp_path: Path, changes: dict[str, object]) -> None:
    facts = own.train(splits(tmp_path / "embedded", **changes), tmp_path / "heads", SMALL)
    assert facts.auroc is not None and facts.auroc > 0.8
    heads, read = read_heads(tmp_path / "heads")
    assert read == facts
    rows = EmbeddedRows(tmp_path / "embedded" / "validation")
    assert validation_figures(heads, labelled(rows, "validation"))["auroc"] == pytest.approx(facts.auroc, abs=0.01)


def test_soft_labels_teach_and_the_rest_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soft = {}
    for name, seed in (("train", 0), ("validation", 1)):
        label = truth(Made(seed=seed)) * 0.5 + 0.25
        label[::10] = NAN
        soft[name] = write_embedded(tmp_path / "embedded" / name, Made(seed=seed, label=label))
    with caplog.at_level(logging.INFO):
        facts = own.train(tmp_path / "embedded", tmp_path / "heads", SMALL)
    assert facts.images == 360 and "40 without a label left out" in caplog.text
    assert facts.auroc is not None and facts.auroc > 0.65
    heads, _ = read_heads(tmp_path / "heads")
    data = labelled(EmbeddedRows(soft["validation"]), "validation")
    prob = torch.cat([logit.sigmoid() for _, logit, _ in iter_states(heads, data, torch.arange(4))])
    assert prob.mean().item() == pytest.approx(
        data.label.mean().item(), abs=0.06
    )  # and not half, as if both kinds were


def test_bands_without_a_check_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        facts = own.train(
            splits(tmp_path / "embedded"),
            tmp_path / "heads",
            dataclasses.replace(SMALL, steps=1),
            log_snr_range=(-9.0, 9.0),
        )
    assert facts.rows_per_band[0] == 0 and "no check lies in the bands [0, 1, 5, 7] of 8" in caplog.text


class Killed(BaseException):
    """Stands for kill -9: nothing is tidied up."""


def test_a_run_that_was_killed_ends_as_if_it_had_not(embedded: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SMALL, steps=30, batch=32, evaluate_every=10)
    own.train(embedded, tmp_path / "whole", recipe)

    def kill(step: int, **values: float) -> None:
        if step == 20:
            raise Killed

    monkey = pytest.MonkeyPatch()
    monkey.setattr("training.posterior.SAVE_EVERY", 10)
    with pytest.raises(Killed):
        own.train(embedded, tmp_path / "killed", recipe, track=kill)
    monkey.undo()
    own.train(embedded, tmp_path / "killed", recipe)
    for name in ("heads.safetensors", "heads.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"heads.safetensors", "heads.json"}
    again = own.train(embedded, tmp_path / "killed", recipe)  # nothing is left to be done
    assert again.auroc is not None


def test_another_recipe_does_not_go_on_with_a_run(embedded: Path, tmp_path: Path) -> None:
    own.train(embedded, tmp_path, dataclasses.replace(SMALL, steps=1))
    with pytest.raises(ConfigError, match="holds heads that differ in recipe"):
        own.train(embedded, tmp_path, dataclasses.replace(SMALL, steps=2))


def test_other_labels_do_not_go_on_with_a_run(tmp_path: Path) -> None:
    embedded = splits(tmp_path / "embedded")
    own.train(embedded, tmp_path / "heads", dataclasses.replace(SMALL, steps=1))
    write_embedded(embedded / "validation", Made(images=200, seed=1))  # some labels were wrong, say
    meta = read_json(embedded / "validation" / "meta.json")
    write_json(embedded / "validation" / "meta.json", meta | {"source": {"sha256": "another"}})
    with pytest.raises(ConfigError, match="holds heads that differ in validation_sha256;"):
        own.train(embedded, tmp_path / "heads", dataclasses.replace(SMALL, steps=1))


def test_a_mistake_in_the_options_leaves_the_folder_free(embedded: Path, tmp_path: Path) -> None:
    small = ["--steps", "1", "--num-experts", "2", "--hidden-dim", "8", "--tracker", "none"]
    command = [str(embedded), "--out", str(tmp_path / "heads"), *small]
    assert own.main([*command, "--log-snr-range", "5", "-5"]) == 2
    assert own.main([*command, "--dropout", "1"]) == 2
    assert not (tmp_path / "heads").exists()
    assert own.main([*command, "--log-snr-range", "-5.5", "6"]) == 0
    assert read_heads(tmp_path / "heads")[1].space.log_snr_range == (-5.5, 6.0)


def test_the_same_images_to_train_and_to_stop_on_are_refused(embedded: Path, tmp_path: Path) -> None:
    for name in ("train", "validation"):
        shutil.copytree(embedded / "train", tmp_path / "embedded" / name)
        meta = tmp_path / "embedded" / name / META
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"source": {"files": "the same"}}))
    with pytest.raises(InputError, match="are the same images: embed train and validation each from its own"):
        own.train(tmp_path / "embedded", tmp_path / "heads")


def test_embeddings_of_two_embedders_are_refused(tmp_path: Path) -> None:
    write_embedded(tmp_path / "train")
    write_embedded(tmp_path / "validation", Made(seed=1, embedder="two"))
    with pytest.raises(InputError, match="made with another embedder: SHA-256 two, expected one"):
        own.train(tmp_path, tmp_path / "heads", SMALL)


@pytest.mark.parametrize("variant", ["soft", "hard", "single-head"])
def test_what_the_heads_say_does_not_depend_on_how_they_are_read(embedded: Path, variant: str) -> None:
    recipe = dataclasses.replace(SMALL, variant=variant)  # type: ignore[arg-type]
    rows = EmbeddedRows(embedded / "validation")
    heads = Heads(recipe, HeadSpace(embed_dim=EMBED_DIM, log_snr_range=(-6.0, 5.0)))
    order = torch.randperm(len(rows))
    shuffled = Subset(rows, order)

    def logits(data: EmbeddedRows | Subset, batch: int) -> torch.Tensor:
        return torch.cat([logit for _, logit, _ in iter_states(heads, data, torch.arange(4), batch)])

    # Sums in another order.
    torch.testing.assert_close(logits(rows, 300)[order], logits(shuffled, 70), atol=1e-5, rtol=1e-5)
    assert len(posterior_auroc(heads, rows)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "medium"}, "variant must be one of"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"lr": NAN}, "lr must be a number"),
        ({"rare_weight": 0.5}, "rare_weight must be at least 1"),
    ],
)
def test_a_recipe_out_of_range_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HeadRecipe(name="x", **change)  # type: ignore[arg-type]


def test_the_command_line(embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "20", "--evaluate-every", "10", "--num-experts", "2", "--hidden-dim", "8", "--tracker", "none"]
    assert own.main([str(embedded), "--out", str(tmp_path / "heads"), *small]) == 0
    assert "AUROC 0." in capsys.readouterr().out
    heads, facts = read_heads(tmp_path / "heads")
    assert (facts.recipe.num_experts, facts.recipe.rare_weight) == (2, own.RECIPE.rare_weight)
    assert np.isfinite([p.abs().max().item() for p in heads.parameters()]).all()

    for wrong in ([str(tmp_path)], [str(embedded), "--device", "abacus"], [str(embedded), "--batch", "0"]):
        assert own.main([*wrong, "--out", str(tmp_path / "other"), "--tracker", "none"]) == 2
        assert capsys.readouterr().err.startswith("error: ")
