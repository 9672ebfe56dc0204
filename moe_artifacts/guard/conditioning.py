"""Cutting the inputs of a denoiser to the running rows: the prompt embeddings, which the loop holds at full size.

What is cut is named in pipelines.py. An input that is named nowhere is refused at the first call, before the first
step: if it held one entry per image, it would meet the wrong ones, and a single row would be broadcast over all of them
without an error.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_artifacts.errors import GuardStateError, UnsupportedPipelineError
from moe_artifacts.guard.pipelines import PipelineSpec
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.shapes import Rows

MOST_COPIES = 3  # of the batch in one call: without, with, and with perturbed guidance


@contextlib.contextmanager
def conditioning_follows(rows: LiveRows, modules: Sequence[nn.Module], spec: PipelineSpec) -> Iterator[None]:
    """While open, each of ``modules`` is called with the running rows and their inputs.

    Where the loop keeps its batch (``spec.keeps_batch``) the outputs are handed back at full size, with zeros in the
    rows that have left.

    Args:
        modules: The denoiser, and what else ``spec`` names, e.g. a ControlNet.
    Raises:
        UnsupportedPipelineError: In the first call of a module, for an input that ``spec`` does not name.
        GuardStateError: In a call, for an input that does not count the batch.
    """
    with contextlib.ExitStack() as handles:
        for module in modules:
            cut = _Cut(rows, spec, module)
            # First of all hooks, so that those of others meet a batch that fits together.
            handles.callback(module.register_forward_pre_hook(cut.inputs, prepend=True, with_kwargs=True).remove)
            if spec.keeps_batch:
                handles.callback(module.register_forward_hook(cut.outputs).remove)
        yield


class _Cut:
    """The hooks of one module."""

    def __init__(self, rows: LiveRows, spec: PipelineSpec, module: nn.Module) -> None:
        self._rows, self._spec = rows, spec
        inner: Any = type(getattr(module, "_orig_mod", module))  # the forward of a compiled module names no parameters
        self._module = inner.__name__
        self._parameters = list(inspect.signature(inner.forward).parameters)[1:]  # without self
        self._copies = 0  # of the batch in the last call: guidance repeats it; 0: not called yet

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook."""
        if self._rows.complete and self._copies:
            return None
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        self._copies = self._count_copies(given[self._parameters[0]])
        cut = {name: self._cut(name, value) for name, value in given.items()}
        if self._rows.complete:
            return None  # the first call: everything has been looked at
        # What came as keyword stays one: diffusers looks for the scale of a LoRA among the keywords only.
        return tuple(cut[name] for name in self._parameters[: len(args)]), {name: cut[name] for name in kwargs}

    def outputs(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of a module whose loop keeps its batch."""
        return output if self._rows.complete else self._pad(output)

    def _count_copies(self, sample: Any) -> int:
        size = len(self._rows.held)
        copies, rest = divmod(len(sample), size)
        if rest or not 1 <= copies <= MOST_COPIES:
            raise GuardStateError(
                f"{self._module} got {len(sample)} rows while the batch has {size} of {self._rows.batch_size} images: "
                "something else changed the size of the batch during the run"
            )
        return copies

    def _cut(self, name: str, value: Any) -> Any:
        """An input, with the entries of the running rows if it holds one per image."""
        if value is None or isinstance(value, bool | int | float | str) or name in self._spec.shared:
            return value
        if isinstance(value, dict):
            return {member: self._cut(f"{name}.{member}", entry) for member, entry in value.items()}
        if name in self._spec.batched:
            return self._select(name, value)
        if name == self._parameters[0]:
            return value  # the latents, which have shrunk already
        raise UnsupportedPipelineError(
            f"{self._module} gets {name!r}, which the guard does not know: it may hold one entry per image"
        )

    def _select(self, name: str, value: Any) -> Any:
        listed = name in self._spec.listed
        if isinstance(value, list | tuple) and not listed:
            return type(value)(self._select(name, part) for part in value)
        expected = self._copies * self._rows.batch_size
        if len(value) != expected:
            raise GuardStateError(
                f"{self._module} got {name} with {len(value)} rows, expected {expected}: the guard itself takes the "
                "rows that have left out of the conditioning"
            )
        if self._rows.complete:
            return value
        places = self._places()
        return [value[place] for place in places.tolist()] if listed else value[places.to(value.device)]

    def _pad(self, output: Any) -> Any:
        """An output at full size, whatever it is packed in."""
        if isinstance(output, Tensor):
            full = output.new_zeros((self._copies * self._rows.batch_size, *output.shape[1:]))
            full[self._places().to(output.device)] = output
            return full
        if isinstance(output, dict):  # an output class of diffusers
            return type(output)(**{name: self._pad(value) for name, value in output.items()})
        if isinstance(output, list) and self._spec.listed:
            return list(self._pad(torch.stack(output)))
        if isinstance(output, list | tuple):
            return type(output)(self._pad(part) for part in output)
        return output

    def _places(self) -> Rows:
        """Where the running rows stand among all the copies of the full batch."""
        starts = torch.arange(self._copies) * self._rows.batch_size
        return (starts.unsqueeze(1) + self._rows.running).flatten()
