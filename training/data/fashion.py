"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747, MIT licence) from its idx files or from the Hub.

28x28 grey images in ten classes, 60,000 to train and 10,000 held out. By default they come from the idx files of Debian's
package ``dataset-fashion-mnist``; ``MOE_ARTIFACTS_FASHION`` names another folder of idx files, or the dataset on the Hub
(``zalando-datasets/fashion_mnist``), of which the Parquet files are read.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_artifacts.shapes import Preview

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

    @property
    def size(self) -> int:
        """Pixels a side of what ``rgb`` returns."""
        return SIZE

    @property
    def coloured(self) -> bool:
        """Whether the three channels can differ."""
        return False

    def rgb(self, rows: Tensor | slice) -> Preview:
        """Some images, RGB in [0, 1]."""
        return to_rgb(self.images[rows])

    def subset(self, rows: Tensor) -> LabelledImages:
        """Some images with their labels."""
        return LabelledImages(self.images[rows], self.labels[rows])


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


def read_parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a Parquet file as ``datasets`` writes them: ``image`` holds an encoded file, ``label`` a number.

    Raises:
        ValueError: If a column is missing, or an image cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image, UnidentifiedImageError

    try:
        table = pq.read_table(path, columns=["image", "label"])
        encoded = table["image"].combine_chunks().field("bytes")
        images = [np.asarray(Image.open(io.BytesIO(cell.as_py())).convert("L")) for cell in encoded]
    except (pa.ArrowException, KeyError, TypeError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is no Parquet file with the columns image and label: {error}") from error
    return np.stack(images), table["label"].to_numpy()


def load_fashion(split: str, source: Path | str | None = None) -> LabelledImages:
    """The "train" or "test" images.

    Args:
        source: A folder of idx files, or a dataset on the Hub ("owner/name"), which is the one case that uses the network;
            by default what ``MOE_ARTIFACTS_FASHION`` says, or the Debian package's folder.
    Raises:
        FileNotFoundError: Naming the Debian package that brings the files.
        ValueError: If the files are damaged or do not belong together.
    """
    source = source or os.environ.get("MOE_ARTIFACTS_FASHION") or DEBIAN_FOLDER
    if _is_hub_id(source):
        from huggingface_hub import hf_hub_download

        name = f"fashion_mnist/{split}-00000-of-00001.parquet"
        images, labels = read_parquet(Path(hf_hub_download(str(source), name, repo_type="dataset")))
    else:
        images, labels = (read_idx(_find(Path(source), stem)) for stem in FILES[split])
    if images.ndim != 3 or len(images) != len(labels):
        raise ValueError(f"{source}: {images.shape} images and {labels.shape} labels do not belong together")
    return LabelledImages(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))


def _is_hub_id(source: Path | str) -> bool:
    return isinstance(source, str) and source.count("/") == 1 and source[0] not in "./~" and not Path(source).exists()


def _find(folder: Path, stem: str) -> Path:
    path = next((p for p in (folder / f"{stem}.gz", folder / stem) if p.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"no {stem}(.gz) in {folder}: install Debian's package dataset-fashion-mnist (apt-get install "
            "dataset-fashion-mnist), or set MOE_ARTIFACTS_FASHION to the folder that holds the four idx files, or to "
            "zalando-datasets/fashion_mnist to download it from the Hub"
        )
    return path


def to_rgb(images: Tensor) -> Tensor:
    """uint8 [image 28 28] to float32 [image 3 32 32] in [0, 1]: a black margin, three equal channels."""
    margin = (SIZE - images.shape[-1]) // 2
    grey = F.pad(images.float() / 255, (margin,) * 4)
    return grey[:, None].expand(-1, 3, -1, -1)
