from __future__ import annotations

import inspect
import math

import diffusers
import pytest
import tiny
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from scheduler_cases import BETAS, CASES, FLOW, Case, steps_of, takes_generator

from moe_artifacts.errors import InputError, UnsupportedPipelineError
from moe_artifacts.noise import (
    NoiseLevel,
    check_steps,
    first_index,
    noise_levels,
    predict_x0,
    progress,
    require_supported,
    variance_preserving,
)
from moe_artifacts.noise_tables import REFUSED_SCHEDULERS, SUPPORTED_SCHEDULERS

# diffusers 0.42 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def forward_noise(case: Case) -> list[tuple[float, float]]:
    """Alpha and sigma at each model call as the scheduler itself noises a clean image, or else from its paper."""
    name = case.kind.__name__
    scheduler = case._replace(begin=0).build()
    steps = list(steps_of(scheduler))
    if name == "SCMScheduler":  # x = cos(t) x0 + sin(t) z, both of standard deviation sigma_data
        data = scheduler.config.sigma_data
        found = [(data * math.cos(t), data * math.sin(t)) for t in steps]
    elif name == "IPNDMScheduler":  # its timesteps are the angle between signal and noise, in quarter turns
        found = [(math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)) for t in steps]
    elif name == "SASolverScheduler":  # its add_noise knows no other sigmas than those of training
        found = [tuple(x.item() for x in scheduler._sigma_to_alpha_sigma_t(sigma)) for sigma in scheduler.sigmas[:-1]]
    else:
        found = [noised(scheduler, t.reshape(1)) for t in steps]
    if name in ("KDPM2DiscreteScheduler", "DPMSolverSDEScheduler"):  # halfway in log sigma
        found[1::2] = [(1.0, math.sqrt(found[i - 1][1] * found[i + 1][1])) for i in range(1, len(found), 2)]
    if name == "KDPM2AncestralDiscreteScheduler":  # halfway to the lower level sigma_down = next**2 / sigma, hence next
        found[1::2] = [found[i + 1] for i in range(1, len(found), 2)]
    return found[case.begin :]


def noised(scheduler, timestep):
    """The scheduler's own forward process, asked with a clean one and with a noise of one."""
    scheduler._step_index = None  # once a run has begun, some forget the timestep they are asked about
    add = getattr(scheduler, "scale_noise", None) or scheduler.add_noise
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    named = {"x": "sample", "t": "timestep"}
    if "sample" not in inspect.signature(add).parameters:
        named = {"x": "original_samples", "t": "timesteps"}
    return tuple(add(**{named["x"]: x, named["t"]: timestep, "noise": n}).item() for x, n in ((one, zero), (zero, one)))


def oracle(scheduler, sample, x0, alpha, sigma):
    """What a denoiser returns that knows x0 and, from elsewhere than the code under test, the level of the sample."""
    name, config = type(scheduler).__name__, scheduler.config
    sample, x0 = sample.double(), x0.double()
    eps, r = (sample - alpha * x0) / sigma, math.hypot(alpha, sigma)
    if name.startswith(("EDM", "Cosine")):  # arXiv:2206.00364, table 1
        data = config.sigma_data
        skip, scale = data**2 / (sigma**2 + data**2), sigma * data / math.hypot(sigma, data)
        return (x0 - skip * sample) / (scale if config.prediction_type == "epsilon" else -scale)
    outputs = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": (alpha * eps - sigma * x0) / r,
        "trigflow": alpha * eps - sigma * x0,  # for latents times sigma_data, hence v times sigma_data
        "flow_prediction": eps - x0,
    }
    kinds = {"IPNDMScheduler": "v_prediction", "DDPMWuerstchenScheduler": "epsilon"}
    kind = "flow_prediction" if name.startswith("FlowMatch") else kinds.get(name) or config.prediction_type
    learned = str(config.get("variance_type")).startswith("learned")
    return torch.cat([outputs[kind], -torch.ones_like(x0)], dim=1) if learned else outputs[kind]


def draws_noise(case):
    name, config = case.kind.__name__, case.config
    stochastic = ("DDPM", "EulerAncestral", "LCM", "TCD", "SASolver", "SDE", "KDPM2Ancestral", "SCM", "Cosine")
    return (
        any(part in name for part in stochastic)
        or str(config.get("algorithm_type")).startswith("sde")
        or bool(config.get("stochastic_sampling"))
    )


def goes_astray(case):
    """Whether the samples are not at the level that the model is told, however right the model is."""
    name, config = case.kind.__name__, case.config
    if name == "PNDMScheduler" and (config.get("prediction_type") == "v_prediction" or case.begin):
        # It extrapolates v over steps as if it were epsilon, which is constant along the way; v is not. And begun later
        # it still takes its first step twice, and is a step behind from then on.
        return True
    if name == "IPNDMScheduler" and not case.begin and "trained_betas" not in config:
        return True  # it knows only epsilon, and starts where this says nothing of x0
    if name == "LMSDiscreteScheduler" and case.begin:
        return True  # weights for steps that were left out
    if name == "SASolverScheduler" and config.get("algorithm_type") == "noise_prediction":
        return True  # as does this one with epsilon, while drawing new noise
    # These step down by 1000 / n, which is not the distance of n timesteps from 0 to 999.
    return config.get("timestep_spacing") == "linspace" and ("DDIM" in name or name == "PNDMScheduler")


def own_prediction(scheduler, output, sample, result):
    """What the scheduler made of the model output in this step: ("x0" or "noise", tensor), or None."""
    if hasattr(scheduler, "convert_model_output"):
        scheduler._step_index -= 1
        found = scheduler.convert_model_output(output, sample=sample)
        scheduler._step_index += 1
        to_noise = isinstance(scheduler, DEISMultistepScheduler) or not getattr(scheduler, "predict_x0", True)
        return ("noise" if to_noise else "x0"), found
    if hasattr(result, "pred_original_sample"):
        scale = scheduler.config.sigma_data if isinstance(scheduler, SCMScheduler) else 1  # the pipeline divides by it
        return "x0", result.pred_original_sample / scale
    return None


@every_case
def test_x0_and_log_snr_agree_with_a_denoiser_that_knows_them(case):
    scheduler = case.build()
    levels, truth = noise_levels(scheduler, case.begin), forward_noise(case)
    generator = torch.Generator().manual_seed(0)
    # Uniform with variance one: what the sample loses in float32 goes with its largest value.
    x0, noise = (torch.rand(2, 2, 4, 16, 16, generator=generator) * 2 - 1) * math.sqrt(3)
    extra = {"generator": generator} if takes_generator(scheduler) else {}
    sample = truth[0][0] * x0 + truth[0][1] * noise
    for t, level, (a, s) in zip(steps_of(scheduler, case.begin), levels, truth, strict=True):
        # KDPM2 ancestral finds its half-steps by a difference of float32 squares.
        assert level.log_snr == pytest.approx(NoiseLevel(a, s).log_snr, abs=1e-4 if level.half_step else 1e-5)
        assert (level.alpha, level.sigma) == pytest.approx((a, s), rel=1e-5 if not level.half_step else 1e-4, abs=1e-7)
        if not goes_astray(case):
            # The sample is at the level we say, or the scheduler would have led it elsewhere.
            if draws_noise(case):
                assert ((sample - a * x0) / s).std().item() == pytest.approx(1, abs=0.08)  # 5 standard errors
            else:
                r = math.hypot(a, s)  # 20 float32 steps, each over the distance of two levels
                torch.testing.assert_close(sample / r, (a * x0 + s * noise) / r, atol=1e-4, rtol=0)
        output = oracle(scheduler, sample, x0, a, s).float()
        found = predict_x0(scheduler, output, sample, level)
        assert found.dtype == torch.float32
        # Three float32 roundings of the sample, over alpha: more than 1e-5 only where there is next to no signal.
        torch.testing.assert_close(found, x0, atol=max(1e-5, 1.8e-7 * sample.abs().max().item() / (a or 1)), rtol=0)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)  # some warn without it
        result = scheduler.step(output, t, sample, **extra)
        if own := own_prediction(scheduler, output, sample, result):
            expected = x0 if own[0] == "x0" else (sample - a * x0) / s
            torch.testing.assert_close(own[1], expected, atol=1e-3, rtol=1e-4)
        sample = result.prev_sample


def test_the_number_of_configurations_is_printed(capsys):
    with capsys.disabled():
        print(f"\nx0 and log-SNR checked for {len(CASES)} configurations of {len({c.kind for c in CASES})} schedulers")
    assert len({case.id for case in CASES}) == len(CASES) >= 340


@every_case
def test_log_snr_rises_over_full_steps_and_is_asked_for_where_a_run_begins(case):
    scheduler = case.build()
    levels = noise_levels(scheduler, case.begin)
    full = [level.log_snr for level in levels if not level.half_step]
    assert full == sorted(set(full))
    assert not levels[0].half_step
    assert levels == noise_levels(scheduler)[case.begin :] or isinstance(scheduler, PNDMScheduler)

    sample = torch.zeros(1, 4, 2, 2)
    output = torch.zeros(1, 8 if "learned" in case.id else 4, 2, 2)
    t = next(steps_of(scheduler, case.begin))
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(sample, t)
    scheduler.step(output, t, sample)
    assert first_index(scheduler, t, num_steps=len(levels)) == case.begin


@pytest.mark.parametrize("begin", range(5))
def test_pndm_begun_at_its_repeated_timestep_needs_the_length_of_the_run(begin):
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[1] == scheduler.timesteps[2]
    t = scheduler.timesteps[begin]
    assert first_index(scheduler, t, num_steps=11 - begin) == begin
    if begin not in (1, 2):
        assert (
            first_index(scheduler, t)
            == first_index(scheduler, t.item())
            == first_index(scheduler, t.expand(3))
            == begin
        )
        return
    with pytest.raises(UnsupportedPipelineError, match=r"stands at the places \[1, 2\]"):
        first_index(scheduler, t)


def test_pndm_marks_the_model_calls_that_are_no_steps_of_their_own():
    plms = PNDMScheduler(**BETAS, skip_prk_steps=True)
    plms.set_timesteps(10)
    assert [i for i, level in enumerate(noise_levels(plms)) if level.half_step] == [1]
    runge_kutta = PNDMScheduler(**BETAS, skip_prk_steps=False)
    runge_kutta.set_timesteps(10)
    assert [i for i, level in enumerate(noise_levels(runge_kutta)) if level.half_step] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    for scheduler in (plms, runge_kutta):
        assert sum(not level.half_step for level in noise_levels(scheduler)) == 10
    plms.set_timesteps(10)
    assert [i for i, level in enumerate(noise_levels(plms, first=4), start=4) if level.half_step] == [5]
    with pytest.raises(UnsupportedPipelineError, match="use skip_prk_steps=True"):
        noise_levels(runge_kutta, first=4)


@pytest.mark.parametrize("name", ["Heun", "KDPM2", "KDPM2Ancestral"])
def test_every_second_call_of_a_second_order_scheduler_is_a_half_step(name):
    scheduler = getattr(diffusers, f"{name}DiscreteScheduler")(**BETAS)
    scheduler.set_timesteps(6)
    assert [level.half_step for level in noise_levels(scheduler)] == [False, True] * 5 + [False]
    assert [level.half_step for level in noise_levels(scheduler, first=4)] == [False, True] * 3 + [False]


def test_every_scheduler_of_diffusers_is_supported_or_refused_for_a_reason():
    """A new one in a later diffusers has to be looked at."""
    every = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    every |= set(diffusers.schedulers._import_structure["deprecated"])
    assert set(SUPPORTED_SCHEDULERS) | set(REFUSED_SCHEDULERS) == every
    assert not set(SUPPORTED_SCHEDULERS) & set(REFUSED_SCHEDULERS)
    assert {case.kind.__name__ for case in CASES} == set(SUPPORTED_SCHEDULERS)


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (CogVideoXDPMScheduler(), "CogVideoXDPMScheduler is not supported: its step takes the x0 of the step before"),
        (DPMSolverMultistepScheduler(variance_type="learned_range"), "first three channels"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "flow prediction needs flow sigmas"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "flow prediction needs flow sigmas"),
        (DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True), "set use_karras_sigmas=False"),
        (UniPCMultistepScheduler(**FLOW, use_beta_sigmas=True), "set use_beta_sigmas=False"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (EulerDiscreteScheduler(prediction_type="original_sample"), "original_sample"),
        (EDMEulerScheduler(prediction_type="sample"), "supported are epsilon, v_prediction"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else "",
)
def test_what_is_not_known_is_refused(scheduler, told):
    with pytest.raises(UnsupportedPipelineError, match=told):
        require_supported(scheduler)
    with pytest.raises(UnsupportedPipelineError, match=told):
        noise_levels(scheduler)


def test_settings_left_over_from_another_scheduler_do_not_matter():
    flow = UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    require_supported(FlowMatchEulerDiscreteScheduler.from_config(flow.config))
    learned = DDPMScheduler(**BETAS, variance_type="learned_range")
    require_supported(DDIMScheduler.from_config(learned.config))  # for a pipeline that cuts the variance off itself
    require_supported(EulerDiscreteScheduler.from_config(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config))


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
