"""The table of the ancestor's wishes.

``python -m benchmarks.ablation`` makes what is missing and writes ``benchmarks/results/ablation.json``: ``runs`` has a row for each
variant and seed, ``variants`` one for each variant, with the mean over the seeds, intervals, and whether it helps.
``--quick`` tries everything at a hundredth of the size, in a folder of its own, and writes the table there.

What the seeds share (x_t of the runs, previews) is made by ``--prepare``; after it, several processes can each do a seed of
their own at the same time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation.designs import FULL, QUICK, VARIANTS, Design, PreviewKind
from benchmarks.ablation.figures import Result, table
from benchmarks.ablation.inputs import Inputs
from benchmarks.ablation.pictures import pictures
from benchmarks.ablation.price import check_price
from benchmarks.ablation.scores import SPLITS, Bench
from benchmarks.results import write_results
from moe_artifacts.errors import MoeArtifactsError
from training.workspace import Stage

WISHES = tuple(dict.fromkeys(variant.wish for variant in VARIANTS))


def designs_of(wishes: Sequence[str]) -> list[Design]:
    """Each design once; those of one backbone and one set of samples after one another, which saves embedding again."""
    found = dict.fromkeys(variant.design for variant in VARIANTS if variant.wish in wishes)
    return sorted(found, key=lambda design: (repr(design.tower), repr(design.samples), design.key))


def prepare(inputs: Inputs, designs: Sequence[Design]) -> None:
    """Make what no seed changes."""
    kinds: dict[PreviewKind, None] = dict.fromkeys(design.tower.preview for design in designs)
    views = dict.fromkeys(design.tested_on for design in designs)
    for split in SPLITS:
        for view in views:
            inputs.latents(split, view)
        for kind in kinds:
            pictures(inputs, kind, inputs.latents(split, "x0"), f"{split}-x0")
    for kind in kinds:
        check_price(inputs, kind)


def run(inputs: Inputs, designs: Sequence[Design], seeds: Sequence[int], stage: Stage) -> dict[tuple[str, int], Result]:
    """Results of all designs and seeds."""
    found = {}
    for seed in seeds:
        bench = Bench(inputs, seed)
        for design in designs:
            start = time.perf_counter()
            new = not bench.path(design).exists()
            try:
                found[design.key, seed] = bench.result(design)
            except MoeArtifactsError as error:  # the others can be had all the same
                stage.log.error("%s seed %d: %s", design.key, seed, error)
                continue
            if new:
                stage.log.info("%s seed %d: %.0f s", design.key, seed, time.perf_counter() - start)
    return found


def kept(inputs: Inputs, seeds: Sequence[int]) -> dict[tuple[str, int], Result]:
    """Results that are there already, of whichever wish."""
    benches = [Bench(inputs, seed) for seed in seeds]
    return {
        (design.key, bench.seed): bench.result(design)
        for bench in benches
        for design in designs_of(WISHES)
        if bench.path(design).exists()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WISHES, action="append", help="make these wishes; can be given several times")
    parser.add_argument("--seeds", help="separated by commas (0,1,2; with --quick 0)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="make what the seeds share, and no table")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args(arguments)
    inputs = Inputs(QUICK if args.quick else FULL)
    designs = designs_of(args.only or WISHES)
    seeds = [int(seed) for seed in (args.seeds or ("0" if args.quick else "0,1,2")).split(",")]
    stage = Stage(inputs.scale.folder, tracker="none")
    start = time.perf_counter()
    prepare(inputs, designs)
    stage.log.info("prepared in %.0f s", time.perf_counter() - start)
    if args.prepare:
        return
    run(inputs, designs, seeds, stage)
    out = args.out or (inputs.folder / "ablation.json" if args.quick else None)
    write_results("ablation", table(VARIANTS, seeds, kept(inputs, seeds)), seed=seeds[0], out=out)


if __name__ == "__main__":
    main()
