"""Labels of finished images, whoever judges them: ``judge(images, prompts) -> labels``.

    RatingJudge       a Parquet file of people's scores
    VerdictJudge      a folder that people have labelled with ``moe-artifacts label``
    ScoreJudge        a function of images and prompts: a reward model, a detector
    ManifoldLabels    how far an image is from real ones, by ``moe_artifacts.judge``

A label is a number in [0, 1]: 1 has artifacts, 0 is clean, between them is the share of raters who saw artifacts. It is NaN
where the judge says nothing of the image, since nobody has rated it, or its prompt is of no class that the judge knows. Such
images are to be left out: a trajectory takes no NaN for a label.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from moe_artifacts import bundled
from moe_artifacts.embedder import state_sha256
from moe_artifacts.errors import InputError
from moe_artifacts.files import read_json
from moe_artifacts.judge import ManifoldJudge, class_in, load_judge
from moe_artifacts.label import find_images, rater_tables, read_verdicts
from moe_artifacts.shapes import PerImage, Preview
from training.data.columns import stream_columns
from training.data.images import read_rgb, square, to_preview
from training.data.rated import label_of

FinishedImage: TypeAlias = str | os.PathLike[str] | Image.Image | Float[Tensor, "3 pixel_h pixel_w"]  # RGB in [0, 1]
FinishedImages: TypeAlias = Sequence[FinishedImage] | Preview

CLASSES = "classes.json"  # names of the classes of a judge, beside its file or one folder above


@runtime_checkable  # for `make shapes`
class Judge(Protocol):
    """Whoever says of finished images whether they have artifacts."""

    def __call__(self, images: FinishedImages, prompts: Sequence[str]) -> PerImage:
        """Labels as float32 in [0, 1], or NaN.

        Raises:
            InputError: If images and prompts differ in number, or an image cannot be read, or is none that this judge
                takes.
        """
        ...


class LabelTable:
    """What people have said of image files, by their place."""

    def __init__(self, labels: Mapping[str, float]) -> None:
        self._labels = labels

    def __call__(self, images: FinishedImages, prompts: Sequence[str]) -> PerImage:
        _require_as_many(images, prompts)
        found = []
        for image in images:
            if not isinstance(image, str | os.PathLike):
                raise InputError(
                    f"people's labels belong to files, so images must be paths, got a {type(image).__name__}"
                )
            found.append(self._labels.get(_place(image), math.nan))
        return torch.tensor(found, dtype=torch.float32)

    def sha256(self) -> str:
        """Of all labels, in lower-case hex: another one when somebody has said more."""
        return hashlib.sha256(json.dumps(self._labels, sort_keys=True).encode()).hexdigest()


class RatingJudge(LabelTable):
    """People's scores from a Parquet file: one row per rating, so that several rows of an image are averaged.

    Args:
        table: With the columns ``path`` and ``score``; or, without ``clean`` and ``bad``, ``path`` and ``label``.
        folder: What the paths are relative to. None: the folder of the table.
        clean: The score of an image without artifacts.
        bad: That of a ruined one; above or below ``clean``.
    Raises:
        InputError: If the table cannot be read or rates no image, or a score is not between ``clean`` and ``bad``.
    """

    def __init__(
        self,
        table: str | os.PathLike[str],
        folder: str | os.PathLike[str] | None = None,
        *,
        clean: float | None = None,
        bad: float | None = None,
    ) -> None:
        if (clean is None) != (bad is None) or (clean is not None and clean == bad):
            raise InputError(f"clean and bad must be two different scores, or both left out, got {clean} and {bad}")
        column = "label" if clean is None or bad is None else "score"
        low, high = (0.0, 1.0) if clean is None or bad is None else (clean, bad)
        folder = Path(table).parent if folder is None else Path(folder)
        labels: dict[str, list[float]] = defaultdict(list)
        for part in stream_columns(table, {"path": pa.string(), column: pa.float64()}):
            for path, score in zip(part["path"].to_pylist(), part[column].to_pylist(), strict=True):
                if path is None or score is None or math.isnan(score):
                    continue
                if not min(low, high) <= score <= max(low, high):
                    raise InputError(
                        f"{table}: {column} of {path!r} must be between {low:g} and {high:g}, got {score:g}"
                    )
                labels[_place(folder / path)].append(score)
        if not labels:
            raise InputError(f"{table} rates no image: no row has both a path and a {column}")
        super().__init__({place: float(label_of(np.array(given), low, high).mean()) for place, given in labels.items()})


class VerdictJudge(LabelTable):
    """Verdicts of people from the folder of the images; of several raters, the share that saw artifacts.

    Raises:
        InputError: If there are no images or no verdicts, or a table cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        images = find_images(folder)
        tables = rater_tables(folder)
        verdicts: dict[str, list[int]] = defaultdict(list)
        for table in tables:
            for file, verdict in read_verdicts(table, images).items():
                verdicts[file].append(verdict)
        if not verdicts:
            raise InputError(f"{folder} has no verdicts in {len(tables)} tables: run `moe-artifacts label {folder}`")
        super().__init__(
            {
                _place(image.path): sum(verdicts[image.file]) / len(verdicts[image.file])
                for image in images
                if image.file in verdicts
            }
        )


class ScoreJudge:
    """A function of pictures and prompts that returns one number for each, or None where it has nothing to say.

    Args:
        function: Takes a list of PIL images in RGB and a list of prompts.
        bad_below: Images with a lower score have artifacts, the others are clean: for rewards.
        bad_above: Images with a higher score have artifacts: for detectors. Without both the numbers are labels already.
    """

    def __init__(
        self,
        function: Callable[[list[Image.Image], list[str]], Iterable[Any]],
        *,
        bad_below: float | None = None,
        bad_above: float | None = None,
    ) -> None:
        if bad_below is not None and bad_above is not None:
            raise InputError(f"give bad_below or bad_above, not both, got {bad_below} and {bad_above}")
        self._function, self._bad_below, self._bad_above = function, bad_below, bad_above

    @torch.no_grad()
    def __call__(self, images: FinishedImages, prompts: Sequence[str]) -> PerImage:
        """Raises, beside what every judge does:

        InputError: If there are not as many numbers as images, one is not finite, or is no label.
        """
        _require_as_many(images, prompts)
        if len(images) == 0:
            return torch.zeros(0)  # models stack what they are given
        told = self._function([_as_picture(image) for image in images], list(prompts))
        scores = [math.nan if value is None else self._label(value) for value in told]
        if len(scores) != len(images):
            raise InputError(f"the scoring function must return a number per image, got {len(scores)} of {len(images)}")
        return torch.tensor(scores, dtype=torch.float32)

    def _label(self, value: Any) -> float:
        try:
            score = float(value)  # a number, or a tensor or an array of one
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"the scoring function must return a number per image, got {value!r}") from error
        if not math.isfinite(score):
            raise InputError(f"the scoring function must return finite numbers, or None for no opinion, got {score}")
        if self._bad_below is not None:
            return float(score < self._bad_below)
        if self._bad_above is not None:
            return float(score > self._bad_above)
        if not 0 <= score <= 1:
            raise InputError(f"{score:g} is no label in [0, 1]: say with bad_below or bad_above which scores are bad")
        return score


class ManifoldLabels:
    """Images that are farther from the real ones of their class than its threshold have artifacts.

    Args:
        judge: Looks at images of its own size.
        class_of: The number of the class that a prompt asks for; None: of none that the judge knows.
    """

    def __init__(self, judge: ManifoldJudge, class_of: Callable[[str], int | None]) -> None:
        self._judge, self._class_of = judge, class_of

    def sha256(self) -> str:
        """Of the judge's weights: a file of the same name may hold another one tomorrow."""
        return state_sha256(self._judge.state_dict())

    def __call__(self, images: FinishedImages, prompts: Sequence[str]) -> PerImage:
        margin = self.margin(images, prompts)
        return torch.where(margin.isnan(), margin, (margin > 0).float())

    def margin(self, images: FinishedImages, prompts: Sequence[str]) -> PerImage:
        """How far each image is beyond the threshold of its class: labels are 1 above 0; NaN where there is no class."""
        _require_as_many(images, prompts)
        margins = torch.full((len(images),), torch.nan)
        classes = [self._class_of(prompt) for prompt in prompts]
        rows = [row for row, number in enumerate(classes) if number is not None]
        if rows:
            pixels = torch.stack([_for_manifold(images[row], self._judge.size) for row in rows])
            margins[rows] = self._judge.margin(pixels, torch.tensor([classes[row] for row in rows]))
        return margins


def judge_named(
    name: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    clean: float | None = None,
    bad: float | None = None,
    bad_below: float | None = None,
    bad_above: float | None = None,
) -> Judge:
    """The judge that a text means, as given on a command line.

    Args:
        name: ``FILE.parquet`` (people's scores), a folder labelled with ``moe-artifacts label``, ``module:function``,
            ``manifold:FILE.safetensors`` (a judge of ``training.judges``, with ``classes.json`` beside it or one folder
            above), or the name of a bundled judge, which comes before a folder of that name: ``./fashion`` is the folder.
        folder: What the paths in a Parquet file are relative to.
        clean: Score of a clean image in a Parquet file; with ``bad``, that of a ruined one.
        bad_below: Of a function: images with a lower score have artifacts; ``bad_above``: those with a higher one.
    Raises:
        InputError: If there is no such file or function, or an option belongs to another kind of judge.
        CheckpointError: If there is no bundled judge of that name, or the file of a judge cannot be read.
    """
    of_ratings = {"folder": folder, "clean": clean, "bad": bad}
    of_function = {"bad_below": bad_below, "bad_above": bad_above}
    if name.endswith(".parquet"):
        _refuse_given(of_function, name, "a Parquet file of scores")
        return RatingJudge(name, folder, clean=clean, bad=bad)
    is_bundled = name.isidentifier() and (bundled.FOLDER / name / "judge.safetensors").is_file()
    if Path(name).is_dir() and not is_bundled:
        _refuse_given(of_ratings | of_function, name, "a folder of verdicts")
        return VerdictJudge(name)
    if name.startswith("manifold:"):
        _refuse_given(of_ratings | of_function, name, "a manifold judge")
        return manifold_labels(name.removeprefix("manifold:"))
    if ":" in name:
        _refuse_given(of_ratings, name, "a function")
        return ScoreJudge(import_function(name), bad_below=bad_below, bad_above=bad_above)
    _refuse_given(of_ratings | of_function, name, "a bundled judge")
    return ManifoldLabels(
        bundled.bundled_judge(name), functools.lru_cache(functools.partial(bundled.class_of, name=name))
    )


def manifold_labels(path: str | os.PathLike[str]) -> ManifoldLabels:
    """A judge of ``training.judges`` from its file, and the classes it knows from ``classes.json``.

    Raises:
        CheckpointError: If the judge cannot be read.
        InputError: If there is no ``classes.json`` beside the judge or one folder above, or it is of another judge.
    """
    file = Path(path)
    judge = load_judge(file)
    beside = [folder / CLASSES for folder in (file.parent, file.absolute().parent.parent)]
    found = next((place for place in beside if place.is_file()), None)
    if found is None:
        raise InputError(
            f"{file} needs a {CLASSES} beside it or one folder above, with a list of names for each of its "
            f"{len(judge.reference)} classes: training.judges writes one"
        )
    classes = read_json(found)
    if not _are_names(classes) or len(classes) != len(judge.reference):
        raise InputError(
            f"{found} must hold a list of names for each of the {len(judge.reference)} classes of {file}, got "
            f"{len(classes) if isinstance(classes, list) else type(classes).__name__}"
        )
    return ManifoldLabels(judge, functools.lru_cache(functools.partial(class_in, classes=classes)))


def import_function(name: str) -> Callable[..., Any]:
    """What ``module:function`` means; ``module:object.method`` too. The module must be on Python's path.

    Raises:
        InputError: If there is none.

    Example:
        >>> import_function("math:sqrt")(4)
        2.0
    """
    module, _, path = name.partition(":")
    if not module or not path:
        raise InputError(f"a function is named as module:function, got {name!r}")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{name}: {module} cannot be imported: {error}; run the command from the folder of the module, or put that "
            "folder into PYTHONPATH"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(f"{name}: there is no {part!r} in {found!r}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name} must be a function, got {found!r}")
    return found


def _refuse_given(options: dict[str, Any], name: str, kind: str) -> None:
    if given := [option for option, value in options.items() if value is not None]:
        raise InputError(f"{' and '.join(given)} cannot be used with {name!r}, which is {kind}")


def _require_as_many(images: FinishedImages, prompts: Sequence[str]) -> None:
    if len(images) != len(prompts):
        raise InputError(f"images and prompts must be as many, got {len(images)} and {len(prompts)}")


def _place(path: str | os.PathLike[str]) -> str:
    """One name for a file however its path is written; an image that is itself a link keeps its own name."""
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder, os.getcwd()), name)


@functools.lru_cache(maxsize=1024)  # one look at the disk for a folder, not one for each of a million images
def _real_folder(folder: str, working_folder: str) -> str:
    return os.path.realpath(os.path.join(working_folder, folder))


def _as_picture(image: FinishedImage) -> Image.Image:
    if isinstance(image, Tensor):
        pixels = _checked(image).permute(1, 2, 0) * 255
        return Image.fromarray(pixels.round().to(torch.uint8).cpu().numpy())
    return image.convert("RGB") if isinstance(image, Image.Image) else read_rgb(image)


def _for_manifold(image: FinishedImage, size: int) -> Float[Tensor, "3 pixel_h pixel_w"]:
    if isinstance(image, Tensor) and image.shape[1:] == (size, size):
        return _checked(image).float()
    picture = _as_picture(image)
    return to_preview(picture if picture.size == (size, size) else square(picture, size))[0]  # as it saw real ones


def _are_names(classes: Any) -> bool:
    return isinstance(classes, list) and all(
        isinstance(names, list) and names and all(isinstance(name, str) for name in names) for names in classes
    )


def _checked(image: Tensor) -> Tensor:
    if image.ndim != 3 or len(image) != 3:
        raise InputError(f"an image must be of shape [3, height, width], got {list(image.shape)}")
    if not ((image >= 0) & (image <= 1)).all():  # NaN fails too
        raise InputError(f"an image must be finite and in [0, 1], got values from {image.min():g} to {image.max():g}")
    return image
