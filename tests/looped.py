"""A small training run for test_loop.py, alone or in processes of its own.

``python -m tests.looped together|killed FOLDER`` forks its runs from one process: importing torch for each takes seconds,
and a process that has used autograd, as that of pytest, cannot be forked. ``launched`` is for the launchers of accelerate
and PyTorch. Each run leaves a folder with ``weights.safetensors`` and ``run.json``.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import accelerate  # noqa: F401  # imported here, what runs need later is there before they are forked
import torch
import torch._dynamo  # likewise: optimizers import it at their first step
import torch.nn.functional as F
from torch import Tensor, nn

from moe_artifacts.checkpoint import save_state
from moe_artifacts.files import write_json
from training.cached_contrastive import cached_backward, clip_loss
from training.loop import LoopResult, Loss, StepBatch, TrainingLoop, cosine_schedule
from training.workspace import Stage

ROWS, WIDTH, BATCH = 300, 6, 24


@dataclass
class Task:
    """Whether the numbers of a row add up to more than nothing."""

    dropout: float = 0.0
    weighted: bool = False  # the loss is a mean over two of three rows
    lonely: bool = False  # a weight that only the first row of a batch uses
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    losses: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)  # of dropout, at each step
    backward: ClassVar[bool] = True  # of the loop

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(ROWS, WIDTH, generator=generator)
        self.y = (self.x.sum(dim=1) > 0).float()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(self.dropout), nn.Tanh(), nn.Linear(16, 1))
        self.extra = nn.Linear(1, 1)
        self.unused = nn.Linear(1, 1)  # never part of the loss

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net, "extra": nn.ModuleList([self.extra, self.unused])}

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.randint(ROWS, (BATCH - 1,), generator=generator)  # cannot be shared out evenly

    def loss_of(self, batch: StepBatch) -> Loss:
        self.seeds.append(torch.initial_seed())
        jitter = batch.own(torch.randn(batch.count, WIDTH, generator=batch.generator))
        logit = self.net(self.x[batch.rows] + 0.1 * jitter).squeeze(1)
        if self.lonely and batch.place.start == 0:
            logit = torch.cat([self.extra(logit[:1, None])[:, 0], logit[1:]])
        each = F.binary_cross_entropy_with_logits(logit, self.y[batch.rows], reduction="none")
        if not self.weighted:
            return each.mean()
        counted = batch.rows % 3 != 0
        return each[counted].mean(), counted.sum()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        logit = self.net(self.x).squeeze(1)
        # Best after some steps, then worse: early stopping has something to do.
        return {
            "good": -abs(float(logit.std()) - 2.0),
            "loss": float(F.binary_cross_entropy_with_logits(logit, self.y)),
        }

    def loop(self, out: Path, **changes: Any) -> TrainingLoop:
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        values: dict[str, Any] = {
            "modules": self.modules,
            "optimizer": torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
            "steps": 50,
            "seed": 7,
            "schedule": cosine_schedule(50, 5),
            "state": out / "state.safetensors",
            "save_every": 5,
            "evaluate_every": 4,
            "log_every": 1,
            "track": lambda step, loss, **_: self.losses.append(loss),
        }
        return TrainingLoop(**values | changes)

    def train(self, out: Path, patience: int | None = None, **changes: Any) -> LoopResult:
        loop = self.loop(out, **changes)
        how: dict[str, Any] = {"monitor": "good", "patience": patience, "backward": self.backward}
        return loop(self.loss_of, self.draw, self.evaluate, **how)

    def weights(self) -> dict[str, Tensor]:
        return {f"{name}.{k}": v for name, module in self.modules.items() for k, v in module.state_dict().items()}


class Contrast(Task):
    """Which of the batch's numbers belongs to which row: no row's loss can do without the other rows."""

    backward: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.net.register_parameter("scale", self.scale)

    def loss_of(self, batch: StepBatch) -> Loss:
        def embed(rows: Tensor) -> tuple[Tensor, Tensor]:
            x = self.x[rows]
            return F.normalize(self.net[:3](x), dim=1), F.normalize(self.net[:3](x.flip(1)), dim=1)

        def loss(one: Tensor, other: Tensor) -> Tensor:
            return clip_loss(one, other, self.scale.exp(), batch.gather(batch.rows))

        return cached_backward(embed, batch.rows.split(4), loss, batch.gather, batch.processes.count)


class Failing(Task):
    """Cannot be evaluated."""

    def evaluate(self) -> dict[str, float]:
        return {"good": 1 / 0}


def leave(out: Path, task: Task, result: LoopResult) -> None:
    """Write what a run came to."""
    save_state(out / "weights.safetensors", task.weights())
    write_json(out / "run.json", {**dataclasses.asdict(result), "losses": task.losses, "seeds": task.seeds})


# --- several processes -----------------------------------------------------------------------------------------------


def fork(work: Callable[[], None], **environment: str) -> int:
    """The id of a process that does ``work`` and ends, with 0 if it went well."""
    if child := os.fork():
        return child
    try:
        os.environ.update(environment)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def fork_together(count: int, work: Callable[[int], None]) -> list[int]:
    """As a launcher starts them on CPUs, each with its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true"}
    return [fork(partial(work, rank), RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(count)]


def ends(children: list[int]) -> list[int]:
    """Their exit codes; minus a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run(out: Path, rank: int, task: Task, **options: Any) -> None:
    """Rank 0 leaves its folder, the others one in it, to be compared."""
    result = task.train(out, **options)
    leave(out if rank == 0 else out / f"rank{rank}", task, result)


CASES: dict[str, tuple[Callable[[], Task], dict[str, Any]]] = {
    "plain": (Task, {}),
    "weighted": (partial(Task, weighted=True, lonely=True), {"patience": 3}),
    "micro": (partial(Task, weighted=True), {"micro_batch": 4}),
    "contrast": (Contrast, {}),
    "dropout": (partial(Task, dropout=0.5), {}),
}


def together(folder: Path) -> None:
    """All cases in one process and in two, whose main process fails in the end; then two that are killed and resumed."""

    def all_cases(rank: int, count: int) -> None:
        for name, (task, options) in CASES.items():
            run(folder / f"{name}{count}", rank, task(), **options)
        stage = Stage(f"tracked{count}", tracker="tensorboard")
        Task().train(stage.folder, track=stage.track, steps=4)
        if count > 1:
            try:
                Failing().train(folder / "failed")
            except Exception as error:
                (folder / f"failed{rank}.txt").write_text(f"{type(error).__name__}: {error}")

    def killed_at(step: int, rank: int) -> None:
        def kill(done: int) -> None:
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)

        task = Task(dropout=0.5)
        task.loop(folder / "killed")(task.loss_of, task.draw, task.evaluate, monitor="good", after_step=kill)

    codes = {
        "one": ends([fork(lambda: all_cases(0, 1))]),
        "two": ends(fork_together(2, lambda rank: all_cases(rank, 2))),
        "killed": ends(fork_together(2, lambda rank: killed_at(23, rank))),
        "resumed": ends(fork_together(2, lambda rank: run(folder / "killed", rank, Task(dropout=0.5)))),
    }
    write_json(folder / "codes.json", codes)


def killed(folder: Path) -> None:
    """A run killed ten times, each after a random part of the time that it takes; then once more, to its end."""
    options: dict[str, Any] = {"steps": 400, "save_every": 3}
    whole, often = folder / "whole", folder / "often"
    start = time.perf_counter()
    codes = {"whole": ends([fork(lambda: run(whole, 0, Task(dropout=0.5), **options))])}
    took = time.perf_counter() - start
    draws, reached = random.Random(0), []
    for _ in range(10):
        child = fork(lambda: run(often, 0, Task(dropout=0.5), **options))
        time.sleep(draws.uniform(0, took / 5))
        os.kill(child, signal.SIGKILL)
        ends([child])
        reached.append(steps_in(often / "state.safetensors"))
    codes["often"] = ends([fork(lambda: run(often, 0, Task(dropout=0.5), **options))])
    write_json(folder / "codes.json", codes | {"reached": reached})


def steps_in(path: Path) -> int:
    from safetensors import safe_open

    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def launched(folder: Path) -> None:
    """One run in the processes that a launcher has started."""
    run(folder, int(os.environ.get("RANK", "0")), Task())


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"together": together, "killed": killed, "launched": launched}[sys.argv[1]](Path(sys.argv[2]))
