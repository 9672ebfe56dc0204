import copy

import pytest
import torch
from torch import nn

from moe_artifacts.guard.fingerprint import fingerprint
from tests import tiny


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(200, 2))
    layers.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    return layers.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_that_of_the_weights_and_not_of_their_layout_or_of_compiling(dtype):
    module = network(dtype)
    expected = fingerprint(module)
    assert expected == fingerprint(network(dtype)) and len(expected) == 16
    assert fingerprint(copy.deepcopy(module).to(memory_format=torch.channels_last)) == expected
    assert fingerprint(torch.compile(module)) == expected


def test_other_weights_names_and_precision_differ():
    found = {fingerprint(network())}
    for name, _ in network().named_parameters():
        module = network()
        with torch.no_grad():
            dict(module.named_parameters())[name].mul_(1.5).add_(0.01)
        found.add(fingerprint(module))
    found |= {fingerprint(network(torch.float16)), fingerprint(nn.Sequential(*network()))}
    assert len(found) == 1 + 7 + 2


def test_weights_that_are_elsewhere_have_none():
    with torch.device("meta"):
        assert fingerprint(nn.Linear(2, 2)) is None


def test_a_fused_lora_makes_another_denoiser():
    unet = tiny.stable_diffusion().unet
    before = fingerprint(unet)
    query = next(module for name, module in unet.named_modules() if name.endswith("attn2.to_q"))
    with torch.no_grad():
        query.weight += 0.01 * torch.outer(torch.randn(query.out_features), torch.randn(query.in_features))
    assert fingerprint(unet) != before
