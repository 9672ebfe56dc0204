"""Two losses for an exit head, with the posterior detached: when to decide, not what.

    economic   - sum_{t<=A} p_t a_t [(1 - spent_t) - price (1 - y)]
    palbert    sum_t p_t BCE(a_t, y) + beta KL(p || prior), all that is undecided put on the last step

Sources: PonderNet, arXiv:2107.05407, and PALBERT, arXiv:2204.03276 (the second); the first is ours, docs/method.md. The
second has no price of delay and so decides late: it is kept for comparison.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe_artifacts.accumulator import exit_pdf
from moe_artifacts.shapes import PerImage, StepMass, StepProbs, StepValues

Loss = Float[Tensor, ""]


def economic_loss(mass: StepMass, prob: StepProbs, bad: PerImage, spent: StepValues, price: float) -> Loss:
    """What a lost clean image costs, less what an early decision saves, in full runs per image.

    ``prob`` is detached; a step at which nothing is left to save takes no part.

    Args:
        mass: Exit mass, >= 0.
        prob: Posterior, in [0, 1].
        bad: In [0, 1]: 1 has artifacts.
        spent: Share of the denoiser calls of a full run spent by each step, in (0, 1].
        price: Of one clean image, in full runs.
    """
    gain = (1 - spent) - price * (1 - bad)[:, None]
    return -(exit_pdf(mass) * prob.detach() * torch.where(spent < 1, gain, 0.0)).sum(dim=-1).mean()


def palbert_loss(mass: StepMass, prob: StepProbs, bad: PerImage, prior_mass: StepMass, beta: float) -> Loss:
    """Expected cross entropy at the exit, and ``beta`` times the distance of the exit distribution from its prior.

    ``prob`` is detached.

    Args:
        mass: Exit mass, >= 0.
        prob: Posterior, in [0, 1].
        bad: In [0, 1]: 1 has artifacts.
        prior_mass: The prior's rate times the progress made at each step.
        beta: Weight of KL(exits || prior), in nats, the direction of the papers (PALBERT's code has the other).
    """
    pdf = _forced(exit_pdf(mass))
    prior = _forced(exit_pdf(prior_mass))
    bce = F.binary_cross_entropy(prob.detach(), bad[:, None].expand_as(prob), reduction="none")
    kl = (pdf * ((pdf + 1e-8).log() - (prior + 1e-8).log())).sum(dim=-1)
    return ((pdf * bce).sum(dim=-1) + beta * kl).mean()


def _forced(pdf: StepProbs) -> StepProbs:
    """The distribution with all that is undecided put on the last step."""
    return torch.cat([pdf[:, :-1], (1 - pdf[:, :-1].sum(dim=-1, keepdim=True)).clamp(min=0)], dim=-1)
