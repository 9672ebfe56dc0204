"""Does watching change a run, and do rows that stay come out as if nothing had left?

``python -m benchmarks.compatibility`` runs every pipeline of tests/tiny_pipelines, with random weights, with each scheduler it takes
and each way of guiding it, and writes ``benchmarks/results/compatibility.json``; ``--docs docs/compatibility.md`` writes the table
for people from that file. ``--pipeline fashion|tiny|FOLDER`` does the same for one pipeline with the schedulers of
``moe_artifacts.schedulers``. One row each:

* ``record``: "equal" if the images of the watched run are bit-identical to those of the unwatched one;
* ``drop``: "equal" if the images that are kept equal the same rows of the unwatched run, while the batch shrinks from
  all rows to half of them, to all but one and then to one, or one by one to none; "refused" where the guard says so itself,
  before the first step;
* ``max_abs_difference``: the largest difference of an image in [0, 1]; ``why``: what went wrong, if anything.

The verdicts follow a script, so that what is compared does not depend on a scorer.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import compatibility_page
from benchmarks.results import RESULTS, write_results
from moe_artifacts import ArtifactGuard, GuardedOutput, UnsupportedPipelineError
from moe_artifacts.config import (
    EmbedderConfig,
    ExitHeadConfig,
    ExpertsConfig,
    FeatureConfig,
    GateConfig,
    PreviewConfig,
    ScorerConfig,
    ThresholdConfig,
)
from moe_artifacts.errors import ReproducibilityWarning
from moe_artifacts.guard.space import latent_space_of
from moe_artifacts.schedulers import SCHEDULERS, set_scheduler
from moe_artifacts.scorer import StepScore

# Of images in [0, 1], float32: a smaller batch sums in another order, which a few steps with random weights amplify.
ATOL = 1e-5
PROMPTS = ("an ankle boot", "a pullover", "a bag", "a shirt")
FAMILIES = "families"  # all of tests/tiny_pipelines


@dataclass
class Script:
    """Stands for a scorer: image i reaches the threshold at the scored step ``abort_at[i]``, counted from 0."""

    config: ScorerConfig
    abort_at: dict[int, int]

    def session(self, batch_size: int, prompts: list[str] | None = None) -> Session:
        return Session(self.abort_at, torch.arange(batch_size))


@dataclass
class Session:
    abort_at: dict[int, int]
    images: Tensor
    calls: int = 0

    def step(self, *, x0: Tensor, log_snr: float, latents: Tensor | None = None) -> StepScore:
        last = self.calls
        self.calls += 1
        prob = torch.tensor([float(self.abort_at.get(i, last + 1) <= last) for i in self.images.tolist()])
        finite = x0.isfinite().flatten(1).all(dim=1)
        return StepScore(prob, prob, prob, prob, torch.zeros_like(prob), torch.ones(len(prob), 1), finite)

    def keep(self, rows: Tensor) -> None:
        self.images = self.images[rows]


def script_config(pipe: Any) -> ScorerConfig:
    """For the pipeline's own latent space, scoring every step."""
    space, levels = latent_space_of(pipe, "the pipeline's own"), (-20.0, 20.0)
    return ScorerConfig(
        name="script",
        label="none",
        latent_space=space,
        preview=PreviewConfig(kind="linear", channels=space.channels),
        embedder=EmbedderConfig(model="custom", embed_dim=1, model_config={}),
        features=FeatureConfig(embed_dim=1, use_delta=False, use_prompt=False),
        gate=GateConfig(num_experts=1, embed_dim=1, log_snr_range=levels, top_k=1),
        experts=ExpertsConfig(num_experts=1, feature_dim=1, hidden_dim=1, log_snr_range=levels),
        exit_head=ExitHeadConfig(state_dim=1),
        log_snr_range=levels,
        check_progress=tuple(i / 1000 for i in range(1001)),
        threshold=ThresholdConfig(rule="cumulative", threshold=0.5),
    )


def leavings(images: int, steps: int) -> dict[str, dict[int, int]]:
    """Which image leaves after which scored step, for each way of shrinking; at least one step is left to run.

    Example:
        >>> leavings(images=4, steps=6)["to one"]
        {0: 0, 1: 2, 3: 2}
    """
    last, kept = max(steps - 2, 0), images // 2
    others = [i for i in range(images) if i != kept]
    outwards = [i // 2 if i % 2 else images - 1 - i // 2 for i in range(images)]  # from either end in turn
    return {
        "to half": {i: min(1, last) for i in range(1, images, 2)},
        "to one": {i: 0 if i == others[0] else min(2, last) for i in others},
        "to none": {image: min(k * steps // (images + 1) + 1, last) for k, image in enumerate(outwards)},
    }


def watched(pipe: Any, on_abort: Any, abort_at: dict[int, int], arguments: dict[str, Any]) -> GuardedOutput:
    return ArtifactGuard(Script(script_config(pipe), abort_at), on_abort=on_abort)(pipe, **arguments)


class NotRun(Exception):
    """The unwatched run fails: diffusers itself does not take this combination."""


def seeded(call: Callable[..., Any], *arguments: Any) -> Any:
    """``call`` from the same state of torch's global generator.

    The generators of a call are its arguments, but SD3's ControlNet encodes its control images without them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return call(*arguments)


def compare_runs(
    pipe: Any, arguments: Callable[[], dict[str, Any]], ways: Sequence[str] = ("to half", "to one", "to none")
) -> dict[str, Any]:
    """The columns of one row: unwatched, recorded, and with rows leaving.

    Args:
        arguments: Of a call of ``pipe``, made anew for each run: generators are used up.
        ways: Of shrinking the batch, see :func:`leavings`.
    Raises:
        NotRun: If the unwatched run fails.
    """
    try:
        # Some hand back numpy arrays when asked for tensors.
        full = torch.as_tensor(seeded(lambda: pipe(**arguments()).images))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise NotRun(error) from error
    row: dict[str, Any] = {"record": "equal", "drop": "equal", "max_abs_difference": 0.0, "why": ""}
    try:
        recorded = seeded(watched, pipe, "record", {}, arguments())
    except UnsupportedPipelineError as error:
        return row | {"record": "refused", "drop": "refused", "why": str(error)}
    if not torch.equal(torch.as_tensor(recorded.images), full):
        row |= {"record": "different", "why": "the images of the watched run differ"}
    for way in ways:
        abort_at = leavings(len(full), len(recorded.trajectory.step))[way]
        expected = [i for i in range(len(full)) if i not in abort_at]
        try:
            output = seeded(watched, pipe, "drop", abort_at, arguments())
        except UnsupportedPipelineError as error:
            return row | {"drop": "refused", "why": str(error)}
        found = (torch.as_tensor(output.images) - full[expected]).abs().max().item() if expected else 0.0
        if output.kept_indices != expected or not found <= ATOL:
            why = f"{way}: kept {output.kept_indices}, expected {expected}; difference {found:.2g}"
            row |= {"drop": "different", "why": why}
        row["max_abs_difference"] = max(row["max_abs_difference"], found)
    return row


def compare(pipe: Any, guidance_scale: float, images: int, steps: int, seed: int) -> dict[str, Any]:
    """One row of the table of a pipeline with a text encoder, for the scheduler that is in it."""

    def arguments() -> dict[str, Any]:
        return {
            "prompt": [PROMPTS[i % len(PROMPTS)] for i in range(images)],
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "generator": [torch.Generator().manual_seed(seed + i) for i in range(images)],
            "output_type": "pt",
        }

    return compare_runs(pipe, arguments)


def load_pipeline(name: str) -> Any:
    if name == "tiny":
        from tests.tiny import stable_diffusion

        return stable_diffusion()
    if name == "fashion":
        from moe_artifacts import bundled_pipeline

        return bundled_pipeline("fashion")[0]
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(name: str, images: int, steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row per scheduler, with guidance and without."""
    pipe = load_pipeline(name)
    for scheduler in SCHEDULERS:
        set_scheduler(pipe, scheduler)
        for guidance_scale in (1.0, 3.0):
            found = compare(pipe, guidance_scale, images, steps, seed)
            yield {"pipeline": name, "scheduler": scheduler, "guidance_scale": guidance_scale, **found}


def family_cases() -> dict[str, Any]:
    """The tiny pipelines of the tests by name, those that the tests of the guard add included."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))  # whose modules import each other as pytest lets them
    from more_pipelines import CASES as MORE
    from tiny_pipelines import CASES

    return CASES | {case.name: case for case in MORE}


def measure_family(case: Any, images: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row per scheduler and way of guiding the pipeline; with its own scheduler also two images per prompt."""
    pipe = case.pipe()
    combinations = [(scheduler, guidance, 1) for scheduler in case.schedulers for guidance in case.guidance]
    if case.images_per_prompt and images % 2 == 0:
        combinations += [(next(iter(case.schedulers)), guidance, 2) for guidance in case.guidance]
    for scheduler, guidance, copies in tqdm(combinations, desc=case.name):
        pipe.scheduler = case.schedulers[scheduler]()
        several = {"num_images_per_prompt": copies} if copies > 1 else {}
        row = {
            "pipeline": case.name,
            "class": type(pipe).__name__,
            "scheduler": scheduler,
            "guidance": guidance,
            "images_per_prompt": copies,
        }
        # A call makes its own generators, from 100 on: they are used up by a run.
        call = functools.partial(case.call, images // copies, guidance, first_seed=100 + seed, **several)
        try:
            yield row | compare_runs(pipe, call)
        except NotRun as error:
            print(f"{case.name} does not take {scheduler}, with images per prompt {copies}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline", default=FAMILIES, help="families (all), one of them by name, tiny, fashion, or a folder"
    )
    parser.add_argument("--images", type=int, help="in the batch; 4 for the families, otherwise 8")
    parser.add_argument("--steps", type=int, default=12, help="of a single pipeline; the families say themselves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/compatibility[_PIPELINE].json")
    parser.add_argument("--docs", type=Path, help="only write this page, from the results of the families")
    args = parser.parse_args()
    if args.docs is not None:
        compatibility_page.write(args.docs, args.out or RESULTS / "compatibility.json")
        return
    cases = family_cases()
    if args.pipeline != FAMILIES:
        cases = {args.pipeline: cases[args.pipeline]} if args.pipeline in cases else {}
    images = args.images or (4 if cases else 8)
    if images < 2 or args.steps < 2:
        parser.error("--images and --steps must be at least 2")
    if cases:
        warnings.simplefilter("ignore", DeprecationWarning)  # those of diffusers' schedulers about numpy
        warnings.simplefilter("ignore", FutureWarning)  # those of diffusers about its own parts
        warnings.simplefilter("ignore", ReproducibilityWarning)  # DPM SDE has its own noise
        rows = [row for case in cases.values() for row in measure_family(case, images, args.seed)]
    else:
        rows = list(measure(args.pipeline, images, args.steps, args.seed))
    name = "compatibility" if args.pipeline == FAMILIES else f"compatibility_{Path(args.pipeline).name}"
    write_results(name, rows, seed=args.seed, out=args.out)
    print(compatibility_page.totals(rows))
    if any("different" in (row["record"], row["drop"]) for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
