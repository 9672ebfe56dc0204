"""A folder of images with a sub-folder for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def discs_and_bars(folder: Path, count: int) -> Path:
    """Two classes of coloured pictures of several shapes and formats."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:36j, -1:1:40j]
    for number in range(count):
        middle, size = rng.uniform(-0.3, 0.3, 2), rng.uniform(0.3, 0.6)
        disc = np.hypot(x - middle[0], y - middle[1]) < size
        bar = abs(x - middle[0]) < size / 2
        for name, shape in (("disc", disc), ("bar", bar)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            colours = rng.integers(0, 256, (2, 3), dtype=np.uint8)
            picture = Image.fromarray(np.where(shape[..., None], colours[0], colours[1]).astype(np.uint8))
            picture.save(folder / name / f"{number:03d}.{'jpg' if number % 2 else 'png'}")
    return folder
