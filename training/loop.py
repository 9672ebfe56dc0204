"""The training loop: any loss on any data, in one process or several, interrupted and taken up again.

    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    state = folder / "head.state.safetensors"
    loop = TrainingLoop(modules={"head": head}, optimizer=optimizer, steps=800, seed=0, state=state)

    def draw(generator):  # the rows of a step, for all processes
        return torch.randint(len(data), (512,), generator=generator)

    def loss_of(batch):  # the mean over those of this process
        features, label = data.take(batch.rows)
        return loss(head(features.to(batch.device)), label.to(batch.device))

    result = loop(loss_of, draw, evaluate, monitor="auroc", patience=4)
    # head holds its best weights: save them, then loop.forget()

A single process trains where the modules are. Several are started by ``accelerate launch`` (GPUs, of one or many
machines) or by ``ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 -m ...`` (CPU, gloo). Every process
draws the same rows, takes its part of them, and goes the same step, down the gradient of all rows: a run depends on the
number of processes by rounding alone, and by dropout, which each draws for itself.

A step depends on the seed, its number and the weights, on nothing else. A run that was killed goes on from its last saved
state and ends with the same bits as if it had not been (with several processes, where the backend adds in one order).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_artifacts.errors import CheckpointError, ConfigError, InputError
from moe_artifacts.shapes import Rows
from training.processes import ProcessError, Processes
from training.state import load_state, read_kept, read_record, save_state, step_generator
from training.workspace import progress

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Tensor | tuple[Tensor, Tensor | float]  # a mean over rows, or over as much as the second number says
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StepBatch:
    """The rows of one step that a process takes at once."""

    step: int
    rows: Rows  # of those drawn for the step
    place: slice  # where among them
    count: int  # how many were drawn, for all processes
    generator: torch.Generator  # on the CPU, after ``draw``; in the same state for every part of the step
    processes: Processes

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def share(self) -> float:
        """Of the rows of the step."""
        return len(self.rows) / self.count

    def own(self, values: Tensor) -> Tensor:
        """This part of what was drawn for all rows of the step: ``batch.own(torch.randn(batch.count, generator=...))``."""
        return values[self.place]

    def gather(self, values: Tensor) -> Tensor:
        """Numbers of this part's rows to those of all rows of the step; the gradient flows back to its own.

        For losses that compare the rows of a batch with each other; not with micro-batches.
        """
        return self.processes.gather(values, self.place, self.count)


@dataclass(frozen=True)
class LoopResult:
    """How a run went; the same on every process."""

    steps: int  # done
    stopped_early: bool
    best_step: int | None  # steps done when the weights were best; None: no evaluation
    best: dict[str, float]  # what ``evaluate`` gave then
    history: list[dict[str, float]]  # what it gave each time, with the step


@dataclass(kw_only=True)
class TrainingLoop:
    """Steps of an optimizer on modules, from the last saved state on.

    Raises:
        ConfigError: If an option is out of range, or accelerate was launched for something that is not supported.
    """

    modules: dict[str, nn.Module]  # whose weights and buffers make up the state: trained ones, running averages
    optimizer: torch.optim.Optimizer  # its own state in tensors, as that of Adam and SGD
    steps: int
    seed: int
    name: str = "training"  # for the progress bar and errors
    schedule: Callable[[int], float] = lambda step: 1.0  # factor of the optimizer's learning rates, from step 0 on
    state: Path | None = None  # file to resume from, .safetensors, seen by every process; None: begin anew each time
    save_every: int = 100  # steps
    evaluate_every: int = 100
    log_every: int = 100
    clip_norm: float | None = 1.0  # longest gradient; None: any
    micro_batch: int | None = None  # rows of a process that go through at once; None: all of its share
    options: Mapping[str, Any] = field(default_factory=dict)  # of the run, as JSON: it is continued only with the same
    track: Callable[..., None] | None = None  # ``Stage.track``, or any ``track(step, **values)``; on the main process
    accelerator: Accelerator | None = None  # None: as launched; without a launcher one process, where the modules are

    def __post_init__(self) -> None:
        least = {"steps": 0, "save_every": 1, "evaluate_every": 1, "log_every": 1, "micro_batch": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"{name} must be at least {lowest}, got {value}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be above 0, or None, got {self.clip_norm}")
        if dotted := [name for name in self.modules if "." in name]:  # a dot ends the name in the state
            raise ConfigError(f"names of modules must not hold dots, got {', '.join(dotted)}")
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._processes = Processes(self._parameters[0].device, self.accelerator)
        for module in self.modules.values():
            module.to(self._processes.device)
        self._buffers = [buffer for module in self.modules.values() for buffer in module.buffers()]

    def __call__(
        self,
        loss_of: Callable[[StepBatch], Loss],
        draw: Callable[[torch.Generator], Rows],
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        *,
        monitor: str | None = None,
        patience: int | None = None,
        after_step: Callable[[int], None] | None = None,
        backward: bool = True,
    ) -> LoopResult:
        """Train to the end, and leave the best weights in the modules: by ``monitor``, or without it the last.

        Args:
            loss_of: The mean loss over ``batch.rows``; where it is a mean over something else (known labels, scored
                steps), the loss and how many there are: with 0 the loss is not looked at. Called in training mode.
            draw: The rows of one step, for all processes together, from the generator alone.
            evaluate: Figures of the modules as they are, in evaluation mode and without gradients; on the main process,
                every ``evaluate_every`` steps and after the last. The others wait, as long as accelerate's
                ``InitProcessGroupKwargs(timeout)`` says.
            monitor: The figure to be highest.
            patience: Evaluations in a row without a better figure after which training stops; None: never.
            after_step: Called after each step with the number of steps done, on every process: clamps, running averages.
            backward: False if ``loss_of`` adds the gradient of ``batch.share`` times its loss to ``.grad`` itself, as
                :func:`training.cached_contrastive.cached_backward` does.
        Raises:
            ConfigError: If the loss, a gradient or a weight is no longer finite: the last state stays. Or if the state is
                of a run with other options.
            CheckpointError: If the state is damaged, or of other modules.
            InputError: If the rows do not suffice for the processes, or ``monitor`` is no finite figure of ``evaluate``.
            ProcessError: If the main process failed and this is another, or they do not see the same state.
        """
        options = self._options(monitor)
        done, history, kept = self._resume(options)
        saved = done
        self._train_mode()
        main = self._processes.is_main
        with progress(self.steps, done, self.name) if main else nullcontext() as bar:
            while done < self.steps and not _out_of_patience(history, monitor, patience):
                loss = self._gradient(done, loss_of, draw, backward)
                norm = self._apply(done, loss, saved)
                done += 1
                if after_step is not None:
                    after_step(done)
                self._processes.take_from_main(self._buffers)
                if bar is not None:
                    bar.update()
                figures: dict[str, float] = {}
                if evaluate is not None and (done % self.evaluate_every == 0 or done == self.steps):
                    figures = self._evaluate(evaluate, monitor)
                    history.append({"step": done, **figures})
                    if main and monitor is not None and history[-1] is _best(history, monitor):
                        kept = self._weights()
                if self.track is not None and (figures or done % self.log_every == 0):
                    told = {f"validation_{name}": value for name, value in figures.items()}
                    self._processes.on_main(partial(self.track, done, loss=loss, gradient=norm, **told))
                ended = done == self.steps or _out_of_patience(history, monitor, patience)
                if self.state is not None and (done % self.save_every == 0 or ended):
                    self._save(self.state, done, kept, {"options": options, "history": history})
                    saved = done
        return self._result(done, history, kept, monitor)

    def forget(self) -> None:
        """Delete the saved state, once the result is stored."""
        if self.state is not None and self._processes.is_main:
            self.state.unlink(missing_ok=True)

    def _options(self, monitor: str | None) -> dict[str, Any]:
        """What the outcome depends on, as it is read back."""
        own = {
            "modules": sorted(self.modules),
            "optimizer": type(self.optimizer).__name__,
            "learning_rates": [float(rate) for rate in self._rates],
            "steps": self.steps,
            "seed": self.seed,
            "evaluate_every": self.evaluate_every,
            "monitor": monitor,
            "clip_norm": self.clip_norm,
        }
        return json.loads(json.dumps({**self.options, **own}))

    def _resume(self, options: dict[str, Any]) -> tuple[int, list[dict[str, float]], dict[str, Tensor]]:
        """Steps done, evaluations so far, and on the main process the best weights so far."""
        done, history, kept = 0, [], {}
        path, processes = self.state, self._processes
        if path is not None and path.exists():
            record = read_record(path)
            found = record.get("options", {})
            if different := sorted(k for k in {*options, *found} if options.get(k) != found.get(k)):
                raise ConfigError(
                    f"{path} holds a run that differs in {', '.join(different)}; use what it was started with, or "
                    "delete it to begin anew"
                )
            try:
                done = load_state(path, self.modules, self.optimizer)
            except (RuntimeError, ValueError, KeyError) as error:  # as PyTorch says it
                told = " ".join(str(error).split())  # in one line
                raise CheckpointError(f"{path} is the state of other modules or another optimizer: {told}") from error
            history = record["history"]
            kept = read_kept(path) if processes.is_main else {}
            log.info("%s: %d of %d steps were done", self.name, done, self.steps)
        if int(processes.total(torch.tensor([done]))) != done * processes.count:
            raise ProcessError(f"{path} is not the same file for every process: put it in a folder they share")
        processes.take_from_main(self._tensors())
        return done, history, kept

    def _gradient(
        self, step: int, loss_of: Callable[[StepBatch], Loss], draw: Callable[[torch.Generator], Rows], backward: bool
    ) -> float:
        """The loss over the rows of the step, of all processes; its gradient is in ``.grad``, on each of them."""
        processes = self._processes
        generator = step_generator(self.seed, step)
        dropout_seed = int(torch.randint(2**62, (), generator=generator))
        torch.manual_seed(dropout_seed + processes.index)  # global, on every device; each process drops others
        rows = draw(generator)
        if len(rows) < processes.count:
            raise InputError(f"draw must give a row for each of {processes.count} processes, got {len(rows)}")
        share = processes.share(len(rows))
        size = self.micro_batch or share.stop - share.start
        sums = torch.zeros(2, device=processes.device)  # of losses, each times its weight, and of weights
        self.optimizer.zero_grad()
        for start in range(share.start, share.stop, size):
            place = slice(start, min(start + size, share.stop))
            again = torch.Generator()
            again.set_state(generator.get_state())
            batch = StepBatch(step, rows[place], place, len(rows), again, processes)
            with processes.autocast():
                loss, weight = _with_weight(loss_of(batch), batch.share)
            if weight == 0:  # nothing in this part counts: the mean of nothing is NaN
                continue
            if backward:
                (loss * weight).backward()
            sums += torch.stack([loss.detach().to(sums) * weight, torch.tensor(weight).to(sums)])
        sums = processes.total(sums)
        processes.add_up_gradients(self._parameters)
        if backward and sums[1] != 1:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad /= sums[1]
        return (sums[0] / sums[1]).item()

    def _apply(self, step: int, loss: float, saved: int) -> float:
        """A step of the optimizer; the length of the gradient before it was clipped."""
        self._check_finite("loss", loss, step, saved)
        if all(parameter.grad is None for parameter in self._parameters):
            raise InputError("loss_of must depend on the parameters of the optimizer: none of them has a gradient")
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = nn.utils.clip_grad_norm_(self._parameters, limit).item()
        self._check_finite("gradient", norm, step, saved)
        factor = self.schedule(step)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        return norm

    def _check_finite(self, what: str, value: float, step: int, saved: int) -> None:
        if not math.isfinite(value):
            kept = f"; the state after step {saved} is in {self.state}" if self.state is not None and saved else ""
            raise ConfigError(
                f"{self.name}: the {what} became {value} at step {step}: lower its learning rate and begin anew{kept}"
            )

    def _evaluate(self, evaluate: Callable[[], Mapping[str, float]], monitor: str | None) -> dict[str, float]:
        @torch.no_grad()
        def measure() -> dict[str, float]:
            for module in self.modules.values():
                module.eval()
            figures = {name: float(value) for name, value in evaluate().items()}
            if monitor is not None and not math.isfinite(figures.get(monitor, math.nan)):
                raise InputError(f"{self.name}: evaluate must give a finite {monitor!r}, got {figures}")
            return figures

        figures = self._processes.on_main(measure)
        self._train_mode()
        return figures

    def _save(self, path: Path, done: int, kept: dict[str, Tensor], record: dict[str, Any]) -> None:
        def write() -> None:
            if not all(parameter.isfinite().all() for parameter in self._parameters):
                raise ConfigError(f"{self.name}: weights are not finite after step {done}: lower its learning rate")
            save_state(path, done, self.modules, self.optimizer, kept, record)

        self._processes.on_main(write)

    def _result(
        self, done: int, history: list[dict[str, float]], kept: dict[str, Tensor], monitor: str | None
    ) -> LoopResult:
        if monitor is None or not history:
            return LoopResult(done, done < self.steps, None, {}, history)
        for name, module in self.modules.items():
            if self._processes.is_main:
                prefix = f"{name}."
                module.load_state_dict({k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)})
        self._processes.take_from_main(self._tensors())
        best = dict(_best(history, monitor))
        return LoopResult(done, done < self.steps, int(best.pop("step")), best, history)

    def _train_mode(self) -> None:
        for module in self.modules.values():
            module.train()

    def _tensors(self) -> list[Tensor]:
        return [value for module in self.modules.values() for value in module.state_dict().values()]

    def _weights(self) -> dict[str, Tensor]:
        """A copy on the CPU."""
        modules = self.modules.items()
        return {f"{name}.{k}": v.cpu().clone() for name, module in modules for k, v in module.state_dict().items()}


def _with_weight(loss: Loss, share: float) -> tuple[Tensor, float]:
    return (loss[0], float(loss[1])) if isinstance(loss, tuple) else (loss, share)


def _best(history: list[dict[str, float]], monitor: str) -> dict[str, float]:
    return max(history, key=lambda figures: figures[monitor])  # the first of equal ones


def _out_of_patience(history: list[dict[str, float]], monitor: str | None, patience: int | None) -> bool:
    if monitor is None or patience is None or not history:
        return False
    return len(history) - 1 - history.index(_best(history, monitor)) >= patience


def cosine_schedule(steps: int, warmup: int) -> Callable[[int], float]:
    """A linear rise over ``warmup`` steps, under half a cosine down to nothing at the end."""
    return lambda step: min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def linear_schedule(steps: int, warmup: int) -> Callable[[int], float]:
    """A linear rise over ``warmup`` steps, under a straight line down to nothing at the end."""
    return lambda step: min(1.0, (step + 1) / max(1, warmup)) * (1 - step / steps)
