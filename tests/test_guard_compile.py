from __future__ import annotations

import pytest
import tiny
import torch

from moe_artifacts.guard.guard import ArtifactGuard
from tests.guarded import ATOL, PROMPTS, settings, statuses, undisturbed


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_denoiser_is_compiled_once(in_place):
    """Neither "mask" nor "record" changes its batch."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pipe = tiny.stable_diffusion()
    if in_place:
        pipe.unet.compile(backend=backend)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=backend)
    pipe(PROMPTS, **settings(num_inference_steps=1))
    before = len(graphs)
    assert before
    for on_abort in ("mask", "record"):
        output = ArtifactGuard(tiny.ScriptedScorer({0: 1, 2: 3}), on_abort)(pipe, PROMPTS, **settings())
        assert len(graphs) == before
        assert statuses(output) == ["aborted", "kept", "aborted", "kept"]
        torch.testing.assert_close(output.images, undisturbed()[output.kept_indices], atol=ATOL, rtol=0)
    # "drop" works too, at the price of a compilation for each new size; other rows at the same size are other inputs.
    for abort_at in ({0: 1}, {2: 1}):
        output = ArtifactGuard(tiny.ScriptedScorer(abort_at))(pipe, PROMPTS, **settings())
        torch.testing.assert_close(output.images, undisturbed()[output.kept_indices], atol=ATOL, rtol=0)
