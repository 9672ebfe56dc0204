"""What the files of a work folder were made of: figures of other runs or of another program must not go into one table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.ablation.inputs import Inputs
from benchmarks.ablation.scores import SPLITS
from benchmarks.sources import source_hashes
from moe_artifacts.embedder import state_sha256
from moe_artifacts.errors import InputError
from moe_artifacts.files import read_json, write_json

START = "benchmarks/ablation/scores.py"  # it imports all that makes a kept file; rows and table can change without harm


def claim(inputs: Inputs) -> None:
    """Note in the work folder what its files are made of.

    Raises:
        InputError: If files are there that were made of something else.
    """
    path, now = inputs.folder / "identity.json", identity(inputs)
    if path.exists():
        found = read_json(path)
    elif any(child.is_dir() for child in inputs.folder.glob("*")):
        found = {}
    else:
        write_json(path, now)
        return
    changed = sorted(name for name in now.keys() | found.keys() if now.get(name) != found.get(name))
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise InputError(
            f"{inputs.folder} holds files made with another {', '.join(changed[:5])}{more}; delete the folder to begin anew"
        )


def identity(inputs: Inputs) -> dict[str, Any]:
    """The scale, hashes of the judged runs and of the pipeline, and one of each source file."""
    scale = {name: value for name, value in asdict(inputs.scale).items() if name != "seeds"}
    runs = {
        f"{split} {name}": value
        for split in ("train", *SPLITS)
        for name, value in vars(inputs.split(split)).items()
        if name != "prompts"  # the seeds and the pipeline stand for them
    }
    weights = {
        f"{part} {name}": value
        for part in ("unet", "vae")
        for name, value in getattr(inputs.pipe, part).state_dict().items()
    }
    return {"scale": scale, "runs": state_sha256(runs), "pipeline": state_sha256(weights), **source_hashes(START)}
