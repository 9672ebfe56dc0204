from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_artifacts.accumulator import exit_pdf
from moe_artifacts.errors import InputError
from moe_artifacts.exit_loss import economic_loss, palbert_loss
from moe_artifacts.scalar.exit import fit_exit


def some_steps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exit mass, posterior, label and share spent of six images at five checks, the last one at the end of the run."""
    generator = torch.Generator().manual_seed(3)
    mass = 0.8 * torch.rand(6, 5, generator=generator)
    prob = 0.02 + 0.96 * torch.rand(6, 5, generator=generator)
    bad = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 0.0])  # half of the raters saw artifacts in one
    return mass, prob, bad, torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0]).expand(6, -1)


# --- the economic loss -----------------------------------------------------------------------------------------------


def test_the_economic_loss_agrees_with_a_loop() -> None:
    mass, prob, bad, spent = some_steps()
    price, total = 1.3, 0.0
    for masses, probs, y, shares in zip(mass.tolist(), prob.tolist(), bad.tolist(), spent.tolist(), strict=True):
        for pdf, a, share in zip(reference.exit_pdf(masses), probs, shares, strict=True):
            if share < 1:
                total -= pdf * a * (1 - share - price * (1 - y)) / len(mass)
    assert economic_loss(mass, prob, bad, spent, price).item() == pytest.approx(total, abs=1e-6)


def economic_loss_of_exit_at(step: int | None, bad: float) -> float:
    """One image that is all but surely decided at one of four steps; None: never."""
    mass = torch.zeros(1, 4)
    if step is not None:
        mass[0, step] = 20.0
    return economic_loss(
        mass, torch.full((1, 4), 0.8), torch.tensor([bad]), torch.tensor([[0.25, 0.5, 0.75, 1.0]]), 1.3
    ).item()


def test_an_earlier_decision_on_a_bad_image_lowers_the_loss_more() -> None:
    losses = [economic_loss_of_exit_at(step, bad=1.0) for step in (0, 1, 2)]
    assert losses == pytest.approx([-0.8 * 0.75, -0.8 * 0.5, -0.8 * 0.25])


def test_a_decision_on_a_clean_image_raises_the_loss() -> None:
    # What is lost is the clean image's price; the calls that were not made come off it.
    losses = [economic_loss_of_exit_at(step, bad=0.0) for step in (0, 1, 2)]
    assert losses == pytest.approx([0.8 * (1.3 - 0.75), 0.8 * (1.3 - 0.5), 0.8 * (1.3 - 0.25)])


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_no_decision_and_one_at_the_last_step_change_nothing(bad: float) -> None:
    assert economic_loss_of_exit_at(None, bad) == economic_loss_of_exit_at(3, bad) == 0


def test_the_economic_loss_leaves_the_posterior_alone() -> None:
    mass, prob, bad, spent = some_steps()
    mass.requires_grad_(), prob.requires_grad_()
    economic_loss(mass, prob, bad, spent, 1.3).backward()
    assert prob.grad is None
    assert mass.grad is not None and mass.grad[:, -1].abs().max() == 0
    # At the last check that can still save a call: on a clean image less mass is less loss, on a bad one more mass is.
    assert (mass.grad[bad == 0][:, 3] > 0).all() and (mass.grad[bad == 1][:, 3] < 0).all()


# --- PALBERT's loss --------------------------------------------------------------------------------------------------


def forced_pdf(masses: list[float]) -> list[float]:
    pdf = reference.exit_pdf(masses)
    return [*pdf[:-1], 1 - sum(pdf[:-1])]


def test_palberts_loss_agrees_with_a_loop() -> None:
    mass, prob, bad, _ = some_steps()
    prior = 0.3 * torch.rand(6, 5)
    total = 0.0
    for i in range(len(mass)):
        y, p, q = bad[i].item(), forced_pdf(mass[i].tolist()), forced_pdf(prior[i].tolist())
        total += sum(-p[t] * (y * math.log(a) + (1 - y) * math.log(1 - a)) for t, a in enumerate(prob[i].tolist()))
        total += 0.7 * sum(p[t] * math.log(p[t] / q[t]) for t in range(5))
    assert palbert_loss(mass, prob, bad, prior, 0.7).item() == pytest.approx(
        total / len(mass), abs=1e-5
    )  # a log of 1e-8


@given(st.lists(st.floats(0, 15, width=32), min_size=1, max_size=12))
def test_the_exits_of_palberts_loss_are_one_distribution(masses: list[float]) -> None:
    mass = torch.tensor([masses])
    # With the same cross entropy at every step, the weighted sum is that entropy.
    loss = palbert_loss(mass, torch.full_like(mass, 0.5), torch.tensor([1.0]), mass, beta=0.0)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


def test_the_pull_to_the_prior_is_zero_at_the_prior_and_positive_elsewhere() -> None:
    mass, prob, bad, _ = some_steps()
    free = palbert_loss(mass, prob, bad, mass, 0.0).item()
    assert palbert_loss(mass, prob, bad, mass, 100.0).item() == pytest.approx(free, abs=1e-5)
    for prior in (0.5 * mass, 2 * mass, torch.full_like(mass, 0.3)):
        assert palbert_loss(mass, prob, bad, prior, 1.0).item() > free + 1e-3


# --- an exit head for scalar scores ----------------------------------------------------------------------------------

SPENT = np.array([0.1, 0.3, 0.6, 0.9])


def two_kinds(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Posteriors [image step] and labels: bad images show from the second step on."""
    rng = np.random.default_rng(0)
    bad = (np.arange(count) % 3 == 0).astype(float)
    logit = rng.normal(size=(count, 4)) * 0.3 - 1
    logit[bad == 1, 1:] += 4
    return 1 / (1 + np.exp(-logit)), bad


@pytest.fixture(scope="module")
def economic():
    prob, bad = two_kinds()
    return fit_exit(prob, SPENT, SPENT, bad, steps=100, batch=128)


def test_the_economic_head_decides_on_bad_images_once_they_show_and_not_on_clean_ones(economic) -> None:
    prob, bad = two_kinds()
    mass = economic.mass(prob, SPENT)
    assert mass.dtype == np.float32 and mass.min() >= 0
    pdf = exit_pdf(torch.from_numpy(mass)).numpy()
    assert (pdf[bad == 1, 1] > 0.5).mean() > 0.9  # the first step at which they show
    assert (pdf[bad == 0].sum(axis=1) < 0.2).mean() > 0.9


def test_the_mass_of_a_step_does_not_depend_on_later_steps_or_other_images(economic) -> None:
    prob, _ = two_kinds()
    whole = economic.mass(prob, SPENT)
    for t in range(1, 5):
        so_far = economic.mass(prob[:3, :t], SPENT[:t])
        np.testing.assert_allclose(so_far, whole[:3, :t], atol=1e-5, rtol=1e-5)  # matmul order changes with the batch


def test_the_same_seed_gives_the_same_head_and_the_random_numbers_of_the_caller_stay() -> None:
    prob, bad = two_kinds(60)
    before = torch.get_rng_state()
    first, again, other = (
        fit_exit(prob, SPENT, SPENT, bad, steps=3, seed=seed).mass(prob, SPENT) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_head_pulled_hard_to_the_prior_keeps_its_rate() -> None:
    prob, bad = two_kinds()
    mass = fit_exit(prob, SPENT, SPENT, bad, loss="palbert", beta=100.0, steps=60).mass(prob, SPENT)
    strides = np.diff(SPENT, prepend=0)
    # The last step takes what is left whatever its mass: nothing pulls there.
    np.testing.assert_allclose((mass / strides)[:, :-1], 2.1, atol=0.3)


def test_a_higher_price_of_a_clean_image_decides_less() -> None:
    prob, bad = two_kinds()
    prob = 0.5 + (prob - 0.5) / 3  # doubtful throughout
    low, high = (
        fit_exit(prob, SPENT, SPENT, bad, price=price, steps=60).mass(prob, SPENT)[bad == 0].sum()
        for price in (0.3, 30.0)
    )
    assert high < low / 2


def test_an_exit_head_survives_its_state_dict(economic) -> None:
    from moe_artifacts.scalar.exit import ScalarExit

    prob, _ = two_kinds(9)
    again = ScalarExit()
    again.load_state_dict(economic.state_dict())
    assert np.array_equal(again.mass(prob, SPENT), economic.mass(prob, SPENT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prob": np.full((4, 4), math.nan)}, "without NaN"),
        ({"prob": np.full((4, 4), 1.5)}, r"in \[0, 1\]"),
        ({"progress": SPENT[::-1]}, "rising"),
        ({"progress": SPENT[:2]}, "one per step"),
        ({"spent": SPENT * 2}, r"\(0, 1\]"),
        ({"label": np.array([0.0, 1.0, 2.0, 0.0])}, r"label must be 4 numbers in \[0, 1\]"),
        ({"label": np.zeros(4)}, "both classes"),
        ({"label": np.ones(4)}, "both classes"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(changes, message) -> None:
    values = {"prob": np.full((4, 4), 0.5), "progress": SPENT, "spent": SPENT, "label": np.array([0.0, 1, 0, 1])}
    with pytest.raises(InputError, match=message):
        fit_exit(**{**values, **changes}, steps=1)
