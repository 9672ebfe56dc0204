"""Every scheduler that the guard supports, with every kind of prediction, sigma schedule and custom grid it takes."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import numpy as np
import torch


class Case(NamedTuple):
    id: str
    kind: type
    config: dict[str, Any]
    grid: dict[str, Any]  # arguments of set_timesteps
    begin: int = 0  # steps left out, as by the strength of image-to-image

    def build(self) -> Any:
        """A new scheduler with its grid."""
        if self.id not in _built:  # some take 0.1 s
            _built[self.id] = self.kind(**self.config)
            _built[self.id].set_timesteps(**self.grid)
        scheduler = copy.deepcopy(_built[self.id])
        if self.begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.begin)
        return scheduler


_built: dict[str, Any] = {}


class _BrownianInterval:
    """In place of torchsde's: noise that depends on the seed and the interval alone."""

    def __init__(self, size: Any, dtype: Any, entropy: int, **_: Any) -> None:
        self.size, self.dtype, self.seed = size, dtype, entropy

    def __call__(self, t0: Any, t1: Any) -> torch.Tensor:
        seed = hash((self.seed, float(t0), float(t1))) % 2**63
        noise = torch.randn(self.size, generator=torch.Generator().manual_seed(seed), dtype=self.dtype)
        return noise * (float(t1) - float(t0)) ** 0.5


@functools.cache
def _scheduler(name: str) -> type:
    if importlib.util.find_spec("torchsde"):
        return getattr(diffusers, name)
    # torchsde is an optional dependency of diffusers, which has two schedulers that need it. How it makes its noise
    # does not matter here.
    modules = {
        "CosineDPMSolverMultistepScheduler": "cosine_dpmsolver_multistep",
        "DPMSolverSDEScheduler": "dpmsolver_sde",
    }
    if name not in modules:
        return getattr(diffusers, name)
    stand_in = types.ModuleType("torchsde")
    stand_in.BrownianInterval = _BrownianInterval  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules):  # takes out what was imported inside
        sys.modules["torchsde"] = stand_in
        return getattr(importlib.import_module(f"diffusers.schedulers.scheduling_{modules[name]}"), name)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EPS_V = ("epsilon", "v_prediction")
ALL = (*EPS_V, "sample")
DEFAULT = {"num_inference_steps": 10}  # 2 n divides 1000: DDIM and PNDM round the grid and its steps apart otherwise
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SIGMAS = ("karras", "exponential", "beta")
SPACINGS = ("leading", "linspace", "trailing")
FALLING = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # AysSchedules["StableDiffusionTimesteps"]
BEGIN = 4  # even: second-order schedulers have two entries a step


def _case(name: str, label: str, config: dict[str, Any], grid: dict[str, Any] | None = None, begin: int = 0) -> Case:
    short = name.removesuffix("Scheduler")
    return Case(f"{short}-{label}", _scheduler(name), config, DEFAULT if grid is None else grid, begin)


def _discrete() -> Iterator[Case]:
    unclipped = {**BETAS, "clip_sample": False}
    for name in ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "CogVideoXDDIM"):
        name += "Scheduler"
        for kind in ALL:
            for spacing in SPACINGS:
                yield _case(
                    name, f"{kind}-{spacing}", {**unclipped, "prediction_type": kind, "timestep_spacing": spacing}
                )
        zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        yield _case(name, "zero-snr", {**unclipped, **zero_snr})
        yield _case(name, "strength", unclipped, begin=BEGIN)
    for name in ("DDPMScheduler", "DDPMParallelScheduler"):
        yield _case(name, "timesteps", unclipped, {"timesteps": FALLING})
        yield _case(name, "learned", {**unclipped, "variance_type": "learned_range"})
    for name in ("LCMScheduler", "TCDScheduler"):
        for kind in ALL:
            yield _case(name, kind, {**unclipped, "prediction_type": kind}, {"num_inference_steps": 5})
        yield _case(name, "timesteps", unclipped, {"timesteps": [999, 759, 499, 259]})
        yield _case(name, "original-steps", unclipped, {"num_inference_steps": 4, "original_inference_steps": 20})
        yield _case(name, "strength", unclipped, {"num_inference_steps": 8, "strength": 0.6})
        yield _case(name, "begin", unclipped, {"num_inference_steps": 8}, begin=BEGIN)
    for kind in EPS_V:
        for spacing in SPACINGS:
            plms = {**BETAS, "prediction_type": kind, "timestep_spacing": spacing, "skip_prk_steps": True}
            yield _case("PNDMScheduler", f"plms-{kind}-{spacing}", plms)
        yield _case("PNDMScheduler", f"prk-{kind}", {**BETAS, "prediction_type": kind, "skip_prk_steps": False})
    yield _case("PNDMScheduler", "strength", {**BETAS, "skip_prk_steps": True}, begin=BEGIN)


def _exploding() -> Iterator[Case]:
    for name, kinds in (
        ("EulerDiscreteScheduler", ALL),
        ("EulerAncestralDiscreteScheduler", EPS_V),
        ("HeunDiscreteScheduler", ALL),
        ("LMSDiscreteScheduler", ALL),
        ("KDPM2DiscreteScheduler", EPS_V),
        ("KDPM2AncestralDiscreteScheduler", EPS_V),
        ("DPMSolverSDEScheduler", EPS_V),
    ):
        # LMS integrates the weights of each step anew.
        grid = {"num_inference_steps": 6} if name == "LMSDiscreteScheduler" else None
        for kind in kinds:
            yield _case(name, kind, {**BETAS, "prediction_type": kind}, grid)
            for sigmas in SIGMAS if name != "EulerAncestralDiscreteScheduler" else ():
                yield _case(
                    name, f"{kind}-{sigmas}", {**BETAS, "prediction_type": kind, f"use_{sigmas}_sigmas": True}, grid
                )
        for spacing in ("leading", "trailing"):
            yield _case(name, spacing, {**BETAS, "timestep_spacing": spacing, "steps_offset": 1}, grid)
        yield _case(name, "strength", BETAS, begin=BEGIN)
    euler, heun = "EulerDiscreteScheduler", "HeunDiscreteScheduler"
    yield _case(euler, "timesteps", BETAS, {"timesteps": FALLING})
    yield _case(heun, "timesteps", BETAS, {"timesteps": FALLING})
    yield _case(euler, "sigmas", BETAS, {"sigmas": diffusers.schedulers.AysSchedules["StableDiffusionXLSigmas"]})
    yield _case(euler, "sigma-min", {**BETAS, "final_sigmas_type": "sigma_min"})
    continuous = {
        "timestep_type": "continuous",
        "prediction_type": "v_prediction",
        "sigma_max": 700.0,
        "sigma_min": 0.002,
    }
    yield _case(euler, "continuous", {**BETAS, **continuous, "use_karras_sigmas": True})
    for name in (euler, "EulerAncestralDiscreteScheduler"):
        # Not trailing, which would begin at a sigma of 4096, where float32 keeps only three digits of x0.
        zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "leading"}
        yield _case(name, "zero-snr", {**BETAS, **zero_snr})


def _solvers() -> Iterator[Case]:
    multi, single, unipc = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
    solvers = (multi, single, unipc, "DEISMultistepScheduler", "SASolverScheduler")
    for name in solvers:
        for kind in ALL:
            yield _case(name, kind, {**BETAS, "prediction_type": kind})
            for sigmas in SIGMAS:
                yield _case(name, f"{kind}-{sigmas}", {**BETAS, "prediction_type": kind, f"use_{sigmas}_sigmas": True})
        for shift in (1.0, 3.0):
            yield _case(name, f"flow-shift-{shift:g}", {**FLOW, "flow_shift": shift})
        yield _case(name, "strength", BETAS, begin=BEGIN)
        yield _case(name, "flow-strength", {**FLOW, "flow_shift": 3.0}, begin=BEGIN)
    for name in (multi, unipc, "DEISMultistepScheduler", "SASolverScheduler"):
        for spacing in ("leading", "trailing"):
            yield _case(name, spacing, {**BETAS, "timestep_spacing": spacing, "steps_offset": 1})
    for name in (multi, single):
        yield _case(name, "timesteps", BETAS, {"timesteps": FALLING})
        yield _case(name, "sde", {**BETAS, "algorithm_type": "sde-dpmsolver++"})
        yield _case(name, "order-3", {**BETAS, "solver_order": 3})
        yield _case(name, "order-1", {**BETAS, "solver_order": 1})
        yield _case(name, "heun", {**BETAS, "solver_type": "heun"})
    for kind in ALL:
        yield _case(multi, f"{kind}-lu", {**BETAS, "prediction_type": kind, "use_lu_lambdas": True})
    yield _case(multi, "euler-at-final", {**BETAS, "euler_at_final": True})
    yield _case(multi, "sigma-min", {**BETAS, "final_sigmas_type": "sigma_min"})
    yield _case(multi, "flow-sde", {**FLOW, "algorithm_type": "sde-dpmsolver++", "flow_shift": 3.0})
    to_sigma_min = {"final_sigmas_type": "sigma_min"}  # these are not finite down to zero
    yield _case(unipc, "bh1-order-3", {**BETAS, "solver_type": "bh1", "solver_order": 3, **to_sigma_min})
    yield _case(unipc, "noise", {**BETAS, "predict_x0": False, **to_sigma_min})
    yield _case(unipc, "flow-karras", {**FLOW, "use_karras_sigmas": True})
    yield _case(unipc, "flow-sigmas", {**FLOW, "flow_shift": 3.0}, {"sigmas": np.linspace(1, 0.2, 5)})
    for name in (multi, single, unipc, "DEISMultistepScheduler"):
        dynamic = {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "exponential"}
        yield _case(name, "flow-dynamic", dynamic, {"num_inference_steps": 10, "mu": 0.8})
    sa_noise = {"algorithm_type": "noise_prediction", "predictor_order": 3, "corrector_order": 3}
    yield _case("SASolverScheduler", "noise-order-3", {**BETAS, **sa_noise})


def _edm_and_others() -> Iterator[Case]:
    for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"):
        for kind in EPS_V:
            for schedule in ("karras", "exponential"):
                yield _case(name, f"{kind}-{schedule}", {"prediction_type": kind, "sigma_schedule": schedule})
        yield _case(name, "strength", {"sigma_data": 1.0}, begin=BEGIN)
    yield _case("EDMEulerScheduler", "sigmas", {}, {"num_inference_steps": 5, "sigmas": torch.linspace(0, 1, 5) ** 2})
    yield _case("EDMDPMSolverMultistepScheduler", "sde", {"algorithm_type": "sde-dpmsolver++"})
    yield _case("EDMDPMSolverMultistepScheduler", "order-3", {"solver_order": 3})
    yield _case("IPNDMScheduler", "default", {})
    yield _case(
        "IPNDMScheduler", "betas", {"trained_betas": [0.999, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0]}, {"num_inference_steps": 6}
    )
    yield _case("IPNDMScheduler", "strength", {}, begin=BEGIN)
    several = {"num_inference_steps": 6, "intermediate_timesteps": None}
    yield _case("SCMScheduler", "one", {}, {"num_inference_steps": 1, "intermediate_timesteps": None})
    yield _case("SCMScheduler", "two", {}, {"num_inference_steps": 2})
    yield _case("SCMScheduler", "several", {}, several)
    custom = {"num_inference_steps": 3, "timesteps": [1.5, 1.1, 0.6, 0.0], "max_timesteps": None}
    yield _case("SCMScheduler", "timesteps", {"sigma_data": 1.0}, {**custom, "intermediate_timesteps": None})
    yield _case("SCMScheduler", "strength", {}, several, begin=2)
    for scaler in (1.0, 2.0, 0.5):
        yield _case("DDPMWuerstchenScheduler", f"scaler-{scaler:g}", {"scaler": scaler})
    yield _case("DDPMWuerstchenScheduler", "timesteps", {}, {"timesteps": [1.0, 0.7, 0.4, 0.1, 0.0]})
    yield _case("DDPMWuerstchenScheduler", "strength", {}, begin=BEGIN)


def _flow() -> Iterator[Case]:
    euler, heun, lcm = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"
    for name in (euler, heun, lcm):
        for shift in (1.0, 3.0):
            yield _case(name, f"shift-{shift:g}", {"shift": shift})
        yield _case(name, "strength", {"shift": 3.0}, begin=BEGIN)
    for name in (euler, lcm):
        for sigmas in SIGMAS:
            yield _case(name, sigmas, {f"use_{sigmas}_sigmas": True})
        for shape in ("exponential", "linear"):
            dynamic = {"use_dynamic_shifting": True, "time_shift_type": shape}
            yield _case(name, f"dynamic-{shape}", dynamic, {"num_inference_steps": 10, "mu": 0.8})
        yield _case(name, "terminal", {"shift_terminal": 0.1})
        yield _case(name, "sigmas", {"shift": 3.0}, {"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2]})
        yield _case(name, "timesteps", {}, {"timesteps": [1000.0, 800.0, 600.0, 400.0, 200.0]})
        both = {"timesteps": [1000.0, 700.0, 300.0], "sigmas": [0.9, 0.6, 0.2]}  # the sigmas are the noise levels
        yield _case(name, "timesteps-and-sigmas", {}, both)
    yield _case(euler, "stochastic", {"stochastic_sampling": True})


CASES: list[Case] = [*_discrete(), *_exploding(), *_solvers(), *_edm_and_others(), *_flow()]


def steps_of(scheduler: Any, begin: int = 0) -> Iterator[Any]:
    """The timesteps at which a pipeline calls the model."""
    if type(scheduler).__name__ in ("SCMScheduler", "DDPMWuerstchenScheduler"):
        # The last entry is the end and no step. Their pipelines hand over a tensor with the same number for each image,
        # for which one entry stands here.
        yield from scheduler.timesteps[begin:-1, None]
    else:
        yield from scheduler.timesteps[begin:]


def takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
