import math
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moe_artifacts.errors import CheckpointError, InputError
from moe_artifacts.judge import FeatureMaps, ManifoldJudge
from moe_artifacts.trajectory import Trajectory
from tests.commands import tiny_bundle, use_bundle
from training.data.images import square, to_preview
from training.judging import ManifoldLabels, RatingJudge, ScoreJudge, VerdictJudge, import_function, judge_named

SIDE = 32
DOC = Path(__file__).parents[1] / "docs" / "labelling.md"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (SIDE, SIDE), (60 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def files(folder):
    return sorted(folder.glob("*.png"))


def judged(judge, images, prompts=None):
    labels = judge(images, ["a bag"] * len(images) if prompts is None else prompts)
    assert labels.dtype == torch.float32 and labels.shape == (len(images),)
    return [None if math.isnan(label) else label for label in labels.tolist()]


# --- people's scores


def ratings(file, **columns):
    pq.write_table(pa.table(columns), file)
    return file


def test_ratings_become_labels_on_their_own_scale(folder):
    table = ratings(folder / "r.parquet", path=["0.png", "1.png", "2.png"], score=[0, 5, 2], more=["x", None, "y"])
    assert judged(RatingJudge(table, clean=0, bad=5), files(folder)) == pytest.approx([0, 1, 0.4, None])
    assert judged(RatingJudge(table, clean=10, bad=0), files(folder)) == pytest.approx([1, 0.5, 0.8, None])


def test_several_ratings_are_averaged_and_missing_ones_left_out(folder):
    path = ["0.png", "0.png", "./0.png", "1.png", "2.png", None]
    table = ratings(folder / "r.parquet", path=path, label=[1.0, 0.0, 0.0, None, math.nan, 1.0])
    assert judged(RatingJudge(table), files(folder)) == pytest.approx([1 / 3, None, None, None])


def test_an_image_is_found_however_its_path_is_written(folder, monkeypatch):
    (folder.parent / "link").symlink_to(folder)
    table = ratings(
        folder.parent / "r.parquet", path=["link/0.png", str(folder / "1.png"), "images/../link/2.png"], label=[1.0] * 3
    )
    judge = RatingJudge(table)
    monkeypatch.chdir(folder)
    assert judged(judge, ["0.png", folder.parent / "link" / "1.png", "../images/2.png", "3.png"]) == [1, 1, 1, None]
    monkeypatch.chdir(folder.parent)
    assert judged(judge, ["0.png", "images/0.png"]) == [None, 1]  # another working folder, another file


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"path": ["0.png"], "score": [6.0]},
            {"clean": 0, "bad": 5},
            "score of '0.png' must be between 0 and 5, got 6",
        ),
        ({"path": ["0.png"], "label": [-0.1]}, {}, "label of '0.png' must be between 0 and 1"),
        ({"path": ["0.png"], "score": [1.0]}, {}, "has no column 'label'"),
        ({"path": ["0.png"], "label": [None]}, {}, "rates no image"),
        ({"path": ["0.png"], "score": [1.0]}, {"clean": 1}, "clean and bad must be two different scores"),
        ({"path": ["0.png"], "score": [1.0]}, {"clean": 1, "bad": 1}, "clean and bad must be two different scores"),
    ],
)
def test_ratings_that_make_no_sense_are_refused(folder, columns, options, message):
    columns = {
        name: pa.array(values, pa.string() if name == "path" else pa.float64()) for name, values in columns.items()
    }
    with pytest.raises(InputError, match=message):
        RatingJudge(ratings(folder / "r.parquet", **columns), **options)


# --- people's verdicts


def test_verdicts_of_several_raters_are_shares(folder):
    (folder / "labels.csv").write_text("file,artifact\n0.png,1\n1.png,0\n2.png,\n")
    assert judged(VerdictJudge(folder), files(folder)) == [1, 0, None, None]
    (folder / "labels-ben.csv").write_text("file,artifact\n0.png,1\n1.png,1\n2.png,0\n")
    assert judged(VerdictJudge(folder), files(folder)) == [1, 0.5, 0, None]


def test_verdicts_need_a_table_and_files(folder):
    with pytest.raises(InputError, match="no verdicts in 0 tables"):
        VerdictJudge(folder)
    (folder / "labels.csv").write_text("file,artifact\n0.png,\n")
    with pytest.raises(InputError, match="no verdicts in 1 tables"):
        VerdictJudge(folder)
    (folder / "labels.csv").write_text("file,artifact\n0.png,1\n")
    with pytest.raises(InputError, match="images must be paths, got a Tensor"):
        judged(VerdictJudge(folder), torch.zeros(1, 3, SIDE, SIDE))


# --- functions


def test_a_function_sees_rgb_pictures_and_prompts_in_their_order(folder):
    seen = []

    def score(pictures, prompts):
        seen.extend(zip(pictures, prompts, strict=True))
        return np.arange(len(pictures)) / 3

    tensor = torch.zeros(3, 2, 5)
    tensor[0], tensor[1] = 1.0, 128 / 255
    images = [files(folder)[2], str(files(folder)[1]), Image.new("L", (4, 6), 9), tensor]
    assert judged(ScoreJudge(score), images, list("abcd")) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [picture.mode for picture, _ in seen] == ["RGB"] * 4
    assert [picture.getpixel((0, 0)) for picture, _ in seen] == [(120, 0, 0), (60, 0, 0), (9, 9, 9), (255, 128, 0)]
    assert [picture.size for picture, _ in seen] == [(32, 32), (32, 32), (4, 6), (5, 2)]
    assert [prompt for _, prompt in seen] == list("abcd")


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(-5, 5))
def test_a_threshold_makes_rewards_and_alarms_into_labels(scores, threshold):
    pictures = [Image.new("RGB", (1, 1))] * len(scores)
    for kind in (list, np.array, torch.tensor):
        low = judged(ScoreJudge(lambda *_, kind=kind: kind(scores), bad_below=threshold), pictures)
        high = judged(ScoreJudge(lambda *_, kind=kind: kind(scores), bad_above=threshold), pictures)
        exact = [float(score) for score in kind(scores)]  # torch holds them in float32
        assert low == [float(score < threshold) for score in exact]
        assert high == [float(score > threshold) for score in exact]


def test_no_opinion_is_no_label():
    picture = Image.new("RGB", (1, 1))
    assert judged(ScoreJudge(lambda *_: [None, 0.25]), [picture] * 2) == [None, 0.25]
    assert judged(ScoreJudge(lambda *_: [None, -9], bad_below=0), [picture] * 2) == [None, 1]
    assert judged(ScoreJudge(lambda *_: []), []) == []


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([1.0], "a number per image, got 1 of 2"),
        ([1.0, 1.0, 1.0], "a number per image, got 3 of 2"),
        ([0.0, math.nan], "finite numbers, or None for no opinion, got nan"),
        ([0.0, 1.5], "1.5 is no label in .0, 1.: say with bad_below or bad_above"),
        ([0.0, "good"], "a number per image, got 'good'"),
        (torch.zeros(2, 2), "a number per image, got tensor"),
    ],
)
def test_what_is_no_score_is_refused(told, message):
    with pytest.raises(InputError, match=message):
        judged(ScoreJudge(lambda *_: told), [Image.new("RGB", (1, 1))] * 2)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 2, 2), torch.nan), "finite and in"),
        (torch.full((3, 2, 2), 1.01), "got values from 1.01 to 1.01"),
        (torch.zeros(1, 2, 2), r"of shape \[3, height, width\], got \[1, 2, 2\]"),
        ("missing.png", "missing.png"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(InputError, match=message):
        judged(ScoreJudge(lambda *_: [0]), [image])


# --- the manifold judge


def manifold():
    torch.manual_seed(0)
    maps = FeatureMaps(2)
    judge = ManifoldJudge(maps, torch.nn.Linear(maps.dim, 4), torch.randn(3, 20, 4), torch.zeros(3), neighbours=3)
    images = torch.rand(6, 3, SIDE, SIDE)
    classes = torch.tensor([0, 1, 2, 0, 1, 2])
    margin = judge.margin(images, classes)
    judge.log_threshold += margin.median()  # so that there are both
    return judge, images, classes, (judge.margin(images, classes) > 0).float()


def test_the_manifold_judge_says_what_its_margin_says():
    judge, images, classes, expected = manifold()
    assert set(expected.tolist()) == {0.0, 1.0}
    found = judged(ManifoldLabels(judge, int), images, [str(k) for k in classes.tolist()])
    assert found == expected.tolist()


def test_prompts_of_no_class_have_no_label(tmp_path):
    judge, images, classes, expected = manifold()
    prompts = [str(k) for k in classes.tolist()]
    prompts[1] = prompts[4] = "a house"
    labels = ManifoldLabels(judge, lambda prompt: int(prompt) if prompt.isdigit() else None)
    assert judged(labels, images, prompts) == [None if k in (1, 4) else expected[k].item() for k in range(6)]
    assert judged(labels, images[:1], ["a house"]) == [None]
    path = tmp_path / "a.png"  # pictures from files are the same up to rounding to 8 bits
    Image.fromarray((images[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(path)
    assert judged(labels, [path], prompts[:1]) == [expected[0].item()]


def test_images_of_another_size_are_seen_as_the_real_ones_were():
    judge, _images, classes, _ = manifold()
    sides = [(SIDE, SIDE), (4 * SIDE, 4 * SIDE), (2 * SIDE, 3 * SIDE), (8, 4)]
    pixels = [torch.rand(3, *side) for side in sides]
    pictures = [Image.fromarray((one.permute(1, 2, 0) * 255).round().byte().numpy()) for one in pixels]
    shown = torch.cat([to_preview(square(picture, SIDE)) for picture in pictures])
    expected = (judge.margin(shown, classes[: len(sides)]) > 0).float().tolist()
    prompts = [str(k) for k in classes[: len(sides)].tolist()]
    assert judged(ManifoldLabels(judge, int), pictures, prompts) == expected
    assert judged(ManifoldLabels(judge, int), pixels, prompts) == expected


# --- by name


def test_a_text_names_any_judge(folder, monkeypatch, tmp_path):
    (folder / "labels.csv").write_text("file,artifact\n0.png,1\n")
    assert judged(judge_named(str(folder)), files(folder)) == [1, None, None, None]

    table = str(ratings(tmp_path / "r.parquet", path=["1.png"], score=[2.0]))
    assert judged(judge_named(table, folder=folder, clean=0, bad=5), files(folder))[1] == pytest.approx(0.4)

    (tmp_path / "my_judge_of_tests.py").write_text(
        "class Reward:\n    def score(self, images, prompts):\n        return [len(prompt) for prompt in prompts]\n"
        "reward = Reward()\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = judge_named("my_judge_of_tests:reward.score", bad_below=3)
    assert judged(judge, files(folder), ["a", "abc", "abcd", ""]) == [1, 0, 0, 1]
    for name, message in [
        ("my_judge_of_tests:rewards.score", "there is no 'rewards'"),
        ("my_judge_of_tests:number", "must be a function, got 3"),
        ("no_such_module_of_tests:score", "cannot be imported"),
        (":score", "module:function"),
        ("my_judge_of_tests:", "module:function"),
    ]:
        with pytest.raises(InputError, match=message):
            import_function(name)
    sys.modules.pop("my_judge_of_tests")

    use_bundle(monkeypatch, tiny_bundle(tmp_path))
    labels = judged(judge_named("fashion"), files(folder), ["an ankle boot", "a house", "a bag", "a bag"])
    assert labels[1] is None and None not in (labels[0], labels[2], labels[3])
    with pytest.raises(CheckpointError, match="nothing bundled is called 'nobody'"):
        judge_named("nobody")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("r.parquet", {"bad_below": 1}, "bad_below cannot be used with 'r.parquet', which is a Parquet file"),
        (".", {"clean": 0, "bad": 1}, "clean and bad cannot be used with '.', which is a folder"),
        ("math:sqrt", {"folder": "x"}, "which is a function"),
        ("fashion", {"bad_above": 1}, "which is a bundled judge"),
        ("math:sqrt", {"bad_above": 1, "bad_below": 1}, "not both"),
    ],
)
def test_options_of_another_judge_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        judge_named(name, **options)


def test_every_judge_wants_a_prompt_per_image(folder):
    (folder / "labels.csv").write_text("file,artifact\n0.png,1\n")
    table = ratings(folder / "r.parquet", path=["0.png"], label=[1.0])
    judges = (VerdictJudge(folder), RatingJudge(table), ScoreJudge(lambda *_: [0]), ManifoldLabels(manifold()[0], int))
    for judge in judges:
        with pytest.raises(InputError, match="images and prompts must be as many, got 4 and 1"):
            judge(files(folder), ["a bag"])


def test_a_trajectory_takes_the_labels_once_the_unknown_ones_are_left_out(folder):
    (folder / "labels.csv").write_text("file,artifact\n0.png,1\n2.png,0\n")
    labels = VerdictJudge(folder)(files(folder), ["a bag"] * 4)

    def trajectory(labels):
        count = len(labels)
        return Trajectory(["a bag"] * count, [None] * count, [0], torch.zeros(1), {}, num_steps=1, label=labels)

    assert trajectory(labels[~labels.isnan()]).label.tolist() == [1, 0]
    with pytest.raises(InputError, match="label must be 4 numbers"):
        trajectory(labels)


def test_the_judges_of_the_page_are_made(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    use_bundle(monkeypatch, tiny_bundle(tmp_path))
    (tmp_path / "my_reward.py").write_text("def score(images, prompts):\n    return [-1.0 for _ in images]\n")
    ratings("ratings.parquet", path=["0.png"], score=[4.0])
    (folder / "labels.csv").write_text("file,artifact\n0.png,1\n")
    (tmp_path / "run").symlink_to(folder)
    calls = re.findall(r"^judge = (judge_named\(.*\))$", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    found = [judged(eval(call), ["run/0.png", "images/0.png"]) for call in calls]
    sys.modules.pop("my_reward")
    assert found[:3] == [[1, 1], pytest.approx([0.25, 0.25]), [1, 1]] and len(found) == 4
    assert isinstance(
        judge_named("fashion"), ManifoldLabels
    )  # the bundled one, though the folder of the bundle is here
    with pytest.raises(InputError, match="holds no finished image"):
        judge_named("./fashion")
