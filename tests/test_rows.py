from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_artifacts.errors import GuardStateError, InputError
from moe_artifacts.guard.rows import LiveRows, conditioning_follows


class Denoiser(nn.Module):
    """Keeps what it was called with."""

    def forward(self, sample, timestep, encoder_hidden_states=None, timestep_cond=None):
        self.seen = {"encoder_hidden_states": encoder_hidden_states, "timestep_cond": timestep_cond}
        return sample


@given(st.integers(1, 9), st.lists(st.sets(st.integers(0, 8)), max_size=5))
def test_the_living_are_those_of_a_plain_list(size, kept):
    rows, expected = LiveRows(size), list(range(size))
    for some in kept:
        places = sorted(place for place in some if place < len(expected))
        rows.keep(torch.tensor(places, dtype=torch.int64))
        expected = [expected[place] for place in places]
    assert rows.alive.tolist() == expected
    assert len(rows) == len(expected)
    full = torch.arange(1.0, 2 * size + 1).unsqueeze(1)
    assert rows.take(full[:size]).flatten().tolist() == [i + 1 for i in expected]
    both = [i + 1 for i in expected] + [size + i + 1 for i in expected]
    assert rows.take(full, copies=2).flatten().tolist() == both
    padded = rows.pad(rows.take(full[:size])).flatten().tolist()
    assert padded == [i + 1 if i in expected else 0 for i in range(size)]


@pytest.mark.parametrize("places", [[1, 0], [0, 0], [2], [-1]])
def test_rows_out_of_order_or_out_of_range_are_refused(places):
    rows = LiveRows(4)
    rows.keep(torch.tensor([0, 3]))
    with pytest.raises(InputError, match="rising indices below 2"):
        rows.keep(torch.tensor(places))


def test_nothing_is_copied_while_all_rows_live():
    rows, batch = LiveRows(3), torch.zeros(3, 2)
    assert rows.pad(batch) is batch
    assert rows.take(batch) is batch


@pytest.mark.parametrize("copies", [1, 2])
def test_the_denoiser_gets_the_conditioning_of_the_living(copies):
    denoiser, rows = Denoiser(), LiveRows(4)
    embeds = torch.arange(4.0 * copies).view(-1, 1, 1)
    with conditioning_follows(rows, denoiser):
        denoiser(torch.zeros(4 * copies, 1), 0, encoder_hidden_states=embeds, timestep_cond=None)
        assert denoiser.seen["encoder_hidden_states"] is embeds
        rows.keep(torch.tensor([1, 3]))
        denoiser(torch.zeros(2 * copies, 1), 0, encoder_hidden_states=embeds, timestep_cond=None)
    assert denoiser.seen["encoder_hidden_states"].flatten().tolist() == [1, 3, 5, 7][: 2 * copies]
    assert denoiser.seen["timestep_cond"] is None


def test_the_hook_is_gone_afterwards_whatever_happened():
    denoiser, rows = Denoiser(), LiveRows(2)
    with pytest.raises(KeyboardInterrupt), conditioning_follows(rows, denoiser):
        raise KeyboardInterrupt
    assert not denoiser._forward_pre_hooks
    rows.keep(torch.tensor([0]))
    denoiser(torch.zeros(2, 1), 0, encoder_hidden_states=torch.zeros(2, 1, 1))
    assert len(denoiser.seen["encoder_hidden_states"]) == 2


@pytest.mark.parametrize(
    ("sample_rows", "embed_rows", "told"),
    [
        (3, 4, "got 3 rows while 2 of 4 images are alive"),
        (6, 4, "got 6 rows while 2 of 4"),
        (2, 2, "encoder_hidden_states with 2 rows, expected 4"),
        (4, 4, "encoder_hidden_states with 4 rows, expected 8"),
    ],
)
def test_a_batch_that_does_not_fit_is_an_error_not_a_broadcast(sample_rows, embed_rows, told):
    denoiser, rows = Denoiser(), LiveRows(4)
    rows.keep(torch.tensor([0, 2]))
    with conditioning_follows(rows, denoiser), pytest.raises(GuardStateError, match=told):
        denoiser(torch.zeros(sample_rows, 1), 0, encoder_hidden_states=torch.zeros(embed_rows, 1, 1))


def test_rows_of_a_real_unet_do_not_depend_on_their_neighbours():
    """What dropping rests on: the same row, in another batch, gives the same output."""
    unet = tiny.stable_diffusion().unet
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(4, 4, 8, 8, generator=generator)
    embeds = torch.randn(4, 8, 16, generator=generator)
    with torch.no_grad():
        full = unet(sample, 500, encoder_hidden_states=embeds).sample
        for keep in ([0, 2], [3]):
            part = unet(sample[keep], 500, encoder_hidden_states=embeds[keep]).sample
            torch.testing.assert_close(part, full[keep], atol=1e-5, rtol=0)  # other batch sizes sum in another order
