"""Pictures: of a guarded run, its images side by side and the curves of its scores; of a calibration, what it is good for."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure  # without pyplot: no display, no global state
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from moe_artifacts.calibrated import Calibrated
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.decision import abort_boundary
from moe_artifacts.errors import InputError
from moe_artifacts.files import atomic_path
from moe_artifacts.trajectory import Trajectory
from moe_artifacts.verdict import Verdict

# By what the judge says of the finished image. Two colours that colour-blind eyes tell apart (Okabe and Ito).
COLOURS = {"artifacts": "#d55e00", "clean": "#0072b2"}
OTHER_COLOUR = "#7f7f7f"

SIDE = 128  # pixels, the longer side of a picture in the grid
FRAME = 4
CELL = SIDE + 2 * FRAME + 24  # wide enough for a line of text
GAP = 24  # between the kept and the stopped
LINE = 15
FONT_SIZE = 12


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of the grid."""

    image: Float[Tensor, "3 pixel_h pixel_w"]  # RGB in [0, 1]; NaN is shown black
    lines: tuple[str, ...]  # under it; what does not fit is cut off
    judged: str  # a key of COLOURS, or anything else


def save_grid(path: str | os.PathLike[str], kept: Sequence[Picture], stopped: Sequence[Picture]) -> None:
    """Kept images on the left; on the right what the stopped ones would have become. The frame is the judge's word.

    Raises:
        InputError: If there is no picture at all, or ``path`` does not end in .png.
    """
    _require_png(path)
    if not kept and not stopped:
        raise InputError("kept and stopped are both empty: the grid needs a picture")
    blocks = [
        _block(f"kept: {len(kept)}", kept),
        _block(f"stopped: {len(stopped)}, and what they would have become", stopped),
    ]
    between, height = blocks[0].width + GAP // 2, max(block.height for block in blocks)
    sheet = Image.new("RGB", (sum(block.width for block in blocks) + GAP, height + 2 * LINE), "white")
    sheet.paste(blocks[0], (0, 0))
    sheet.paste(blocks[1], (between + GAP // 2, 0))
    draw, at = ImageDraw.Draw(sheet), float(FRAME)
    draw.line((between, 0, between, height), fill="black")
    key = (("The judge, of the finished image:", "black"), *COLOURS.items(), ("no verdict", OTHER_COLOUR))
    for text, colour in key:
        draw.text((at, sheet.height - 1.5 * LINE), text, fill=colour, font=_font())
        at += _font().getlength(text) + LINE
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def save_curves(
    path: str | os.PathLike[str],
    trajectory: Trajectory,
    verdicts: Sequence[Verdict],
    judged: Sequence[str],
    rule: ThresholdConfig | None,
    progress: Float[Tensor, " step"] | None = None,
) -> None:
    """Cumulative artifact probability and posterior of every image at its scored steps, a cross where it was stopped.

    Args:
        trajectory: Scored.
        verdicts: One per image.
        judged: What the judge says of each finished image; the colour of its curve.
        rule: Its threshold is drawn beside the quantity it decides by.
        progress: Of the scored steps, in [0, 1]; needed by the economic rule, whose threshold depends on it.
    Raises:
        InputError: If verdicts and judged are not one per image, ``path`` does not end in .png, or progress is missing.
    """
    _require_png(path)
    images = len(trajectory.prompts)
    if len(verdicts) != images or len(judged) != images:
        raise InputError(f"verdicts and judged must be one per image, {images}, got {len(verdicts)} and {len(judged)}")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    steps_done = [step + 1 for step in trajectory.step]
    names = {"cumulative_artifact_prob": "cumulative artifact probability", "artifact_prob": "posterior"}
    for panel, (name, title) in zip(panels, names.items(), strict=True):
        for values, verdict, word in zip(trajectory.scores[name].tolist(), verdicts, judged, strict=True):
            colour = COLOURS.get(word, OTHER_COLOUR)
            panel.plot(steps_done, values, color=colour, alpha=0.6, linewidth=1, marker=".", markersize=4)
            if verdict.status in ("aborted", "rejected") and verdict.step in trajectory.step:
                end = trajectory.step.index(verdict.step)
                panel.plot(steps_done[end], values[end], color=colour, marker="x", markersize=8)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set(title=title, xlabel="denoiser steps done", xlim=(0, trajectory.num_steps + 1), ylim=(-0.02, 1.02))
    key = [
        Line2D([], [], color=COLOURS.get(word, OTHER_COLOUR), label=f"{word} ({list(judged).count(word)})")
        for word in sorted(set(judged))
    ]
    key.append(Line2D([], [], color="black", linestyle="none", marker="x", label="stopped"))
    if rule is not None:
        line: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
        label = f"threshold {rule.threshold:.3g} ({rule.rule})"
        if rule.rule == "cumulative":
            panels[0].axhline(rule.threshold, **line)
        elif rule.rule == "economic":
            if progress is None:
                raise InputError("progress is missing: the economic rule's threshold depends on it")
            needed = abort_boundary(rule, progress)
            needed[needed > 1] = torch.nan  # it never aborts there
            panels[1].plot(steps_done, needed.tolist(), marker="_", **line)
            label = "posterior that aborts (economic)"
        else:  # these decide by the posterior too: now, over several checks, or at one of them
            panels[1].axhline(rule.threshold, **line)
        key.append(Line2D([], [], label=label, **line))
    # Below the panels: inside, it would hide curves.
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), title="The judge, of the finished image")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def save_calibration(path: str | os.PathLike[str], found: Calibrated) -> None:
    """The posterior against what became of the images, and what every other threshold would do, on the part held back.

    Raises:
        InputError: If ``path`` does not end in .png.
    """
    _require_png(path)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    bins, most = found.reliability, max(line.count for line in found.reliability)
    left.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    left.scatter(
        [line.predicted for line in bins],
        [line.observed for line in bins],
        s=[10 + 150 * line.count / most for line in bins],
        color=COLOURS["artifacts"],
        clip_on=False,
    )
    left.set(
        title="posterior (area: how often)", xlabel="mean posterior", ylabel="really bad", xlim=(0, 1), ylim=(0, 1)
    )
    curve, promised = found.curve, found.request.risk in ("per-image", "per-prompt")
    middle.plot(curve["threshold"], curve["recall"], color=COLOURS["artifacts"], label="bad images found")
    middle.plot(curve["threshold"], curve["false_abort_rate"], color=COLOURS["clean"], label="clean images aborted")
    if promised:
        limit = f"promised: at most {100 * found.request.max_risk:g} %"
        middle.axhline(found.request.max_risk, color=COLOURS["clean"], linestyle=":", linewidth=1, label=limit)
    middle.set(title="what a threshold does", xlabel="threshold", ylabel="share", ylim=(-0.02, 1.02))
    right.axhline(0, color=OTHER_COLOUR, linewidth=1)
    right.plot(curve["threshold"], 100 * curve["cost_per_clean"], color="black")
    right.set(title="cost per clean image, scoring included", xlabel="threshold", ylabel="change in %")
    for panel in (middle, right):
        label = f"{found.rule.rule}, {found.rule.threshold:.3g}"
        panel.axvline(found.rule.threshold, color="black", linestyle="--", linewidth=1, label=label)
        panel.legend(loc="best", fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _block(title: str, pictures: Sequence[Picture]) -> Image.Image:
    columns = max(1, math.ceil(math.sqrt(len(pictures))))
    height = SIDE + 2 * FRAME + LINE * (1 + max((len(p.lines) for p in pictures), default=0))
    width = max(columns * CELL, round(_font().getlength(title)) + 4 * FRAME)
    block = Image.new("RGB", (width, 2 * LINE + math.ceil(len(pictures) / columns) * height), "white")
    draw = ImageDraw.Draw(block)
    draw.text((FRAME, LINE // 2), title, fill="black", font=_font())
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        left, top = FRAME + column * CELL, 2 * LINE + row * height
        image = _enlarged(picture.image)
        corner = (left + image.width + 2 * FRAME - 1, top + image.height + 2 * FRAME - 1)
        draw.rectangle((left, top, *corner), fill=COLOURS.get(picture.judged, OTHER_COLOUR))
        block.paste(image, (left + FRAME, top + FRAME))
        for number, line in enumerate(picture.lines):
            under = top + SIDE + 2 * FRAME + number * LINE
            draw.text((left, under), _fitting(line, CELL - FRAME), fill="black", font=_font())
    return block


def _enlarged(image: Float[Tensor, "3 pixel_h pixel_w"]) -> Image.Image:
    """By nearest neighbour: the pixels of a small image stay what they are."""
    pixels = (image.detach().float().cpu().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    height, width = pixels.shape[1:]
    scale = SIDE / max(height, width)
    shown = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return shown.resize((round(width * scale), round(height * scale)), Image.Resampling.NEAREST)


def _fitting(text: str, width: int) -> str:
    text = " ".join(text.split())  # a prompt may have several lines, which cannot be measured
    while text and _font().getlength(text) > width:
        text = text[:-1]
    return text


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _require_png(path: str | os.PathLike[str]) -> None:
    if not os.fspath(path).endswith(".png"):
        raise InputError(f"path must end in .png, got {os.fspath(path)!r}")
