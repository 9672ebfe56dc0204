from __future__ import annotations

import types
import warnings

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    TCDScheduler,
)

from moe_artifacts.errors import ReproducibilityWarning
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.reproducible import warn_if_not_alone
from moe_artifacts.guard.request import Request
from tests.guarded import PROMPTS, guarded, settings, undisturbed


class DPMSolverSDEScheduler:
    """Stands for the one of diffusers, which needs the package torchsde."""

    def __init__(self, noise_sampler_seed=None):
        self.config = types.SimpleNamespace(noise_sampler_seed=noise_sampler_seed)


def request(kind, batch_size=4):
    return Request(batch_size, None, [None] * batch_size, 6, 1.0, 0.0, "pt", 16, 16, True, kind)


def warned(scheduler, kind="single", eta=0.0, batch_size=4):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_not_alone(scheduler, request(kind, batch_size), eta, stacklevel=1)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("scheduler", "eta", "expected"),
    [
        (EulerAncestralDiscreteScheduler(), 0.0, True),
        (DDIMScheduler(), 0.0, False),
        (DDIMScheduler(), 0.5, True),
        (DDIMScheduler(), None, False),
        (TCDScheduler(), 0.0, False),
        (TCDScheduler(), None, True),  # its own default, where the pipeline has no such argument
        (DPMSolverMultistepScheduler(), 0.0, False),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 0.0, True),
        (FlowMatchEulerDiscreteScheduler(), None, False),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), None, True),
    ],
)
def test_noise_in_every_step_needs_a_generator_per_image(scheduler, eta, expected):
    for kind in ("single", "none"):
        assert bool(warned(scheduler, kind, eta)) == expected
        assert not warned(scheduler, kind, eta, batch_size=1)
    assert not warned(scheduler, "list", eta)


def test_the_warning_says_what_is_wrong_and_what_to_do():
    [text] = warned(EulerAncestralDiscreteScheduler())
    assert "EulerAncestralDiscreteScheduler draws noise in every step" in text
    assert "one generator for the whole batch was given; give a list of them, one per image" in text
    assert "still equal those of the undisturbed run, but none can be made again alone from a seed" in text


def test_a_scheduler_with_a_noise_of_its_own_has_none_per_image():
    [text] = warned(DPMSolverSDEScheduler(), "list")
    assert "DPMSolverSDEScheduler draws its noise for the whole batch, whatever the generators" in text
    [text] = warned(DPMSolverSDEScheduler(), "list", batch_size=1)
    assert "draws a seed from torch's global generator; make it with a noise_sampler_seed" in text
    assert warned(DPMSolverSDEScheduler(3), "list", batch_size=1) == []


def test_the_guard_warns_its_caller_once_and_the_kept_images_are_right():
    def call():
        return settings(generator=torch.Generator().manual_seed(3))

    expected = tiny.stable_diffusion("euler-a")(PROMPTS, **call()).images
    with pytest.warns(ReproducibilityWarning) as caught:
        output = ArtifactGuard(tiny.ScriptedScorer({0: 1, 1: 2}))(tiny.stable_diffusion("euler-a"), PROMPTS, **call())
    assert [warning.filename for warning in caught if warning.category is ReproducibilityWarning] == [__file__]
    torch.testing.assert_close(output.images, expected[[2, 3]], atol=1e-4, rtol=0)  # other batch sizes sum otherwise


def test_nothing_is_said_where_nothing_is_lost():
    """The test suite takes warnings as errors."""
    guarded(tiny.ScriptedScorer({0: 1}), "euler-a")
    guarded(tiny.ScriptedScorer({0: 1}), "ddim", generator=torch.Generator().manual_seed(3))
    guarded(tiny.ScriptedScorer({0: 1}), "euler-a", on_abort="record", generator=torch.Generator().manual_seed(3))


def test_an_image_with_its_own_generator_can_be_made_again_alone():
    """What the warning is about, where there is none."""
    alone = tiny.stable_diffusion("euler-a")(PROMPTS[2], **settings(generator=tiny.generators(4)[2:3])).images
    torch.testing.assert_close(undisturbed("euler-a")[2:3], alone, atol=1e-4, rtol=0)
