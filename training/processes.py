"""The processes that train together: one alone, or those that accelerate was launched with.

Every process holds the whole model. They exchange gradients, and what the main process says; nothing is pickled.

Gradients are added up after the backward pass, not by DistributedDataParallel during it. It expects one forward call of
one module, while losses here run several modules, in parts, twice (:mod:`training.cached_contrastive`), or with experts
that a process does not use. The price is that sending does not overlap with computing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_artifacts.errors import ConfigError, MoeArtifactsError

if TYPE_CHECKING:
    from accelerate import Accelerator

LAUNCHED = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and by accelerate launch
AT_ONCE = 2**23  # numbers that are sent at a time: 32 MB in float32, so that memory does not double


class ProcessError(MoeArtifactsError, RuntimeError):
    """Another process failed, or does not do the same as this one."""


class Processes:
    """What a training loop needs of them.

    Args:
        device: Where to train without an accelerator.
        accelerator: By default the one that a launcher asks for in its environment; without a launcher none.
    Raises:
        ConfigError: If accelerate was set up for something that is not supported: float16, or a model in pieces.
    """

    def __init__(self, device: torch.device, accelerator: Accelerator | None = None) -> None:
        if accelerator is None and any(name in os.environ for name in LAUNCHED):
            from accelerate import Accelerator

            accelerator = Accelerator()
        self.accelerator = accelerator
        self.index, self.count, self.device = 0, 1, device
        if accelerator is None:
            return
        self.index, self.count, self.device = accelerator.process_index, accelerator.num_processes, accelerator.device
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ConfigError(f'mixed_precision must be "no" or "bf16", got {accelerator.mixed_precision!r}')
        kind = accelerator.distributed_type.value
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise ConfigError(f"every process holds the whole model here: launch without {kind}")

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that accelerate was launched with; float32 without it."""
        return nullcontext() if self.accelerator is None else self.accelerator.autocast()

    def share(self, count: int) -> slice:
        """Which of ``count`` rows are this process's: shares of equal size, but for one row."""
        return slice(count * self.index // self.count, count * (self.index + 1) // self.count)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes; to each the same bits."""
        if self.count == 1:
            return values
        assert self.accelerator is not None
        return self.accelerator.reduce(values.to(self.device), reduction="sum")

    def gather(self, values: Tensor, place: slice, count: int) -> Tensor:
        """The rows of all processes, ``count`` of them, to each; the gradient flows back to its own, at ``place``."""
        if self.count == 1:
            return values
        mine = values.new_zeros(count, *values.shape[1:])
        mine[place] = values.detach()
        whole = self.total(mine)
        return torch.cat([whole[: place.start], values, whole[place.stop :]])

    def add_up_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the sum of the gradients. What has none on any of them stays without: no step, no decay."""
        if self.count == 1:
            return
        has = self.total(torch.tensor([float(p.grad is not None) for p in parameters])) > 0
        used = [p for p, somewhere in zip(parameters, has.tolist(), strict=True) if somewhere]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for part in _parts([p.grad for p in used if p.grad is not None]):
            whole = self.total(torch.cat([gradient.flatten() for gradient in part]))
            for gradient, values in zip(part, whole.split([g.numel() for g in part]), strict=True):
                gradient.copy_(values.view_as(gradient))

    @torch.no_grad()
    def take_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors of the other processes with those of the main one."""
        if self.count == 1:
            return
        for tensor in tensors:
            tensor.copy_(self._broadcast(tensor.to(self.device).contiguous()))

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives on the main process, to all of them; the others wait. It must be something JSON can hold.

        Raises:
            ProcessError: On the others, if it failed; the main process raises the error itself.
        """
        if self.count == 1:
            return work()
        failure: Exception | None = None
        told: dict[str, Any] = {}
        if self.is_main:
            try:
                told = {"value": work()}
            except Exception as error:  # the others must not wait for ever
                failure, told = error, {"failure": f"{type(error).__name__}: {error}"}
        told = self._tell(told)
        if failure is not None:
            raise failure
        if "failure" in told:
            raise ProcessError(f"the main process failed: {told['failure']}")
        return told["value"]

    def _tell(self, value: Any) -> Any:
        """A JSON value of the main process, to all: first how long it is, then its bytes."""
        text = json.dumps(value).encode()
        length = self._broadcast(torch.tensor([len(text)], device=self.device))
        data = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_main:
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return json.loads(bytes(self._broadcast(data.to(self.device)).tolist()))

    def _broadcast(self, tensor: Tensor) -> Tensor:
        from accelerate.utils import broadcast

        return broadcast(tensor)


def _parts(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """The tensors in order, in lists of one dtype and at most ``AT_ONCE`` numbers, or of one tensor."""
    part: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if part and (size + tensor.numel() > AT_ONCE or tensor.dtype != part[0].dtype):
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.numel()
    if part:
        yield part
