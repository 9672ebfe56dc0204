"""Exit mass and posteriors to a cumulative artifact probability, as sums of logs rather than products of probabilities.

    exit_prob_t = 1 - exp(-m_t)          m_t = exit_rate_t * (progress_t - progress_{t-1})
    exit_pdf_t  = exit_prob_t * exp(-(m_1 + ... + m_{t-1}))
    exit_cdf_t  = 1 - exp(-(m_1 + ... + m_t))
    cumulative_artifact_prob_t = sum_{s<=t} exit_pdf_s * artifact_prob_s

Sources: PonderNet, arXiv:2107.05407 (the chain); PALBERT, arXiv:2204.03276 (the exit head, and stopping once a running
sum passes a threshold). One difference: a rate times progress in place of a probability per step, so the number of
steps does not matter; and nothing is forced to exit at the last step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from moe_artifacts.config import ExitHeadConfig
from moe_artifacts.errors import InputError
from moe_artifacts.shapes import PerImage, Rows, StepMass, StepProbs

FIRST_RATE = 2.1  # per unit of progress, before training: the rate of the prior in the PALBERT ablation


class ExitHead(nn.Module):
    """Evidence rate per unit of progress, from the mixed states of this scored step and of the one before."""

    def __init__(self, config: ExitHeadConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim
        self.hidden = nn.Sequential(
            *(nn.Linear(2 * config.state_dim, width), nn.Tanh()),
            *(nn.Linear(width, width), nn.Tanh()),
            *(nn.Linear(width, width), nn.Tanh()),
        )
        self.output = nn.Linear(width, 1)
        nn.init.constant_(self.output.bias, math.log(math.expm1(FIRST_RATE)))  # softplus of it is FIRST_RATE

    def forward(
        self, state: Float[Tensor, "*lead hidden"], previous_state: Float[Tensor, "*lead hidden"]
    ) -> Float32[Tensor, "*lead"]:
        """Rate >= 0; ``previous_state`` is zeros at the first scored step.

        Raises:
            InputError: If the states have another width than the config says.
        """
        if state.shape[-1] != self.config.state_dim:
            raise InputError(f"state must be {self.config.state_dim} wide, got shape {tuple(state.shape)}")
        both = torch.cat([state, previous_state], dim=-1).to(self.output.weight.dtype)
        return F.softplus(self.output(self.hidden(both)).squeeze(-1).float())


def step_mass(
    exit_rate: Float[Tensor, "*shape"], progress: Float[Tensor, "*shape"], previous_progress: Float[Tensor, "*shape"]
) -> Float32[Tensor, "*shape"]:
    """Exit mass of a step: the rate times the progress made, 0 where the noise level went back.

    Args:
        exit_rate: >= 0, per unit of progress.
        progress: In [0, 1].
        previous_progress: Of the scored step before; 0 before the first.
    """
    return exit_rate.float() * (progress.float() - previous_progress.float()).clamp(min=0)


def exit_pdf(exit_mass: StepMass) -> StepProbs:
    """Probability that the decision falls at exactly each step.

    Args:
        exit_mass: One per step in denoising order; finite, >= 0, any float dtype.
    Returns:
        Float32 in [0, 1]; sums to less than 1 along ``step``: what is left is undecided.
    Raises:
        InputError: If there are no steps.
    Example:
        >>> exit_pdf(torch.tensor([[0.6931472, 0.6931472, 0.6931472]]))
        tensor([[0.5000, 0.2500, 0.1250]])
    """
    if exit_mass.shape[-1] == 0:
        raise InputError(f"exit_mass needs at least one step, got shape {tuple(exit_mass.shape)}")
    mass = exit_mass.float()
    log_undecided = F.pad(-mass[..., :-1].cumsum(dim=-1), (1, 0))  # log P(no decision before this step); 0 at the first
    return -torch.expm1(-mass) * log_undecided.exp()  # 1 - exp(-x) would round the smallest masses to 0


PerStep = Float32[Tensor, "batch *step"]  # one number an image and step, or, while it runs, one an image


@dataclass(frozen=True, slots=True)
class Accumulated:
    """What has been decided by each step, in [0, 1].

    ``cumulative_artifact_prob + cumulative_clean_prob + (1 - exit_cdf) = 1``, and none of the three sums falls.
    """

    exit_prob: PerStep
    exit_pdf: PerStep
    exit_cdf: PerStep
    cumulative_artifact_prob: PerStep
    cumulative_clean_prob: PerStep


def accumulate(artifact_prob: StepProbs, exit_mass: StepMass) -> Accumulated:
    """All steps of whole trajectories at once; equals :class:`Accumulator` to float tolerance.

    Args:
        artifact_prob: In [0, 1].
        exit_mass: Finite, >= 0.
    Raises:
        InputError: If there are no steps, or the shapes differ.
    Example:
        >>> done = accumulate(torch.tensor([[1.0, 0.5]]), torch.tensor([[0.6931472, 0.6931472]]))
        >>> done.cumulative_artifact_prob, done.cumulative_clean_prob
        (tensor([[0.5000, 0.6250]]), tensor([[0.0000, 0.1250]]))
    """
    if artifact_prob.shape != exit_mass.shape:
        raise InputError(
            f"artifact_prob and exit_mass must have one shape, "
            f"got {tuple(artifact_prob.shape)} and {tuple(exit_mass.shape)}"
        )
    prob, pdf = artifact_prob.float(), exit_pdf(exit_mass)
    return Accumulated(
        exit_prob=-torch.expm1(-exit_mass.float()),
        exit_pdf=pdf,
        exit_cdf=-torch.expm1(-exit_mass.float().cumsum(dim=-1)),
        cumulative_artifact_prob=(pdf * prob).cumsum(dim=-1),
        cumulative_clean_prob=(pdf * (1 - prob)).cumsum(dim=-1),
    )


class Accumulator:
    """The same sums one step at a time, for a batch that is still running and may lose rows."""

    def __init__(self, batch_size: int) -> None:
        self._mass = torch.zeros(batch_size)
        self._artifact = torch.zeros(batch_size)
        self._clean = torch.zeros(batch_size)

    def step(self, artifact_prob: PerImage, exit_mass: PerImage) -> Accumulated:
        """Add one scored step. A NaN stays in the sums of its own row, and only there.

        Raises:
            InputError: If the number of rows is not the one of the running batch.
        """
        for name, value in (("artifact_prob", artifact_prob), ("exit_mass", exit_mass)):
            if value.shape != self._mass.shape:
                raise InputError(
                    f"{name} must have shape {tuple(self._mass.shape)}, one number per row that is still running, "
                    f"got {tuple(value.shape)}; call keep(rows) when rows leave the batch"
                )
        prob, mass = artifact_prob.float(), exit_mass.float()
        self._mass, self._artifact, self._clean = (t.to(mass.device) for t in (self._mass, self._artifact, self._clean))
        exit_prob = -torch.expm1(-mass)
        pdf = exit_prob * torch.exp(-self._mass)
        self._mass = self._mass + mass
        self._artifact = self._artifact + pdf * prob
        self._clean = self._clean + pdf * (1 - prob)
        return Accumulated(exit_prob, pdf, -torch.expm1(-self._mass), self._artifact, self._clean)

    def keep(self, rows: Rows) -> None:
        """Go on with these rows only, in this order."""
        self._mass, self._artifact, self._clean = (
            t[rows.to(t.device)] for t in (self._mass, self._artifact, self._clean)
        )
