"""Resumable training state as safetensors and JSON: no pickle, written to a temporary name and renamed.

Random numbers need no saving: every step draws from a generator seeded with (seed, step), so that a resumed run
continues exactly as the uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_artifacts.errors import CheckpointError
from moe_artifacts.files import atomic_path, remove_unfinished


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step. The odd constant keeps neighbouring seeds from sharing a stream."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 62))


def save_state(
    path: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    kept: Mapping[str, Tensor] | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write modules and optimizer so that ``load_state`` continues after ``step`` finished steps.

    Args:
        kept: Tensors beside those of the modules, such as the best weights so far; for :func:`read_kept`.
        record: What JSON can hold, such as the options of the run and its figures so far; for :func:`read_record`.
    Raises:
        OSError: If it cannot be written; the state before is still there.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module.{name}.{k}": v.detach().clone().contiguous() for k, v in module.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v).clone().contiguous() for k, v in values.items()}
    tensors |= {f"kept.{k}": v.contiguous() for k, v in (kept or {}).items()}
    remove_unfinished(path)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step), "record": json.dumps(dict(record or {}))})


def load_state(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Restore what ``save_state`` wrote; the number of finished steps, 0 where nothing was saved.

    Raises:
        CheckpointError: If the file is damaged.
    """
    if not path.exists():
        return 0
    tensors = _read(path, ("module.", "optimizer."))
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(_metadata(path)["step"])


def read_record(path: Path) -> dict[str, Any]:
    """The record that a state was saved with; empty where nothing was saved.

    Raises:
        CheckpointError: If the file is damaged.
    """
    return json.loads(_metadata(path).get("record", "{}")) if path.exists() else {}


def read_kept(path: Path) -> dict[str, Tensor]:
    """The tensors that a state was saved with beside those of its modules."""
    return {key.removeprefix("kept."): value for key, value in _read(path, ("kept.",)).items()}


def _read(path: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot read the training state {path}: {error}; delete it to begin again")
