"""Where the rest of the saving is lost: in the limit on false aborts, in looking early, or in what the judges themselves dispute.

``python -m benchmarks.headroom`` writes ``benchmarks/results/headroom.json``. Perfect knowledge after the first of the steps that the
evaluation reports on aborts exactly the bad images, there. Between that and the bundled scorer stand, at the price of a check that the rules
were chosen with:

* ``second judge``: the margin of the other judge, trained apart, on the finished image, known at that step already: how
  well another judge of the same kind knows the verdicts.
* ``finished image``: the scorer's own posterior of the finished image, known at that step already: what is lost by looking late is not
  lost here.
* ``scorer``: what there is, by the economic rule.

Each at several limits on the false aborts. Thresholds are the cheapest ones for the very images measured on, within the limit, so
every figure is what could be reached at best; the boundaries of the economic rule come from the calibration trajectories.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import Float

from benchmarks.results import write_results
from moe_artifacts.calibration.economic import fit_boundary
from moe_artifacts.policy import Run, cheapest_threshold, perfect
from moe_artifacts.scorer import ArtifactScorer
from training.collect import DEFAULT
from training.evaluate import BY_NAME
from training.figures import Row, rule_row
from training.rules import Paths
from training.scored import Scored, ensure_split, score_recorded
from training.tables import FIRST_CHECK_SHARE, shipped_rules

SEED = 0
LIMITS = (0.01, 0.02, 0.05, 0.10, 0.20)
Known = tuple[Run, Paths]


def known_early(score: Float[np.ndarray, " image"], run: Run, first: int) -> Known:
    """Images that are looked at once, at column ``first``, where a score of the finished image is known; higher is worse."""
    place = np.unique(score, return_inverse=True)[1]  # its order is all that counts; thresholds lie in (0, 1]
    statistic = ((place + 1) / (place.max() + 1)).astype(np.float32)[:, None]
    return Run(run.bad, run.calls[[first]], run.check_cost, run.total_calls), Paths(statistic, None)


def economic(test: Scored, held_out: Scored, cost: float, limit: float) -> Known:
    """The scorer's posteriors at the checks where an abort saves a call, by the boundary that is best on ``held_out``."""
    run = test.run(cost)
    saving = slice(0, run.last_saving + 1)
    calls = run.calls[saving]
    boundary = fit_boundary(
        held_out.prob[:, saving].numpy(), held_out.bad, calls, run.total_calls, cost, max_false_aborts=limit
    )
    prob = test.prob[:, saving].numpy()
    return Run(run.bad, calls, cost, run.total_calls), Paths(boundary.statistic(prob), boundary.clear_step(prob))


def headroom(test: Scored, second: Float[np.ndarray, " image"], held_out: Scored, cost: float) -> list[Row]:
    """One row for each kind of knowledge and limit.

    Args:
        second: The second judge's margin of each finished test image.
        held_out: Calibration trajectories.
        cost: Of a check, in denoiser calls.
    """
    run = test.run(cost)
    first = int(np.abs(run.calls / run.total_calls - FIRST_CHECK_SHARE).argmin())
    ideal = perfect(run, first).cost_per_clean
    finished = test.prob[:, -1].numpy()
    rows = []
    for limit in LIMITS:
        known = {
            "second judge": known_early(second, run, first),
            "finished image": known_early(finished, run, first),
            "scorer": economic(test, held_out, cost, limit),
        }
        for name, (seen, paths) in known.items():
            threshold = cheapest_threshold(seen, paths.statistic, limit, clear=paths.clear)
            row = rule_row(name, seen, paths, threshold, "best")
            share = {k: row[k] / ideal for k in ("cost_per_clean", "cost_per_clean_low", "cost_per_clean_high")}
            rows.append(
                {
                    "knowledge": name,
                    "max_false_aborts": limit,
                    "false_abort_rate": row["false_abort_rate"],
                    "recall": row["recall"],
                    **{k: row[k] for k in share},
                    "share_of_perfect": share["cost_per_clean"],
                    "share_of_perfect_low": share["cost_per_clean_high"],  # a lower cost is a larger share
                    "share_of_perfect_high": share["cost_per_clean_low"],
                    "perfect_cost_per_clean": ideal,
                    "check_cost": cost,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scorer = ArtifactScorer.from_pretrained("fashion")
    recorded = ensure_split(BY_NAME["test"])
    test = score_recorded(scorer, recorded, DEFAULT)
    held_out = score_recorded(scorer, ensure_split(BY_NAME["calibration"]), DEFAULT)
    rows = headroom(test, recorded.margin_second.numpy(), held_out, shipped_rules()["check_cost"])
    write_results("headroom", rows, seed=SEED, out=args.out)


if __name__ == "__main__":
    main()
