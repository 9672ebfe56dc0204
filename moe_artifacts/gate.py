"""How one step is shared out between the experts: soft log-SNR bands, moved a little by what is in the picture.

    gate_weight_k = softmax over k of [ -(log_snr - centre_k)^2 / (2 width_k^2) + v_k . embedding ]

Only the ``top_k`` largest are kept and renormalised. Source of the sparse gate: Shazeer et al., arXiv:1701.06538, here
without noise and load balancing, since the bands already spread the work over the experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_artifacts.config import GateConfig
from moe_artifacts.errors import InputError
from moe_artifacts.shapes import Embedding, GateWeights, PerImage


class Gate(nn.Module):
    """Shares over experts from the noise level and the embedding; kind="hard" is the nearest band alone."""

    centres: Tensor

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        low, high = config.log_snr_range
        spacing = (high - low) / config.num_experts
        # Not saved: it follows from the config, so weights and config cannot disagree.
        self.register_buffer("centres", low + spacing * (torch.arange(config.num_experts) + 0.5), persistent=False)
        if config.kind == "soft":  # the hard gate has nothing to learn
            self.log_width = nn.Parameter(torch.full((config.num_experts,), math.log(spacing / 2)))
            self.embedding_weight = nn.Parameter(torch.zeros(config.num_experts, config.embed_dim))  # v; 0: bands alone

    def forward(self, log_snr: PerImage, embedding: Embedding) -> GateWeights:
        """Shares over experts, float32.

        Args:
            log_snr: Nats; clamped to the config's range, so infinite values are allowed.
            embedding: Length 1; any float dtype.
        Returns:
            ``top_k`` numbers above 0 in each row (one if hard), the others exactly 0; rows sum to 1.
        Raises:
            InputError: If the embedding has another width than the config says.
        """
        if embedding.shape[-1] != self.config.embed_dim:
            raise InputError(f"embedding must be {self.config.embed_dim} wide, got shape {tuple(embedding.shape)}")
        distance = log_snr.float().clamp(*self.config.log_snr_range)[:, None] - self.centres  # batch expert
        if self.config.kind == "hard":
            return F.one_hot(distance.abs().argmin(dim=-1), self.config.num_experts).to(distance.dtype)
        band = -0.5 * (distance * torch.exp(-self.log_width)).square()
        score, expert = (band + F.linear(embedding.float(), self.embedding_weight)).topk(self.config.top_k, dim=-1)
        return torch.zeros_like(band).scatter(-1, expert, score.softmax(dim=-1))  # softmax of the kept = renormalised
