from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_artifacts.calibration import Calibration
from moe_artifacts.noise import progress
from moe_artifacts.scorer import SMALLEST_STRIDE
from training.ancestor import Ancestor, rating
from training.clip import EMBED_DIM, MARGIN_SCALE, artifact_loss, draw_checks, multi_positive_loss
from training.collect import LOG_SNR_RANGE, Recorded
from training.exit_head import ExitData, ExitRecipe, exit_data, exit_masses, train_exit
from training.heads import HeadRecipe, Heads, draw_subset, equal_single_width, iter_states, sequence
from training.train import MAIN, SPACE, Embedded

NAN = math.nan
SMALL = HeadRecipe(name="small", num_experts=3, hidden_dim=40, expert_dim=6)


# --- losses of the embedder ------------------------------------------------------------------------------------------


def some_pairs(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    image, text = F.normalize(torch.randn(2, count, 8), dim=-1)
    return image, text, torch.tensor(7.0)


def test_pairs_that_are_all_different_have_the_loss_of_clip() -> None:
    from open_clip.loss import ClipLoss

    image, text, scale = some_pairs()
    ours = multi_positive_loss(image, text, scale, torch.tensor([5, 0, 3, 1, 9, 4]))
    assert ours.item() == pytest.approx(ClipLoss()(image, text, scale).item(), abs=1e-6)


def test_pairs_of_one_group_are_positives_in_equal_shares() -> None:
    image, text, scale = some_pairs()
    groups = [0, 1, 0, 2, 1, 0]
    logits = (scale * image @ text.T).tolist()
    total = 0.0
    for one_way in (logits, [list(column) for column in zip(*logits, strict=True)]):
        for i, row in enumerate(one_way):
            log_sum = math.log(sum(math.exp(value) for value in row))
            positives = [j for j in range(6) if groups[j] == groups[i]]
            total -= sum(row[j] - log_sum for j in positives) / len(positives) / 6 / 2
    assert multi_positive_loss(image, text, scale, torch.tensor(groups)).item() == pytest.approx(total, abs=1e-5)


def test_the_artifact_loss_by_hand() -> None:
    logit, margin = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -4.0])
    true_margin = torch.tensor([MARGIN_SCALE, -100.0])  # a target of 1; a target beyond -4, which is clamped
    # Both logits are undecided; smooth L1 is 1/2 at a distance of 1, and 0.
    assert artifact_loss(logit, margin, true_margin, 3.0).item() == pytest.approx(math.log(2) + 3.0 * 0.25, abs=1e-6)
    surer = artifact_loss(torch.tensor([5.0, -5.0]), margin, true_margin, 0.0).item()
    assert surer == pytest.approx(math.log1p(math.exp(-5)), abs=1e-6)


def test_the_check_drawn_is_one_that_was_recorded_and_each_comes_as_often() -> None:
    log_snr = torch.tensor([[NAN, NAN, 1.0], [NAN, 0.5, 1.0], [-1.0, 0.0, 1.0]])
    place = 10 * torch.arange(3)[:, None] + torch.arange(3)  # each x0 tells where it comes from
    zeros = torch.zeros(3)
    data = Recorded(
        x0=place.half()[:, :, None, None, None],
        log_snr=log_snr,
        step=place,
        num_steps=zeros,
        prompts=["bag"] * 3,
        label=zeros,
        margin=zeros,
        margin_second=zeros,
        seeds=zeros,
        noisy=zeros,
        final=zeros,
    )
    rows = torch.arange(3).repeat(1_000)
    x0, drawn = draw_checks(data, rows, torch.Generator().manual_seed(0))
    assert x0.dtype == torch.float32
    row, check = x0.flatten().long() // 10, x0.flatten().long() % 10
    assert torch.equal(row, rows)
    assert torch.equal(drawn, log_snr[row, check]) and drawn.isfinite().all()
    for i, present in ((0, 1), (1, 2), (2, 3)):
        share = torch.bincount(check[rows == i], minlength=3)[-present:] / 1_000
        assert (share - 1 / present).abs().max() < 0.06  # 4 standard errors


# --- what the heads see ----------------------------------------------------------------------------------------------


def embedded() -> Embedded:
    """Three images at five checks; the second lacks the first check and the third the first three."""
    embedding = F.normalize(torch.randn(3, 5, EMBED_DIM), dim=-1)
    log_snr = torch.tensor([-4.9, -2.0, 0.5, 0.6, 6.7]).repeat(3, 1)  # two checks nearer than SMALLEST_STRIDE
    for row, missing in ((1, 1), (2, 3)):
        embedding[row, :missing], log_snr[row, :missing] = 0, NAN
    return Embedded(
        embedding=embedding.half(),
        text=F.normalize(torch.randn(3, EMBED_DIM), dim=-1),
        log_snr=log_snr,
        spent=torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0]).repeat(3, 1),
        margin=torch.tensor([0.4, -0.2, 0.1]),
        prompt_id=torch.tensor([0, 1, 1]),
    )


@pytest.mark.parametrize("checks", [[0, 1, 2, 3, 4], [0, 2, 4], [1, 3, 4], [4]])
def test_the_features_agree_with_a_walk_along_each_run(checks: list[int]) -> None:
    data, rows = embedded(), [2, 0, 1]
    seen = sequence(data.take(torch.tensor(rows)), torch.tensor(checks), SPACE)
    features, at, before, present = seen.features, seen.at, seen.before, seen.present
    for i, row in enumerate(rows):
        last_embedding, last_progress = None, 0.0
        for j, check in enumerate(checks):
            log_snr = data.log_snr[row, check].item()
            assert present[i, j] == (not math.isnan(log_snr))
            if math.isnan(log_snr):
                assert at[i, j] == before[i, j]  # no stride, hence no exit mass
                continue
            here, embedding = progress(log_snr, LOG_SNR_RANGE), data.embedding[row, check].float()
            delta = torch.zeros(EMBED_DIM)
            if last_embedding is not None:
                delta = (embedding - last_embedding) / max(here - last_progress, SMALLEST_STRIDE)
            expected = torch.cat([embedding, delta, data.text[row]])
            torch.testing.assert_close(features[i, j], expected, atol=1e-5, rtol=1e-5)
            assert (at[i, j].item(), before[i, j].item()) == pytest.approx((here, last_progress), abs=1e-6)
            last_embedding, last_progress = embedding, here


@pytest.mark.parametrize("checks", [[0, 1, 2, 3, 4], [0, 2, 4]])
def test_the_exit_head_sees_the_state_before_and_no_stride_where_a_check_is_missing(checks: list[int]) -> None:
    source = embedded()
    missing = source.log_snr.isnan()
    state = torch.randn(3, 5, 2).masked_fill(missing[..., None], 0)
    data = ExitData(state, torch.zeros(3, 5), source.log_snr, source.spent, source.label, LOG_SNR_RANGE)
    now, previous, at, before = data.at(torch.arange(3), torch.tensor(checks))
    for row in range(3):
        last_state, last_progress = torch.zeros(2), 0.0
        for j, check in enumerate(checks):
            if missing[row, check]:
                assert at[row, j] == before[row, j]
                continue
            assert torch.equal(now[row, j], state[row, check]) and torch.equal(previous[row, j], last_state)
            assert before[row, j].item() == pytest.approx(last_progress, abs=1e-6)
            last_state, last_progress = state[row, check], at[row, j].item()


@given(st.integers(4, 12), st.integers(0, 10_000))
def test_a_subset_of_checks_rises_to_the_last(count: int, seed: int) -> None:
    chosen = draw_subset(torch.Generator().manual_seed(seed), count).tolist()
    assert chosen == sorted(set(chosen))
    assert chosen[0] >= 0 and chosen[-1] == count - 1 and 3 <= len(chosen) <= count


def test_all_checks_are_looked_at_half_of_the_time_and_each_of_them_is_left_out_at_times() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [draw_subset(generator, 6).tolist() for _ in range(400)]
    assert sum(len(d) == 6 for d in draws) / 400 == pytest.approx(0.5, abs=0.1)  # 4 standard errors
    left_out = [sum(check not in d for d in draws) for check in range(6)]
    assert min(left_out[:5]) > 40 and left_out[5] == 0


# --- heads -----------------------------------------------------------------------------------------------------------


def test_the_single_head_has_as_many_parameters_as_the_mixture() -> None:
    def size(r: HeadRecipe) -> int:
        return sum(p.numel() for p in Heads(r, SPACE).parameters())

    assert size(dataclasses.replace(MAIN, variant="single-head")) == pytest.approx(size(MAIN), rel=0.01)
    assert equal_single_width(MAIN, SPACE) > MAIN.hidden_dim


@pytest.mark.parametrize("variant", ["soft", "hard", "single-head"])
def test_states_do_not_depend_on_the_batch_and_are_zero_where_a_check_is_missing(variant: str) -> None:
    data = embedded()
    heads = Heads(dataclasses.replace(SMALL, variant=variant), SPACE)  # type: ignore[arg-type]
    checks = torch.tensor([0, 2, 4])

    def states_of(batch: int) -> tuple[Tensor, Tensor]:
        found = [(logit, state) for _, logit, state in iter_states(heads, data, checks, batch)]
        logit, state = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logit, state

    logit, state = states_of(batch=3)
    assert (logit.shape, state.shape) == ((3, 3), (3, 3, heads.margin.in_features))
    missing = data.log_snr[:, checks].isnan()
    assert missing.any() and (logit[missing] == 0).all() and (state[missing] == 0).all()
    assert (logit[~missing] != 0).all()
    for whole, part in zip((logit, state), states_of(batch=1), strict=True):
        torch.testing.assert_close(whole, part, atol=1e-5, rtol=1e-5)  # matmul order changes with the batch
    found = exit_data(heads, Calibration(LOG_SNR_RANGE), data, checks)
    torch.testing.assert_close(found.prob, torch.where(missing, 0.0, logit.sigmoid()))
    assert torch.equal(found.bad, torch.tensor([1.0, 0.0, 1.0]))


# --- training the exit head ------------------------------------------------------------------------------------------


def two_kinds(count: int = 32) -> ExitData:
    """Images whose state tells all: half bad with a posterior of 0.9, half clean with 0.1."""
    bad = (torch.arange(count) % 2).float()
    return ExitData(
        state=(2 * bad - 1)[:, None, None].repeat(1, 5, 3),
        prob=(0.1 + 0.8 * bad)[:, None].repeat(1, 5),
        log_snr=torch.linspace(*LOG_SNR_RANGE, 5).repeat(count, 1),
        spent=torch.linspace(0.2, 1, 5).repeat(count, 1),
        bad=bad,
        log_snr_range=LOG_SNR_RANGE,
    )


def test_the_economic_exit_head_decides_early_on_bad_images_and_not_on_clean_ones() -> None:
    data = two_kinds()
    head = train_exit(ExitRecipe(name="tiny", steps=80, batch=32, lr=1e-2), data)
    mass = exit_masses(head, data)
    prior = 2.1 / 4  # rate at the start times the stride
    assert mass[data.bad == 1][:, 1:].min() > 2 * prior
    assert mass[data.bad == 0][:, 1:].max() < prior / 2
    assert (mass[:, 0] == 0).all()  # the run begins there: no progress yet


@pytest.mark.parametrize("loss", ["economic", "palbert"])
def test_an_exit_head_trained_again_is_the_same(loss: str) -> None:
    recipe = ExitRecipe(name="tiny", loss=loss, steps=3, batch=8)  # type: ignore[arg-type]
    first, again = (train_exit(recipe, two_kinds()).state_dict() for _ in range(2))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    other = train_exit(dataclasses.replace(recipe, seed=1), two_kinds()).state_dict()
    assert not torch.equal(first["output.weight"], other["output.weight"])


# --- the baseline ----------------------------------------------------------------------------------------------------


def test_the_rating_is_half_way_at_the_border_and_ends_at_0_and_5() -> None:
    margin = torch.tensor([-9.0, -MARGIN_SCALE, 0.0, MARGIN_SCALE, 9.0])
    torch.testing.assert_close(rating(margin), torch.tensor([0.0, 1.25, 2.5, 3.75, 5.0]))


def test_the_ancestor_is_a_linear_map() -> None:
    net, (one, other) = Ancestor(), torch.randn(2, 4, EMBED_DIM)
    with torch.no_grad():
        middle = (net(one) + net(other)) / 2
        torch.testing.assert_close(net((one + other) / 2), middle, atol=1e-6, rtol=1e-5)
