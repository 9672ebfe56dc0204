from __future__ import annotations

import dataclasses
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_artifacts.accumulator import FIRST_RATE, Accumulated, Accumulator, ExitHead, accumulate, exit_pdf, step_mass
from moe_artifacts.config import ExitHeadConfig
from moe_artifacts.decision import abort_step
from moe_artifacts.errors import InputError

masses = st.lists(st.floats(0, 15, width=32), min_size=1, max_size=60)
paths = st.lists(st.tuples(st.floats(0, 1, width=32), st.floats(0, 15, width=32)), min_size=1, max_size=60)


def stacked(steps: list[Accumulated]) -> Accumulated:
    fields = [f.name for f in dataclasses.fields(Accumulated)]
    return Accumulated(**{name: torch.stack([getattr(s, name) for s in steps], dim=-1) for name in fields})


@given(masses)
def test_agrees_with_the_loop(m: list[float]) -> None:
    fast = exit_pdf(torch.tensor([m]))[0].tolist()
    assert fast == pytest.approx(reference.exit_pdf(m), abs=1e-5)  # 60 float32 additions
    assert sum(fast) == pytest.approx(1 - math.exp(-sum(m)), abs=1e-5)


@given(masses, st.integers(0, 59))
def test_abort_is_the_first_step_to_reach_the_threshold(m: list[float], i: int) -> None:
    cumulative = exit_pdf(torch.tensor([m])).cumsum(dim=-1)
    threshold = cumulative[0, i % len(m)].item()  # met exactly, where >= and > differ
    assert abort_step(cumulative, threshold).item() == cumulative[0].tolist().index(threshold)
    assert abort_step(cumulative, 1.1).item() == len(m)  # never reached


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_tiny_masses_and_finite_gradients(dtype: torch.dtype) -> None:
    m = torch.tensor([[6e-8, 30.0, 6e4]], dtype=dtype, requires_grad=True)
    pdf = exit_pdf(m)
    pdf[0, 0].backward()
    assert pdf[0, 0].item() == pytest.approx(m[0, 0].item(), rel=1e-4, abs=0)  # abs=0: the default hides 1e-8
    assert m.grad is not None and m.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_sums_have_finite_gradients_at_the_extremes(dtype: torch.dtype) -> None:
    prob = torch.tensor([[0.0, 1.0, 6e-8, 0.5]], dtype=dtype, requires_grad=True)
    mass = torch.tensor([[0.0, 6e-8, 6e4, 6e4]], dtype=dtype, requires_grad=True)
    acc = accumulate(prob, mass)
    (acc.cumulative_artifact_prob - acc.cumulative_clean_prob + acc.exit_cdf).sum().backward()
    for t in (prob, mass):
        assert t.grad is not None and t.grad.isfinite().all() and t.grad.any()


@given(paths)
def test_the_sums_agree_with_the_loop(path: list[tuple[float, float]]) -> None:
    prob, mass = map(list, zip(*path, strict=True))
    acc = accumulate(torch.tensor([prob]), torch.tensor([mass]))
    cdf, artifact, clean = reference.accumulate(prob, mass)
    assert acc.exit_cdf[0].tolist() == pytest.approx(cdf, abs=1e-5)  # 60 float32 additions, here and below
    assert acc.cumulative_artifact_prob[0].tolist() == pytest.approx(artifact, abs=1e-5)
    assert acc.cumulative_clean_prob[0].tolist() == pytest.approx(clean, abs=1e-5)
    assert acc.exit_prob[0].tolist() == pytest.approx([1 - math.exp(-m) for m in mass], abs=1e-6)


@given(paths)
def test_what_is_decided_and_undecided_adds_up_and_never_falls(path: list[tuple[float, float]]) -> None:
    prob, mass = map(list, zip(*path, strict=True))
    acc = accumulate(torch.tensor([prob]), torch.tensor([mass]))
    total = acc.cumulative_artifact_prob + acc.cumulative_clean_prob + (1 - acc.exit_cdf)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    for sums in (acc.exit_cdf, acc.cumulative_artifact_prob, acc.cumulative_clean_prob):
        assert (sums.diff(dim=-1) >= 0).all()
        assert (sums <= 1 + 1e-5).all()


@given(st.integers(0, 1_000), st.integers(1, 6), st.integers(1, 20))
def test_streaming_equals_the_whole_while_rows_leave(seed: int, batch: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(batch, steps, generator=generator)
    mass = 3 * torch.rand(batch, steps, generator=generator)
    whole, stream = accumulate(prob, mass), Accumulator(batch)
    alive = torch.arange(batch)
    for t in range(steps):
        now = stream.step(prob[alive, t], mass[alive, t])
        for f in dataclasses.fields(now):
            # float32 additions in another order
            torch.testing.assert_close(getattr(now, f.name), getattr(whole, f.name)[alive, t], atol=2e-6, rtol=0)
        rows = (torch.rand(len(alive), generator=generator) < 0.8).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]  # keep() gives the new order
        stream.keep(rows)
        alive = alive[rows]


def test_scoring_every_second_step_describes_the_same_distribution() -> None:
    progress, rate = torch.linspace(0, 1, 21)[1:], 2.1

    def cdf_at_the_end(progress: Tensor) -> float:
        previous = torch.cat([torch.zeros(1), progress[:-1]])
        mass = step_mass(torch.full_like(progress, rate), progress, previous)
        return accumulate(torch.full((1, len(mass)), 0.3), mass[None]).exit_cdf[0, -1].item()

    assert cdf_at_the_end(progress) == pytest.approx(1 - math.exp(-rate), abs=1e-6)
    assert cdf_at_the_end(progress[1::2]) == pytest.approx(cdf_at_the_end(progress), abs=1e-6)


def test_going_back_in_noise_level_adds_no_mass() -> None:
    mass = step_mass(torch.tensor([2.0, 2.0, 2.0]), torch.tensor([0.5, 0.4, 0.4]), torch.tensor([0.25, 0.5, 0.4]))
    assert mass.tolist() == [0.5, 0.0, 0.0]


def test_a_nan_stays_in_its_row() -> None:
    stream = Accumulator(2)
    stream.step(torch.tensor([0.5, torch.nan]), torch.ones(2))
    after = stream.step(torch.tensor([0.5, 0.5]), torch.ones(2))
    assert after.cumulative_artifact_prob.isnan().tolist() == [False, True]
    assert after.cumulative_clean_prob.isnan().tolist() == [False, True]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="exit_mass needs at least one step"):
        exit_pdf(torch.zeros(2, 0))
    with pytest.raises(InputError, match="must have one shape"):
        accumulate(torch.zeros(2, 3), torch.zeros(2, 4))
    stream = Accumulator(2)
    with pytest.raises(InputError, match=r"artifact_prob must have shape \(2,\).*got \(3,\); call keep"):
        stream.step(torch.zeros(3), torch.zeros(3))


class TestExitHead:
    head = ExitHead(ExitHeadConfig(state_dim=5, hidden_dim=7))

    @pytest.mark.parametrize("lead", [(), (4,), (4, 3), (0,)])
    def test_gives_one_rate_per_state(self, lead: tuple[int, ...]) -> None:
        rate = self.head(torch.randn(*lead, 5), torch.randn(*lead, 5))
        assert rate.shape == lead
        assert (rate >= 0).all()

    def test_starts_near_the_rate_of_the_prior(self) -> None:
        torch.manual_seed(0)
        rate = ExitHead(ExitHeadConfig(state_dim=64))(torch.randn(100, 64), torch.zeros(100, 64))
        assert rate.mean().item() == pytest.approx(FIRST_RATE, abs=0.3)  # its other weights start at random

    def test_sees_both_states(self) -> None:
        one, other = torch.ones(1, 5), torch.zeros(1, 5)
        assert self.head(one, other) != self.head(one, one) != self.head(other, one)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_is_finite_and_float32_at_the_extremes(self, dtype: torch.dtype) -> None:
        state = torch.tensor([[6e4] * 5, [-6e4] * 5, [0.0] * 5], dtype=dtype)
        rate = self.head(state, state)
        assert rate.dtype == torch.float32
        assert rate.isfinite().all() and (rate >= 0).all()

    def test_wrong_shapes_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"state must be 5 wide, got shape \(2, 4\)"):
            self.head(torch.zeros(2, 4), torch.zeros(2, 4))
