"""How much of an image's verdict is still open after half of the steps: the ceiling of any scorer that looks there.

``python -m benchmarks.twins`` finishes each image several times from the same state at half of the steps, with other noise from
there on, and asks how well the mean of the judge's margins of these twins ranks the image itself. A deterministic sampler
draws no noise: its twins are the image. A stochastic one leaves open what the noise of the second half decides. Next to it stands what the
bundled scorer reaches on the same images.

A setting takes up to ten minutes. A run that was killed goes on with the next one: rows that are done are in
``MOE_ARTIFACTS_WORK/twins`` and count as long as program and bundled files stay the same.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import plain_value, write_results
from benchmarks.sources import source_hashes
from moe_artifacts.bundled import FOLDER as BUNDLED
from moe_artifacts.bundled import bundled_judge, bundled_pipeline
from moe_artifacts.files import read_json, sha256_file, write_json
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.judge import ManifoldJudge
from moe_artifacts.schedulers import set_scheduler
from moe_artifacts.scorer import ArtifactScorer
from training.data.prompts import draw_prompts
from training.metrics import auroc_within, bootstrap
from training.workspace import compile_if_possible, progress, work_folder

SEED = 80_000_000
BATCH = 100
STOCHASTIC = ("ddpm", "euler-a")  # the others need no second twin: it is the image again


class Setting:
    """The bundled pipeline with one scheduler and number of steps."""

    def __init__(self, scheduler: str, steps: int) -> None:
        self.pipe, defaults = bundled_pipeline("fashion")
        set_scheduler(self.pipe, scheduler)
        self.call: dict[str, Any] = {**defaults, "num_inference_steps": steps, "output_type": "pt"}
        self.half = steps // 2

    def images(self, prompts: list[str], seeds: list[int], later: int | None = None) -> Tensor:
        """Finished images; ``later`` shifts the seeds of what is drawn in the second half."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def reseed(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if later is not None and step + 1 == self.half:
                for generator, seed in zip(generators, seeds, strict=True):
                    generator.manual_seed(seed + later)
            return tensors

        return self.pipe(prompts, generator=generators, callback_on_step_end=reseed, **self.call).images

    def scores(self, scorer: ArtifactScorer, prompts: list[str], seeds: list[int]) -> Tensor:
        """The scorer's posterior at its last check up to half of the steps."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        out = ArtifactGuard(scorer, on_abort="record")(self.pipe, prompts, generator=generators, **self.call)
        column = max(i for i, step in enumerate(out.trajectory.step) if step < self.half)
        return out.trajectory.scores["artifact_prob"][:, column]


def measured(scheduler: str, steps: int, images: int, twins: int) -> dict[str, Any]:
    """One row, from its file if it has been measured by this program on these bundled files."""
    files = sorted(path for path in (BUNDLED / "fashion").rglob("*") if path.is_file())
    made_by = source_hashes("benchmarks/twins.py") | {
        str(path.relative_to(BUNDLED)): sha256_file(path) for path in files
    }
    path = work_folder() / "twins" / f"{scheduler}-{steps}-{images}-{twins}.json"
    if path.exists() and (found := read_json(path))["made_by"] == made_by:
        return dict(found["row"])
    row = {name: plain_value(name, value) for name, value in measure(scheduler, steps, images, twins).items()}
    write_json(path, {"made_by": made_by, "row": row})
    return row


def measure(scheduler: str, steps: int, images: int, twins: int) -> dict[str, Any]:
    """One row."""
    setting, judge = Setting(scheduler, steps), bundled_judge("fashion")
    compile_if_possible(setting.pipe.unet, logging.getLogger(__name__))
    scorer = ArtifactScorer.from_pretrained("fashion")
    own, others, posterior, classes = [], [], [], []
    with progress(images, 0, f"{scheduler} {steps}") as bar:
        for start in range(0, images, BATCH):
            seeds = list(range(SEED + start, SEED + min(start + BATCH, images)))
            prompts, labels = draw_prompts(len(seeds), "held-out", torch.Generator().manual_seed(seeds[0]))
            own.append(judge.margin(setting.images(prompts, seeds), labels))
            others.append(mean_margin(setting, judge, prompts, seeds, labels, twins))
            posterior.append(setting.scores(scorer, prompts, seeds))
            classes.append(labels)
            bar.update(len(seeds))
    bad, label = (torch.cat(own) > 0).numpy(), torch.cat(classes).numpy()
    row: dict[str, Any] = {"scheduler": scheduler, "steps": steps, "images": images, "twins": twins}
    row["bad_rate"] = float(bad.mean())
    for name, parts in (("auroc_twins", others), ("auroc_within", posterior)):
        score = torch.cat(parts).numpy()
        row[name] = auroc_within(score, bad, label)
        within = partial(_auroc_of, score, bad, label)
        row[f"{name}_low"], row[f"{name}_high"] = bootstrap(within, images)
    return row


def _auroc_of(score: np.ndarray, bad: np.ndarray, label: np.ndarray, rows: np.ndarray) -> float:
    return auroc_within(score[rows], bad[rows], label[rows])


def mean_margin(
    setting: Setting, judge: ManifoldJudge, prompts: list[str], seeds: list[int], labels: Tensor, twins: int
) -> Tensor:
    """Mean over the twins of the judge's margin."""
    margins = [judge.margin(setting.images(prompts, seeds, later=k << 24), labels) for k in range(1, twins + 1)]
    return torch.stack(margins).mean(dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedulers", default="ddim,euler-a", help="separated by commas (%(default)s)")
    parser.add_argument("--steps", default="12,25,50", help="separated by commas (%(default)s)")
    parser.add_argument("--images", type=int, default=1_000, help="(%(default)s)")
    parser.add_argument("--twins", type=int, default=6, help="of each image (%(default)s)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [
        measured(scheduler, int(steps), args.images, args.twins if scheduler in STOCHASTIC else 1)
        for scheduler in args.schedulers.split(",")
        for steps in args.steps.split(",")
    ]
    write_results("twins", rows, seed=SEED, out=args.out)


if __name__ == "__main__":
    main()
