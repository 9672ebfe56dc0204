"""Which denoiser it is: the same weights in the same precision, told from a few numbers of each tensor."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

NUMBERS = 64  # read of each tensor: hashing all gigabytes would take longer than the run


def fingerprint(module: nn.Module) -> str | None:
    """Sixteen hexadecimal digits; None where the weights cannot be read, as when they are offloaded one by one.

    The names, types and shapes of all parameters count, and the beginning of each: training changes them everywhere, and
    so does a LoRA that is fused. One that is not fused adds parameters. A compiled module has those of its original.
    """
    module = getattr(module, "_orig_mod", module)
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if parameter.is_meta:
            return None
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach()
        row = values[(0,) * (values.ndim - 1)][:NUMBERS] if values.ndim else values.reshape(1)
        digest.update(row.cpu().contiguous().view(torch.uint8).numpy().data)  # as bytes: numpy has no bfloat16
    return digest.hexdigest()[:16]
