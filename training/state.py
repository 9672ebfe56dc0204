"""Resumable training state as safetensors: no pickle, written to a temporary name and renamed.

Random numbers need no saving: every step draws from a generator seeded with (seed, step), so that a resumed run
continues exactly as the uninterrupted one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_artifacts.files import atomic_path


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step. The odd constant keeps neighbouring seeds from sharing a stream."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 62))


def save_state(path: Path, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Write modules and optimizer so that ``load_state`` continues after ``step`` finished steps."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module.{name}.{k}": v.detach().clone().contiguous() for k, v in module.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v).clone().contiguous() for k, v in values.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step)})


def load_state(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Restore what ``save_state`` wrote; the number of finished steps, 0 where nothing was saved."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
