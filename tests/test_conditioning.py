from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_artifacts.errors import GuardStateError, UnsupportedPipelineError
from moe_artifacts.guard.conditioning import conditioning_follows
from moe_artifacts.guard.pipelines import PipelineSpec
from moe_artifacts.guard.rows import LiveRows

SPEC = PipelineSpec(
    batched=frozenset({"encoder_hidden_states", "cond.embeds", "residuals", "captions"}),
    listed=frozenset({"captions"}),
    shared=frozenset({"timestep", "ids"}),
)
# Of a loop that keeps its batch: here the latents and the timestep count it too.
KEEPING = PipelineSpec(
    batched=SPEC.batched | {"sample", "timestep"}, listed=SPEC.listed, shared=frozenset({"ids"}), keeps_batch=True
)


class Denoiser(nn.Module):
    """Keeps what it was called with, and how."""

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states=None,
        cond=None,
        residuals=None,
        captions=None,
        ids=None,
        scale=1.0,
    ):
        self.seen = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            "cond": cond,
            "residuals": residuals,
            "captions": captions,
            "ids": ids,
            "scale": scale,
        }
        return (sample,)


def rows_of(size, *kept, keeps_all=False):
    rows = LiveRows(size, loop_keeps_all=keeps_all)
    for places in kept:
        rows.keep(torch.tensor(places))
    return rows


def numbered(count, *shape):
    """Row i holds the number i."""
    return torch.arange(float(count)).view(-1, *[1] * len(shape)).expand(-1, *shape).clone()


@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.lists(st.sets(st.integers(0, 5)), max_size=3),
    st.sampled_from([None, (), (4, 2, 1)]),
)
def test_every_copy_of_a_batch_is_cut_to_the_running_rows(size, copies, kept, sizes):
    rows = LiveRows(size, sizes)
    for some in kept:
        rows.keep(torch.tensor(sorted(place for place in some if place < len(rows.alive)), dtype=torch.int64))
    if not len(rows):
        return  # the run has ended
    running = rows.running.tolist()
    denoiser = Denoiser()
    with conditioning_follows(rows, [denoiser], SPEC):
        denoiser(numbered(copies * len(running), 1), 0, encoder_hidden_states=numbered(copies * size, 2, 3))
    expected = [copy * size + place for copy in range(copies) for place in running]
    assert denoiser.seen["encoder_hidden_states"][:, 1, 2].tolist() == expected


def test_members_of_dicts_tensors_in_lists_and_lists_over_images_are_cut():
    denoiser, rows = Denoiser(), rows_of(4, [1, 3])
    captions = [f"tokens {i}" for i in range(8)]
    ids, given_cond = numbered(7), {"embeds": numbered(8), "scale": 0.5}
    with conditioning_follows(rows, [denoiser], SPEC):
        denoiser(
            numbered(4),
            torch.tensor(500),
            cond=given_cond,
            residuals=[numbered(8, 2), [numbered(8, 1)]],
            captions=captions,
            ids=ids,
            scale=2,
        )
    seen = denoiser.seen
    assert seen["cond"]["embeds"].tolist() == [1, 3, 5, 7]
    assert seen["cond"]["scale"] == 0.5
    assert given_cond["embeds"].tolist() == list(range(8)), "the loop's own dict is as it was"
    assert seen["residuals"][0][:, 0].tolist() == [1, 3, 5, 7]
    assert seen["residuals"][1][0][:, 0].tolist() == [1, 3, 5, 7]
    assert seen["captions"] == [captions[i] for i in (1, 3, 5, 7)]
    assert seen["ids"] is ids
    assert seen["timestep"] == 500
    assert seen["scale"] == 2


def test_positional_arguments_are_known_by_their_place_and_stay_positional():
    denoiser, rows = Denoiser(), rows_of(4, [2])
    hook = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((len(args), list(kwargs))), with_kwargs=True
    )
    calls = []
    with hook, conditioning_follows(rows, [denoiser], SPEC):
        denoiser(numbered(1), 0, numbered(4), cond=None, scale=3.0)
    assert denoiser.seen["encoder_hidden_states"].tolist() == [2]
    assert calls == [(3, ["cond", "scale"])]


def test_nothing_is_copied_while_all_rows_run():
    denoiser, rows, embeds = Denoiser(), LiveRows(4), numbered(4)
    with conditioning_follows(rows, [denoiser], SPEC):
        for _ in range(2):
            denoiser(numbered(4), 0, encoder_hidden_states=embeds)
            assert denoiser.seen["encoder_hidden_states"] is embeds


def test_a_loop_that_keeps_its_batch_gets_outputs_of_its_size_computed_from_the_running_rows():
    denoiser, rows = Denoiser(), rows_of(4, [0, 2], keeps_all=True)
    with conditioning_follows(rows, [denoiser], KEEPING):
        (output,) = denoiser(numbered(8, 2) + 1, numbered(8), encoder_hidden_states=numbered(8))
    assert denoiser.seen["sample"][:, 0].tolist() == [1, 3, 5, 7]
    assert denoiser.seen["timestep"].tolist() == [0, 2, 4, 6]
    assert denoiser.seen["encoder_hidden_states"].tolist() == [0, 2, 4, 6]
    assert output[:, 1].tolist() == [1, 0, 3, 0, 5, 0, 7, 0]


@pytest.mark.parametrize("pack", ["tensor", "list of images", "output class", "tuple of tensors"])
def test_outputs_are_filled_up_in_whatever_they_are_packed(pack):
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    class Packing(Denoiser):
        def forward(self, sample, timestep):
            if pack == "list of images":
                return (list(sample),)
            if pack == "output class":
                return Transformer2DModelOutput(sample=sample)
            return sample if pack == "tensor" else (sample, [sample, sample])

    spec = (
        KEEPING
        if pack == "list of images"
        else PipelineSpec(batched=KEEPING.batched, shared=frozenset(), keeps_batch=True)
    )
    denoiser, rows = Packing(), rows_of(3, [1], keeps_all=True)
    with conditioning_follows(rows, [denoiser], spec):
        output = denoiser(numbered(3, 2) + 1, 0)
    parts = {
        "tensor": lambda: [output],
        "list of images": lambda: [torch.stack(output[0])],
        "output class": lambda: [output.sample],
        "tuple of tensors": lambda: [output[0], *output[1]],
    }[pack]()
    for part in parts:
        assert part[:, 0].tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"encoder_hidden_states": torch.zeros(4), "cond": {"image": torch.zeros(4)}}, r"'cond\.image'"),
        ({"cond": [1, 2, 3, 4]}, "'cond'"),
    ],
)
def test_an_input_nobody_has_named_is_refused_at_the_first_call(given, named):
    denoiser = Denoiser()
    with (
        conditioning_follows(LiveRows(4), [denoiser], SPEC),
        pytest.raises(UnsupportedPipelineError, match=f"Denoiser gets {named}, which the guard does not know"),
    ):
        denoiser(torch.zeros(4), 0, **given)
    assert not hasattr(denoiser, "seen")


@pytest.mark.parametrize(
    ("sample_rows", "embed_rows", "told"),
    [
        (3, 4, "got 3 rows while the batch has 2 of 4 images"),
        (8, 16, "got 8 rows while the batch has 2 of 4"),
        (2, 2, "encoder_hidden_states with 2 rows, expected 4"),
        (4, 4, "encoder_hidden_states with 4 rows, expected 8"),
    ],
)
def test_a_batch_that_does_not_fit_is_an_error_not_a_broadcast(sample_rows, embed_rows, told):
    denoiser, rows = Denoiser(), rows_of(4, [0, 2])
    with conditioning_follows(rows, [denoiser], SPEC), pytest.raises(GuardStateError, match=told):
        denoiser(torch.zeros(sample_rows, 1), 0, encoder_hidden_states=torch.zeros(embed_rows, 1, 1))


def test_a_latent_batch_that_grew_back_is_an_error():
    """What a single row does in a scheduler whose state was left at full size."""
    denoiser, rows = Denoiser(), rows_of(3, [1])
    with conditioning_follows(rows, [denoiser], SPEC), pytest.raises(GuardStateError, match="3 rows, expected 9"):
        denoiser(torch.zeros(3, 1), 0, encoder_hidden_states=torch.zeros(3, 1, 1))


@pytest.mark.parametrize("spec", [SPEC, KEEPING])
def test_the_hooks_are_gone_afterwards_whatever_happened(spec):
    modules, rows = [Denoiser(), Denoiser()], LiveRows(2)
    with pytest.raises(KeyboardInterrupt), conditioning_follows(rows, modules, spec):
        assert all(module._forward_pre_hooks for module in modules)
        raise KeyboardInterrupt
    rows.keep(torch.tensor([0]))
    for module in modules:
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        module(torch.zeros(2, 1), 0, encoder_hidden_states=torch.zeros(2, 1, 1))
        assert len(module.seen["encoder_hidden_states"]) == 2


def test_every_module_of_a_step_is_cut_and_counts_its_own_copies():
    """A ControlNet in guess mode sees the batch once, the denoiser behind it twice."""
    control, denoiser, rows = Denoiser(), Denoiser(), rows_of(3, [2])
    with conditioning_follows(rows, [control, denoiser], SPEC):
        control(numbered(1), 0, encoder_hidden_states=numbered(3))
        denoiser(numbered(2), 0, encoder_hidden_states=numbered(6))
    assert control.seen["encoder_hidden_states"].tolist() == [2]
    assert denoiser.seen["encoder_hidden_states"].tolist() == [2, 5]


def test_a_compiled_denoiser_is_bound_by_the_names_of_the_module_inside():
    denoiser = Denoiser()
    compiled, rows = torch.compile(denoiser, backend="eager"), rows_of(4, [1])
    with conditioning_follows(rows, [compiled], SPEC):
        compiled(numbered(1), 0, numbered(4))
    assert denoiser.seen["encoder_hidden_states"].tolist() == [1]
