"""Small recorded runs with a known law, in every format that the readers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from moe_artifacts.trajectory import Trajectory

STEPS = (1, 4, 7)  # of 10: scored after 2, 5 and 8 calls
NUM_STEPS = 10


def made_up(prompts: int = 40, images: int = 5, seed: int = 0) -> dict[str, Any]:
    """Final scores with a part that the images of a prompt share, and scores that come nearer to them; 20 % are bad."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), images)
    final = rng.normal(size=prompts)[prompt] + rng.normal(size=len(prompt))
    noise = rng.normal(size=(len(prompt), 3)) * np.array([1.5, 0.8, 0.4])
    return {
        "prompt": prompt,
        "final": final,
        "scores": final[:, None] + noise,
        "label": (final < np.quantile(final, 0.2)).astype(float),
    }


def long_form(runs: dict[str, Any], **columns: Any) -> dict[str, Any]:
    """One row per image and step; ``columns`` replaces some, None takes one out."""
    images, steps = runs["scores"].shape
    table = {
        "image": [f"{i:04d}" for i in range(images) for _ in range(steps)],
        "prompt": [f"prompt {p}" for p in runs["prompt"] for _ in range(steps)],
        "step": list(STEPS) * images,
        "num_steps": [NUM_STEPS] * (images * steps),
        "score": runs["scores"].ravel(),
        "label": np.repeat(runs["label"], steps),
        "final": np.repeat(runs["final"], steps),
    }
    return {name: value for name, value in (table | columns).items() if value is not None}


def write(path: Path, table: dict[str, Any]) -> Path:
    """By its ending: .csv, .parquet, or .npz."""
    if path.suffix == ".npz":
        np.savez(path, **table)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pa.table(table), path)
    else:
        pq.write_table(pa.table(table), path)
    return path


def arrays(runs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What an npz holds."""
    values = runs | {"calls": np.array(STEPS) + 1, "total_calls": np.array(NUM_STEPS)} | changes
    return {name: value for name, value in values.items() if value is not None}


def posterior(runs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The scores of our own scorers [image step], as if it had guessed the law; decided at a rate of 1 per call."""
    prob = 1 / (1 + np.exp(1.5 * runs["scores"] + 1.5))
    pdf = np.array([0.5, 0.3, 0.1])
    return {
        "artifact_prob": prob,
        "exit_prob": np.broadcast_to([0.5, 0.6, 0.5], prob.shape),
        "exit_cdf": np.broadcast_to(pdf.cumsum(), prob.shape),
        "cumulative_artifact_prob": (pdf * prob).cumsum(axis=1),
        "cumulative_clean_prob": (pdf * (1 - prob)).cumsum(axis=1),
    }


def trajectory(runs: dict[str, Any], rows: slice = slice(None), **changes: Any) -> Trajectory:
    """The posterior as a guard records it."""
    prompt = runs["prompt"][rows]
    values: dict[str, Any] = {
        "prompts": [f"prompt {p}" for p in prompt],
        "seeds": list(range(len(runs["prompt"])))[rows],
        "step": list(STEPS),
        "log_snr": torch.tensor([-3.0, 0.0, 3.0]),
        "scores": {name: torch.tensor(v[rows]).float() for name, v in posterior(runs).items()},
        "num_steps": NUM_STEPS,
        "label": torch.tensor(runs["label"][rows]).float(),
        "meta": {
            "scheduler": "DDIMScheduler",
            "num_inference_steps": NUM_STEPS,
            "guidance_scale": 1.5,
            "scored_steps": list(STEPS),
        },
    }
    return Trajectory(**values | changes)
