"""Taking rows out of a batch that is being denoised, while the others go on as if nothing had happened.

The pipeline's loop replaces its latents by what ``scheduler.step`` returns: a step that returns fewer rows makes the
batch smaller. Two parties still count on the full batch, and each is served in its own way:

* The scheduler keeps past model outputs (PNDM, DPM-Solver, UniPC) and draws noise for the shape it is given, row by row
  of a generator list or in one block. It goes on seeing the full batch, with zeros in the rows that have left: its
  state never has to be cut, where one tensor forgotten would be broadcast silently over the last living row, and every
  random number falls where it would have fallen. This costs a few elementwise operations.
* The denoiser, whose calls are the cost to be saved, sees the living rows only. Its latents have shrunk already; the
  prompt embeddings, which the loop holds at full size, are cut in a forward pre-hook.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_artifacts.errors import GuardStateError, InputError
from moe_artifacts.shapes import Rows

# Keyword arguments of a denoiser with one row per image, or with two where classifier-free guidance doubles the batch.
BATCHED_KWARGS = ("encoder_hidden_states", "timestep_cond")


class LiveRows:
    """Which rows of a batch are still being denoised.

    Example:
        >>> rows = LiveRows(4)
        >>> rows.keep(torch.tensor([0, 3]))
        >>> rows.keep(torch.tensor([1]))  # counts among the living
        >>> rows.alive.tolist()
        [3]
        >>> rows.pad(torch.tensor([7.0])).tolist()
        [0.0, 0.0, 0.0, 7.0]
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.alive: Rows = torch.arange(batch_size)  # places in the full batch, rising

    def __len__(self) -> int:
        return len(self.alive)

    @property
    def complete(self) -> bool:
        return len(self.alive) == self.batch_size

    def keep(self, rows: Rows) -> None:
        """Go on with these of the living rows.

        Raises:
            InputError: If they do not rise, or are not living rows: the order of a batch never changes.
        """
        places = rows.tolist()
        if places != sorted(set(places)) or any(not 0 <= place < len(self) for place in places):
            raise InputError(f"rows must be rising indices below {len(self)}, the number of living rows, got {places}")
        self.alive = self.alive[rows.cpu()]

    def pad(self, living: Tensor) -> Tensor:
        """The full batch, with zeros in the rows that have left; ``living`` itself while all rows live."""
        if self.complete:
            return living
        full = living.new_zeros((self.batch_size, *living.shape[1:]))
        full[self.alive.to(living.device)] = living
        return full

    def take(self, full: Tensor, copies: int = 1) -> Tensor:
        """The living rows of a full batch, or of ``copies`` full batches one after the other; ``full`` if all live."""
        if self.complete:
            return full
        return full.unflatten(0, (copies, self.batch_size))[:, self.alive.to(full.device)].flatten(0, 1)


@contextlib.contextmanager
def conditioning_follows(rows: LiveRows, denoiser: nn.Module) -> Iterator[None]:
    """While open, ``denoiser`` is called with the conditioning of the living rows.

    Under classifier-free guidance the batch holds every image twice, all unconditional rows first: image k is row k of
    both halves.
    """

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if rows.complete:
            return None
        sample = args[0] if args else kwargs["sample"]
        copies, rest = divmod(len(sample), len(rows))
        if rest or copies not in (1, 2):
            raise GuardStateError(
                f"the denoiser got {len(sample)} rows while {len(rows)} of {rows.batch_size} images are alive: "
                "something else changed the size of the batch during the run"
            )
        batched = {name: kwargs[name] for name in BATCHED_KWARGS if kwargs.get(name) is not None}
        for name, value in batched.items():
            if len(value) != copies * rows.batch_size:
                raise GuardStateError(
                    f"the denoiser got {name} with {len(value)} rows, expected {copies * rows.batch_size}: the guard "
                    "itself takes the rows that have left out of the conditioning"
                )
        return args, kwargs | {name: rows.take(value, copies) for name, value in batched.items()}

    # First of all hooks, so that those of others meet a batch that fits together.
    handle = denoiser.register_forward_pre_hook(cut, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
