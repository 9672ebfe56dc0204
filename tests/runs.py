"""Folders of runs whose every attempt ended as the test says, for the tests of the audit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from moe_artifacts.config import ThresholdConfig, to_dict
from moe_artifacts.guard.output import Setting
from moe_artifacts.guard.run_folder import Attempt, RunWriter, Wave, image_name

RULE = ThresholdConfig(rule="cumulative", threshold=0.5, max_risk=0.05, confidence=0.9)
SETTING = Setting("DDIMScheduler", 6, 1.0, (1, 3, 5))
STATUS = {"k": "kept", "c": "cleared", "a": "aborted", "u": "audited", "x": "error", "r": "rejected", "e": "error"}


def made_up_run(
    folder: Path,
    fates: Mapping[str, str],
    *,
    images_per_prompt: int | None = None,
    rule: ThresholdConfig = RULE,
    audit_rate: float = 0.5,
    seed: int = 0,
    side: int = 4,
    **changes: Any,
) -> Path:
    """Write a run of one wave per prompt.

    Args:
        fates: For each prompt, one letter per attempt: the keys of ``STATUS``, where x broke after it was audited.
        images_per_prompt: By default as many as the first prompt has attempts.
        side: Of the images, in pixels.
        changes: Of run.json.
    """
    settings = {
        "format_version": 1,
        "version": "0.1.0",
        "pipeline": "StableDiffusionPipeline",
        "model": None,
        "dtype": "float32",
        "scheduler": {"_class_name": "DDIMScheduler"},
        "call": {"num_inference_steps": 6},
        "scorer": "scripted",
        "rule": to_dict(rule),
        "audit_rate": audit_rate,
        "audit_seed": 0,
        "seed": seed,
        "images_per_prompt": images_per_prompt or len(next(iter(fates.values()))),
        "prompts": list(fates),
    }
    with RunWriter(folder, settings | changes) as writer:
        for index, (prompt, letters) in enumerate(fates.items()):
            attempts = tuple(_attempt(index, prompt, number, letter, seed) for number, letter in enumerate(letters))
            wave = Wave(attempts=attempts, steps_run=len(attempts), steps_full=6 * len(attempts), setting=SETTING)
            images = [None if made.file is None else Image.new("RGB", (side, side)) for made in attempts]
            writer.commit(wave, images)
    return folder


def _attempt(index: int, prompt: str, number: int, letter: str, seed: int) -> Attempt:
    audited = letter in "ux"
    return Attempt(
        prompt_index=index,
        prompt=prompt,
        attempt=number,
        seed=10_000 * seed + 100 * index + number,
        status=STATUS[letter],
        step=None if letter == "k" else 3,
        audited=audited,
        artifact_prob=0.1,
        cumulative_artifact_prob=None,
        prompt_truncated=False,
        nsfw_content_detected=None,
        file=image_name(index, number, audited) if letter in "kcu" else None,
    )
