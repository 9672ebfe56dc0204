from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.errors import InputError
from moe_artifacts.guard.rows import LiveRows

drops = st.lists(st.sets(st.integers(0, 8)), max_size=5)


@given(st.integers(1, 9), drops)
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


@given(st.integers(1, 9), drops, st.sets(st.integers(1, 9)).map(tuple))
def test_the_running_batch_is_the_smallest_allowed_that_holds_the_living(size, kept, sizes):
    rows = LiveRows(size, sizes)
    for some in kept:
        before = len(rows)
        rows.keep(torch.tensor(sorted(place for place in some if place < len(rows.alive)), dtype=torch.int64))
        living, running = rows.alive.tolist(), rows.running.tolist()
        assert set(living) <= set(running)
        assert running == sorted(running)
        fitting = [s for s in sizes if len(living) <= s < before]
        assert len(running) == (min(fitting, default=before) if living else 0)
    rows.drop_passengers()
    assert torch.equal(rows.running, rows.alive)


@given(st.integers(1, 9), drops)
def test_without_sizes_the_batch_stays_until_the_last_step(size, kept):
    rows = LiveRows(size, sizes=())
    for some in kept:
        rows.keep(torch.tensor(sorted(place for place in some if place < len(rows.alive)), dtype=torch.int64))
        assert len(rows) == (size if len(rows.alive) else 0)
    batch = torch.arange(1.0, size + 1)
    if len(rows.alive):
        assert rows.pad(batch) is batch
    rows.drop_passengers()
    assert rows.take(batch).tolist() == (rows.alive + 1).tolist()


def test_a_loop_that_keeps_its_batch_holds_all_rows_until_the_last_step():
    rows, batch = LiveRows(4, loop_keeps_all=True), torch.arange(4.0)
    rows.keep(torch.tensor([1, 3]))
    assert rows.running.tolist() == [1, 3]
    assert rows.held.tolist() == [0, 1, 2, 3]
    assert rows.take(batch) is batch
    assert rows.pad(batch) is batch
    assert rows.places(rows.alive).tolist() == [1, 3]
    rows.drop_passengers()
    assert rows.take(batch).tolist() == [1, 3]
    assert rows.places(rows.alive).tolist() == [0, 1]


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
