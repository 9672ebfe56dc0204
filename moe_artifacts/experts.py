"""One head for all noise levels, and a small expert per log-SNR band that corrects it.

    state = shared_state(features, log_snr) + sum_k gate_weight_k * P_k h_k(features)
    logit = o . state + c  =  shared_logit + sum_k gate_weight_k * delta_k,    delta_k = (P_k^T o) . h_k(features)

P_k starts at zero, so that training starts from the single head that is told the noise level, and ``expert_penalty``
pulls it back there: experts must earn their place. Reading the logit from the mixed state keeps the two consistent.

Sources: FiLM, arXiv:1709.07871 (scale and shift told by the noise level; starting at the identity as in DiT,
arXiv:2212.09748); gated linear units, arXiv:2002.05202: image and prompt lie side by side in the features, and only a
product of two projections can compare them in the first layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_artifacts.config import ExpertsConfig
from moe_artifacts.errors import InputError
from moe_artifacts.shapes import Features, GateWeights, PerImage, State

NUM_FREQUENCIES = 8  # half waves over the log-SNR range: the finest is an eighth of it
LEVEL_DIM = 32


class Experts(nn.Module):
    """Artifact logit and mixed hidden state of one scored step; ``num_experts=0`` is the shared head alone."""

    frequencies: Tensor

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", math.pi * torch.arange(1, NUM_FREQUENCIES + 1), persistent=False)
        self.level = nn.Sequential(nn.Linear(NUM_FREQUENCIES, LEVEL_DIM), nn.SiLU())
        self.first = _ModulatedLinear(config.feature_dim, 2 * config.hidden_dim)
        self.second = _ModulatedLinear(config.hidden_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.logit = nn.Linear(config.hidden_dim, 1)

        experts, inner = config.num_experts, config.expert_dim
        bound = 1 / math.sqrt(config.feature_dim)  # as nn.Linear starts
        self.expert_weight = nn.Parameter(torch.empty(experts, config.feature_dim, 2 * inner).uniform_(-bound, bound))
        self.expert_bias = nn.Parameter(torch.zeros(experts, 2 * inner))
        self.expert_state = nn.Parameter(torch.zeros(experts, inner, config.hidden_dim))  # P_k, transposed

    def forward(self, features: Features, log_snr: PerImage, gate_weights: GateWeights) -> tuple[PerImage, State]:
        """Logit (float32, uncalibrated) and mixed state of each row.

        Args:
            features: Any float dtype.
            log_snr: Nats; clamped to the config's range, so infinite values are allowed.
            gate_weights: An expert is computed only for the rows where its weight is not 0. Ignored if there are no
                experts.
        Raises:
            InputError: If features or gate weights have another width than the config says.
        """
        config = self.config
        if features.shape[-1] != config.feature_dim:
            raise InputError(f"features must be {config.feature_dim} wide, got shape {tuple(features.shape)}")
        if config.num_experts and gate_weights.shape[-1] != config.num_experts:
            raise InputError(
                f"gate_weights must have {config.num_experts} columns, one per expert, "
                f"got shape {tuple(gate_weights.shape)}"
            )
        features = features.to(self.logit.weight.dtype)
        state = self._shared_state(features, log_snr) + self._corrections(features, gate_weights)
        return self.logit(state).squeeze(-1).float(), state

    def expert_penalty(self) -> Tensor:
        """Mean square of the weights that turn the experts' hidden layers into ``delta``; 0 without experts."""
        delta_weight = self.expert_state @ self.logit.weight[0]  # expert inner
        return delta_weight.square().sum() / max(1, delta_weight.numel())

    def _shared_state(self, features: Tensor, log_snr: Tensor) -> Tensor:
        low, high = self.config.log_snr_range
        progress = ((log_snr.float() - low) / (high - low)).clamp(0, 1)
        waves = torch.cos(progress[:, None] * self.frequencies)
        level = self.level(waves.to(features.dtype))
        hidden = self.dropout(_gated(self.first(features, level)))
        return self.dropout(F.silu(self.second(hidden, level)))

    def _corrections(self, features: Tensor, gate_weights: Tensor) -> Tensor:
        """Sum over experts of gate_weight_k * P_k h_k, each expert on its own rows only."""
        mixed = features.new_zeros(len(features), self.config.hidden_dim)
        for k in range(self.config.num_experts):
            rows = (gate_weights[:, k] != 0).nonzero().squeeze(-1)  # not `> 0`, which would drop NaN without a trace
            if len(rows) == 0:  # while running, a batch has one noise level, and most experts no rows
                continue
            everyone = len(rows) == len(features)  # then gathering and scattering would only cost time
            inner = torch.addmm(self.expert_bias[k], features if everyone else features[rows], self.expert_weight[k])
            hidden = _gated(F.layer_norm(inner, inner.shape[-1:]))
            correction = (gate_weights[rows, k, None] * (hidden @ self.expert_state[k])).to(mixed)
            mixed = mixed + correction if everyone else mixed.index_add(0, rows, correction)
        return mixed


class _ModulatedLinear(nn.Module):
    """Linear and LayerNorm, then scale and shift given by the noise level."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        # The norm comes after the linear layer: the entries of a CLIP embedding are about 1/sqrt(width), and products
        # of two such small numbers would vanish.
        self.norm = nn.LayerNorm(out_dim)
        self.modulation = nn.Linear(LEVEL_DIM, 2 * out_dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.modulation(level).chunk(2, dim=-1)
        return self.norm(self.linear(x)) * (1 + scale) + shift


def _gated(x: Tensor) -> Tensor:
    """SwiGLU: one half of the channels times the SiLU of the other."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)
