from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import training.state
from training.state import load_state, save_state, step_generator
from training.wise_ft import interpolate
from training.workspace import Stage, work_folder

Modules = dict[str, nn.Module]


# --- resumable state -------------------------------------------------------------------------------------------------


def build(width: int = 3) -> tuple[Modules, torch.optim.AdamW]:
    """A model and its running average, as the generator stage has them."""
    torch.manual_seed(1)
    net = nn.Linear(4, width)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    return {"net": net, "ema": ema}, torch.optim.AdamW(net.parameters(), lr=0.1)


def train(modules: Modules, optimizer: torch.optim.Optimizer, steps: range) -> None:
    net, ema = modules["net"], modules["ema"]
    assert isinstance(ema, AveragedModel)
    for step in steps:
        x = torch.randn(8, 4, generator=step_generator(5, step))
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        loss = (net(x) - x[:, :3].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(net)


def everything(modules: Modules, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    weights = {f"{name}.{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    moments = optimizer.state_dict()["state"]
    return weights | {f"{i}.{k}": torch.as_tensor(v) for i, values in moments.items() for k, v in values.items()}


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, whole_optimizer = build()
    train(whole, whole_optimizer, range(6))

    killed, killed_optimizer = build()
    train(killed, killed_optimizer, range(3))
    save_state(tmp_path / "state.safetensors", 3, killed, killed_optimizer)
    resumed, resumed_optimizer = build()
    assert load_state(tmp_path / "state.safetensors", resumed, resumed_optimizer) == 3
    train(resumed, resumed_optimizer, range(3, 6))

    expected, found = everything(whole, whole_optimizer), everything(resumed, resumed_optimizer)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert not torch.equal(expected["net.weight"], everything(*build())["net.weight"])  # and something was trained


def test_without_a_file_training_starts_at_the_beginning(tmp_path: Path) -> None:
    modules, optimizer = build()
    before = everything(*build())
    assert load_state(tmp_path / "state.safetensors", modules, optimizer) == 0
    assert all(torch.equal(value, before[key]) for key, value in everything(modules, optimizer).items())


def test_a_kill_while_saving_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    modules, optimizer = build()
    train(modules, optimizer, range(1))
    save_state(path, 1, modules, optimizer)
    before = path.read_bytes()

    def killed_half_way(tensors: object, target: Path, metadata: object) -> None:
        target.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(training.state, "save_file", killed_half_way)
    train(modules, optimizer, range(1, 2))
    with pytest.raises(KeyboardInterrupt):
        save_state(path, 2, modules, optimizer)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert load_state(path, *build()) == 1


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    modules, optimizer = build()
    train(modules, optimizer, range(1))
    save_state(tmp_path / "state.safetensors", 1, modules, optimizer)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_state(tmp_path / "state.safetensors", *build(width=2))


def test_each_seed_and_step_has_its_own_random_numbers() -> None:
    def draw(seed: int, step: int) -> tuple[float, ...]:
        return tuple(torch.rand(2, generator=step_generator(seed, step)).tolist())

    draws = [draw(seed, step) for seed in (0, 1, 2, 50) for step in range(50)]
    assert len(set(draws)) == len(draws)
    torch.rand(1)  # the global generator has no part in it
    assert draw(50, 49) == draws[-1]


# --- weights between two models --------------------------------------------------------------------------------------


def two_models(dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    first, second = (
        {"w": (scale * torch.randn(500)).to(dtype), "count": torch.tensor([count])}
        for scale, count in ((1e3, 1), (1e-3, 2))
    )
    return first, second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mix", [0, 1])
def test_the_ends_are_the_parents_to_the_bit(dtype: torch.dtype, mix: int) -> None:
    parents = two_models(dtype)
    most = torch.finfo(dtype).max  # differences of these are infinite, and 0 * infinity is NaN
    for parent, sign in zip(parents, (1, -1), strict=True):
        parent["w"][:3] = torch.tensor([-0.0, sign * most, -sign * most])
    mixed = interpolate(*parents, mix)
    for key, value in parents[mix].items():
        assert mixed[key].dtype == value.dtype
        assert torch.equal(mixed[key].view(torch.uint8), value.view(torch.uint8))  # -0.0 stays -0.0
        assert mixed[key].data_ptr() != value.data_ptr()  # training on must not change the parent


def test_the_middle_is_the_mean_and_counters_come_from_the_finetuned() -> None:
    first, second = two_models()
    mixed = interpolate(first, second, 0.5)
    torch.testing.assert_close(mixed["w"], (first["w"] + second["w"]) / 2, rtol=1e-6, atol=0)  # float32
    assert mixed["count"].tolist() == [2]


@given(st.floats(0, 1), st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32))
def test_every_mix_is_the_weighted_mean(mix: float, a: float, b: float) -> None:
    mixed = interpolate({"w": torch.tensor([a])}, {"w": torch.tensor([b])}, mix)["w"].item()
    assert mixed == pytest.approx((1 - mix) * a + mix * b, abs=4e-4)  # float32: up to 2000 * 2^-23, a few times


def test_16_bit_weights_are_mixed_in_float32() -> None:
    first, second = ({"w": torch.tensor([value], dtype=torch.float16)} for value in (60_000.0, -60_000.0))
    assert interpolate(first, second, 0.5)["w"].tolist() == [0.0]  # their difference is beyond float16


def test_models_that_do_not_belong_together_are_refused() -> None:
    one, two = {"a": torch.zeros(2), "b": torch.zeros(2)}, {"a": torch.zeros(2), "c": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"differ in keys: \['b', 'c'\] \(2 in all\)"):
        interpolate(one, two, 0.5)
    with pytest.raises(ValueError, match=r"a has the shapes \(2,\) and \(1,\)"):  # which would be broadcast
        interpolate({"a": torch.zeros(2)}, {"a": torch.zeros(1)}, 0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_weights_that_are_not_finite_are_refused(value: float, mix: float) -> None:
    good, bad = {"a": torch.zeros(2)}, {"a": torch.tensor([0.0, value])}
    for parents in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="a holds NaN or infinity"):
            interpolate(*parents, mix)


@pytest.mark.parametrize("mix", [-0.01, 1.01, float("nan")])
def test_a_mix_beyond_the_ends_is_refused(mix: float) -> None:
    with pytest.raises(ValueError, match=r"mix must be in \[0, 1\]"):
        interpolate({}, {}, mix)


# --- work folder and log ---------------------------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setenv("MOE_ARTIFACTS_WORK", str(tmp_path / "work"))
    stage = Stage("tested", tracker="none")
    yield stage
    for handler in list(stage.log.handlers):
        stage.log.removeHandler(handler)
        handler.close()
    stage.log.propagate = True  # pytest hangs a handler of its own on loggers that keep to themselves


def test_the_work_folder_is_the_one_asked_for(stage: Stage, tmp_path: Path) -> None:
    assert work_folder() == tmp_path / "work"
    assert stage.folder == tmp_path / "work" / "tested" and stage.folder.is_dir()


def test_tracked_numbers_are_in_the_log_once(stage: Stage) -> None:
    Stage("tested", tracker="none").track(7, loss=0.123456789)  # a second stage of the name shares the log
    assert logging.getLogger("training.tested").level == logging.INFO
    lines = (stage.folder / "log.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].endswith("step 7  loss 0.12346")
