"""What a scorer is worth on trajectories that took no part in its making.

``python -m training.own.evaluate SCORER TRAJECTORIES/test [--against NAME]`` scores recorded trajectories of one setting, and writes three
tables (DESIGN.md, section 5, has their columns):

    quality    at each step that the guard would score, or at ``--shares`` of the steps: AUROC within prompts, pooled, and of the
               prompt alone (the share of bad images in the other half of the prompt's images, where it has several);
               calibration error; Brier score
    rules      each rule that was calibrated: what it finds, wrongly aborts, saves and costs, at its certified threshold (deployed)
               and at the one with as many false aborts on these very images as were promised at most (matched)
    against    AUROC less that of another scorer, which looks at the same steps of the same images

Intervals are over prompts where images share them, else over images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import write_results
from moe_artifacts.accumulator import ExitHead
from moe_artifacts.checkpoint import CONFIG_NAME, find_checkpoint, load_state_strict, read_config, read_weights
from moe_artifacts.config import ScorerConfig, ThresholdConfig, from_dict
from moe_artifacts.errors import InputError, MoeArtifactsError
from moe_artifacts.files import read_json
from moe_artifacts.noise import check_steps
from moe_artifacts.policy import matched_threshold, perfect
from moe_artifacts.scorer import ArtifactScorer
from moe_artifacts.trajectory import Trajectory
from moe_artifacts.trajectory_files import iter_trajectories
from training import figures
from training.clip_towers import load_preview
from training.figures import Row
from training.head_data import is_bad
from training.metrics import Measure, Resample, auroc, auroc_within, over_groups, over_images
from training.own.batches import require_all_batches
from training.scored import Scored, score_parts

AT_ONCE = 64  # images
DEFAULT_RISK = 0.05  # for matched thresholds, where a scorer promises nothing
SEED = 0


@dataclass(frozen=True, eq=False)
class TestSet:
    """Labelled trajectories of one setting; latents are read when they are scored."""

    path: Path
    label: Tensor  # [image], NaN: not known
    prompt: np.ndarray  # [image], equal numbers for equal prompts
    step: list[int]
    log_snr: list[float]  # nats, of each recorded step
    num_steps: int

    __test__ = False  # for pytest

    @property
    def used(self) -> Tensor:
        return ~self.label.isnan()

    def guarded(self, scorer: ArtifactScorer) -> list[int]:
        """Columns of the recorded steps at which the guard would score."""
        levels: Any = [SimpleNamespace(log_snr=value, half_step=False) for value in self.log_snr]
        return check_steps(levels, scorer.config)

    def nearest(self, shares: Sequence[float]) -> list[int]:
        """Columns of the recorded steps nearest to these shares of the steps."""
        done = (np.array(self.step) + 1) / self.num_steps
        return sorted({int(np.abs(done - share).argmin()) for share in shares})

    def score(self, scorer: ArtifactScorer, columns: Sequence[int]) -> Scored:
        """The labelled images, scored at these columns and no others.

        Raises:
            LatentSpaceError: If the scorer was trained on other latents.
        """
        calls = np.array([self.step[c] + 1 for c in columns])
        used = self.used
        parts = self._parts(list(columns))
        return score_parts(scorer, parts, calls, self.num_steps, self.label[used], self.prompt[used.numpy()])

    def _parts(self, columns: list[int]) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        for part in iter_trajectories(self.path, AT_ONCE):
            if part.label is not None:
                assert part.x0 is not None
                yield part.x0[:, columns], part.log_snr[columns].expand(len(part.prompts), -1), part.prompts


def read_test_set(path: Path) -> TestSet:
    """Labels, prompts and noise levels of trajectories; their latents stay on disk.

    Raises:
        InputError: If they are of several settings, hold no x0, or the labels are missing or of one kind only.
    """
    require_all_batches(path)
    first: Trajectory | None = None
    labels, prompts = [], []
    for part in iter_trajectories(path, AT_ONCE):
        if part.x0 is None:
            raise InputError(f"{path} holds no x0: record trajectories with training.own.collect")
        first = first or part
        if (part.step, part.num_steps) != (first.step, first.num_steps) or not torch.allclose(
            part.log_snr, first.log_snr, atol=1e-3
        ):
            raise InputError(
                f"{path} holds trajectories of several settings, recorded at the steps {first.step} of {first.num_steps} and "
                f"{part.step} of {part.num_steps}: evaluate each setting by itself"
            )
        labels.append(torch.full((len(part.prompts),), torch.nan) if part.label is None else part.label)
        prompts += part.prompts
    assert first is not None  # iter_trajectories refuses a folder without any
    label = torch.cat(labels)
    known = is_bad(label[~label.isnan()])
    if len(known) == 0 or known.all() or not known.any():
        kind = "no label" if len(known) == 0 else "only bad ones" if known.all() else "only clean ones"
        raise InputError(f"{path} must hold labelled images of both kinds, got {kind} among {len(label)} images")
    prompt = np.unique(np.array(prompts), return_inverse=True)[1]
    return TestSet(path, label, prompt, list(first.step), first.log_snr.tolist(), first.num_steps)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What training.own.calibrate wrote beside a scorer; a scorer from elsewhere has its own threshold alone."""

    check_cost: float
    bad_rate: float
    rules: dict[str, tuple[ThresholdConfig, ExitHead | None]]  # None: the scorer's own exit head
    default: str | None


def read_calibration(name: str, scorer: ArtifactScorer, check_cost: float, bad_rate: float) -> Calibration:
    """From the folder of a scorer.

    Args:
        check_cost: Where the folder does not say it, as ``bad_rate``.
    """
    path = Path(name) / "rules" / "rules.json"
    if not path.exists():
        own = scorer.config.threshold
        if own is None:
            return Calibration(check_cost, bad_rate, {}, None)
        return Calibration(check_cost, bad_rate, {own.rule: (own, None)}, own.rule)
    values = read_json(path)
    found: dict[str, tuple[ThresholdConfig, ExitHead | None]] = {}
    for rule, stored in values["rules"].items():
        head = ExitHead(scorer.config.exit_head)
        weights = path.with_name(f"{rule}.safetensors")
        load_state_strict(head, read_weights(weights), str(weights))
        found[rule] = from_dict(ThresholdConfig, stored, where=f"{path}: {rule}"), head.eval()
    return Calibration(values["check_cost"], values["bad_rate"], found, values["default"])


def evaluate(
    name: str,
    scorer: ArtifactScorer,
    test: TestSet,
    columns: Sequence[int],
    check_cost: float | None = None,
    default_cost: float = 0.0,
) -> tuple[list[Row], Scored]:
    """The tables quality and rules of one scorer, and the scores behind the first.

    Args:
        columns: Recorded steps, for the table quality.
        check_cost: Of one image, in its denoiser calls; None: as it was calibrated, or else ``default_cost``.
    """
    seen, guarded = test.score(scorer, columns), test.guarded(scorer)
    resample, prompt = _resampling(seen.prompt)
    known = read_calibration(name, scorer, default_cost, float(seen.label.mean()))
    cost = known.check_cost if check_cost is None else check_cost
    by_prompt = figures.halves_rate(seen.label.numpy(), seen.prompt)
    rows = figures.quality(seen, range(len(columns)), known.bad_rate, by_prompt, resample)

    decided = seen if guarded == list(columns) else test.score(scorer, guarded)
    run = decided.run(cost)
    ideal = perfect(run, 0)
    found: list[Row] = []
    for rule, (config, head) in known.rules.items():
        paths = decided.paths(config, head)
        matched = matched_threshold(run, paths.statistic, config.max_risk or DEFAULT_RISK, paths.clear)
        for setting, threshold in (("deployed", config.threshold), ("matched", matched)):
            row = figures.rule_row(rule, run, paths, threshold, setting, prompt, resample)
            found.append({**row, "default": rule == known.default})
    found.append({"table": "rules", "rule": "perfect", "setting": "matched", **ideal.row()})
    for row in found:
        row |= {"perfect_cost_per_clean": ideal.cost_per_clean, "check_cost": cost}
    return [{"table": row["table"], "scorer": name} | row for row in rows + found], seen


def against(name: str, ours: Scored, other_name: str, theirs: Scored) -> list[Row]:
    """AUROC of one scorer less that of another, paired over the same images and steps."""
    resample, _ = _resampling(ours.prompt)
    bad = ours.bad

    def measures_of(first: np.ndarray, second: np.ndarray) -> dict[str, Measure]:
        return {
            "minus_auroc_within": lambda i, group: (
                auroc_within(first[i], bad[i], group) - auroc_within(second[i], bad[i], group)
            ),
            "minus_auroc_pooled": lambda i, group: auroc(first[i], bad[i]) - auroc(second[i], bad[i]),
        }

    return [
        {
            "table": "against",
            "scorer": name,
            "against": other_name,
            "share": float(calls / ours.total_calls),
            **figures.with_intervals(
                measures_of(ours.prob[:, column].numpy(), theirs.prob[:, column].numpy()), ours.prompt, resample
            ),
        }
        for column, calls in enumerate(ours.calls)
    ]


def _resampling(prompt: np.ndarray) -> tuple[Resample, np.ndarray | None]:
    """Over prompts where some have several images, else over images."""
    repeated = len(np.unique(prompt)) < len(prompt)
    return (over_groups, prompt) if repeated else (over_images, None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scorer", metavar="SCORER", help="a folder, or a bundled name")
    parser.add_argument("trajectories", type=Path, metavar="TRAJECTORIES", help="labelled, of one setting")
    parser.add_argument(
        "--against", metavar="NAME", help="another scorer for the same latents: a folder, or a bundled name"
    )
    parser.add_argument(
        "--shares", help="of the steps, separated by commas, for the AUROC (where the guard would score)"
    )
    parser.add_argument("--preview", help="where a scorer uses an autoencoder: its folder or Hub id")
    parser.add_argument("--check-cost", type=float, help="of one image, in its denoiser calls (as calibrated)")
    parser.add_argument("--out", type=Path, help="result file (evaluation.json in the folder of the scorer)")
    args = parser.parse_args(arguments)
    try:
        test = read_test_set(args.trajectories)
        scorer = _load(args.scorer, args.preview)
        columns = test.guarded(scorer) if args.shares is None else test.nearest(_shares(args.shares))
        rows, ours = evaluate(args.scorer, scorer, test, columns, args.check_cost)
        if args.against is not None:
            ours_cost = next(row["check_cost"] for row in rows if row["table"] == "rules")
            other = _load(args.against, args.preview)
            more, theirs = evaluate(args.against, other, test, columns, args.check_cost, ours_cost)
            rows += more + against(args.scorer, ours, args.against, theirs)
        if left_out := int((~test.used).sum()):
            print(f"{left_out} images without a label left out")
        folder = Path(args.scorer)
        write_results(
            "own", rows, seed=SEED, out=args.out or (folder if folder.is_dir() else Path()) / "evaluation.json"
        )
    except (MoeArtifactsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _load(name: str, preview: str | None) -> ArtifactScorer:
    """A scorer; with the autoencoder that it needs for its previews, where it does."""
    config = read_config(find_checkpoint(name, local_files_only=True) / CONFIG_NAME, ScorerConfig)
    if config.preview.kind == "linear":
        return ArtifactScorer.from_pretrained(name, local_files_only=True)
    if preview is None:
        raise InputError(f"the scorer {name!r} looks through an autoencoder: name it with --preview")
    return ArtifactScorer.from_pretrained(name, preview=load_preview(preview, "latents"), local_files_only=True)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"shares must be numbers separated by commas such as 0.15,0.35,1, got {text!r}") from error
    if not all(0 < share <= 1 for share in shares):
        raise InputError(f"shares must be above 0 and at most 1, got {text!r}")
    return shares


if __name__ == "__main__":
    sys.exit(main())
