from __future__ import annotations

import inspect
import math

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.errors import InputError, UnsupportedPipelineError
from moe_artifacts.noise import NoiseLevel, check_steps, noise_levels, predict_x0, progress, variance_preserving

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALL = ("epsilon", "v_prediction", "sample")
NO_SAMPLE = ("epsilon", "v_prediction")  # the others refuse prediction_type="sample" themselves
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def discrete(kind, predictions, **config):
    return [(kind, {**BETAS, **config, "prediction_type": p}) for p in predictions]


CASES = [
    *discrete(DDIMScheduler, ALL, clip_sample=False),
    *discrete(
        DDIMScheduler, ("v_prediction",), clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    *discrete(DDPMScheduler, ALL, clip_sample=False),
    *discrete(PNDMScheduler, NO_SAMPLE, skip_prk_steps=True, steps_offset=1),
    *discrete(PNDMScheduler, NO_SAMPLE, skip_prk_steps=False),
    *discrete(EulerDiscreteScheduler, ALL),
    *discrete(EulerDiscreteScheduler, ("epsilon",), use_karras_sigmas=True),
    *discrete(EulerDiscreteScheduler, ("epsilon",), use_beta_sigmas=True),
    *discrete(EulerAncestralDiscreteScheduler, NO_SAMPLE),
    *discrete(DPMSolverMultistepScheduler, ALL),
    *discrete(DPMSolverMultistepScheduler, ("epsilon",), use_karras_sigmas=True, solver_order=3),
    *discrete(DPMSolverMultistepScheduler, ("epsilon",), algorithm_type="sde-dpmsolver++"),
    *discrete(DPMSolverMultistepScheduler, ("epsilon",), use_exponential_sigmas=True),
    (DPMSolverMultistepScheduler, FLOW),
    *discrete(UniPCMultistepScheduler, ALL),
    (UniPCMultistepScheduler, {**FLOW, "flow_shift": 3.0}),
    (FlowMatchEulerDiscreteScheduler, {}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
]


def case_name(case):
    kind, config = case
    return "-".join([kind.__name__.removesuffix("Scheduler"), *(f"{v}" for v in config.values() if isinstance(v, str))])


def stays_on_a_line(scheduler):
    """Whether each sample is alpha * x0 + sigma * noise with the noise of the start, if every prediction is right."""
    config = scheduler.config
    fresh_noise = isinstance(scheduler, (DDPMScheduler, EulerAncestralDiscreteScheduler))
    fresh_noise |= bool(config.get("stochastic_sampling")) or str(config.get("algorithm_type")).startswith("sde")
    # PNDM extrapolates v over steps as if it were epsilon, which is constant along the way; v is not.
    return not fresh_noise and not (isinstance(scheduler, PNDMScheduler) and config.prediction_type == "v_prediction")


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize(
    "num_steps", [10, 20]
)  # 2 n divides 1000: DDIM and PNDM round the grid and its steps apart otherwise
def test_x0_and_level_agree_with_a_denoiser_that_knows_x0(case, num_steps):
    kind, config = case
    scheduler = kind(**config)
    scheduler.set_timesteps(num_steps)
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps)

    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 4, 8, 8, generator=generator)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    sample = levels[0].alpha * x0 + levels[0].sigma * noise
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        a, s = level.alpha, level.sigma
        r = math.hypot(a, s)
        eps = (sample - a * x0) / s
        if stays_on_a_line(scheduler):
            # The sample is at the level we say, or the scheduler would have led it elsewhere; 20 float32 steps.
            torch.testing.assert_close(sample / r, (a * x0 + s * noise) / r, atol=1e-5, rtol=0)
        output = {"epsilon": eps, "sample": x0, "v_prediction": (a * eps - s * x0) / r, "flow_prediction": eps - x0}[
            prediction
        ]
        found = predict_x0(scheduler, output, sample, level)
        assert found.dtype == torch.float32
        # float32 to the model output and back: errors of 1e-7 grow by sigma / alpha, 15 at the start of this schedule
        torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)  # Euler warns without it
        extra = {"generator": generator} if takes_generator else {}
        sample = scheduler.step(output, t, sample, **extra, return_dict=False)[0]
    assert (sample - x0).std() < 0.1  # what the scheduler leaves in the last sample, if anything


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_log_snr_is_that_of_the_schedulers_own_forward_noise(case):
    kind, config = case
    scheduler = kind(**config)
    scheduler.set_timesteps(9)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for t, level in zip(scheduler.timesteps, noise_levels(scheduler), strict=True):
        fresh = kind(**config)  # once a run has begun, some forget the timestep they are asked about
        fresh.set_timesteps(9)
        if hasattr(fresh, "scale_noise"):
            alpha, sigma = (fresh.scale_noise(x, t[None], noise).item() for x, noise in ((one, zero), (zero, one)))
        else:
            alpha, sigma = (fresh.add_noise(x, noise, t[None]).item() for x, noise in ((one, zero), (zero, one)))
        assert level.log_snr == pytest.approx(NoiseLevel(alpha, sigma).log_snr, abs=1e-5)
        assert (level.alpha, level.sigma) == pytest.approx((alpha, sigma), rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_log_snr_rises_over_full_steps(case):
    kind, config = case
    scheduler = kind(**config)
    scheduler.set_timesteps(12)
    full = [level.log_snr for level in noise_levels(scheduler) if not level.half_step]
    assert full == sorted(set(full))


def test_pndm_marks_the_model_calls_that_are_no_steps_of_their_own():
    plms = PNDMScheduler(**BETAS, skip_prk_steps=True)
    plms.set_timesteps(10)
    assert [i for i, level in enumerate(noise_levels(plms)) if level.half_step] == [1]
    runge_kutta = PNDMScheduler(**BETAS, skip_prk_steps=False)
    runge_kutta.set_timesteps(10)
    assert [i for i, level in enumerate(noise_levels(runge_kutta)) if level.half_step] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    for scheduler in (plms, runge_kutta):
        assert sum(not level.half_step for level in noise_levels(scheduler)) == 10


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (LCMScheduler(), "LCMScheduler is not supported; supported are DDIMScheduler"),
        (DDPMScheduler(variance_type="learned_range"), "learned_range"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "flow prediction needs flow sigmas"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "flow prediction needs flow sigmas"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (EulerDiscreteScheduler(prediction_type="original_sample"), "original_sample"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else "",
)
def test_what_is_not_known_is_refused(scheduler, told):
    with pytest.raises(UnsupportedPipelineError, match=told):
        noise_levels(scheduler)


def test_a_subclass_is_refused_because_its_step_may_differ():
    class MyScheduler(DDIMScheduler):
        pass

    with pytest.raises(UnsupportedPipelineError, match="MyScheduler"):
        noise_levels(MyScheduler())


def test_a_grid_must_have_been_made():
    with pytest.raises(InputError, match="set_timesteps"):
        noise_levels(PNDMScheduler())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_x0_is_computed_in_float32(dtype):
    level = NoiseLevel(alpha=0.02, sigma=1.0)
    # In float16 sigma / alpha = 50 times an output of 2000 would be infinite.
    out, x = (torch.full((1, 4, 2, 2), 2000.0, dtype=dtype), torch.ones(1, 4, 2, 2, dtype=dtype))
    found = predict_x0(DDIMScheduler(), out, x, level)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (x.float() - out.float()) / 0.02)


def test_without_any_signal_v_still_gives_x0():
    level = NoiseLevel(alpha=0.0, sigma=1.0)  # zero terminal SNR, or flow matching at its start
    assert level.log_snr == -math.inf
    x0 = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    torch.testing.assert_close(predict_x0(scheduler, -x0, torch.ones_like(x0), level), x0)
    assert NoiseLevel(alpha=1.0, sigma=0.0).log_snr == math.inf


def test_a_scaled_sample_has_the_variance_of_a_variance_preserving_one():
    x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    for log_snr in (-3.0, 0.0, 2.5):
        sigma = math.exp(-log_snr / 2)  # with alpha = 1, as Euler has it
        alpha_vp = 1 / math.hypot(1, sigma)
        found = variance_preserving(x0 + sigma * noise, NoiseLevel(1.0, sigma))
        torch.testing.assert_close(found, alpha_vp * x0 + sigma * alpha_vp * noise)


@given(st.floats(allow_nan=False), st.floats(-20, 0), st.floats(0.5, 20))
def test_progress_is_a_clamped_share_of_the_range(log_snr, low, width):
    u = progress(log_snr, (low, low + width))
    assert 0 <= u <= 1
    assert u == pytest.approx(progress(torch.tensor([log_snr], dtype=torch.float64), (low, low + width)).item())
    if low <= log_snr <= low + width:
        assert low + u * width == pytest.approx(log_snr, abs=1e-9)


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
@given(checks=st.sets(st.floats(0, 1, width=16), min_size=1, max_size=8), num_steps=st.integers(1, 30))
def test_each_check_falls_on_the_first_step_at_or_past_it_and_on_the_last(name, checks, num_steps):
    config = tiny.scorer_config(check_progress=tuple(sorted(checks)))
    scheduler = tiny.SCHEDULERS[name]()
    scheduler.set_timesteps(num_steps)
    levels = noise_levels(scheduler)
    steps = check_steps(levels, config)
    assert steps == sorted(set(steps))
    assert steps[-1] == len(levels) - 1
    assert not any(levels[i].half_step for i in steps)
    reached = [progress(level.log_snr, config.log_snr_range) for level in levels]
    for check in checks:
        first = [i for i, u in enumerate(reached) if u >= check and not levels[i].half_step][:1]
        assert set(first) <= set(steps)
    assert len(steps) <= len(checks) + 1
