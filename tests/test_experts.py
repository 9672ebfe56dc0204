from __future__ import annotations

import math

import pytest
import reference
import torch
from torch import Tensor

from moe_artifacts.config import ExpertsConfig
from moe_artifacts.errors import InputError
from moe_artifacts.experts import LEVEL_DIM, Experts

RANGE = (-6.0, 8.0)
FEATURES, HIDDEN, EXPERTS, ROWS = 6, 5, 3, 8


def make_experts(num_experts: int = EXPERTS, trained: bool = True, dropout: float = 0.0) -> Experts:
    """``trained``: every weight moved away from its start, so that the experts say something."""
    torch.manual_seed(0)
    config = ExpertsConfig(
        num_experts=num_experts,
        feature_dim=FEATURES,
        hidden_dim=HIDDEN,
        expert_dim=4,
        log_snr_range=RANGE,
        dropout=dropout,
    )
    experts = Experts(config)
    if trained:
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
    return experts.eval()


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(ROWS, FEATURES, generator=generator)
    log_snr = torch.linspace(-7, 9, ROWS)
    gate_weights = torch.rand(ROWS, EXPERTS, generator=generator)
    gate_weights[:, 0] = 0  # an expert without rows
    gate_weights[0] = torch.tensor([0.0, 1.0, 0.0])
    return features, log_snr, gate_weights / gate_weights.sum(dim=-1, keepdim=True)


def test_agrees_with_every_expert_computed_for_every_row() -> None:
    experts, (features, log_snr, gate_weights) = make_experts(), make_inputs()
    logit, state = experts(features, log_snr, gate_weights)
    shared_logit, shared_state = experts(features, log_snr, torch.zeros(ROWS, EXPERTS))
    for row in range(ROWS):
        correction = torch.zeros(HIDDEN)
        for k in range(EXPERTS):
            one = reference.expert_state(
                features[row].tolist(),
                experts.expert_weight[k].tolist(),
                experts.expert_bias[k].tolist(),
                experts.expert_state[k].tolist(),
            )
            correction += gate_weights[row, k] * torch.tensor(one)
        delta = correction @ experts.logit.weight[0]
        # A handful of float32 products of numbers around 1.
        torch.testing.assert_close(state[row] - shared_state[row], correction, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logit[row] - shared_logit[row], delta, atol=1e-5, rtol=1e-5)
        assert correction.abs().max() > 0.01


def test_starts_as_the_single_head() -> None:
    experts, (features, log_snr, gate_weights) = make_experts(trained=False), make_inputs()
    single = make_experts(num_experts=0, trained=False)
    single.load_state_dict({k: v for k, v in experts.state_dict().items() if "expert" not in k}, strict=False)
    for ours, alone in zip(
        experts(features, log_snr, gate_weights), single(features, log_snr, gate_weights), strict=True
    ):
        torch.testing.assert_close(ours, alone, atol=0, rtol=0)
    assert experts.expert_penalty().item() == 0


def test_the_single_head_runs_without_gate_columns_and_has_no_penalty() -> None:
    features, log_snr, _ = make_inputs()
    logit, state = make_experts(num_experts=0)(features, log_snr, torch.zeros(ROWS, 0))
    assert (logit.shape, state.shape) == ((ROWS,), (ROWS, HIDDEN))
    assert make_experts(num_experts=0).expert_penalty().item() == 0


def test_the_penalty_is_the_mean_square_of_the_weights_of_delta() -> None:
    experts = make_experts()
    squares = [
        sum(o * p for o, p in zip(experts.logit.weight[0].tolist(), column, strict=True)) ** 2
        for expert in experts.expert_state.tolist()
        for column in expert
    ]
    assert experts.expert_penalty().item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_the_shared_head_is_told_the_log_snr_and_clamps_it() -> None:
    experts, no_gate = make_experts(), torch.zeros(1, EXPERTS)

    def logit(log_snr: float) -> float:
        # One row at a time: some processors round the same row in another way at another place of a batch.
        return experts(torch.ones(1, FEATURES), torch.tensor([log_snr]), no_gate)[0].item()

    assert logit(-math.inf) == logit(-6.0) and logit(math.inf) == logit(8.0)
    assert abs(logit(-6.0) - logit(8.0)) > 0.01


def test_the_noise_level_scales_and_shifts_a_layer() -> None:
    layer, (hidden, level) = make_experts().second, (torch.randn(4, HIDDEN), torch.zeros(4, LEVEL_DIM))
    with torch.no_grad():
        layer.modulation.bias.copy_(torch.tensor([-1.0] * HIDDEN + [0.7] * HIDDEN))  # scale, then shift
    torch.testing.assert_close(layer(hidden, level), torch.full((4, HIDDEN), 0.7))  # scaled by 1 - 1


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    experts, inputs = make_experts(), make_inputs()
    order = torch.tensor([5, 2, 7])
    for whole, part in zip(experts(*inputs), experts(*(x[order] for x in inputs)), strict=True):
        torch.testing.assert_close(whole[order], part, atol=1e-6, rtol=1e-5)  # matmul order changes with the batch


@pytest.mark.parametrize("place", ["features", "log_snr", "gate_weights"])
def test_a_nan_stays_in_its_row_and_is_not_lost(place: str) -> None:
    experts, inputs = make_experts(), make_inputs()
    spoilt = [x.clone() for x in inputs]
    spoilt[["features", "log_snr", "gate_weights"].index(place)][3] = torch.nan
    logit, _ = experts(*spoilt)
    assert logit.isnan().tolist() == [row == 3 for row in range(ROWS)]


def test_every_weight_gets_a_finite_gradient_except_of_an_expert_without_rows() -> None:
    experts = make_experts()
    logit, _ = experts(*make_inputs())
    (logit.square().sum() + experts.expert_penalty()).backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert not experts.expert_weight.grad[0].any()


def test_experts_learn_from_their_start() -> None:
    experts, inputs = make_experts(trained=False), make_inputs()
    experts(*inputs)[0].sum().backward()
    assert experts.expert_state.grad[1:].any(), "a projection of zero must not block its own gradient"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_the_weights_own_dtype(dtype: torch.dtype) -> None:
    experts, (features, log_snr, gate_weights) = make_experts(), make_inputs()
    logit, _ = experts(features.to(dtype), log_snr, gate_weights)
    assert logit.dtype == torch.float32
    torch.testing.assert_close(logit, experts(features.to(dtype).float(), log_snr, gate_weights)[0], atol=0, rtol=0)


def test_a_half_precision_module_runs() -> None:
    features, log_snr, gate_weights = make_inputs()
    logit, _ = make_experts().bfloat16()(features, log_snr, gate_weights)
    expected, _ = make_experts()(features, log_snr, gate_weights)
    torch.testing.assert_close(logit, expected, atol=0.2, rtol=0.1)  # bfloat16 has three digits, through six layers


def test_dropout_acts_in_training_only() -> None:
    experts, inputs = make_experts(dropout=0.5), make_inputs()
    assert torch.equal(experts(*inputs)[0], experts(*inputs)[0])
    experts.train()
    assert not torch.equal(experts(*inputs)[0], experts(*inputs)[0])


def test_wrong_shapes_are_refused() -> None:
    experts, (features, log_snr, gate_weights) = make_experts(), make_inputs()
    with pytest.raises(InputError, match=r"features must be 6 wide, got shape \(8, 5\)"):
        experts(features[:, 1:], log_snr, gate_weights)
    with pytest.raises(InputError, match=r"gate_weights must have 3 columns, one per expert, got shape \(8, 2\)"):
        experts(features, log_snr, gate_weights[:, 1:])
