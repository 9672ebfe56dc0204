"""Taking rows out of a batch that is being denoised, while the others go on as if nothing had happened.

The pipeline's loop replaces its latents by what ``scheduler.step`` returns: a step that returns fewer rows makes the
batch smaller. Two parties still count on the full batch, and each is served in its own way:

* The scheduler keeps past model outputs (PNDM, DPM-Solver, UniPC) and draws noise for the shape it is given, row by row
  of a generator list or in one block. It goes on seeing the full batch, with zeros in the rows that have left: its
  state never has to be cut, where one tensor forgotten would be broadcast silently over the last running row, and every
  random number falls where it would have fallen. This costs a few elementwise operations.
* The denoiser, whose calls are the cost to be saved, sees the running rows only. Its latents have shrunk already; the
  prompt embeddings, which the loop holds at full size, are cut in a forward pre-hook: conditioning.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.shapes import Rows


class LiveRows:
    """Which rows of a batch are alive, that is still wanted, which are running, and which the pipeline's latents hold.

    Only the living rows matter. A dead row runs on as a passenger where the batch must not shrink to any size, and
    leaves with the last step at the latest.

    Args:
        batch_size: Rows at the start.
        sizes: What the running batch may shrink to; None: to any size, (): not at all before the last step.
        loop_keeps_all: The pipeline's loop counts on the full batch to the end: rows leave in the denoiser only.
    Example:
        >>> rows = LiveRows(8, sizes=(4, 2, 1))
        >>> rows.keep(torch.tensor([0, 5, 7]))
        >>> rows.alive.tolist(), rows.running.tolist()
        ([0, 5, 7], [0, 1, 5, 7])
        >>> rows.keep(torch.tensor([1]))  # counts among the living
        >>> rows.alive.tolist(), rows.running.tolist()
        ([5], [5])
        >>> rows.pad(torch.tensor([7.0])).tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 0.0, 0.0]
    """

    def __init__(self, batch_size: int, sizes: Sequence[int] | None = None, *, loop_keeps_all: bool = False) -> None:
        self.batch_size = batch_size
        self.alive: Rows = torch.arange(batch_size)  # places in the full batch, rising
        self.running: Rows = self.alive  # the same, with the passengers among them: what the denoiser is called with
        self._all: Rows = self.alive
        self._sizes = sizes
        self._loop_keeps_all = loop_keeps_all

    def __len__(self) -> int:
        """Number of running rows."""
        return len(self.running)

    @property
    def complete(self) -> bool:
        """Whether the whole batch runs."""
        return len(self) == self.batch_size

    @property
    def held(self) -> Rows:
        """Places in the full batch of the rows that the pipeline's latents hold: the running ones, or all."""
        return self._all if self._loop_keeps_all else self.running

    def keep(self, rows: Rows) -> None:
        """Keep these of the living rows alive; the running ones become as few as the sizes allow.

        Raises:
            InputError: If they do not rise, or are not living rows: the order of a batch never changes.
        """
        places, living = rows.tolist(), len(self.alive)
        if places != sorted(set(places)) or any(not 0 <= place < living for place in places):
            raise InputError(f"rows must be rising indices below {living}, the number of living rows, got {places}")
        self.alive = self.alive[rows.cpu()]
        self._shrink_to(self._smallest_size())

    def drop_passengers(self) -> None:
        """After the last denoiser call: nothing is to be filled up any more, and only the living are to be decoded."""
        self._shrink_to(len(self.alive))
        self._loop_keeps_all = False

    def pad(self, held: Tensor) -> Tensor:
        """The full batch, with zeros in the rows that have left; ``held`` itself while none has."""
        if len(self.held) == self.batch_size:
            return held
        full = held.new_zeros((self.batch_size, *held.shape[1:]))
        full[self.held.to(held.device)] = held
        return full

    def take(self, full: Tensor, copies: int = 1) -> Tensor:
        """The held rows of a full batch, or of ``copies`` full batches one after the other; ``full`` if all are held."""
        if len(self.held) == self.batch_size:
            return full
        return full.unflatten(0, (copies, self.batch_size))[:, self.held.to(full.device)].flatten(0, 1)

    def places(self, rows: Rows) -> Rows:
        """Where these rows of the full batch stand among the held ones; both rise."""
        return torch.searchsorted(self.held, rows)

    def _smallest_size(self) -> int:
        living = len(self.alive)
        if self._sizes is None or not living:
            return living
        return min((size for size in self._sizes if living <= size < len(self)), default=len(self))

    def _shrink_to(self, size: int) -> None:
        dead = self.running[~torch.isin(self.running, self.alive)]
        passengers = dead[: size - len(self.alive)]
        self.running = torch.cat([self.alive, passengers]).sort().values
