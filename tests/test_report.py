import dataclasses
import math

import pytest
import torch
from PIL import Image

from moe_artifacts.config import ThresholdConfig
from moe_artifacts.errors import InputError
from moe_artifacts.report import COLOURS, FRAME, LINE, OTHER_COLOUR, SIDE, Picture, save_curves, save_grid
from moe_artifacts.trajectory import Trajectory
from moe_artifacts.verdict import Verdict


def picture(judged="clean", **changes):
    return dataclasses.replace(Picture(torch.rand(3, 32, 32), ("a bag", "kept"), judged), **changes)


def count_pixels(path, colour):
    wanted = tuple(bytes.fromhex(colour[1:]))
    found = {c: n for n, c in Image.open(path).convert("RGB").getcolors(maxcolors=2**20)}
    return found.get(wanted, 0)


def scored(images=3, steps=(1, 4, 9)):
    prob = torch.linspace(0.1, 0.9, images * len(steps)).reshape(images, len(steps))
    prob[0, 1:] = math.nan  # stopped at the first scored step
    return Trajectory(
        prompts=["a bag"] * images,
        seeds=list(range(images)),
        step=list(steps),
        log_snr=torch.linspace(-3, 3, len(steps)),
        scores={"artifact_prob": prob, "cumulative_artifact_prob": prob / 2},
        num_steps=10,
    )


def verdicts(images=3):
    first = Verdict(0, "aborted", 1, 0.9, 0.8, "a bag", 0)
    return [first] + [Verdict(i, "kept", None, 0.1, 0.1, "a bag", i) for i in range(1, images)]


def test_every_pixel_of_a_small_image_becomes_a_square(tmp_path):
    image = torch.rand(3, 32, 32)
    save_grid(tmp_path / "grid.png", [picture(image=image)], [])
    left, top, side = 2 * FRAME, 2 * LINE + FRAME, SIDE // 32
    sheet = Image.open(tmp_path / "grid.png")
    for row, column in [(0, 0), (31, 31), (5, 20)]:
        x, y = left + column * side, top + row * side
        expected = tuple((image[:, row, column] * 255).round().int().tolist())
        assert sheet.crop((x, y, x + side, y + side)).getcolors() == [(side * side, expected)]


@pytest.mark.parametrize("side", ["kept", "stopped"])
@pytest.mark.parametrize("judged", ["clean", "artifacts", "unknown class"])
def test_the_frame_has_the_colour_of_the_judgement(tmp_path, judged, side):
    pictures = {"kept": [], "stopped": []} | {side: [picture(judged)] * 5}
    save_grid(tmp_path / "grid.png", **pictures)
    frames = 5 * ((SIDE + 2 * FRAME) ** 2 - SIDE**2)
    for colour in (*COLOURS.values(), OTHER_COLOUR):
        expected = colour == COLOURS.get(judged, OTHER_COLOUR)
        assert (count_pixels(tmp_path / "grid.png", colour) >= frames) == expected


@pytest.mark.parametrize(("kept", "stopped"), [(1, 0), (0, 1), (24, 1), (3, 7)])
def test_the_grid_has_room_for_all(tmp_path, kept, stopped):
    save_grid(tmp_path / "grid.png", [picture()] * kept, [picture()] * stopped)
    frames = (kept + stopped) * ((SIDE + 2 * FRAME) ** 2 - SIDE**2)
    assert count_pixels(tmp_path / "grid.png", COLOURS["clean"]) >= frames


def test_long_texts_and_broken_images_are_shown_as_far_as_possible(tmp_path):
    odd = picture(image=torch.full((3, 64, 32), math.nan), lines=("two\nlines " * 99, "\u9774 \U0001f462", ""))
    save_grid(tmp_path / "grid.png", [odd], [odd])
    Image.open(tmp_path / "grid.png").verify()


BOUNDARY = ((0.1, 0.4, 0.0), (0.5, 0.8, 0.1), (0.9, 1.5, 0.2))


@pytest.mark.parametrize("rule", ["cumulative", "posterior", "economic", None])
def test_curves_are_drawn_in_the_colours_of_the_judgements(tmp_path, rule):
    boundary = BOUNDARY if rule == "economic" else None
    threshold = None if rule is None else ThresholdConfig(rule=rule, threshold=0.3, boundary=boundary)
    judged, progress = ["artifacts", "clean", "unknown class"], torch.tensor([0.1, 0.5, 0.9])
    save_curves(tmp_path / "curves.png", scored(), verdicts(), judged, threshold, progress)
    Image.open(tmp_path / "curves.png").verify()
    for colour in (*COLOURS.values(), OTHER_COLOUR):
        assert count_pixels(tmp_path / "curves.png", colour) > 10  # the key at least; the curves are transparent


def test_what_does_not_fit_together_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"one per image, 3, got 3 and 2"):
        save_curves(tmp_path / "curves.png", scored(), verdicts(), ["clean"] * 2, None)
    economic = ThresholdConfig(rule="economic", threshold=0.5, boundary=BOUNDARY)
    with pytest.raises(InputError, match="progress is missing"):
        save_curves(tmp_path / "curves.png", scored(), verdicts(), ["clean"] * 3, economic)
    with pytest.raises(InputError, match=r"must end in \.png"):
        save_curves(tmp_path / "curves", scored(), verdicts(), ["clean"] * 3, None)
    with pytest.raises(InputError, match="both empty"):
        save_grid(tmp_path / "grid.png", [], [])
    assert list(tmp_path.iterdir()) == []
