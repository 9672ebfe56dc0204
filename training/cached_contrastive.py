"""Contrastive training with batches that do not fit into memory: the gradient of the whole batch, a micro-batch at a time.

A contrastive loss compares every image with every text, so it cannot be summed over parts of the batch as other losses can.
It needs only the features of the whole batch, though, and those are small:

    1. features of all micro-batches, without a graph
    2. the loss on all features; its gradient at the features, and at the temperature and bias, which is complete already
    3. each micro-batch again, with a graph; its part of the gradient at the features goes back through the towers

The towers run twice, and what they keep for the backward pass is that of one micro-batch, whatever the size of the batch.
The logits, batch x batch of them, are made a few rows at a time.

Sources: GradCache, arXiv:2101.06983 (the three passes); CLIP, arXiv:2103.00020, and SigLIP, arXiv:2303.15343 (the losses, equal
to open_clip's ``ClipLoss`` and ``SigLipLoss``); arXiv:2004.11362 (several positives). open_clip's own ``--accum-freq`` caches
features too, but adds up the gradient of ``logit_scale`` once per micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_artifacts.errors import InputError
from moe_artifacts.shapes import Embedding, Rows

BatchT = TypeVar("BatchT")
LOGITS_AT_ONCE = 2**20  # 4 MB in float32: large enough for fast products, small beside the activations of any tower


def cached_backward(
    embed: Callable[[BatchT], tuple[Embedding, Embedding]],
    batches: Sequence[BatchT],
    loss: Callable[[Embedding, Embedding], Tensor],
    gather: Callable[[Embedding], Embedding] | None = None,
    processes: int = 1,
) -> Tensor:
    """Add to ``.grad`` what ``loss(*embed(whole batch)).backward()`` would add, up to rounding.

    Random layers (dropout, dropped patches) draw the same numbers in both runs of a micro-batch, on the CPU and on CUDA.

    Args:
        embed: Image and text features of one micro-batch, where no row depends on another: BatchNorm must be in evaluation
            mode.
        batches: The micro-batches, of any sizes. Read twice, from first to last: a sequence that loads what it is asked for
            keeps one in memory.
        loss: Of all features, in the order of the batches: ``clip_loss`` or ``siglip_loss`` of this module, or any other
            differentiable function. The temperature belongs in here.
        gather: Features of this process's rows to those of all processes, with the gradient of its own. What is added is
            then this process's part of the gradient of the whole batch: the parts are to be summed.
        processes: How many there are.
    Returns:
        The loss, without a graph.
    Raises:
        InputError: If there are no micro-batches, or they can be read only once.
    """
    if not isinstance(batches, Sequence) or len(batches) == 0:
        raise InputError(
            f"batches must be a sequence of at least one micro-batch, as it is read twice; got "
            f"{'none' if isinstance(batches, Sequence) else type(batches).__name__}"
        )
    states, features = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(_random_state())
            features.append(embed(batch))
    sizes = [len(image) for image, _ in features]
    leaves = [torch.cat(parts).requires_grad_() for parts in zip(*features, strict=True)]
    del features
    value = loss(*(leaves if gather is None else map(gather, leaves)))
    # Each process has all of the gradient at the temperature, of which it adds its part, and that at its own rows' features.
    (value / processes).backward()
    gradients = zip(*(_gradient(leaf).mul_(processes).split(sizes) for leaf in leaves), strict=True)
    for batch, state, gradient in zip(batches, states, gradients, strict=True):
        with _from_random_state(state):
            _send_back(embed(batch), gradient)
    return value.detach()


def clip_loss(image: Embedding, text: Embedding, scale: Tensor, group: Rows | None = None) -> Tensor:
    """CLIP's symmetric cross entropy of each image among the texts and each text among the images.

    Args:
        image, text: Float32 of length 1, row by row a pair.
        scale: The temperature's inverse, ``logit_scale.exp()``.
        group: Pairs of one number are positives of each other, in equal shares; without it every pair is alone. Needed
            where a prompt occurs more than once: a text cannot be told from itself.
    Example:
        >>> e = torch.eye(2)
        >>> clip_loss(e, e, torch.tensor(0.0))
        tensor(0.6931)
    """

    def rows_loss(rows: Tensor, columns: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
        share = positive / positive.sum(dim=1, keepdim=True)
        return F.cross_entropy(scale * rows @ columns.T, share, reduction="sum")

    both = (_over_rows(rows_loss, *pair, group, scale) for pair in ((image, text), (text, image)))
    return sum(both, start=image.new_zeros(())) / (2 * len(image))


def siglip_loss(image: Embedding, text: Embedding, scale: Tensor, bias: Tensor, group: Rows | None = None) -> Tensor:
    """SigLIP's loss: whether an image and a text belong together, asked of every combination; summed over texts.

    Args:
        bias: Added to the logits; starts at about -10, since nearly all combinations are negative.
        group: As for :func:`clip_loss`.
    """

    def rows_loss(rows: Tensor, columns: Tensor, positive: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return -F.logsigmoid((2 * positive - 1) * (scale * rows @ columns.T + bias)).sum()

    return _over_rows(rows_loss, image, text, group, scale, bias) / len(image)


def _over_rows(
    rows_loss: Callable[..., Tensor], rows: Tensor, columns: Tensor, group: Tensor | None, *parameters: Tensor
) -> Tensor:
    """``rows_loss(rows, columns, positive, *parameters)`` as a sum over slices of the rows, each computed again for its
    gradient. Not more than ``LOGITS_AT_ONCE`` logits are held at a time.
    """
    group = torch.arange(len(rows), device=rows.device) if group is None else group

    def slice_loss(part: slice, rows: Tensor, columns: Tensor, *parameters: Tensor) -> Tensor:
        positive = (group[part, None] == group[None]).to(rows.dtype)
        return rows_loss(rows[part], columns, positive, *parameters)

    size, total = max(1, LOGITS_AT_ONCE // len(columns)), rows.new_zeros(())
    for start in range(0, len(rows), size):
        inputs = (slice(start, start + size), rows, columns, *parameters)
        total = total + checkpoint(slice_loss, *inputs, use_reentrant=False, preserve_rng_state=False)
    return total


def _send_back(features: tuple[Tensor, Tensor], gradient: tuple[Tensor, Tensor]) -> None:
    """A function of its own, so that the graph of a micro-batch is gone when the next one is made."""
    trained = [i for i, feature in enumerate(features) if feature.requires_grad]
    if trained:  # towers may be frozen, with only the temperature left to train
        torch.autograd.backward([features[i] for i in trained], [gradient[i] for i in trained])


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


@contextmanager
def _from_random_state(state: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """Draw once more what was drawn after ``state``, then go on as if nothing had been drawn."""
    cpu, cuda = state
    with torch.random.fork_rng(devices=range(len(cuda))):
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        yield
