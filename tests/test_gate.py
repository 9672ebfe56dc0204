from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.config import GateConfig
from moe_artifacts.errors import InputError
from moe_artifacts.gate import Gate

RANGE = (-6.0, 8.0)
DIM = 4


def make_gate(num_experts: int = 5, top_k: int = 2, kind: str = "soft", seed: int | None = 0) -> Gate:
    """A gate with random weights; ``seed=None`` leaves it as it starts."""
    config = GateConfig(num_experts=num_experts, embed_dim=DIM, log_snr_range=RANGE, top_k=top_k, kind=kind)
    gate = Gate(config)
    if seed is not None and kind == "soft":
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            gate.log_width.add_(0.3 * torch.randn(num_experts, generator=generator))
            gate.embedding_weight.copy_(torch.randn(num_experts, DIM, generator=generator))
    return gate


embeddings = st.lists(st.floats(-1, 1, width=32), min_size=DIM, max_size=DIM)
log_snrs = st.floats(allow_nan=False, width=32)  # infinite at a signal or a noise of 0


@given(log_snrs, embeddings, st.integers(1, 5))
def test_agrees_with_the_formula(log_snr: float, embedding: list[float], top_k: int) -> None:
    gate = make_gate(top_k=top_k)
    weights = gate(torch.tensor([log_snr]), torch.tensor([embedding]))[0]
    expected = reference.gate_weights(
        log_snr,
        embedding,
        log_snr_range=RANGE,
        width=gate.log_width.exp().tolist(),
        embedding_weight=gate.embedding_weight.tolist(),
        top_k=top_k,
    )
    # Between two experts of equal score, float32 may keep the other one; their sorted shares are the same.
    assert sorted(weights.tolist()) == pytest.approx(sorted(expected), abs=1e-5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@given(st.lists(log_snrs, min_size=1, max_size=20), embeddings)
def test_rows_are_shares_of_at_most_top_k_experts(kind: str, log_snr: list[float], embedding: list[float]) -> None:
    weights = make_gate(kind=kind)(torch.tensor(log_snr), torch.tensor([embedding] * len(log_snr)))
    assert (weights >= 0).all()
    assert ((weights > 0).sum(dim=-1) <= 2).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(len(log_snr)), atol=1e-6, rtol=0)  # two float32 shares


def test_starts_from_bands_alone_and_halfway_between_two_centres_is_half_and_half() -> None:
    gate = make_gate(seed=None)
    halfway = (gate.centres[1:2] + gate.centres[2:3]) / 2
    for embedding in (torch.zeros(1, DIM), torch.ones(1, DIM)):
        torch.testing.assert_close(gate(halfway, embedding), torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0]]))


def test_values_outside_the_range_are_clamped() -> None:
    gate, embedding = make_gate(), torch.full((2, DIM), 0.5)
    outside = gate(torch.tensor([-math.inf, 1e30]), embedding)
    torch.testing.assert_close(outside, gate(torch.tensor(RANGE), embedding), atol=0, rtol=0)


def test_hard_is_the_nearest_centre_and_has_nothing_to_learn() -> None:
    gate = make_gate(kind="hard")
    log_snr = torch.linspace(*RANGE, 201)[1::2]  # off the borders between bands
    weights = gate(log_snr, torch.randn(100, DIM, generator=torch.Generator().manual_seed(0)))
    assert weights.argmax(dim=-1).tolist() == [i // 20 for i in range(100)]  # five bands, each a fifth of the range
    assert weights.unique().tolist() == [0.0, 1.0]
    assert not list(gate.parameters())


def test_every_weight_gets_a_finite_gradient() -> None:
    gate = make_gate(top_k=5)
    gate(torch.linspace(*RANGE, 7), torch.ones(7, DIM))[:, 0].sum().backward()
    for parameter in gate.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_float32_shares(dtype: torch.dtype) -> None:
    gate, embedding = make_gate(), torch.full((1, DIM), 0.5)
    weights = gate(torch.tensor([1.5], dtype=dtype), embedding.to(dtype))  # both exact in either format
    torch.testing.assert_close(weights, gate(torch.tensor([1.5]), embedding), atol=0, rtol=0)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"embedding must be 4 wide, got shape \(1, 3\)"):
        make_gate()(torch.zeros(1), torch.zeros(1, 3))
