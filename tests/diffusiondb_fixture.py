"""A small DiffusionDB with AI-Horde ratings: zip parts, metadata and ratings with the published columns and types.

The first images have one fault each, counted in ``planted`` under the name of the filter that must find it; the others are
good. Broken pictures are stripes over a soft colour, and their ratings say so, so that a scorer can learn from them.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import struct
import uuid
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

# https://huggingface.co/datasets/poloclub/diffusiondb, "Metadata Schema"
METADATA_SCHEMA = pa.schema(
    {
        "image_name": pa.string(),
        "prompt": pa.string(),
        "part_id": pa.uint16(),
        "seed": pa.uint32(),
        "step": pa.uint16(),
        "cfg": pa.float32(),
        "sampler": pa.uint8(),
        "width": pa.uint16(),
        "height": pa.uint16(),
        "user_name": pa.string(),
        "timestamp": pa.timestamp("us", tz="UTC"),
        "image_nsfw": pa.float32(),
        "prompt_nsfw": pa.float32(),
    }
)
# https://huggingface.co/datasets/Haidra-Org/AI-Horde-Ratings names the columns; the types are those pandas gives them.
RATINGS_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "ratings_count": pa.int64(),
        "rating": pa.int64(),
        "kudos": pa.float64(),
        "account_age": pa.int64(),
        "usage_requests": pa.int64(),
        "created_at": pa.timestamp("ns"),
        "client_agent": pa.string(),
        "artifacts": pa.float64(),  # a float since some are missing
        "user_id": pa.string(),
        "trusted": pa.bool_(),
        "validated": pa.bool_(),
        "captchas_failed": pa.int64(),
        "country": pa.string(),
    }
)
LONG_PROMPT = "a castle on a hill, highly detailed, " * 1_000
FOREIGN_PROMPT = "\u732b\u306e\u7d75, caf\u00e9 \u0645\u0646\u0638\u0631 \U0001f408\u200d\u2b1b, e\u0301"
ANONYMOUS = hashlib.sha256(b"anon").hexdigest()
FAULTS = (  # of the first images, one each
    "blurred",
    "picture: damaged",
    "picture: pixels",
    "not in its zip part",
    "no zip part",
    "broken zip part",
    "not in the metadata",
    "listed twice, differently",
    "same image again",
    "no prompt",
    "fewer than 3 ratings",
    "anonymous user",
    "same user and image",
    "no artifacts value",
    "artifacts outside 0 to 5",
    "not rated",
)
KEPT = (
    "same image again",
    "no artifacts value",
    "artifacts outside 0 to 5",
)  # the fault is of one row, the image stays


@dataclass(frozen=True)
class DiffusionDBFolder:
    """The files, what is wrong in them, and every image in order: its key and the fault it has."""

    metadata: Path
    ratings: Path
    parts: Path
    keys: list[str]
    faults: list[str | None]

    def key_of(self, fault: str) -> str:
        return self.keys[self.faults.index(fault)]


def write_diffusiondb(
    folder: Path, images: int = 60, size: int = 32, suffix: str = ".png", seed: int = 0
) -> DiffusionDBFolder:
    """Write ``images`` images of ``size`` x ``size`` pixels: the FAULTS, two odd prompts, and good ones.

    Args:
        suffix: ".png" as in the 2M subset, or ".webp" as in the large one.
    """
    rng = np.random.default_rng(seed)
    keys = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(images)]
    faults: list[str | None] = [*FAULTS, *[None] * (images - len(FAULTS))]
    broken = rng.random(images) < 0.5
    parts: dict[int, dict[str, bytes]] = {number: {} for number in (1, 2, 3)}
    metadata, ratings = [], []
    for i, (key, fault) in enumerate(zip(keys, faults, strict=True)):
        part = {"broken zip part": 3, "no zip part": 4}.get(fault or "", 1 + i % 2)
        row = metadata_row(f"{key}{suffix}", prompt_of(i), part, i, size)
        content = encoded(picture(rng, size, bool(broken[i])), suffix)
        match fault:
            case "blurred":
                row["image_nsfw"] = 2.0
            case "no prompt":
                row["prompt"] = " "
            case "picture: damaged":
                content = content[: len(content) // 2]
            case "picture: pixels":
                content = bomb()
        if part in parts and fault != "not in its zip part":
            parts[part][row["image_name"]] = content
        if fault != "not in the metadata":
            metadata.append(row)
        if fault == "same image again":
            metadata.append(dict(row))
        elif fault == "listed twice, differently":
            metadata.append(row | {"prompt": "something else"})
        ratings += ratings_of(key, fault, bool(broken[i]), rng)
    write_parts(folder / "images", parts)
    pq.write_table(pa.Table.from_pylist(metadata, METADATA_SCHEMA), folder / "metadata.parquet", row_group_size=16)
    order = rng.permutation(len(ratings))
    table = pa.Table.from_pylist([ratings[k] for k in order], RATINGS_SCHEMA)
    pq.write_table(table, folder / "diffusiondb_export.parquet")
    return DiffusionDBFolder(
        folder / "metadata.parquet", folder / "diffusiondb_export.parquet", folder / "images", keys, faults
    )


def prompt_of(i: int) -> str:
    """Two odd ones after the FAULTS; then every prompt is used twice, by two users."""
    after = i - len(FAULTS)
    return {0: LONG_PROMPT, 1: FOREIGN_PROMPT}.get(after, f"an oil painting of house number {i // 2}, 4 k")


def user_of(i: int) -> str | None:
    """Who made it: a hash, a deleted account, or unknown."""
    return {0: None, 1: "deleted_account", 2: "deleted_account"}.get(
        i % 7, hashlib.sha256(f"user {i // 4}".encode()).hexdigest()
    )


def metadata_row(name: str, prompt: str, part: int, i: int, size: int) -> dict:
    user = user_of(i)
    return {
        "image_name": name,
        "prompt": prompt,
        "part_id": part,
        "seed": 4_294_967_295 - i,
        "step": 50,
        "cfg": 7.0,
        "sampler": 8,
        "width": size,
        "height": size,
        "user_name": user,
        "timestamp": user and datetime.datetime(2022, 8, 11, 9, 5, tzinfo=datetime.UTC),
        "image_nsfw": 0.08,
        "prompt_nsfw": 0.004,
    }


def ratings_of(key: str, fault: str | None, broken: bool, rng: np.random.Generator) -> list[dict]:
    """Three to five ratings; with a fault, two good ones and what is wrong, or three good ones where the image is to stay."""
    if fault == "not rated":
        return []
    count = (
        3
        if fault in KEPT
        else 2
        if fault in ("fewer than 3 ratings", "anonymous user", "same user and image")
        else int(rng.integers(3, 6))
    )
    users = rng.choice(40, size=count, replace=False).tolist()
    rows = [rating_row(key, f"rater {user}", broken, rng) for user in users]
    match fault:
        case "anonymous user":
            rows.append(rows[0] | {"user_id": ANONYMOUS, "kudos": -50.0, "artifacts": 5.0})
        case "same user and image":
            rows += [rows[0] | {"user_id": "twice", "artifacts": value} for value in (0.0, 5.0)]
        case "no artifacts value":
            rows.append(rows[0] | {"user_id": "another", "artifacts": None})
        case "artifacts outside 0 to 5":
            rows.append(rows[0] | {"user_id": "another", "artifacts": 7.0})
    return [row | {"ratings_count": len(rows)} for row in rows]


def rating_row(key: str, user: str, broken: bool, rng: np.random.Generator) -> dict:
    return {
        "id": key,
        "rating": int(rng.integers(1, 6) if broken else rng.integers(5, 11)),
        "kudos": float(rng.integers(0, 10_000)),
        "account_age": int(rng.integers(0, 10**7)),
        "usage_requests": int(rng.integers(0, 1_000)),
        "created_at": datetime.datetime(2023, 5, 12),
        "client_agent": "ArtBot",
        "artifacts": float(rng.integers(3, 6) if broken else rng.integers(0, 3)),
        "user_id": hashlib.sha256(user.encode()).hexdigest(),
        "trusted": bool(rng.integers(2)),
        "validated": False,
        "captchas_failed": -3,
        "country": "GR",
    }


def picture(rng: np.random.Generator, size: int, broken: bool) -> Image.Image:
    """A soft colour gradient; broken: with black and white stripes."""
    corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    pixels = np.asarray(corners.resize((size, size), Image.Resampling.BILINEAR)).copy()
    if broken:
        pixels[:: max(size // 8, 1)] = rng.choice([0, 255])
    return Image.fromarray(pixels)


def encoded(image: Image.Image, suffix: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format={".png": "PNG", ".webp": "WEBP"}[suffix], lossless=True)
    return stream.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header states ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


def write_parts(folder: Path, parts: dict[int, dict[str, bytes]]) -> None:
    """part-000001.zip and on, each with its JSON file; number 3 is cut short."""
    folder.mkdir(parents=True)
    for number, members in parts.items():
        name = f"part-{number:06d}"
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
            archive.writestr(f"{name}.json", json.dumps({member: {"p": "", "st": 50} for member in members}))
    cut = folder / "part-000003.zip"
    cut.write_bytes(cut.read_bytes()[:-40])
