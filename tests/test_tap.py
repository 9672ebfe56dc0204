from __future__ import annotations

import copy
import inspect
import pickle
import threading

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

from moe_artifacts.errors import GuardStateError, UnsupportedPipelineError
from moe_artifacts.guard.rows import LiveRows
from moe_artifacts.guard.tap import AllRowsGone, SchedulerTap
from moe_artifacts.noise import noise_levels, predict_x0

STEPS = 6


def see_nothing(step):
    return None


def model(sample, t):
    """Stands for a denoiser: any function of a row and the timestep alone."""
    return torch.sin(3 * sample + 0.01 * float(t))


def denoise(scheduler, sample, generator=None, begin=0, return_dict=False):
    """The loop of a pipeline."""
    scheduler.set_timesteps(STEPS)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps[begin:]:
        output = model(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, **extra, return_dict=return_dict)[0]
    return sample


def noise(rows=4):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_every_step_is_shown_with_its_level_and_its_x0(name):
    scheduler, shown = tiny.SCHEDULERS[name](), []
    with SchedulerTap(scheduler, lambda step: shown.append(step), LiveRows(4)):
        end = denoise(scheduler, noise(), tiny.generators(4))
    levels = noise_levels(scheduler)
    assert [step.index for step in shown] == list(range(len(levels)))
    assert [step.level for step in shown] == levels
    assert [step.is_last for step in shown] == [False] * (len(levels) - 1) + [True]
    assert all(step.num_steps == len(levels) for step in shown)
    for step, after in zip(shown, [*(s.sample for s in shown[1:]), end], strict=True):
        assert step.prev_sample is after
        torch.testing.assert_close(step.x0, predict_x0(scheduler, step.model_output, step.sample, step.level))


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_a_tap_that_only_looks_changes_no_bit(name):
    alone, watched = tiny.SCHEDULERS[name](), tiny.SCHEDULERS[name]()
    with SchedulerTap(watched, lambda step: step.x0[:0].sum().item() or None, LiveRows(4)):
        found = denoise(watched, noise(), tiny.generators(4))
    assert torch.equal(found, denoise(alone, noise(), tiny.generators(4)))


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm", "unipc"])
def test_a_run_that_begins_later_shows_the_levels_it_uses(name):
    scheduler, shown = tiny.SCHEDULERS[name](), []
    with SchedulerTap(scheduler, lambda step: shown.append(step), LiveRows(4)):
        denoise(scheduler, noise(), begin=2)
    assert [step.level for step in shown] == noise_levels(scheduler)[2:]


@pytest.mark.parametrize("begin", [1, 2])
def test_the_length_of_the_loop_tells_where_a_run_began_whose_timestep_stands_twice(begin):
    scheduler, shown = tiny.SCHEDULERS["pndm"](), []
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps[1] == scheduler.timesteps[2]
    length = len(scheduler.timesteps) - begin
    with SchedulerTap(scheduler, lambda step: shown.append(step), LiveRows(4), num_steps=lambda: length):
        denoise(scheduler, noise(), begin=begin)
    assert [step.level for step in shown] == noise_levels(scheduler, begin)
    assert shown[-1].is_last
    with pytest.raises(UnsupportedPipelineError, match="stands at the places"):
        with SchedulerTap(scheduler, see_nothing, LiveRows(4)):
            denoise(scheduler, noise(), begin=begin)


def test_x0_is_computed_only_when_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr("moe_artifacts.guard.tap.predict_x0", lambda *args: calls.append(1) or args[2])

    def look_twice_at_step_3(step):
        if step.index == 3:
            assert step.x0 is step.x0

    scheduler = tiny.SCHEDULERS["ddim"]()
    with SchedulerTap(scheduler, look_twice_at_step_3, LiveRows(4)):
        denoise(scheduler, noise())
    assert calls == [1]


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
@pytest.mark.parametrize("how", ["list", "one", "global"])
@pytest.mark.parametrize("return_dict", [False, True])
def test_rows_that_stay_are_the_same_bits_as_in_the_full_run(name, how, return_dict):
    """Also one row alone, whom the state of a full batch would be broadcast to; and noise drawn in one block."""

    def generator():
        return {"list": tiny.generators(4), "one": torch.Generator().manual_seed(7), "global": None}[how]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        full = denoise(tiny.SCHEDULERS[name](), noise(), generator())
        torch.manual_seed(3)
        schedule = {1: [0, 1, 3], 2: [1, 2], 4: [1]}  # 4 rows, 3, 2 and 1: rows 0 1 3, 1 3, 3
        scheduler = tiny.SCHEDULERS[name]()

        def keep(step):
            return torch.tensor(schedule[step.index]) if step.index in schedule else None

        rows = LiveRows(4)
        with SchedulerTap(scheduler, keep, rows):
            found = denoise(scheduler, noise(), generator(), return_dict=return_dict)
    assert rows.alive.tolist() == [3]
    assert torch.equal(found, full[3:])


@pytest.mark.parametrize("return_dict", [False, True])
def test_passengers_leave_with_the_last_step(return_dict):
    scheduler, shrunk, sizes = tiny.SCHEDULERS["unipc"](), [], []
    rows = LiveRows(4, sizes=(3,))

    def keep(step):
        sizes.append(len(step.sample))
        return torch.tensor([1, 2]) if step.index == 1 else None

    with SchedulerTap(scheduler, keep, rows, on_shrink=lambda: shrunk.append(len(rows))):
        found = denoise(scheduler, noise(), return_dict=return_dict)
    assert sizes == [4, 4, 3, 3, 3, 3]
    assert shrunk == [3, 2]
    assert torch.equal(found, denoise(tiny.SCHEDULERS["unipc"](), noise())[[1, 2]])


def test_a_loop_that_keeps_its_batch_gets_it_back_until_the_last_step():
    scheduler, shrunk, sizes = tiny.SCHEDULERS["unipc"](), [], []
    rows = LiveRows(4, loop_keeps_all=True)

    def keep(step):
        sizes.append(len(step.prev_sample))
        return torch.tensor([1, 2]) if step.index == 1 else None

    with SchedulerTap(scheduler, keep, rows, on_shrink=lambda: shrunk.append(len(rows))):
        found = denoise(scheduler, noise())
    assert sizes == [4] * 6
    assert shrunk == [2]
    assert torch.equal(found, denoise(tiny.SCHEDULERS["unipc"](), noise())[[1, 2]])


def test_generators_of_the_caller_end_where_they_would_have_ended():
    """A dropped row draws its noise on, so that what is sampled next from these generators stays the same."""
    full, dropped = tiny.generators(4), tiny.generators(4)
    denoise(tiny.SCHEDULERS["euler-a"](), noise(), full)
    scheduler = tiny.SCHEDULERS["euler-a"]()
    with SchedulerTap(scheduler, lambda step: torch.tensor([0]) if step.index == 1 else None, LiveRows(4)):
        denoise(scheduler, noise(), dropped)
    assert len(dropped) == 4
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(full, dropped, strict=True))


def test_no_row_left_ends_the_loop():
    scheduler, shown = tiny.SCHEDULERS["ddim"](), []

    def keep(step):
        shown.append(step.index)
        return torch.tensor([], dtype=torch.int64) if step.index == 2 else None

    with pytest.raises(AllRowsGone), SchedulerTap(scheduler, keep, LiveRows(4)):
        denoise(scheduler, noise())
    assert shown == [0, 1, 2]


class Interrupted(KeyboardInterrupt):
    """So that a test cannot mistake the user's own Ctrl-C for the one it makes."""


@pytest.mark.parametrize("error", [None, RuntimeError, Interrupted])
def test_the_scheduler_is_restored_whatever_happens(error):
    scheduler = tiny.SCHEDULERS["dpm"]()
    before = set(vars(scheduler))

    def fail(step):
        if error is not None and step.index == 2:
            raise error

    def run():
        with SchedulerTap(scheduler, fail, LiveRows(4)):
            assert "step" in vars(scheduler)
            denoise(scheduler, noise())

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert set(vars(scheduler)) == before
    assert scheduler.step == type(scheduler).step.__get__(scheduler)
    pickle.dumps(scheduler)
    copy.deepcopy(scheduler)


@pytest.mark.parametrize("take_away", [copy.deepcopy, pickle.dumps])
def test_a_copy_would_take_the_steps_of_the_original_so_there_is_none(take_away):
    scheduler = tiny.SCHEDULERS["dpm"]()
    with SchedulerTap(scheduler, see_nothing, LiveRows(4)):
        with pytest.raises(GuardStateError, match="a scheduler that a guard is watching cannot be copied or pickled"):
            take_away(scheduler)
        type(scheduler).from_config(scheduler.config)  # a new one of the same kind is no copy
    take_away(scheduler)


def test_what_pipelines_learn_from_the_signature_of_step_stays_the_same():
    scheduler = tiny.SCHEDULERS["ddim"]()
    before = inspect.signature(scheduler.step)
    with SchedulerTap(scheduler, see_nothing, LiveRows(4)):
        assert inspect.signature(scheduler.step) == before


def test_the_wrapper_of_someone_else_is_put_back():
    scheduler = tiny.SCHEDULERS["ddim"]()

    def theirs(*args, **kwargs):
        return DDIMScheduler.step(scheduler, *args, **kwargs)

    scheduler.step = theirs
    with SchedulerTap(scheduler, see_nothing, LiveRows(4)):
        denoise(scheduler, noise())
    assert scheduler.step is theirs


def test_a_second_tap_on_the_same_scheduler_is_refused_and_leaves_the_first():
    scheduler, shown = tiny.SCHEDULERS["ddim"](), []
    with SchedulerTap(scheduler, lambda step: shown.append(step.index), LiveRows(4)):
        with pytest.raises(GuardStateError, match="watched already"):
            SchedulerTap(scheduler, see_nothing, LiveRows(4)).__enter__()
        denoise(scheduler, noise())
    assert shown == list(range(STEPS))
    with SchedulerTap(scheduler, see_nothing, LiveRows(4)):  # free again
        pass


def test_another_thread_is_refused():
    scheduler, caught = tiny.SCHEDULERS["ddim"](), []

    def elsewhere():
        try:
            denoise(scheduler, noise())
        except GuardStateError as error:
            caught.append(str(error))

    with SchedulerTap(scheduler, see_nothing, LiveRows(4)):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert caught == ["scheduler.step was called from another thread than the guard that watches it"]


def test_a_batch_that_grew_back_is_an_error():
    """What happens where something of the full size is broadcast over the last living row."""
    scheduler = tiny.SCHEDULERS["ddim"]()
    scheduler.set_timesteps(STEPS)
    with SchedulerTap(scheduler, lambda step: torch.tensor([2]), LiveRows(4)):
        t = scheduler.timesteps
        one = scheduler.step(noise(), t[0], noise(), return_dict=False)[0]
        assert len(one) == 1
        with pytest.raises(
            GuardStateError, match="model_output with 4 and sample with 1 rows while 1 of 4 are expected"
        ):
            scheduler.step(noise(), t[1], one, return_dict=False)
