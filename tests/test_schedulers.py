"""A scheduler whose batch loses rows on the way, under the tap, against the same rows of an undisturbed run.

The scheduler goes on seeing the full batch, so its state stays whole. That this is what keeps the rows right is shown by
sabotage: each tensor of its state, cut or in another order, must be noticed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from scheduler_cases import CASES, Case, steps_of, takes_generator
from torch import Tensor

from moe_artifacts.errors import InputError
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.guard.tap import SchedulerTap, TappedStep
from moe_artifacts.noise import noise_levels, require_supported
from moe_artifacts.noise_tables import SUPPORTED_SCHEDULERS
from moe_artifacts.schedulers import FLOW_SCHEDULERS, MORE_SCHEDULERS, SCHEDULERS, set_scheduler

# diffusers 0.42 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

SHAPE = (4, 4, 5, 3)  # no other tensor of a scheduler has this shape
TOKENS = (4, 6, 8)  # packed, as in Flux
BY_ID = {case.id: case for case in CASES}

# What each scheduler remembers of the batch between two steps; the others remember nothing.
STATE = {
    "CosineDPMSolverMultistepScheduler": {"model_outputs", "noise_sampler"},
    "DEISMultistepScheduler": {"model_outputs"},
    "DPMSolverMultistepScheduler": {"model_outputs"},
    "DPMSolverSDEScheduler": {"sample", "noise_sampler"},
    "DPMSolverSinglestepScheduler": {"model_outputs", "sample"},
    "EDMDPMSolverMultistepScheduler": {"model_outputs"},
    "FlowMatchHeunDiscreteScheduler": {"prev_derivative", "sample"},
    "HeunDiscreteScheduler": {"prev_derivative", "sample"},
    "IPNDMScheduler": {"ets"},
    "KDPM2AncestralDiscreteScheduler": {"sample"},
    "KDPM2DiscreteScheduler": {"sample"},
    "LMSDiscreteScheduler": {"derivatives"},
    "PNDMScheduler": {"ets", "cur_sample"},
    "SASolverScheduler": {"model_outputs", "last_sample", "last_noise"},
    "UniPCMultistepScheduler": {"model_outputs", "last_sample"},
}
# One configuration of each scheduler with state, with as much of it as there can be.
RICHEST = [
    "CosineDPMSolverMultistep-epsilon-karras",
    "DEISMultistep-epsilon",
    "DPMSolverMultistep-order-3",
    "DPMSolverSDE-epsilon",
    "DPMSolverSinglestep-order-3",
    "EDMDPMSolverMultistep-order-3",
    "FlowMatchHeunDiscrete-shift-3",
    "HeunDiscrete-epsilon",
    "IPNDM-default",
    "KDPM2AncestralDiscrete-epsilon",
    "KDPM2Discrete-epsilon",
    "LMSDiscrete-epsilon",
    "PNDM-plms-epsilon-leading",
    "PNDM-prk-epsilon",
    "SASolver-epsilon",
    "UniPCMultistep-bh1-order-3",
]
OTHERS = {
    case.kind: case.id for case in CASES if case.kind.__name__ not in STATE and "num_inference_steps" in case.grid
}
ONE_EACH = [*RICHEST, *OTHERS.values()]


def short(name: str) -> Case:
    """With fewer steps, for tests that try each of them."""
    case = BY_ID[name]
    return case._replace(id=f"{name}-short", grid={**case.grid, "num_inference_steps": 5}, begin=0)


def state(scheduler: Any, shape: tuple[int, ...] = SHAPE) -> dict[tuple[str, ...], Any]:
    """Every tensor of the shape of the batch that the scheduler holds, by the way to it; and its noise sampler."""

    def search(value: Any, way: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        if isinstance(value, Tensor):
            if value.shape == shape:
                yield way, value
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                yield from search(item, (*way, str(i)))
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from search(item, (*way, str(key)))

    found = dict(search(vars(scheduler), ()))
    if getattr(scheduler, "noise_sampler", None) is not None:  # a Brownian tree over the whole batch
        found["noise_sampler",] = scheduler.noise_sampler
    return found


def replace(scheduler: Any, way: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> None:
    holder = vars(scheduler)
    for key in way[:-1]:
        holder = holder[int(key)] if isinstance(holder, list) else holder[key]
    last = int(way[-1]) if isinstance(holder, list) else way[-1]
    old = holder[last]
    holder[last] = change(old) if isinstance(old, Tensor) else lambda *sigmas: change(old(*sigmas))


def model(case: Case, sample: Tensor, t: Tensor) -> Tensor:
    """Stands for a denoiser: any function of a row and the timestep alone."""
    output = torch.sin(3 * sample + 0.01 * t.float().sum())
    return torch.cat([output, -output], dim=1) if case.config.get("variance_type") == "learned_range" else output


def denoise(case: Case, keep: dict[int, list[int]], after_step: Any = None, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """The loop of a pipeline, under a tap that keeps these of the living rows after these steps."""
    scheduler, rows = case.build(), LiveRows(shape[0])
    own_step = scheduler.step

    def watched(model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        assert len(model_output) == len(sample) == shape[0], "the scheduler must see the full batch"
        result = own_step(model_output, timestep, sample, **kwargs)
        assert len(result[0]) == shape[0]
        return result

    def observe(step: TappedStep) -> Tensor | None:
        return torch.tensor(keep[step.index]) if step.index in keep else None

    scheduler.step = watched
    extra = {"generator": tiny.generators(shape[0])} if takes_generator(scheduler) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sample = torch.randn(shape)
        with SchedulerTap(scheduler, observe, rows):
            for i, t in enumerate(steps_of(scheduler, case.begin)):
                scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
                sample = scheduler.step(model(case, scaled, t), t, sample, **extra, return_dict=False)[0]
                if after_step is not None:
                    after_step(i, scheduler)
    return sample


def survivors(keep: dict[int, list[int]]) -> list[int]:
    alive = list(range(SHAPE[0]))
    for i in sorted(keep):
        alive = [alive[row] for row in keep[i]]
    return alive


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_rows_that_stay_are_the_same_bits_as_in_the_full_run(case: Case) -> None:
    remembered = set()
    full = denoise(case, {}, lambda i, scheduler: remembered.update(way[0] for way in state(scheduler)))
    assert full.isfinite().all()
    last = len(list(steps_of(case.build(), case.begin))) - 1
    schedules: list[dict[int, list[int]]] = [
        {0: [0, 1, 3], 1: [2]},  # 4 to 3 to 1: what is remembered of four could be broadcast to one
        {last // 2: [0, 3], last: [1]},
    ]
    for schedule in schedules if last > 1 else [{0: [1, 2]}]:
        assert torch.equal(denoise(case, schedule), full[survivors(schedule)])
    known = STATE.get(case.kind.__name__, set())
    assert remembered == known | ({"cur_model_output"} if case.id.startswith("PNDM-prk") else set())


@pytest.mark.parametrize("name", ONE_EACH)
def test_rows_that_stay_are_the_same_at_whichever_step_the_others_leave(name: str) -> None:
    """Also between the two calls of a step of second order."""
    case = short(name)
    full = denoise(case, {})
    for i in range(len(list(steps_of(case.build())))):
        assert torch.equal(denoise(case, {i: [0, 3]}), full[[0, 3]])


@pytest.mark.parametrize("name", ONE_EACH)
def test_packed_tokens_are_rows_like_any_other(name: str) -> None:
    full = denoise(short(name), {}, shape=TOKENS)
    assert torch.equal(denoise(short(name), {1: [0, 1, 3], 2: [2]}, shape=TOKENS), full[[3]])


def is_noticed(name: str, step: int, rows: list[int], way: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> bool:
    """Whether the rows come out otherwise, or not at all, if a piece of state is changed right after a drop."""

    def sabotage(i: int, scheduler: Any) -> None:
        if i == step:
            replace(scheduler, way, change)

    try:
        found = denoise(short(name), {step: rows}, sabotage)
    except RuntimeError:  # of another size
        return True
    return not torch.equal(found, undisturbed(name)[rows])


@functools.cache
def undisturbed(name: str) -> Tensor:
    return denoise(short(name), {})


def pieces(name: str) -> list[tuple[int, tuple[str, ...]]]:
    """(step, way) of each piece of state that still matters after that step."""
    held: dict[int, list[tuple[str, ...]]] = {}
    denoise(short(name), {}, lambda i, scheduler: held.update({i: list(state(scheduler))}))
    found = [(i, way) for i, ways in held.items() for way in ways]
    # What does not (the oldest of a list that is moved up next, a noise that is multiplied by zero) may be anything.
    return [(i, way) for i, way in found if is_noticed(name, i, [0, 1, 2, 3], way, lambda x: x + 1)]


@pytest.mark.parametrize("name", RICHEST)
def test_any_piece_of_state_that_is_cut_or_moved_is_noticed(name: str) -> None:
    found = pieces(name)
    # Nothing that is known to be remembered is there in vain, or the sabotage would show nothing.
    names = STATE[BY_ID[name].kind.__name__] | ({"cur_model_output"} if "prk" in name else set())
    assert {way[0] for _, way in found} == names
    for i, way in found:
        assert is_noticed(name, i, [0, 3], way, lambda x: x[[0, 3]]), f"{way} cut after step {i}"
        assert is_noticed(name, i, [0, 3], way, lambda x: x.flip(0)), f"{way} turned round after step {i}"
        # Cut to one row it is broadcast, and right, for that row; any other row in its place is wrong.
        assert is_noticed(name, i, [2], way, lambda x: x[[1]]), f"{way} cut to the wrong row after step {i}"


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("rows", [[0, 3], [2]])
def test_a_batch_that_is_not_padded_is_noticed(name: str, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveRows, "pad", lambda self, running: running)
    with pytest.raises(AssertionError, match="must see the full batch"):
        denoise(short(name), {1: rows})


def test_every_scheduler_and_its_state_is_tried() -> None:
    kinds = {BY_ID[name].kind.__name__ for name in ONE_EACH}
    assert kinds == set(SUPPORTED_SCHEDULERS)
    assert {BY_ID[name].kind.__name__ for name in RICHEST} == set(STATE)


NEEDS_TORCHSDE = () if importlib.util.find_spec("torchsde") else ("dpm-sde",)
DISCRETE = [name for name in (*SCHEDULERS, *MORE_SCHEDULERS) if name not in NEEDS_TORCHSDE]


def test_going_through_the_short_names_keeps_the_noise_schedule() -> None:
    pipe = tiny.stable_diffusion()
    before = pipe.scheduler
    for name in (*DISCRETE, "dpm"):
        set_scheduler(pipe, name)
        assert type(pipe.scheduler).__name__ == (SCHEDULERS | MORE_SCHEDULERS)[name]
        torch.testing.assert_close(pipe.scheduler.alphas_cumprod, before.alphas_cumprod)
        require_supported(pipe.scheduler)


def test_going_through_the_flow_schedulers_keeps_the_shift() -> None:
    pipe = tiny.stable_diffusion()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for name in (*FLOW_SCHEDULERS, "flow-euler", "flow-dpm"):
        set_scheduler(pipe, name)
        assert type(pipe.scheduler).__name__ == FLOW_SCHEDULERS[name]
        require_supported(pipe.scheduler)
        pipe.scheduler.set_timesteps(100)
        # A share of 0.5 of the noise, shifted. The grids of 100 steps differ by up to one step.
        half = len(pipe.scheduler.timesteps) // 2
        assert noise_levels(pipe.scheduler)[half].sigma == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.02), name


@pytest.mark.parametrize(
    ("scheduler", "name", "told"),
    [
        (
            DDIMScheduler(),
            "flow-euler",
            "'flow-euler' is for models that predict a flow and .* DDIMScheduler .*use one of ddim,",
        ),
        (
            FlowMatchEulerDiscreteScheduler(),
            "ddim",
            "'ddim' is for models with a discrete noise .*use one of flow-deis,",
        ),
        (DDIMScheduler(), "plms", "must be one of ddim, .*, got 'plms'"),
    ],
    ids=["flow", "discrete", "unknown"],
)
def test_a_scheduler_that_does_not_fit_the_model_is_refused(scheduler: Any, name: str, told: str) -> None:
    pipe = tiny.stable_diffusion()
    pipe.scheduler = scheduler
    with pytest.raises(InputError, match=told):
        set_scheduler(pipe, name)
    assert pipe.scheduler is scheduler
