"""The figures of the bundled scorer on held-out seeds and prompts, from its checkpoint.

``python -m training.evaluate`` writes ``benchmarks/results/fashion.json``: AUROC, ECE and Brier score at several shares of the
steps; one row per decision rule, for the ancestor's design and for the prompt alone; the mixture against its ablations.
``--steps 12,25,50 --schedulers ddim,dpm,euler-a,unipc`` writes ``benchmarks/results/fashion_transfer.json`` instead: the same
scorer, without retraining, in other settings. Trajectories that are not on disk are made again from their seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.results import write_results
from moe_artifacts.guard.output import Setting as GuardSetting
from moe_artifacts.guard.output import promise
from moe_artifacts.schedulers import SCHEDULERS
from moe_artifacts.scorer import ArtifactScorer
from training import tables
from training.collect import DEFAULT, SPLITS, Setting, Split, load_pipeline
from training.scored import ensure_split, score_recorded
from training.timing import check_cost

SEED = 0
BY_NAME = {split.name: split for split in SPLITS}


def evaluate(scorer: ArtifactScorer, out: Path | None) -> None:
    """The default setting: quality, ceiling, rules, mixture."""
    data = ensure_split(BY_NAME["test"]), ensure_split(BY_NAME["calibration"])
    test, held_out = (score_recorded(scorer, recorded, DEFAULT) for recorded in data)
    cost = check_cost(load_pipeline(), scorer)
    rows = tables.quality(test) + tables.ceiling(data[0])
    rows += tables.rules(scorer, test, held_out, data, cost) + tables.mixture(scorer, data[0])
    write_results("fashion", rows, seed=SEED, out=out)


def evaluate_transfer(
    scorer: ArtifactScorer, schedulers: list[str], steps: list[int], count: int, out: Path | None
) -> None:
    """Other schedulers and numbers of steps, on prompts and seeds of the held-out kind."""
    rule = scorer.config.threshold
    if rule is None:
        raise SystemExit("the scorer has no threshold: run python -m training.calibrate first")
    settings = [Setting(scheduler=name, steps=n) for name in schedulers for n in steps]
    settings.sort(key=lambda setting: setting != DEFAULT)  # a setting's seeds follow from its place
    # The drop is against the default setting on the whole test split: a few hundred images would be a reference of luck.
    test = score_recorded(scorer, ensure_split(BY_NAME["test"]), DEFAULT)
    reference = tables.transfer(test, rule, DEFAULT.scheduler, DEFAULT.steps, 0.0, "")["auroc_within"]
    rows = []
    for number, setting in enumerate(settings):
        split = Split(
            name=f"transfer-{setting.scheduler}-{setting.steps}",
            count=count,
            first_seed=50_000_000 + 100_000 * number,
            prompts="held-out",
            settings=(setting,),
        )
        scored = score_recorded(scorer, ensure_split(split), setting)
        guard_setting = GuardSetting(
            scheduler=SCHEDULERS[setting.scheduler],
            num_inference_steps=setting.steps,
            guidance_scale=setting.guidance_scale,
            scored_steps=tuple(int(c) - 1 for c in scored.calls),
        )
        said = promise(rule, guard_setting)
        rows.append(tables.transfer(scored, rule, setting.scheduler, setting.steps, reference, said))
    write_results("fashion_transfer", rows, seed=SEED, out=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorer", default="fashion", help="a bundled name or a folder")
    parser.add_argument("--steps", help="comma-separated numbers of steps, for the transfer table")
    parser.add_argument(
        "--schedulers", default="ddim,dpm,euler-a,unipc", help="comma-separated, for the transfer table"
    )
    parser.add_argument("--count", type=int, default=1_500, help="trajectories per setting of the transfer table")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    scorer = ArtifactScorer.from_pretrained(args.scorer)
    if args.steps is None:
        evaluate(scorer, args.out)
    else:
        steps = [int(n) for n in args.steps.split(",")]
        evaluate_transfer(scorer, args.schedulers.split(","), steps, args.count, args.out)


if __name__ == "__main__":
    main()
