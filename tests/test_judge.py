from __future__ import annotations

import itertools
import math
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from moe_artifacts.errors import CheckpointError, InputError
from moe_artifacts.judge import FeatureMaps, ManifoldJudge, load_judge
from training.data.class_images import ClassImages
from training.data.fashion import LabelledImages
from training.judges import JudgeRecipe, build_judge, principal_components
from training.workspace import Stage

CLASSES, WIDTH, FEATURES, REFERENCES, NEIGHBOURS = 3, 4, 6, 40, 5
METADATA = {"width": str(WIDTH), "neighbours": str(NEIGHBOURS)}


def make_judge() -> ManifoldJudge:
    torch.manual_seed(0)
    maps = FeatureMaps(WIDTH)
    for module in maps.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training: away from mean 0 and variance 1
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    reference = torch.randn(CLASSES, REFERENCES, FEATURES)
    projection = torch.nn.Linear(maps.dim, FEATURES)
    return ManifoldJudge(maps, projection, reference, torch.tensor([0.1, -0.2, 0.7]), NEIGHBOURS)


def make_images(count: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 32, 32, generator=generator), torch.arange(count) % CLASSES


def save(judge: ManifoldJudge, path: Path, **metadata: str) -> Path:
    save_file(judge.tensors(), path, METADATA | metadata)
    return path


def test_the_margin_agrees_with_a_loop_over_the_references() -> None:
    judge, (images, labels) = make_judge(), make_images()
    margins = judge.margin(images, labels)
    for image, label, margin in zip(images, labels.tolist(), margins.tolist(), strict=True):
        with torch.no_grad():
            point = judge.features(image[None])[0].tolist()
        distances = sorted(math.dist(point, real) for real in judge.reference[label].tolist())
        mean = sum(distances[:NEIGHBOURS]) / NEIGHBOURS
        # float32; torch multiplies matrices for the distances to many references, which cancels a few more digits.
        assert margin == pytest.approx(math.log(mean) - judge.log_threshold[label].item(), abs=1e-4)


def test_an_image_at_the_threshold_is_at_the_border() -> None:
    judge, (images, labels) = make_judge(), make_images()
    margins = judge.margin(images[:1], labels[:1])
    judge.log_threshold[0] += margins[0]
    assert judge.margin(images[:1], labels[:1]).item() == pytest.approx(0, abs=1e-6)


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    judge, (images, labels) = make_judge(), make_images()
    order = torch.tensor([7, 2, 3, 8])
    part = judge.margin(images[order], labels[order])
    torch.testing.assert_close(part, judge.margin(images, labels)[order], atol=1e-4, rtol=0)  # another order of adding
    spoilt = images.clone()
    spoilt[0] = torch.nan
    margins = judge.margin(spoilt, labels)
    assert margins[0].isnan()
    torch.testing.assert_close(margins[order], part, atol=1e-4, rtol=0)


def test_a_grey_judge_ignores_colour() -> None:
    judge, (images, labels) = make_judge(), make_images()
    grey = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(judge.margin(grey, labels), judge.margin(images, labels), atol=1e-4, rtol=0)


def test_no_images_have_no_margins() -> None:
    assert make_judge().margin(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_out_of_range_are_refused(label: int) -> None:
    with pytest.raises(InputError, match=rf"labels must be in \[0, 2\], got {min(label, 0)} to {max(label, 0)}"):
        make_judge().margin(torch.zeros(2, 3, 32, 32), torch.tensor([0, label]))


def test_images_and_labels_of_different_number_are_refused() -> None:
    with pytest.raises(InputError, match="as many, got 2 and 3"):
        make_judge().margin(torch.zeros(2, 3, 32, 32), torch.zeros(3, dtype=torch.int64))


def test_a_judge_from_its_file_judges_alike(tmp_path: Path) -> None:
    judge, (images, labels) = make_judge(), make_images()
    loaded = load_judge(save(judge, tmp_path / "judge.safetensors"))
    assert not loaded.training and loaded.neighbours == NEIGHBOURS
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(loaded.log_threshold, judge.log_threshold)
    # Weights and references are rounded to float16, 2^-11 of their size; distances are a few times that off.
    torch.testing.assert_close(loaded.margin(images, labels), judge.margin(images, labels), atol=5e-3, rtol=0)
    again = load_judge(save(loaded, tmp_path / "again.safetensors"))
    assert torch.equal(again.margin(images, labels), loaded.margin(images, labels))  # nothing left to round


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    judge, path = make_judge(), tmp_path / "judge.safetensors"
    whole = save(judge, path).read_bytes()
    for content in (b"", whole[:4], whole[:-1], b"\x80\x04" + whole):  # the last would be a pickle
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"judge\.safetensors is not a readable judge"):
            load_judge(path)


def test_a_file_that_is_no_judge_is_named(tmp_path: Path) -> None:
    judge, path = make_judge(), tmp_path / "judge.safetensors"
    tensors = judge.tensors()
    for key, metadata in itertools.product(["reference", "log_threshold", "projection.weight"], [METADATA, None]):
        save_file({k: v for k, v in tensors.items() if k != key}, path, metadata)
        with pytest.raises(CheckpointError, match=r"judge\.safetensors is not a readable judge"):
            load_judge(path)
    for changed in ({"width": "5"}, {"neighbours": "many"}):
        with pytest.raises(CheckpointError, match=r"judge\.safetensors is not a readable judge"):
            load_judge(save(judge, path, **changed))
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        load_judge(tmp_path / "absent.safetensors")


def made_up(count: int, per_class: int) -> ClassImages:
    """Noise for both parts, 10 classes."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (2, count, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) // per_class
    names = tuple((f"class {k}",) for k in range(10))
    return ClassImages(LabelledImages(images[0], labels), LabelledImages(images[1], labels), names)


def test_thresholds_leave_one_real_image_in_twenty_above() -> None:
    # 40 images a class: 20 of them, at even rows, set the threshold.
    recipe = JudgeRecipe(
        name="tiny", seed=0, width=2, feature_dim=4, steps=2, batch=8, reference_per_class=6, neighbours=3
    )
    judge, report = build_judge(recipe, made_up(400, 40), create_autospec(Stage, instance=True))
    assert judge.reference.shape == (10, 6, 4) and judge.reference.isfinite().all()
    # The 95th percentile of 20 numbers lies between the 19th and the last.
    assert report["real_rate_threshold_half"] == pytest.approx(1 / 20)
    by_class = report["real_rate_other_half_by_class"]
    assert isinstance(by_class, list) and len(by_class) == 10
    assert report["real_rate_other_half"] == pytest.approx(sum(by_class) / 10)


def test_principal_components_are_those_of_scikit_learn() -> None:
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(3)) @ torch.randn(6, 6) * 3 + 1
    projected = principal_components(features, 3)(features)
    expected = PCA(3).fit_transform(StandardScaler().fit_transform(features.numpy()))
    # The sign of a component is arbitrary, and StandardScaler divides by n where torch divides by n - 1.
    torch.testing.assert_close(projected.abs(), torch.from_numpy(expected).float().abs(), rtol=5e-3, atol=1e-3)


def test_principal_components_of_few_images_with_features_that_never_fire() -> None:
    generator = torch.Generator().manual_seed(4)
    features = (torch.randn(60, 20, generator=generator) @ torch.randn(20, 600, generator=generator)).relu()
    features[:, torch.rand(600, generator=generator) < 0.9] = 0  # in single precision LAPACK gives up on these
    spread = principal_components(features, 16)(features).std(dim=0)
    assert spread.isfinite().all() and (spread[:-1] >= spread[1:]).all() and spread[-1] > 0.5


def test_too_few_reference_images_are_refused() -> None:
    recipe = JudgeRecipe(name="tiny", seed=0, width=2, steps=2, batch=4)
    with pytest.raises(InputError, match=r"the class 'class 0' has \d reference images, 10 are needed"):
        build_judge(recipe, made_up(60, 6), create_autospec(Stage, instance=True))


def test_a_class_with_fewer_references_is_filled_up(tmp_path: Path) -> None:
    judge, (images, labels) = make_judge(), make_images()
    few = ManifoldJudge(judge.maps, judge.projection, judge.reference[:, :10], judge.log_threshold, NEIGHBOURS)
    ragged = judge.reference.clone()
    ragged[1, 10:] = torch.nan
    mixed = ManifoldJudge(judge.maps, judge.projection, ragged, judge.log_threshold, NEIGHBOURS)
    expected = torch.where(labels == 1, few.margin(images, labels), judge.margin(images, labels))
    torch.testing.assert_close(mixed.margin(images, labels), expected, atol=1e-4, rtol=0)  # another order of adding
    loaded = load_judge(save(mixed, tmp_path / "judge.safetensors"))
    torch.testing.assert_close(loaded.margin(images, labels), expected, atol=5e-3, rtol=0)  # float16


def test_a_coloured_judge_sees_colours_and_its_file_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    maps = FeatureMaps(WIDTH, coloured=True)
    projection = torch.nn.Linear(maps.dim, FEATURES)
    judge = ManifoldJudge(maps, projection, torch.randn(CLASSES, 10, FEATURES), torch.zeros(CLASSES), 3, size=64)
    save_file(judge.tensors(), tmp_path / "judge.safetensors", judge.metadata())
    loaded = load_judge(tmp_path / "judge.safetensors")
    assert (loaded.size, loaded.neighbours, loaded.maps.coloured) == (64, 3, True)
    images, labels = torch.rand(3, 3, 64, 64), torch.arange(3)
    margins = judge.margin(images, labels)
    torch.testing.assert_close(loaded.margin(images, labels), margins, atol=5e-3, rtol=0)  # float16
    images[:, 0], images[:, 1:] = 1, 0
    red, blue = judge.features(images), judge.features(images.flip(1))
    assert (red - blue).abs().max() > 1e-3  # a grey judge's differ by rounding, some 1e-8


@pytest.mark.parametrize("count", [20, 50, 500])
def test_the_threshold_of_few_images_leaves_as_many_above_as_that_of_many(count: int) -> None:
    generator = np.random.default_rng(0)
    thresholds = np.quantile(generator.random((20_000, count)), 0.95, axis=1, method="weibull")
    # Uniform numbers: the share above a threshold t is 1 - t. Standard error of the mean: below 0.05 / sqrt(20,000).
    assert (1 - thresholds).mean() == pytest.approx(0.05, abs=0.002)
    if count == 20:
        assert (1 - np.quantile(generator.random((20_000, count)), 0.95, axis=1)).mean() > 0.08
