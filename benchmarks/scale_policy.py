"""Time and memory of certifying a threshold and of finding an economic boundary, as the number of trajectories grows.

``python -m benchmarks.scale_policy`` writes ``benchmarks/results/scale_policy.json``: one row per stage and size on one thread, each
in a process of its own. ``peak_mb`` is what the process grew by beyond its imports. Trajectories are simulated part by part,
as a reader would stream them: of each only the path statistic at its end is kept. ``seconds`` passed on the clock, ``cpu_seconds`` do not count what
else the machine did; ``time_exponent`` says how the latter grew from the size before: 1 is in proportion.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

PART = 20_000  # trajectories held at once
IMAGES_PER_PROMPT = 10
BAD_SHARE = 0.2
CHECK_COST = 0.12
STAGES = {"certify": ((10_000, 100_000, 1_000_000), 50), "boundary": ((1_000, 10_000, 100_000), 20)}


def simulated(images: int, steps: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of true posteriors [image step], float32, and labels: evidence that comes in evenly, as a random walk."""
    strength = 4 / math.sqrt(
        steps
    )  # of one step's evidence, so that the last posterior is about as sharp at any number of steps
    for start in range(0, images, PART):
        rng = np.random.default_rng([seed, start])
        count = min(PART, images - start)
        bad = rng.random(count) < BAD_SHARE
        noise = rng.standard_normal((count, steps), dtype=np.float32)
        logit = strength * (noise + strength * (bad[:, None] - np.float32(0.5))).cumsum(axis=1)
        yield expit(logit + np.float32(math.log(BAD_SHARE / (1 - BAD_SHARE)))), bad


def certify_stage(images: int, steps: int, seed: int) -> None:
    """Path statistics of all, part by part, and a threshold certified by prompt and one by image."""
    import torch

    from moe_artifacts.accumulator import accumulate
    from moe_artifacts.calibration.certify import certify
    from moe_artifacts.calibration.risks import Risk
    from moe_artifacts.config import ThresholdConfig
    from moe_artifacts.decision import path_statistic

    rule = ThresholdConfig(rule="patience", threshold=0.5, patience=2)  # the rule that needs most memory
    statistic, label = np.empty(images, dtype=np.float32), np.empty(images)
    start = 0
    for prob, bad in simulated(images, steps, seed):
        part = torch.from_numpy(prob)
        rows = slice(start, start + len(bad))
        statistic[rows] = path_statistic(rule, part, accumulate(part, torch.full_like(part, 0.1)))[:, -2].numpy()
        label[rows] = bad
        start += len(bad)
    prompt = np.arange(images) // IMAGES_PER_PROMPT
    for unit in ("prompt", "image"):
        certify(statistic, label, prompt, risks=Risk("false-aborts", 0.05), confidence=0.95, unit=unit)


def boundary_stage(images: int, steps: int, seed: int) -> None:
    """The boundary with the false-abort limit, which includes finding it without."""
    from moe_artifacts.calibration.economic import fit_boundary

    parts = list(simulated(images, steps, seed))
    prob, bad = (np.concatenate(values) for values in zip(*parts, strict=True))
    fit_boundary(prob, bad, np.arange(1, steps + 1), steps + 1, CHECK_COST, max_false_aborts=0.05)


def measured(stage: str, images: int, steps: int, seed: int) -> dict[str, Any]:
    """Seconds and megabytes of one stage at one size, the imports done before."""
    work = {"certify": certify_stage, "boundary": boundary_stage}[stage]
    work(1_000, steps, seed)
    before, start, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
    work(images, steps, seed)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "stage": stage,
        "images": images,
        "steps": steps,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "images_per_s": images / cpu_seconds,
        "peak_mb": (after - before) / 1024,
    }


def single_thread() -> None:
    import torch

    torch.set_num_threads(1)


def in_own_process(stage: str, images: int, steps: int, seed: int) -> dict[str, Any]:
    """:func:`measured`, where no other size has left its memory behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=single_thread) as process:
        return process.submit(measured, stage, images, steps, seed).result()


def measure(
    stages: Mapping[str, tuple[tuple[int, ...], int]],
    seed: int,
    run: Callable[[str, int, int, int], dict[str, Any]] = in_own_process,
) -> list[dict[str, Any]]:
    """One row per stage and size."""
    rows: list[dict[str, Any]] = []
    for stage, (sizes, steps) in stages.items():
        before: dict[str, Any] | None = None
        for images in sizes:
            row = run(stage, images, steps, seed)
            if before is not None:
                row["time_exponent"] = math.log(row["cpu_seconds"] / before["cpu_seconds"]) / math.log(
                    images / before["images"]
                )
            rows.append(row)
            before = row
    return rows


def main() -> None:
    from benchmarks.results import write_results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write_results("scale_policy", measure(STAGES, args.seed), seed=args.seed, out=args.out)


if __name__ == "__main__":
    main()
