"""What ``moe-artifacts demo`` does: generate under the guard, again without it, and ask the judge who was right.

Both runs use the same seed for the same image, so an image that was stopped has a finished counterpart to be judged.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import moe_artifacts
from moe_artifacts.bundled import bundled_judge, bundled_pipeline, class_of
from moe_artifacts.errors import InputError
from moe_artifacts.files import write_json
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.output import GuardedOutput, promise
from moe_artifacts.judge import ManifoldJudge
from moe_artifacts.noise import progress as noise_progress
from moe_artifacts.report import Picture, save_curves, save_grid
from moe_artifacts.schedulers import SCHEDULERS, set_scheduler
from moe_artifacts.scorer import ArtifactScorer
from moe_artifacts.shapes import Preview
from moe_artifacts.trajectory import join_trajectories
from moe_artifacts.verdict import Verdict

BATCH = 48  # images at a time: with far fewer, so small a denoiser costs the same whatever leaves the batch
PROMPTS = (
    "a t-shirt", "a short sleeved top", "trousers", "a pair of trousers", "a pullover", "a sweater",
    "a dress", "a gown", "a coat", "a winter coat", "a sandal", "a summer sandal", "a shirt", "a blouse",
    "a sneaker", "a running shoe", "a handbag", "a tote bag", "an ankle boot", "a leather boot",
)  # fmt: skip

Judged = Literal["artifacts", "clean", "unknown class", "not finite"]


@dataclass(frozen=True)
class DemoRun:
    """The same images with and without the guard."""

    guarded: GuardedOutput  # of all batches together
    finished: Preview  # every image asked for, from the run without the guard
    log_snr_range: tuple[float, float]  # of the scorer
    margins: list[float | None]  # the judge's, of the finished images; None: it does not know the prompt's class
    seconds_guarded: float  # scoring included
    seconds_unguarded: float

    @property
    def judged(self) -> list[Judged]:
        """What the judge says of each finished image."""
        return [_word(margin) for margin in self.margins]

    @property
    def max_difference(self) -> float | None:
        """Largest difference of a pixel between a kept image and its finished counterpart; None if none was kept."""
        kept = self.guarded.kept_indices
        return (self.guarded.images - self.finished[kept]).abs().max().item() if kept else None

    def truth_table(self) -> dict[str, dict[Judged, int]]:
        """Images by what became of them and by what the judge says of the finished image."""
        words: tuple[Judged, ...] = ("artifacts", "clean", "unknown class", "not finite")
        table = {fate: dict.fromkeys(words, 0) for fate in ("aborted", "kept")}
        for verdict, word in zip(self.guarded.verdicts, self.judged, strict=True):
            fate = "kept" if verdict.status == "cleared" else verdict.status
            table.setdefault(fate, dict.fromkeys(words, 0))[word] += 1
        return table

    def text(self) -> str:
        """All of it for people to read."""
        out = self.guarded
        steps = out.steps_run / out.steps_full - 1
        seconds = self.seconds_guarded / self.seconds_unguarded - 1
        difference = (
            "no image was kept, so there is nothing to compare with the run without the guard"
            if self.max_difference is None
            else f"kept images and the same images without the guard differ by at most {self.max_difference:.1e} "
            "(pixels in [0, 1])"
        )
        return "\n".join(
            [
                *self._image_lines(),
                "",
                out.report(),
                "",
                f"denoiser steps: {out.steps_run} with the guard, {out.steps_full} without ({steps:+.1%})",
                f"wall-clock: {self.seconds_guarded:.1f} s with the guard, scoring included, "
                f"{self.seconds_unguarded:.1f} s without ({seconds:+.1%})",
                difference,
                "",
                *self._truth_lines(),
            ]
        )

    def results(self) -> dict[str, Any]:
        """All of it as plain JSON values; steps are counted from 1, as in the report."""
        out, trajectory = self.guarded, self.guarded.trajectory
        images = []
        for i, (verdict, word, margin) in enumerate(zip(out.verdicts, self.judged, self.margins, strict=True)):
            curves = {
                name: [_finite(value) for value in trajectory.scores[name][i].tolist()]
                for name in ("artifact_prob", "cumulative_artifact_prob", "exit_cdf")
            }
            images.append(
                {
                    **{name: getattr(verdict, name) for name in ("index", "prompt", "seed", "status")},
                    "decided_after": None if verdict.step is None else verdict.step + 1,
                    "artifact_prob": _finite(verdict.artifact_prob),
                    "cumulative_artifact_prob": _finite(verdict.cumulative_artifact_prob),
                    "judged": word,
                    "margin": None if margin is None else _finite(margin),
                    "curves": curves,
                }
            )
        return {
            "command": "moe-artifacts demo",
            "version": moe_artifacts.__version__,
            "torch_threads": torch.get_num_threads(),
            "setting": dataclasses.asdict(out.setting),
            "threshold": None if out.rule is None else dataclasses.asdict(out.rule),
            "promise": promise(out.rule, out.setting),
            "num_steps": trajectory.num_steps,
            "scored_after": [step + 1 for step in trajectory.step],
            "kept_indices": out.kept_indices,
            "denoiser_steps": {"guarded": out.steps_run, "unguarded": out.steps_full},
            "seconds": {"guarded": self.seconds_guarded, "unguarded": self.seconds_unguarded},
            "max_difference": self.max_difference,
            "truth_table": self.truth_table(),
            "images": images,
        }

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write grid.png, curves.png and results.json; returns their paths."""
        out, judged = self.guarded, self.judged
        kept = set(out.kept_indices)
        pictures = [
            Picture(self.finished[i], (v.prompt, self._fate(v), f"judge: {_judgement(word, margin)}"), word)
            for i, (v, word, margin) in enumerate(zip(out.verdicts, judged, self.margins, strict=True))
        ]
        paths = [Path(folder, name) for name in ("grid.png", "curves.png", "results.json")]
        save_grid(
            paths[0],
            kept=[dataclasses.replace(pictures[i], image=out.images[k]) for k, i in enumerate(out.kept_indices)],
            stopped=[picture for i, picture in enumerate(pictures) if i not in kept],
        )
        progress = noise_progress(out.trajectory.log_snr, self.log_snr_range)
        save_curves(paths[1], out.trajectory, out.verdicts, judged, out.rule, progress)
        write_json(paths[2], self.results())
        return paths

    def _fate(self, verdict: Verdict) -> str:
        after = "" if verdict.step is None else f" at {verdict.step + 1} of {self.guarded.trajectory.num_steps}"
        return f"{verdict.status}{after}"

    def _image_lines(self) -> list[str]:
        width = min(32, max(len(v.prompt) for v in self.guarded.verdicts))
        head = (
            f"{'#':>4}  {'prompt':{width}}  {'seed':>10}  {'verdict':20}  {'cumulative':>10}  {'posterior':>9}  judge"
        )
        lines = [head]
        for verdict, word, margin in zip(self.guarded.verdicts, self.judged, self.margins, strict=True):
            prompt = " ".join(verdict.prompt.split())[:width]
            lines.append(
                f"{verdict.index:>4}  {prompt:{width}}  {verdict.seed:>10}  {self._fate(verdict):20}  "
                f"{verdict.cumulative_artifact_prob:>10.3f}  {verdict.artifact_prob:>9.3f}  {_judgement(word, margin)}"
            )
        return lines

    def _truth_lines(self) -> list[str]:
        table = self.truth_table()
        always = ("artifacts", "clean")
        words = [w for w in table["kept"] if w in always or any(counts[w] for counts in table.values())]
        lines = [f"{'judge:':10}{''.join(f'{word:>15}' for word in words)}"]
        return lines + [f"{fate:10}{''.join(f'{counts[w]:>15}' for w in words)}" for fate, counts in table.items()]


def plan(prompts: list[str] | None, images: int, seed: int) -> tuple[list[str], list[int]]:
    """One prompt and one seed per image; the images are shared out evenly over the prompts, in their order.

    Args:
        prompts: None: ``PROMPTS``, two for each of the ten classes.
        seed: Of the first image; the others follow.
    Raises:
        InputError: If there are no prompts, no images, or fewer images than prompts of the caller's own.
    Example:
        >>> plan(["a bag", "a coat"], images=3, seed=7)
        (['a bag', 'a bag', 'a coat'], [7, 8, 9])
    """
    if images < 1:
        raise InputError(f"images must be at least 1, got {images}")
    if not 0 <= seed <= 2**63 - images:
        raise InputError(f"seed must be between 0 and {2**63 - images}, got {seed}")
    if prompts is not None:
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise InputError(f"prompts must be at least one text that is not empty, got {prompts}")
        if images < len(prompts):
            raise InputError(f"images must be at least {len(prompts)}, one per prompt, got {images}")
    chosen = PROMPTS if prompts is None else prompts
    return [chosen[i * len(chosen) // images] for i in range(images)], list(range(seed, seed + images))


def run_demo(
    prompts: list[str], seeds: list[int], steps: int | None = None, scheduler: str | None = None, name: str = "fashion"
) -> DemoRun:
    """Generate one image per prompt and seed, with the guard and without it, and judge what the latter gives.

    Args:
        steps: Denoising steps; None: as many as the scorer was calibrated for.
        scheduler: A key of ``SCHEDULERS``; None: the pipeline's own.
        name: Of what is bundled.
    Raises:
        InputError: For an unknown scheduler, or a number of steps it cannot take.
        CheckpointError: If a bundled file is missing or damaged.
    """
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise InputError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {scheduler!r}")
    if steps is not None and steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    pipe, settings = bundled_pipeline(name)
    most = pipe.scheduler.config.num_train_timesteps
    if steps is not None and steps > most:
        raise InputError(
            f"steps must be at most {most}, the number of steps the pipeline was trained with, got {steps}"
        )
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    if steps is not None:
        settings["num_inference_steps"] = steps
    pipe.set_progress_bar_config(disable=None, leave=False)  # None: only on a terminal
    scorer = ArtifactScorer.from_pretrained(name)
    guard = ArtifactGuard(scorer, on_abort="drop")

    # What is paid only once must not be counted against whichever run comes first.
    short = {**settings, "num_inference_steps": min(2, settings["num_inference_steps"]), "output_type": "pt"}
    first = prompts[:BATCH]
    ArtifactGuard(scorer, on_abort="record")(pipe, first, generator=_generators(seeds[:BATCH]), **short)

    outputs, finished, guarded_s, unguarded_s = [], [], 0.0, 0.0
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        call = {"prompt": prompts[part], "output_type": "pt", **settings}
        began = time.perf_counter()
        outputs.append(guard(pipe, generator=_generators(seeds[part]), **call))
        between = time.perf_counter()
        finished.append(pipe(generator=_generators(seeds[part]), **call).images.float().cpu())
        guarded_s, unguarded_s = guarded_s + between - began, unguarded_s + time.perf_counter() - between
    images = torch.cat(finished)
    return DemoRun(
        guarded=_join(outputs),
        finished=images,
        log_snr_range=scorer.config.log_snr_range,
        margins=judge_margins(bundled_judge(name), prompts, images, name),
        seconds_guarded=guarded_s,
        seconds_unguarded=unguarded_s,
    )


def judge_margins(judge: ManifoldJudge, prompts: list[str], images: Preview, name: str) -> list[float | None]:
    """The judge's margin of each image, None where the prompt names none of its classes."""
    labels = [class_of(prompt, name) for prompt in prompts]
    known = [i for i, label in enumerate(labels) if label is not None]
    margins: list[float | None] = [None] * len(prompts)
    values = judge.margin(images[known], torch.tensor([labels[i] for i in known], dtype=torch.int64)).tolist()
    for i, value in zip(known, values, strict=True):
        margins[i] = value
    return margins


def _join(outputs: list[GuardedOutput]) -> GuardedOutput:
    """The batches of one setting as one run."""
    starts = [sum(len(out.verdicts) for out in outputs[:k]) for k in range(len(outputs))]
    pairs = list(zip(starts, outputs, strict=True))
    return dataclasses.replace(
        outputs[0],
        images=torch.cat([out.images.float().cpu() for out in outputs]),
        kept_indices=[start + i for start, out in pairs for i in out.kept_indices],
        verdicts=[dataclasses.replace(v, index=start + v.index) for start, out in pairs for v in out.verdicts],
        trajectory=join_trajectories([out.trajectory for out in outputs]),
        steps_run=sum(out.steps_run for out in outputs),
        steps_full=sum(out.steps_full for out in outputs),
    )


def _generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _word(margin: float | None) -> Judged:
    if margin is None:
        return "unknown class"
    if math.isnan(margin):
        return "not finite"
    return "artifacts" if margin > 0 else "clean"


def _judgement(word: Judged, margin: float | None) -> str:
    return word if margin is None or math.isnan(margin) else f"{word} ({margin:+.2f})"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
