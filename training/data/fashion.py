"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747, MIT licence) from its idx files.

28x28 grey images in ten classes, 60,000 to train and 10,000 held out. The default folder is where Debian's package
``dataset-fashion-mnist`` puts the files.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SIZE = 32  # 28 and a margin of 2, so that three halvings come out even


@dataclass(frozen=True)
class LabelledImages:
    """``images`` uint8 [image 28 28], ``labels`` int64 [image]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes, plain or gzipped, as an array of the shape its header states.

    Raises:
        ValueError: If the header is not that of an idx file of bytes, or the file is cut short.
    """
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:  # cut short, no gzip file, damaged
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes: it starts with {raw[:4]!r}")
    rank = raw[3]
    if len(raw) < 4 + 4 * rank:
        raise ValueError(f"{path} ends within its header: is it truncated?")
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{path} states the shape {shape} but holds {values.size} values: is it truncated?")
    return values.reshape(shape)


def load_fashion(split: str, folder: Path | None = None) -> LabelledImages:
    """The "train" or "test" images.

    Raises:
        FileNotFoundError: Naming the Debian package that brings the files.
    """
    folder = folder or DEBIAN_FOLDER
    arrays = []
    for stem in FILES[split]:
        path = next((p for p in (folder / f"{stem}.gz", folder / stem) if p.exists()), None)
        if path is None:
            raise FileNotFoundError(
                f"no {stem}(.gz) in {folder}: install Debian's package dataset-fashion-mnist (apt-get install "
                "dataset-fashion-mnist), or name the folder that holds the four idx files"
            )
        arrays.append(read_idx(path))
    images, labels = arrays
    if images.ndim != 3 or len(images) != len(labels):
        raise ValueError(f"{folder}: {images.shape} images and {labels.shape} labels do not belong together")
    return LabelledImages(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))


def to_rgb(images: Tensor) -> Tensor:
    """uint8 [image 28 28] to float32 [image 3 32 32] in [0, 1]: a black margin, three equal channels."""
    margin = (SIZE - images.shape[-1]) // 2
    grey = F.pad(images.float() / 255, (margin,) * 4)
    return grey[:, None].expand(-1, 3, -1, -1)
