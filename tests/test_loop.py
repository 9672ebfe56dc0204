from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import training.processes
import training.state
from moe_artifacts.errors import CheckpointError, ConfigError, InputError
from moe_artifacts.files import read_json
from tests.looped import BATCH, ROWS, Contrast, Task
from training.loop import LoopResult, StepBatch, TrainingLoop, cosine_schedule, linear_schedule
from training.state import read_record, step_generator

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in training.processes.LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# --- one step is what one would write ---------------------------------------------------------------------------------


def test_a_run_is_the_loop_that_one_would_write(tmp_path: Path) -> None:
    looped, written = Task(dropout=0.5), Task(dropout=0.5)
    looped.loop(tmp_path, steps=20, schedule=linear_schedule(20, 3))(looped.loss_of, looped.draw)

    parameters = [p for module in written.modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
    losses = []
    for step in range(20):
        generator = step_generator(7, step)
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        rows = torch.randint(ROWS, (BATCH - 1,), generator=generator)
        jitter = torch.randn(len(rows), 6, generator=generator)
        logit = written.net(written.x[rows] + 0.1 * jitter).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logit, written.y[rows], reduction="none").mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = 0.02 * (min(1, (step + 1) / 3) * (1 - step / 20))
        optimizer.step()
        losses.append(loss.item())
    assert looped.losses == losses
    assert same(looped.weights(), written.weights())


@pytest.mark.parametrize("kind", [Task, Contrast])
def test_losses_fall(kind: type[Task], tmp_path: Path) -> None:
    task = kind()
    task.train(tmp_path)
    assert sum(task.losses[-5:]) < 0.7 * sum(task.losses[:5])


@settings(max_examples=15)
@given(micro_batch=st.integers(1, BATCH), weighted=st.booleans())
def test_micro_batches_give_the_step_of_the_whole_batch(micro_batch: int, weighted: bool) -> None:
    whole, parts = Task(weighted=weighted), Task(weighted=weighted)  # parts of one row: some have nothing that counts
    for task, options in ((whole, {}), (parts, {"micro_batch": micro_batch})):
        task.loop(Path(), state=None, steps=8, **options)(task.loss_of, task.draw)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)  # float32 sums in another order


def test_a_mean_over_less_than_the_rows_is_weighted_by_what_it_is_over(tmp_path: Path) -> None:
    w = nn.Parameter(torch.tensor(0.0))
    values = torch.tensor([1.0, 2.0, 6.0, math.nan])

    def loss_of(batch: StepBatch) -> tuple[Tensor, int]:
        known = values[batch.rows].isfinite()
        return w * values[batch.rows][known].mean(), int(known.sum())

    module = nn.Module()
    module.register_parameter("w", w)
    optimizer = torch.optim.SGD([w], lr=1.0)
    loop = TrainingLoop(modules={"m": module}, optimizer=optimizer, steps=1, seed=0, micro_batch=2, clip_norm=None)
    loop(loss_of, lambda _: torch.arange(4))
    assert w.item() == -3.0  # the mean of 1, 2, 6; unweighted, of 1.5 and 6


def test_what_a_step_draws_is_the_same_for_each_of_its_parts() -> None:
    task, seen = Task(), []

    def loss_of(batch: StepBatch) -> Tensor:
        seen.append((batch.step, torch.rand((), generator=batch.generator).item()))
        return task.net(task.x[batch.rows]).mean()

    task.loop(Path(), state=None, steps=2, micro_batch=10)(loss_of, task.draw)
    assert [step for step, _ in seen] == [0, 0, 0, 1, 1, 1] and len(set(seen)) == 2


def test_modes_are_set_and_evaluation_keeps_no_graph(tmp_path: Path) -> None:
    task, modes = Task(), []

    def loss_of(batch: StepBatch) -> Any:
        modes.append(("train", task.net.training, torch.is_grad_enabled()))
        return task.loss_of(batch)

    def evaluate() -> dict[str, float]:
        modes.append(("evaluate", task.net.training, torch.is_grad_enabled()))
        return {}

    task.loop(tmp_path, steps=3, evaluate_every=2)(loss_of, task.draw, evaluate)
    train, held = ("train", True, True), ("evaluate", False, False)
    assert modes == [train, train, held, train, held]


def test_what_follows_each_step_is_part_of_the_run(tmp_path: Path) -> None:
    """A running average, in the modules though not in the optimizer."""

    def run(folder: Path, *, stop: int | None = None) -> Tensor:
        task = Task()
        trained = next(task.net.parameters())
        average = nn.Linear(6, 16)
        nn.init.zeros_(average.weight)

        @torch.no_grad()
        def after_step(done: int) -> None:
            if done == stop:
                raise KeyboardInterrupt
            average.weight.lerp_(trained, 1 / done)

        loop = task.loop(folder, steps=20, modules={**task.modules, "average": average})
        loop(task.loss_of, task.draw, after_step=after_step)
        return average.weight.detach()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=13)
    assert torch.equal(run(tmp_path / "cut"), whole) and not torch.equal(whole, next(Task().net.parameters()))


# --- interrupted runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> tuple[LoopResult, dict[str, Tensor]]:
    task = Task(dropout=0.5)
    with tempfile.TemporaryDirectory() as folder:
        return task.train(Path(folder)), task.weights()


@settings(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from(["loss", "evaluation", "saving"]), st.integers(1, 30)), max_size=4))
def test_a_run_interrupted_anywhere_ends_as_if_it_had_not_been(
    whole: tuple[LoopResult, dict[str, Tensor]], cuts: list[tuple[str, int]]
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        for place, call in cuts:
            torch.rand(call)  # the global generator is elsewhere in another process
            task = Task(dropout=0.5)
            if place == "saving":
                patch.setattr(training.state, "save_file", interrupted(training.state.save_file, call % 8 + 1))
            else:
                method = {"loss": "loss_of", "evaluation": "evaluate"}[place]
                setattr(task, method, interrupted(getattr(task, method), call))
            try:
                task.train(folder)
            except KeyboardInterrupt:
                pass
            patch.undo()
        task = Task(dropout=0.5)
        result = task.train(folder)
        assert [path.name for path in folder.iterdir()] == ["state.safetensors"]
    assert result == whole[0]
    assert same(task.weights(), whole[1])


def interrupted(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """Ends in the middle of its ``call``-th call, after its work was done."""
    calls = iter(range(1, call + 1))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if next(calls) == call:
            raise KeyboardInterrupt
        return result

    return wrapper


def test_a_finished_run_is_not_trained_again_until_it_is_forgotten(tmp_path: Path) -> None:
    first, second = Task(), Task()
    result = first.train(tmp_path)
    assert result == second.train(tmp_path) and second.losses == []
    assert same(first.weights(), second.weights())

    loop = second.loop(tmp_path)
    loop.forget()
    loop.forget()  # nothing there: no error
    assert list(tmp_path.iterdir()) == []
    third = Task()
    third.train(tmp_path)
    assert third.losses == first.losses


def test_no_steps_leave_the_weights_as_they_are(tmp_path: Path) -> None:
    task = Task()
    assert task.train(tmp_path, steps=0) == LoopResult(0, False, None, {}, [])
    assert same(task.weights(), Task().weights()) and not list(tmp_path.iterdir())


def test_a_run_is_continued_only_as_it_was_started(tmp_path: Path) -> None:
    Task().train(tmp_path, options={"batch": 8, "names": ("a", "b")})
    Task().train(tmp_path, options={"batch": 8, "names": ("a", "b")})
    with pytest.raises(
        ConfigError, match="holds a run that differs in batch, seed; use what it was started with, or del"
    ):
        Task().train(tmp_path, options={"batch": 9, "names": ("a", "b")}, seed=8)
    with pytest.raises(ConfigError, match="differs in batch, names;"):
        Task().train(tmp_path)
    with pytest.raises(ConfigError, match="differs in learning_rates, optimizer;"):
        task = Task()
        task.train(
            tmp_path, options={"batch": 8, "names": ("a", "b")}, optimizer=torch.optim.SGD(task.net.parameters())
        )
    with pytest.raises(ConfigError, match="differs in monitor;"):
        task = Task()
        task.loop(tmp_path, options={"batch": 8, "names": ("a", "b")})(task.loss_of, task.draw)


def test_states_of_other_modules_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    Task().train(tmp_path)
    other = Task()
    other.net = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1))
    with pytest.raises(CheckpointError, match=r"is the state of other modules or another optimizer: .*size mismatch"):
        other.train(tmp_path)
    path = tmp_path / "state.safetensors"
    for content in (path.read_bytes()[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot read the training state .*; delete it to begin again"):
            Task().train(tmp_path)


# --- early stopping ---------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=10), st.one_of(st.none(), st.integers(1, 3)))
def test_stops_after_patience_and_leaves_the_best_weights(scores: list[int], patience: int | None) -> None:
    task, weights, given_out = Task(), [], iter(scores)

    def evaluate() -> dict[str, float]:
        weights.append({key: value.clone() for key, value in task.weights().items()})
        return {"score": next(given_out), "other": math.nan}

    loop = task.loop(Path(), state=None, steps=2 * len(scores), evaluate_every=2)
    result = loop(task.loss_of, task.draw, evaluate, monitor="score", patience=patience)

    best, waited, seen = -1, 0, 0
    for score in scores:  # as one would write it
        seen += 1
        best, waited = (score, 0) if score > best else (best, waited + 1)
        if waited == patience:
            break
    place = scores.index(best)
    assert (result.steps, result.best_step, result.best["score"]) == (2 * seen, 2 * place + 2, best)
    assert result.stopped_early == (seen < len(scores))
    assert [figures["step"] for figures in result.history] == [2 * i + 2 for i in range(seen)]
    assert same(task.weights(), weights[place])


def test_without_a_monitor_the_last_weights_stay(tmp_path: Path) -> None:
    one, other = Task(), Task()
    result = one.loop(tmp_path)(one.loss_of, one.draw, one.evaluate)
    other.loop(tmp_path, state=None)(other.loss_of, other.draw)
    assert result.best_step is None and len(result.history) == 13
    assert same(one.weights(), other.weights())


def test_the_last_step_is_evaluated_and_saved(tmp_path: Path) -> None:
    result = Task().train(tmp_path, steps=11)  # evaluated every 4, saved every 5
    assert [figures["step"] for figures in result.history] == [4, 8, 11]
    record = read_record(tmp_path / "state.safetensors")
    assert record["history"] == result.history
    assert record["options"]["steps"] == 11


@pytest.mark.parametrize("figures", [{}, {"good": math.nan}, {"good": math.inf}])
def test_a_monitor_that_is_no_figure_is_refused(figures: dict[str, float], tmp_path: Path) -> None:
    task = Task()
    with pytest.raises(InputError, match="training: evaluate must give a finite 'good', got"):
        task.loop(tmp_path)(task.loss_of, task.draw, lambda: figures, monitor="good")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def spoiled(what: str) -> Task:
    """Goes wrong at step 12: the loss, or its gradient alone."""
    task = Task()
    right = task.loss_of

    def loss_of(batch: StepBatch) -> Any:
        loss = right(batch)
        assert isinstance(loss, Tensor)
        if batch.step < 12:
            return loss
        return loss * math.nan if what == "loss" else loss + (loss - loss).sqrt()  # finite, with slope 0 * infinity

    task.loss_of = loss_of  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_with_its_last_good_state(what: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"head: the {what} became nan at step 12: lower its learning rate and begin anew; the state after step 10 is",
    ):
        spoiled(what).train(tmp_path, name="head")
    assert all(value.isfinite().all() for value in load_file(tmp_path / "state.safetensors").values())
    task, whole = Task(), Task()
    task.train(tmp_path, name="head")
    whole.train(tmp_path / "whole")
    assert task.losses == whole.losses[10:]


def test_without_a_state_the_error_names_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"begin anew$"):
        spoiled("loss").train(tmp_path, state=None)
    with pytest.raises(ConfigError, match=r"begin anew$"):
        spoiled("loss").train(tmp_path, save_every=50)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training: weights are not finite after step 10: lower its learning rate"):
        Task().train(tmp_path, schedule=lambda step: math.inf if step == 9 else 1.0, evaluate_every=100)
    assert all(value.isfinite().all() for value in load_file(tmp_path / "state.safetensors").values())


def test_a_full_disk_is_an_error_and_the_state_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Task().loop(tmp_path, steps=50)  # nothing yet
    real = training.state.save_file
    saves = iter([True, True, False])

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if not next(saves):
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, metadata)

    monkeypatch.setattr(training.state, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*state.safetensors: I/O error: No space left"):
        Task().train(tmp_path)
    monkeypatch.undo()
    task = Task()
    task.train(tmp_path)
    assert len(task.losses) == 40


def test_a_loss_without_a_gradient_and_steps_without_rows_are_refused(tmp_path: Path) -> None:
    task = Task()
    with pytest.raises(InputError, match="none of them has a gradient"):
        task.loop(tmp_path)(lambda batch: torch.zeros((), requires_grad=True), task.draw)
    with pytest.raises(InputError, match="a row for each of 1 processes, got 0"):
        task.loop(tmp_path)(task.loss_of, lambda _: torch.arange(0))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, or None, got 0.0"),
        ({"clip_norm": math.nan}, "clip_norm must be above 0, or None, got nan"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        Task().loop(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"names of modules must not hold dots, got a\.b"):
        TrainingLoop(modules={"a.b": nn.Linear(1, 1)}, optimizer=Task().loop(tmp_path).optimizer, steps=1, seed=0)


def accelerated(**changes: Any) -> Any:
    """What a loop looks at of an Accelerator."""
    kind = SimpleNamespace(value=changes.pop("kind", "NO"))
    values = {"process_index": 0, "num_processes": 1, "device": torch.device("cpu"), "mixed_precision": "no"}
    return SimpleNamespace(**values | {"distributed_type": kind} | changes)


def test_what_accelerate_can_but_a_loop_cannot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='mixed_precision must be "no" or "bf16", got \'fp16\''):
        Task().loop(tmp_path, accelerator=accelerated(mixed_precision="fp16"))
    with pytest.raises(ConfigError, match="every process holds the whole model here: launch without FSDP"):
        Task().loop(tmp_path, accelerator=accelerated(kind="FSDP"))


def test_bf16_is_for_the_loss_alone(tmp_path: Path) -> None:
    task, kinds = Task(), []

    def loss_of(batch: StepBatch) -> Any:
        kinds.append(task.net(task.x[batch.rows]).dtype)
        return task.loss_of(batch)

    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    loop = task.loop(tmp_path, accelerator=accelerated(mixed_precision="bf16", autocast=autocast))
    loop(loss_of, task.draw, task.evaluate)
    assert set(kinds) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "state.safetensors").values())
    exact = Task()
    exact.train(tmp_path / "exact")
    assert task.losses == pytest.approx(exact.losses, abs=0.05) and task.losses != exact.losses  # 8 bits


# --- schedules --------------------------------------------------------------------------------------------------------


def test_schedules_rise_and_fall() -> None:
    straight, cosine = linear_schedule(10, 4), cosine_schedule(10, 4)
    assert [straight(step) for step in (0, 3, 5, 9)] == pytest.approx([1 / 4, 0.7, 0.5, 0.1])
    assert [cosine(step) for step in (0, 5, 9)] == pytest.approx([1 / 4, 0.5, 0.5 * (1 + math.cos(0.9 * math.pi))])
    assert linear_schedule(10, 0)(0) == cosine_schedule(10, 0)(0) == 1


# --- several processes ------------------------------------------------------------------------------------------------


def run_looped(scenario: str, folder: Path) -> dict[str, Any]:
    environment = os.environ | {"MOE_ARTIFACTS_WORK": str(folder / "work"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "tests.looped", scenario, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return read_json(folder / "codes.json")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    assert run_looped("together", folder) == {"one": [0], "two": [0, 0], "killed": [-9, -9], "resumed": [0, 0]}
    return folder


@pytest.mark.parametrize("case", ["plain", "weighted", "micro", "contrast"])
def test_two_processes_train_as_one_on_all_rows(case: str, together: Path) -> None:
    one, two = (read_json(together / f"{case}{count}" / "run.json") for count in (1, 2))
    assert len(one["losses"]) == one["steps"] == (36 if case == "weighted" else 50)  # the former stops early
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)  # sums in another order, over 50 steps
    for name in ("steps", "stopped_early", "best_step"):
        assert one[name] == two[name]
    weights = [load_file(together / f"{case}{count}" / "weights.safetensors") for count in (1, 2)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)
    untrained = {"extra.1.weight", "extra.1.bias"} | ({"extra.0.weight"} if case != "weighted" else set())
    begun = Task().weights()
    for key in untrained:  # not even decayed
        assert torch.equal(weights[1][key], begun[key])
    assert torch.equal(weights[1]["extra.0.weight"], begun["extra.0.weight"]) == (case != "weighted")


@pytest.mark.parametrize("case", ["plain2", "weighted2", "micro2", "contrast2", "dropout2", "killed"])
def test_all_processes_end_with_the_same_bits(case: str, together: Path) -> None:
    main, other = together / case, together / case / "rank1"
    assert same(load_file(main / "weights.safetensors"), load_file(other / "weights.safetensors"))
    results = [read_json(folder / "run.json") for folder in (main, other)]
    assert results[1].pop("losses") == [] and results[0].pop("losses")  # only the main process tells
    for result in results:
        del result["seeds"]
    assert results[0] == results[1]


def test_each_process_drops_others(together: Path) -> None:
    folders = [together / name for name in ("dropout1", "dropout2", "dropout2/rank1")]
    one, main, other = (read_json(folder / "run.json")["seeds"] for folder in folders)
    assert one == main and len({*main, *other}) == 100  # 50 steps, each with its own


def test_killed_processes_go_on_together(together: Path) -> None:
    whole, resumed = together / "dropout2", together / "killed"
    assert same(load_file(whole / "weights.safetensors"), load_file(resumed / "weights.safetensors"))
    losses = [read_json(folder / "run.json")["losses"] for folder in (whole, resumed)]
    assert losses[1] == losses[0][20:]  # killed at 23, saved at 20


def test_the_others_end_when_the_main_process_fails(together: Path) -> None:
    assert (together / "failed0.txt").read_text() == "ZeroDivisionError: division by zero"
    told = (together / "failed1.txt").read_text()
    assert told == "ProcessError: the main process failed: ZeroDivisionError: division by zero"


def test_nothing_is_pickled(together: Path) -> None:
    files = [path for path in together.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files if not path.name.startswith("events.out.tfevents")}
    assert kinds == {".safetensors", ".json", ".txt"}
    for count in (1, 2):
        stage = together / "work" / f"tracked{count}"
        assert len(list(stage.rglob("events.out.tfevents*"))) == 1
        lines = (stage / "log.txt").read_text().splitlines()
        assert len(lines) == 4 and "validation_good" in lines[3] and "step 4  loss " in lines[3]


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    told = run_looped("killed", tmp_path)
    assert told["whole"] == told["often"] == [0]
    assert any(0 < step < 400 for step in told["reached"])
    whole, often = tmp_path / "whole", tmp_path / "often"
    assert same(load_file(whole / "weights.safetensors"), load_file(often / "weights.safetensors"))
    assert same(load_file(whole / "state.safetensors"), load_file(often / "state.safetensors"))
    results = [read_json(folder / "run.json") for folder in (whole, often)]
    losses = [result.pop("losses") for result in results]
    seeds = [result.pop("seeds") for result in results]
    assert seeds[1] == seeds[0][400 - len(seeds[1]) :]
    assert results[0] == results[1] and losses[1] == losses[0][400 - len(losses[1]) :]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    task = Task()
    task.train(Path(), state=None)
    return task.losses


@pytest.mark.slow  # each process imports torch
@pytest.mark.parametrize(
    ("launcher", "count"),
    [
        (["torch.distributed.run", "--nproc-per-node", "2", "--standalone"], 2),
        (["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no"], 1),
    ],
)
def test_launchers_start_it(launcher: list[str], count: int, tmp_path: Path, alone: list[float]) -> None:
    module = ["-m", "tests.looped", "launched", str(tmp_path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *module],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run.json")["losses"] == pytest.approx(alone, rel=1e-5)
    assert (tmp_path / "rank1").exists() == (count == 2)
