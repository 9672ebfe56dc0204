"""What scoring costs and what the guard saves on the bundled pipeline, as ratios measured in one run.

``python -m benchmarks.savings`` writes ``benchmarks/results/savings.json``: the price of a check against a denoiser call, the
share of scoring in the denoising time at the demo's default, and the wall-clock time per clean image with the guard
relative to without, on the same seeds. Guarded and unguarded batches alternate, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import write_results
from moe_artifacts import ArtifactGuard, ArtifactScorer
from moe_artifacts.bundled import bundled_judge, bundled_pipeline
from moe_artifacts.scorer import Session
from training.data.prompts import draw_prompts
from training.metrics import bootstrap
from training.timing import check_cost


@contextmanager
def stopwatch(owner: Any, name: str, times: list[float]) -> Iterator[None]:
    """Time every call of a method while the block runs."""
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - start)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def measure(batch: int, batches: int, seed: int) -> list[dict[str, Any]]:
    """One row for the whole run."""
    pipe, defaults = bundled_pipeline("fashion")
    scorer, judge = ArtifactScorer.from_pretrained("fashion"), bundled_judge("fashion")
    guard = ArtifactGuard(scorer)
    scoring: list[float] = []
    guarded_s, plain_s, guarded_clean, plain_clean, steps_saved = [], [], [], [], []
    unet_s: list[float] = []
    for number in range(batches + 1):
        first = seed + number * batch
        prompts, labels = draw_prompts(batch, "held-out", torch.Generator().manual_seed(first))

        def generators(first: int = first) -> list[torch.Generator]:
            return [torch.Generator().manual_seed(first + i) for i in range(batch)]

        before = len(scoring)
        with stopwatch(Session, "step", scoring):
            start = time.perf_counter()
            guarded = guard(pipe, prompts, generator=generators(), output_type="pt", **defaults)
            guarded_time = time.perf_counter() - start
        start = time.perf_counter()
        with stopwatch(pipe.unet, "forward", unet_s):
            plain = pipe(prompts, generator=generators(), output_type="pt", **defaults).images
        plain_time = time.perf_counter() - start
        if number == 0:  # warm-up
            del scoring[before:], unet_s[:]
            continue
        clean = judge.margin(plain, labels) <= 0
        guarded_s.append(guarded_time)
        plain_s.append(plain_time)
        plain_clean.append(int(clean.sum()))
        guarded_clean.append(int(clean[guarded.kept_indices].sum()))
        steps_saved.append(1 - guarded.steps_run / guarded.steps_full)

    seconds_guarded, seconds_plain = np.array(guarded_s), np.array(plain_s)
    kept, all_clean = np.array(guarded_clean), np.array(plain_clean)

    def per_clean(rows: np.ndarray) -> float:
        guarded_price = seconds_guarded[rows].sum() / kept[rows].sum()
        return float(guarded_price / (seconds_plain[rows].sum() / all_clean[rows].sum()) - 1)

    low, high = bootstrap(per_clean, batches)
    return [
        {
            "batch": batch,
            "images": batch * batches,
            "guidance_scale": defaults["guidance_scale"],
            "num_inference_steps": defaults["num_inference_steps"],
            "check_cost": check_cost(pipe, scorer, batch),
            "scoring_share": float(np.sum(scoring) / np.sum(unet_s)),
            "steps_saved": float(np.mean(steps_saved)),
            "wall_clock_per_clean": per_clean(np.arange(batches)),
            "wall_clock_per_clean_low": low,
            "wall_clock_per_clean_high": high,
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--batches", type=int, default=14)
    parser.add_argument("--seed", type=int, default=60_000_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write_results("savings", measure(args.batch, args.batches, args.seed), seed=args.seed, out=args.out)


if __name__ == "__main__":
    main()
