"""The auxiliary target against plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.margins import margin_loss, margin_scale

numbers = st.floats(-50, 50, width=32)


@given(st.lists(st.tuples(numbers, st.none() | numbers), min_size=1, max_size=20), st.floats(0.1, 10))
def test_the_loss_is_the_mean_of_smooth_distances_to_what_is_known(rows, scale):
    expected = []
    for said, margin in rows:
        target = None if margin is None else min(max(margin / scale, -4), 4)
        distance = 0.0 if target is None else abs(said - target)
        expected.append(distance**2 / 2 if distance < 1 else distance - 0.5)
    said = torch.tensor([row[0] for row in rows], requires_grad=True)
    margin = torch.tensor([math.nan if row[1] is None else row[1] for row in rows])
    loss = margin_loss(said, margin, scale)
    assert loss.item() == pytest.approx(float(np.mean(expected)), rel=1e-4, abs=1e-5)
    loss.backward()
    assert (said.grad[margin.isnan()] == 0).all() and said.grad.isfinite().all()


def test_the_scale_is_a_standard_deviation_whatever_the_tails_and_the_unit():
    margin = torch.randn(20_000)
    margin[:200] = 1e6
    margin[200:400] = math.nan
    assert margin_scale(margin) == pytest.approx(1, abs=0.03)
    assert margin_scale(1000 * margin) == pytest.approx(1000, rel=0.03)


@pytest.mark.parametrize(("margin", "scale"), [([], 1), ([3.0], 1), ([math.nan, 2.0], 1), ([2.0, 2.0], 1e-6)])
def test_too_few_or_equal_margins_have_a_scale_too(margin, scale):
    assert margin_scale(torch.tensor(margin)) == scale
