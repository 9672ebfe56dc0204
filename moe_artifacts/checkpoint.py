"""A scorer on disk: ``config.json`` and ``model.safetensors`` in one folder. Nothing is ever unpickled.

Whatever a file may hold, the caller gets a checked config and finite float32 weights, or an error that says which file
is wrong and what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_artifacts.config import FORMAT_VERSION, ConfigT, ScorerConfig, from_dict, to_dict
from moe_artifacts.errors import CheckpointError, ConfigError, InputError
from moe_artifacts.files import atomic_path, read_json, write_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
BUNDLED = Path(__file__).parent / "bundled"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def save_checkpoint(folder: str | os.PathLike[str], config: ScorerConfig, state: Mapping[str, Tensor]) -> None:
    """Write a checkpoint. The config goes before other weights come, and comes last: what is half replaced does not load.

    Raises:
        CheckpointError: If a weight is not finite.
    """
    save_state(Path(folder, WEIGHTS_NAME), state, makes_void=Path(folder, CONFIG_NAME))
    write_json(Path(folder, CONFIG_NAME), to_dict(config))


def save_state(path: Path, state: Mapping[str, Tensor], makes_void: Path | None = None) -> None:
    """Write finite tensors to a safetensors file.

    Args:
        makes_void: A file that belongs to the tensors that are replaced; removed once the new ones are written, just before
            they appear.
    Raises:
        CheckpointError: If one is not finite.
    """
    _check_finite(state, "state")
    # safetensors refuses tensors that share memory or are strided, so each gets a copy of its own.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        if makes_void is not None:
            makes_void.unlink(missing_ok=True)


def load_checkpoint(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> tuple[ScorerConfig, dict[str, Tensor]]:
    """Read a checkpoint: a bundled name ("fashion"), a folder, or a Hub id ("owner/name").

    A folder wins over a Hub id of the same name, a bundled name over a folder of the same name ("./fashion" is the
    folder). Only a Hub id uses the network, and only for the two files of a checkpoint.

    Args:
        revision: Branch, tag or commit of a Hub id.
        local_files_only: Take a Hub id from the cache, or fail.
    Returns:
        The config and the weights; floating tensors as float32, on the CPU.
    Raises:
        CheckpointError: If files are missing or damaged, or hold NaN or infinity.
        ConfigError: If the config has unknown keys or values out of range, or is of a newer format.
    """
    folder = find_checkpoint(os.fspath(name_or_path), revision, cache_dir, local_files_only)
    return read_config(folder / CONFIG_NAME, ScorerConfig), read_weights(folder / WEIGHTS_NAME)


def load_state_strict(module: nn.Module, state: Mapping[str, Tensor], name: str = "the checkpoint") -> None:
    """``module.load_state_dict``, with every missing, unexpected or misshapen tensor in one error of ours.

    Raises:
        CheckpointError: Naming the tensors.
    """
    own = module.state_dict()
    problems = [f"lacks {key}" for key in sorted(own.keys() - state.keys())]
    problems += [f"has an unexpected {key}" for key in sorted(state.keys() - own.keys())]
    for key in sorted(own.keys() & state.keys()):
        if own[key].shape != state[key].shape:
            problems.append(f"has {key} of shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
    if problems:
        more = f" and {len(problems) - 5} problems more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{name} {'; '.join(problems[:5])}{more}: its config and its weights do not belong together"
        )
    module.load_state_dict(dict(state))


def find_checkpoint(
    name: str, revision: str | None = None, cache_dir: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder that :func:`load_checkpoint` reads, on this machine.

    Raises:
        CheckpointError: If there is none, or the Hub could not give it.
    """
    bundled = sorted(path.parent.parent.name for path in BUNDLED.glob(f"*/scorer/{CONFIG_NAME}"))
    if name in bundled:
        return BUNDLED / name / "scorer"
    if Path(name).is_dir():
        return Path(name)
    if HUB_ID.fullmatch(name):
        return _download(name, revision, cache_dir, local_files_only)
    raise CheckpointError(
        f"no checkpoint {name!r}: it is neither a folder, nor a Hub id (owner/name), nor bundled (there is: {bundled})"
    )


def _download(name: str, revision: str | None, cache_dir: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
        )
    except Exception as error:  # offline, not found, gated, disk full: the hub has a dozen unrelated classes
        raise CheckpointError(f"there is no folder {name!r}, and the Hub could not give {name!r}: {error}") from error
    return Path(folder)


def read_config(path: Path, kind: type[ConfigT]) -> ConfigT:
    """A checked config.

    Raises:
        CheckpointError: If the file is missing or no JSON.
        ConfigError: If it has unknown keys or values out of range, or is of a newer format.
    """
    try:
        values = read_json(path)
    except InputError as error:
        raise CheckpointError(f"damaged or incomplete checkpoint: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        # Before the keys are looked at: a newer format may have others.
        raise ConfigError(
            f"{path} has format_version {version}, this release reads {FORMAT_VERSION}; upgrade moe-artifacts"
        )
    return from_dict(kind, values, where=path.name)


def read_weights(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Finite weights, floating tensors as ``dtype``, on the CPU.

    Raises:
        CheckpointError: If the file is missing or damaged, or holds NaN or infinity.
    """
    try:
        state = load_file(path, device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"damaged or incomplete checkpoint: cannot read {path}: no such file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}; fetch it again. Pickles (.bin, .pt, .ckpt) are not "
            "read, whatever their name"
        ) from error
    _check_finite(state, str(path))
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _check_finite(state: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{where}: the tensor {name!r} holds NaN or infinity; such weights cannot be used")
