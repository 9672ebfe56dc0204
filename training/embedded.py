"""Embeddings on disk as the heads are trained on them: any rows, in any order, a batch in memory.

:mod:`training.embed` wrote the folder and says what is in it. Held in memory are about 40 bytes an image; what belongs to a row is
read from the middle of its file when it is asked for. The files are not mapped: pages of a map stay in memory for as long as
nobody else wants it, and count as this process's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.files import read_json
from moe_artifacts.shapes import Embedding, PerImage, Rows, StepValues
from training.row_jobs import META, complete_shards

OPEN_FILES = 256  # at once; systems allow 1024 by default
NUMPY: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "I32": np.int32}
DTYPES = {"embedding": "F16", "log_snr": "F32", "step": "I32", "text": "F16", "prompt": "I32"}


@dataclass(frozen=True)
class EmbeddedBatch:
    """Some images; float32."""

    embedding: Float[Tensor, "batch step embed"]  # of length 1; 0 where there is no such check
    log_snr: StepValues  # nats; NaN where there is no such check
    spent: StepValues  # share of the denoiser calls made by this check; 0 where there is no such check
    text: Embedding
    label: PerImage  # NaN: not known
    margin: PerImage  # NaN: not known


class EmbeddedRows:
    """The images of a folder of :mod:`training.embed`.

    Attributes:
        label: P(artifacts) of the finished image, in [0, 1]; NaN where it is not known.
        margin: The judge's, above 0 where it found artifacts; NaN where it is not known.
        prompt_id: Equal for equal prompts, 0 the first one's.
        checks: The most levels that an image has.
        embed_dim: Width of an embedding.
    Raises:
        InputError: If the folder is none, shards are missing or damaged, or it holds no images.
    """

    label: PerImage
    margin: PerImage
    prompt_id: Rows

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        meta = read_json(self.folder / META)
        if not isinstance(meta, dict) or not {"checks", "embed_dim", "shards"} <= meta.keys():
            raise InputError(f"{self.folder} is not a folder of training.embed: its {META} lacks checks or embed_dim")
        self.meta: dict[str, Any] = meta
        self.checks, self.embed_dim = int(meta["checks"]), int(meta["embed_dim"])
        self._files: list[Path] = []
        self._open: OrderedDict[int, int] = OrderedDict()  # shard to file descriptor, last used last
        self._read_columns(complete_shards(self.folder))

    def __len__(self) -> int:
        return len(self.label)

    def __del__(self) -> None:
        for handle in getattr(self, "_open", {}).values():
            os.close(handle)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # a descriptor means nothing in another process

    def take(self, rows: Rows) -> EmbeddedBatch:
        """Some images, in the order asked for; one may be asked for twice.

        Raises:
            IndexError: If there is no such row.
            InputError: If a file is cut short.
        """
        index = rows.cpu().numpy()
        if len(index) and not (0 <= index.min() and index.max() < len(self)):
            raise IndexError(f"rows must be from 0 to {len(self) - 1}, got {index.min()} to {index.max()}")
        shard = np.searchsorted(self._ends, index, side="right")
        place = index - np.concatenate([[0], self._ends])[shard]
        step = self._gather("step", shard, place, (self.checks,))
        return EmbeddedBatch(
            embedding=self._gather("embedding", shard, place, (self.checks, self.embed_dim)).float(),
            log_snr=self._gather("log_snr", shard, place, (self.checks,)),
            spent=(step + 1) / torch.from_numpy(self._num_steps[index])[:, None],
            text=self._gather("text", shard, self._text_row[index], (self.embed_dim,)).float(),
            label=self.label[rows],
            margin=self.margin[rows],
        )

    def _read_columns(self, files: list[Path]) -> None:
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("label", "margin", "num_steps", "text", "prompt")}
        offsets, counts = [], []
        for path in files:
            try:
                table = pq.read_table(path, columns=["prompt", "label", "margin", "num_steps"])
                if len(table) == 0:
                    continue
                offset, text_row = _open_tensors(path.with_suffix(".safetensors"), self._shapes(len(table)))
            except (OSError, pa.ArrowException, SafetensorError, ValueError) as error:
                raise InputError(f"{path} cannot be read: {error}; delete it and embed again") from error
            self._files.append(path.with_suffix(".safetensors"))
            offsets.append(offset)
            counts.append(len(table))
            for name in ("label", "margin", "num_steps"):
                columns[name].append(table[name].to_numpy())  # null becomes NaN
            columns["text"].append(text_row)
            columns["prompt"].append(_hashes(table["prompt"]))
        if not counts:
            raise InputError(f"{self.folder} holds no images: all were rejected, see its folder rejects")
        self._offsets = offsets  # of each tensor in each file
        self._ends = np.cumsum(counts)
        self.label, self.margin = (
            torch.from_numpy(np.concatenate(columns[name]).astype(np.float32)) for name in ("label", "margin")
        )
        self._num_steps = np.concatenate(columns["num_steps"]).astype(np.int32)
        self._text_row = np.concatenate(columns["text"])
        self.prompt_id = torch.from_numpy(_numbered(np.concatenate(columns["prompt"])))

    def _shapes(self, images: int) -> dict[str, tuple[int | None, ...]]:
        per_image = {"embedding": (self.checks, self.embed_dim), "log_snr": (self.checks,), "step": (self.checks,)}
        of_images = {name: (images, *rest) for name, rest in {**per_image, "prompt": ()}.items()}
        return {**of_images, "text": (None, self.embed_dim)}  # as many as there are prompts

    def _gather(self, name: str, shard: np.ndarray, place: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        """Rows of a tensor; each is read once, neighbours together."""
        dtype = NUMPY[DTYPES[name]]
        size = np.dtype(dtype).itemsize * math.prod(shape)
        wanted, inverse = np.unique((shard.astype(np.int64) << 32) | place, return_inverse=True)
        found = np.empty((len(wanted), size), dtype=np.uint8)
        starts = np.flatnonzero(np.diff(wanted, prepend=-2) != 1)  # of runs of neighbours, which are of one file
        for start, stop in pairwise([*starts.tolist(), len(wanted)]):
            number, first = divmod(int(wanted[start]), 1 << 32)
            self._read(number, self._offsets[number][name] + first * size, found[start:stop])
        values = found.view(dtype).reshape(len(wanted), *shape)
        return torch.from_numpy(values[inverse])

    def _read(self, shard: int, offset: int, into: np.ndarray) -> None:
        handle, view = self._handle(shard), into.reshape(-1).data
        while len(view):
            count = os.preadv(handle, [view], offset)  # at most 2 GB
            if count == 0:
                raise InputError(f"{self._files[shard]} is cut short; delete its .parquet file and embed again")
            view, offset = view[count:], offset + count

    def _handle(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[shard] = os.open(self._files[shard], os.O_RDONLY)
        except OSError as error:
            raise InputError(f"cannot read {self._files[shard]}: {error.strerror}; embed again") from error
        return self._open[shard]


def _open_tensors(path: Path, shapes: dict[str, tuple[int | None, ...]]) -> tuple[dict[str, int], np.ndarray]:
    """Where each tensor begins in a safetensors file, and the one that is held in memory: each image's row of ``text``.

    Raises:
        ValueError: If a tensor is missing, or of another shape than expected; None is any length.
        SafetensorError: If the file is damaged or cut short.
    """
    with safe_open(path, framework="np") as file:  # checks the header, which is then safe to read
        for name, shape in shapes.items():
            tensor = file.get_slice(name) if name in file.keys() else None
            found = (tensor.get_dtype(), tuple(tensor.get_shape())) if tensor is not None else None
            if found is None or found[0] != DTYPES[name] or not _fits(found[1], shape):
                raise ValueError(f"{path.name}: {name} must be {DTYPES[name]} {shape}, got {found}")
        text_row = file.get_tensor("prompt")
        prompts = file.get_slice("text").get_shape()[0]
    if not (0 <= text_row.min() and text_row.max() < prompts):
        raise ValueError(f"{path.name}: prompt must be rows of text, 0 to {prompts - 1}")
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {name: 8 + length + header[name]["data_offsets"][0] for name in shapes}, text_row


def _fits(found: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(found) == len(shape) and all(b in (None, a) for a, b in zip(found, shape, strict=True))


def _hashes(prompts: pa.ChunkedArray) -> np.ndarray:
    """64 bits of each: a million texts would take a hundred megabytes. That two of them meet has a chance of 3e-8."""
    coded = prompts.combine_chunks().dictionary_encode()
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in coded.dictionary.to_pylist())
    return np.frombuffer(digests, dtype=np.uint64)[coded.indices.to_numpy()]


def _numbered(hashes: np.ndarray) -> np.ndarray:
    """Numbers in the order of first appearance.

    Example:
        >>> _numbered(np.array([7, 9, 7, 1], dtype=np.uint64)).tolist()
        [0, 1, 0, 2]
    """
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse].astype(np.int64)
