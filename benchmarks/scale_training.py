"""Whether training data may grow: rows per second and peak memory of each stage at 10k, 100k and 1M rows.

``python -m benchmarks.scale_training`` writes ``benchmarks/results/scale_training.json``. A row is one preview: a Fashion-MNIST
picture at one noise level, ten levels a picture; every second picture is broken (its lower half is another's), which is what the
heads learn to see. Stages, each in a process of its own, so that its peak is its own:

    noise       pictures to noisy previews, by training.forward_noise with the bundled VAE and preview
    embed       previews to embeddings, by training.embed with the bundled image tower
    backbone    the forward pass of that tower alone, same batch size, between the shards of ``embed``
    train       the posterior's heads, by training.own.train, ``PASSES`` times over the rows

``bytes_per_row`` is what a stage writes. ``share_of_backbone`` is the rate of ``embed`` over that of ``backbone``. ``time_exponent``
and ``memory_ratio`` compare the two largest sizes: time grows as rows ** exponent. Imports and the loading of models are not
timed; the peak has them.

A run that was killed goes on: a size and stage that is done is not repeated, and of one that is half done the rate is that of the
rows that were left. A size that was begun with another program begins anew: its files are deleted, figures among them. Files, 4 GB
for 1M rows, are in ``MOE_ARTIFACTS_WORK/scale-training``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import write_results
from benchmarks.sources import source_hashes
from moe_artifacts.bundled import FOLDER as BUNDLED
from moe_artifacts.errors import InputError
from moe_artifacts.files import read_json, write_json
from moe_artifacts.latent_spaces import space_of_vae
from moe_artifacts.seeds import attempt_seed
from moe_artifacts.shapes import Preview
from training.data.fashion import load_fashion, to_rgb
from training.data.prompts import prompts_of
from training.embed import Embed, embed_job, load_embedder
from training.fit_preview import load_vae
from training.forward_noise import ForwardNoise, NoiseOptions, noise_job
from training.image_rows import ImageRow
from training.level_images import open_source
from training.noise_grids import model_scheduler, parse_grids
from training.row_jobs import RowJob, ShardRows, count_rows, missing_shards, run_job
from training.workspace import keep_freed_memory, work_folder

Row = dict[str, Any]

STAGES = ("noise", "embed", "train")
SIZES = (10_000, 100_000, 1_000_000)
LEVELS = 10  # rows a picture
PICTURES_PER_SHARD = 10_000  # the text of a prompt is embedded once a shard
VALIDATION_PICTURES = 500
PASSES = 8  # over the rows, in training
BACKBONE_BATCHES = 40  # forward passes of the tower alone before each shard, and as many after it


class HalvedFashion:
    """As many pictures as wanted: Fashion-MNIST over and over. The lower half of every second one is that of another picture.

    Args:
        split: "train" or "test".
    """

    def __init__(self, split: str, pictures: int) -> None:
        self.split, self.pictures = split, pictures
        self.data = load_fashion(split)

    def __len__(self) -> int:
        return self.pictures

    def rows(self, start: int, stop: int) -> Iterator[ImageRow]:
        for number in range(start, min(stop, self.pictures)):
            key = f"{self.split}-{number:07d}"
            prompts = prompts_of(int(self.data.labels[number % len(self.data)]), "all")
            prompt = prompts[attempt_seed(0, key, attempt=0) % len(prompts)]
            yield ImageRow(key, prompt, float(number % 2), partial(self._read, number))

    def facts(self) -> Row:
        return {"table": "Fashion-MNIST, halved", "split": self.split, "rows": self.pictures}

    def _read(self, number: int, size: int) -> Preview:
        images = self.data.images
        picture = images[number % len(images)].clone()
        if number % 2:
            half = len(picture) // 2
            other = attempt_seed(1, str(number), attempt=0) % len(images)
            picture[half:] = images[other, half:]
        return to_rgb(picture[None])


def noise(folder: Path, pictures: int, batch: int) -> Row:
    """Previews under ``folder/noised``."""
    pipeline = BUNDLED / "fashion" / "pipeline"
    vae = load_vae(str(pipeline))
    _, preview = load_embedder("fashion")
    grids = parse_grids("ddim:50,dpm:25", model_scheduler(str(pipeline)))

    def job(name: str, source: HalvedFashion) -> RowJob:
        options = NoiseOptions(size=32, levels_per_image=LEVELS, images_per_shard=PICTURES_PER_SHARD)
        forward = ForwardNoise(vae, space_of_vae(vae, "fashion"), grids, preview, options, batch)
        return noise_job(forward, source, folder / "noised" / name, {})

    run_job(job("validation", HalvedFashion("test", VALIDATION_PICTURES)))
    return timed(job("train", HalvedFashion("train", pictures)))


def embed(folder: Path, pictures: int, batch: int) -> Row:
    """Embeddings under ``folder/embedded``; the rate of the backbone alone beside that of the stage."""
    embedder, _ = load_embedder("fashion")
    jobs = {
        name: embed_job(Embed(open_source(folder / "noised" / name), embedder, batch=batch), folder / "embedded" / name)
        for name in ("validation", "train")
    }
    run_job(jobs["validation"])
    size = embedder.clip.visual.image_size
    shape = (batch, 3, *((size, size) if isinstance(size, int) else size))
    # Other ones each time, as new to the processor's caches as those of the stage.
    pixels = [torch.rand(shape) for _ in range(BACKBONE_BATCHES)]
    alone = 0.0

    @torch.no_grad()
    def backbone(batches: int) -> None:
        nonlocal alone
        start = time.perf_counter()
        for number in range(batches):
            embedder.clip.encode_image(pixels[number])
        alone += time.perf_counter() - start

    backbone(BACKBONE_BATCHES)  # the first passes are slower
    alone, passes = 0.0, 0

    def shard(number: int) -> ShardRows:
        """By turns, so that a machine that slows down slows both."""
        nonlocal passes
        backbone(BACKBONE_BATCHES)
        rows = jobs["train"].shard(number)
        backbone(BACKBONE_BATCHES)
        passes += 2 * BACKBONE_BATCHES
        return rows

    result = timed(dataclasses.replace(jobs["train"], shard=shard), per_row=LEVELS, elsewhere=lambda: alone)
    return {**result, "backbone_rows_per_s": passes * batch / alone}


def train(folder: Path, pictures: int, batch: int) -> Row:
    """Heads under ``folder/heads``; begun anew, since a part of the steps says nothing of the rest."""
    from training.own.train import RECIPE
    from training.own.train import train as train_heads

    shutil.rmtree(folder / "heads", ignore_errors=True)
    steps = math.ceil(PASSES * pictures / RECIPE.batch)
    recipe = dataclasses.replace(RECIPE, steps=steps, patience=steps)
    start = time.perf_counter()
    facts = train_heads(folder / "embedded", folder / "heads", recipe)
    seconds = time.perf_counter() - start
    return {"rows_per_s": steps * recipe.batch * LEVELS / seconds, "auroc": facts.auroc}


def timed(job: RowJob, per_row: int = 1, elsewhere: Callable[[], float] = lambda: 0.0) -> Row:
    """Run a job; rows a second of what was left to do.

    Args:
        per_row: How many rows of ours a row of the job is.
        elsewhere: Seconds spent on something else meanwhile.
    Raises:
        InputError: If a row was rejected: the figure would be that of other rows.
    """
    if not list(missing_shards(job.folder, job.shards)):
        shutil.rmtree(job.folder)  # killed after its last shard and before its figures were written
    before = count_rows(job.folder)[0]
    start = time.perf_counter()
    run_job(job)
    seconds = time.perf_counter() - start - elsewhere()
    after, rejects = count_rows(job.folder)
    if rejects or after == before:
        raise InputError(f"{job.folder}: {after - before} new rows, rejected {rejects}; delete it and begin anew")
    size = sum(path.stat().st_size for path in job.folder.rglob("*") if path.is_file())
    return {"rows_per_s": (after - before) * per_row / seconds, "bytes_per_row": size / (after * per_row)}


def peak_mb() -> float:
    """Peak memory of this process in units of 2**20 bytes.

    Not ``getrusage``: its peak begins with that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peak) / 1024


def growth(rows: Sequence[Row]) -> list[Row]:
    """Per stage with a peak of its own, how the second largest size compares with the largest.

    Example:
        >>> small = {"stage": "embed", "rows": 1_000, "rows_per_s": 100.0, "peak_mb": 500.0}
        >>> large = {"stage": "embed", "rows": 10_000, "rows_per_s": 50.0, "peak_mb": 600.0}
        >>> [found] = growth([small, large])
        >>> round(found["time_exponent"], 3), found["memory_ratio"]  # ten times the rows took twenty times as long
        (1.301, 1.2)
    """
    found = []
    for stage in dict.fromkeys(row["stage"] for row in rows if "peak_mb" in row):
        sizes = sorted((row for row in rows if row["stage"] == stage), key=lambda row: row["rows"])[-2:]
        if len(sizes) == 2:
            small, large = sizes
            times = [row["rows"] / row["rows_per_s"] for row in sizes]
            found.append(
                {
                    "stage": stage,
                    "rows": large["rows"],
                    "time_exponent": math.log(times[1] / times[0]) / math.log(large["rows"] / small["rows"]),
                    "memory_ratio": large["peak_mb"] / small["peak_mb"],
                }
            )
    return found


def changed_sources(folder: Path) -> list[str]:
    """Source files that are not what they were when the folder was begun; notes them in a new one."""
    path, now = folder / "sources.json", source_hashes("benchmarks/scale_training.py")
    del now["benchmarks/results.py"]  # it only writes the table
    if not folder.exists():
        write_json(path, now)
    found = read_json(path) if path.exists() else {}
    return sorted(name for name in now.keys() | found.keys() if now.get(name) != found.get(name))


def begin(folder: Path) -> None:
    """Begin anew where the folder is of another program."""
    if changed := changed_sources(folder):
        print(f"{folder} was made before {', '.join(changed[:5])} changed: deleted", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
        changed_sources(folder)


def measure(rows: int, stage: str, batch: int) -> None:
    """A stage at one size, in this process; its figures go to a file.

    Raises:
        InputError: If the stages before it were run with another program.
    """
    folder = _folder(rows, batch)
    if changed := changed_sources(folder):
        raise InputError(f"{folder} was made before {', '.join(changed[:5])} changed; leave out --stage to begin anew")
    keep_freed_memory()  # as the commands do
    functions: dict[str, Callable[[Path, int, int], Row]] = {"noise": noise, "embed": embed, "train": train}
    figures = functions[stage](folder, rows // LEVELS, batch)
    write_json(folder / f"{stage}.json", {**figures, "peak_mb": peak_mb()})


def table_rows(rows: int, batch: int) -> list[Row]:
    """What was measured at one size."""
    found = []
    for stage in STAGES:
        figures = read_json(_folder(rows, batch) / f"{stage}.json")
        backbone = figures.pop("backbone_rows_per_s", None)
        if backbone is not None:
            figures["share_of_backbone"] = figures["rows_per_s"] / backbone
            found.append({"stage": "backbone", "rows": rows, "rows_per_s": backbone})
        found.append({"stage": stage, "rows": rows, **figures})
    return found


def _folder(rows: int, batch: int) -> Path:
    return work_folder() / "scale-training" / f"{rows}-{batch}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, SIZES)), help="sizes, separated by commas (%(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="previews embedded at once (%(default)s)")
    parser.add_argument("--stage", choices=STAGES, help="only this one, at one size, in this process, without a table")
    parser.add_argument("--out", type=Path, help="(benchmarks/results/scale_training.json)")
    args = parser.parse_args(arguments)
    sizes = [int(text) for text in args.rows.split(",")]
    if any(size < LEVELS or size % LEVELS for size in sizes):
        parser.error(f"--rows must be multiples of {LEVELS}, the levels of a picture, got {args.rows}")
    if args.stage is not None:
        for size in sizes:
            measure(size, args.stage, args.batch)
        return 0
    for size in sizes:
        begin(_folder(size, args.batch))
        for stage in STAGES:
            if not (_folder(size, args.batch) / f"{stage}.json").exists():
                print(f"{size:,} rows: {stage}", file=sys.stderr, flush=True)
                words = ["--rows", str(size), "--stage", stage, "--batch", str(args.batch)]
                subprocess.run([sys.executable, "-m", "benchmarks.scale_training", *words], check=True)
    measured = [row for size in sizes for row in table_rows(size, args.batch)]
    found = [{"table": "sizes", **row} for row in measured] + [{"table": "growth", **row} for row in growth(measured)]
    write_results("scale_training", found, seed=0, out=args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
