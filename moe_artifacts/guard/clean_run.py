"""What generate_clean hands back, and its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from moe_artifacts.config import ThresholdConfig
from moe_artifacts.guard.attempts import AttemptQueue, Place
from moe_artifacts.guard.output import promise
from moe_artifacts.guard.run_folder import Attempt, Wave
from moe_artifacts.verdict import Status

SHOWN = 10  # unfilled prompts that the report names
ENDS: dict[Status, str] = {  # of attempts that bring no image, in words
    "aborted": "aborted",
    "audited": "finished for the audit",
    "rejected": "rejected at the last step",
    "error": "with non-finite latents or scores",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CleanImage:
    """One finished image and what makes it again."""

    prompt_index: int
    prompt: str
    attempt: int  # 0-based, among those of its prompt
    seed: int
    path: Path | None  # where the run has a folder
    held: Any = field(default=None, repr=False)  # where it has none

    @property
    def image(self) -> Any:
        """As ``output_type`` says; read from the file where the run has a folder."""
        if self.path is None:
            return self.held
        with Image.open(self.path) as picture:
            return picture.copy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfilled:
    """A prompt that lacks images."""

    prompt_index: int
    prompt: str
    out_of_attempts: int  # images that ``max_attempts`` attempts did not bring
    out_of_budget: int  # images still to be attempted when ``max_denoiser_calls``, or an interruption, ended the run

    @property
    def missing(self) -> int:
        return self.out_of_attempts + self.out_of_budget


@dataclass(frozen=True, kw_only=True)
class CleanRun:
    """All images of a run, those of earlier sessions in the same folder included, and what they took."""

    images: list[CleanImage]  # in the order of the prompts, and of the attempts of one prompt
    audited: list[CleanImage]  # would have been aborted, and were finished to be looked at; in the same order
    unfilled: list[Unfilled]
    wanted: int  # images asked for
    waves: list[Wave]  # in the order in which they were made
    rule: ThresholdConfig | None
    interrupted: bool = False  # by the pipeline, in a wave that is not among ``waves``

    @property
    def attempts(self) -> list[Attempt]:
        """Every image that was tried, in the order in which they were made."""
        return [attempt for wave in self.waves for attempt in wave.attempts]

    @property
    def steps_run(self) -> int:
        """Denoiser steps, summed over all attempts."""
        return sum(wave.steps_run for wave in self.waves)

    @property
    def steps_full(self) -> int:
        """What the same attempts would have taken without the guard."""
        return sum(wave.steps_full for wave in self.waves)

    def report(self) -> str:
        """What was made, what it took, which prompts lack images, and what the threshold promises."""
        lines = [self._images(), self._steps(), *self._lacks()]
        promises = dict.fromkeys(promise(self.rule, wave.setting) for wave in self.waves)
        return "\n".join([*lines, *promises])

    def _images(self) -> str:
        counts = Counter(attempt.status for attempt in self.attempts)
        ends = [f"{counts[status]} {words}" for status, words in ENDS.items() if counts[status]]
        tried = f"{counts.total()} attempts and {len(self.waves)} waves"
        made = f"{len(self.images)} of {self.wanted} images in {tried}"
        return f"{made}: {', '.join(ends)}" if ends else made

    def _steps(self) -> str:
        run, full = self.steps_run, self.steps_full
        text = f"{run} denoiser steps run, {full - run} of {full} not run"
        if full:
            text += f" ({(full - run) / full:.1%})"
        return f"{text}; {run / len(self.images):.1f} per image" if self.images else text

    def _lacks(self) -> list[str]:
        if not self.unfilled:
            return []
        rest = "as the run was interrupted" if self.interrupted else "as the next wave could pass max_denoiser_calls"
        lines = [f"{len(self.unfilled)} prompts lack {sum(u.missing for u in self.unfilled)} images:"]
        for unfilled in self.unfilled[:SHOWN]:
            reasons = [
                f"{count} {reason}"
                for count, reason in (
                    (unfilled.out_of_attempts, "after max_attempts"),
                    (unfilled.out_of_budget, rest),
                )
                if count
            ]
            lines.append(f"  {unfilled.prompt_index}  {unfilled.prompt!r}: {', '.join(reasons)}")
        return lines + [f"  and {len(self.unfilled) - SHOWN} more"] * (len(self.unfilled) > SHOWN)


def clean_run(
    prompts: list[str],
    waves: list[Wave],
    queue: AttemptQueue,
    rule: ThresholdConfig | None,
    held: Mapping[Place, Any],
    folder: Path | None,
    *,
    interrupted: bool = False,
) -> CleanRun:
    """The record of a run from its waves.

    Args:
        held: The finished images, where there is no ``folder``.
    """

    def finished(made: Attempt) -> CleanImage:
        return CleanImage(
            prompt_index=made.prompt_index,
            prompt=made.prompt,
            attempt=made.attempt,
            seed=made.seed,
            path=None if folder is None else folder / str(made.file),
            held=held.get((made.prompt_index, made.attempt)),
        )

    attempts = [attempt for wave in waves for attempt in wave.attempts]
    in_order = sorted(attempts, key=lambda made: (made.prompt_index, made.attempt))
    return CleanRun(
        images=[finished(made) for made in in_order if made.kept],
        audited=[finished(made) for made in in_order if made.status == "audited"],
        unfilled=[
            Unfilled(prompt_index=index, prompt=prompts[index], out_of_attempts=tried, out_of_budget=untried)
            for index, (tried, untried) in queue.missing().items()
        ],
        wanted=queue.wanted,
        waves=waves,
        rule=rule,
        interrupted=interrupted,
    )
