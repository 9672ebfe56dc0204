"""The table of the ancestor's wishes.

``python -m benchmarks.ablation`` makes what is missing and writes ``benchmarks/results/ablation.json``: ``runs`` has a row for each
variant and seed, ``variants`` one for each variant, with the mean over the seeds, intervals, and whether it helps.
``--quick`` tries everything at a hundredth of the size, in a folder of its own, and writes the table there.

What the seeds share (x_t of the runs, previews) is made by ``--prepare``; after it, several processes can each do a seed of
their own at the same time. The table is written by the one that finds all designs of all seeds there; the others say what is missing.
Where a design fails, the others are made all the same, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation.designs import FULL, QUICK, Design, PreviewKind
from benchmarks.ablation.identity import claim
from benchmarks.ablation.inputs import Inputs
from benchmarks.ablation.pictures import pictures
from benchmarks.ablation.price import check_price
from benchmarks.ablation.scores import SPLITS, Bench
from benchmarks.ablation.table import table
from benchmarks.ablation.wishes import VARIANTS
from benchmarks.results import write_results
from moe_artifacts.errors import InputError, MoeArtifactsError
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


def names_of(design: Design) -> str:
    """The rows that show it."""
    return ", ".join(f"{v.wish}: {v.name}" for v in VARIANTS if v.design == design)


def run(inputs: Inputs, designs: Sequence[Design], seeds: Sequence[int], stage: Stage) -> list[str]:
    """Make the results of all designs and seeds; returns those that failed."""
    failed = []
    for seed in seeds:
        bench = Bench(inputs, seed)
        for design in designs:
            if bench.path(design).exists():
                continue
            start = time.perf_counter()
            try:
                bench.result(design)
            except MoeArtifactsError as error:  # the others can be had all the same
                stage.log.error("%s (%s), seed %d: %s", names_of(design), design.key, seed, error)
                failed.append(f"{names_of(design)}, seed {seed}")
            else:
                stage.log.info("%s, seed %d: %.0f s", names_of(design), seed, time.perf_counter() - start)
    return failed


def write_table(inputs: Inputs, out: Path | None) -> list[str]:
    """Write the table if every design of every seed is there; returns what is missing."""
    seeds = inputs.scale.seeds
    wanted = [(design, Bench(inputs, seed)) for seed in seeds for design in designs_of(WISHES)]
    missing = [f"{names_of(design)}, seed {bench.seed}" for design, bench in wanted if not bench.path(design).exists()]
    if not missing:
        results = {(design.key, bench.seed): bench.result(design) for design, bench in wanted}
        write_results("ablation", table(VARIANTS, seeds, results), seed=seeds[0], out=out)
    return missing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WISHES, action="append", help="make these wishes; can be given several times")
    parser.add_argument("--seeds", help="make these, separated by commas (0,1,2; with --quick 0)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="make what the seeds share, and no table")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args(arguments)
    inputs = Inputs(QUICK if args.quick else FULL)
    known = inputs.scale.seeds
    seeds = known if args.seeds is None else tuple(int(seed) for seed in args.seeds.split(","))
    if not set(seeds) <= set(known):
        parser.error(f"--seeds must be of those of the table, {', '.join(map(str, known))}, got {args.seeds}")
    designs = designs_of(args.only or WISHES)
    stage = Stage(inputs.scale.folder, tracker="none")
    start = time.perf_counter()
    try:
        claim(inputs)
    except InputError as error:
        parser.error(str(error))
    prepare(inputs, designs)
    stage.log.info("prepared in %.0f s", time.perf_counter() - start)
    if args.prepare:
        return 0
    failed = run(inputs, designs, seeds, stage)
    missing = write_table(inputs, args.out or (inputs.folder / "ablation.json" if args.quick else None))
    if missing:
        stage.log.info("no table yet, %d results are missing:\n  %s", len(missing), "\n  ".join(missing))
    if failed:
        stage.log.error("%d failed:\n  %s", len(failed), "\n  ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
