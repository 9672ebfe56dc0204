from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import training.cached_contrastive
from moe_artifacts.config import EmbedderConfig
from moe_artifacts.embedder import ClipEmbedder
from moe_artifacts.errors import InputError
from training.cached_contrastive import cached_backward, clip_loss, siglip_loss
from training.clip import multi_positive_loss

SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 4,
        "patch_dropout": 0.25,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 514, "width": 32, "heads": 2, "layers": 2},
}
Pairs = tuple[Tensor, list[str]]
Loss = Callable[[Tensor, Tensor], Tensor]


def small_clip(seed: int = 0, patch_dropout: float = 0.0, bias: bool = False) -> ClipEmbedder:
    """A CLIP in training mode."""
    torch.manual_seed(seed)
    config = copy.deepcopy(SMALL_CLIP)
    config["vision_cfg"]["patch_dropout"] = patch_dropout
    if bias:
        config["init_logit_bias"] = -10.0
    return ClipEmbedder(EmbedderConfig(model="custom", embed_dim=16, model_config=config)).train()


def some_pairs(count: int) -> Pairs:
    words = ["bag", "coat", "dress", "shirt", "boot", "hat", "glove"]
    texts = [f"{words[i % 7]} {i}" for i in range(count)]
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)), texts


def micro_batches(pairs: Pairs, sizes: Sequence[int]) -> list[Pairs]:
    images, texts = pairs
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(images[a : a + n], texts[a : a + n]) for a, n in zip(starts, sizes, strict=True)]


def embed_with(model: ClipEmbedder) -> Callable[[Pairs], tuple[Tensor, Tensor]]:
    return lambda pairs: (model.embed_images(pairs[0]), model.embed_texts(pairs[1]))


def scaled_clip_loss(model: ClipEmbedder) -> Loss:
    return lambda image, text: clip_loss(image, text, model.clip.logit_scale.exp())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest over the tensors, each in its own norm."""
    assert found.keys() == expected.keys()
    return max(((found[k] - expected[k]).norm() / expected[k].norm().clamp(min=1e-12)).item() for k in expected)


# --- the gradient is that of the whole batch -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("sizes", [[1] * 24, [8, 8, 8], [5, 16, 3], [24]])
def test_the_gradient_equals_that_of_open_clips_loss_on_the_whole_batch(kind: str, sizes: list[int]) -> None:
    whole, cached = small_clip(bias=kind == "siglip"), small_clip(bias=kind == "siglip")
    pairs = some_pairs(24)
    scale, bias = whole.clip.logit_scale, whole.clip.logit_bias
    images, texts = embed_with(whole)(pairs)
    if kind == "clip":
        expected = ClipLoss()(images, texts, scale.exp())
    else:
        expected = SigLipLoss()(images, texts, scale.exp(), bias)
    expected.backward()

    scale, bias = cached.clip.logit_scale, cached.clip.logit_bias

    def loss(image: Tensor, text: Tensor) -> Tensor:
        if kind == "clip":
            return clip_loss(image, text, scale.exp())
        return siglip_loss(image, text, scale.exp(), bias)

    value = cached_backward(embed_with(cached), micro_batches(pairs, sizes), loss)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6) and not value.requires_grad
    found = gradients(cached)
    assert found.keys() == dict(cached.named_parameters()).keys()  # none was forgotten, logit_scale and logit_bias too
    assert relative_difference(found, gradients(whole)) <= 1e-5


def test_open_clips_own_losses_can_be_used_too() -> None:
    whole, cached = small_clip(), small_clip()
    pairs = some_pairs(12)
    ClipLoss()(*embed_with(whole)(pairs), whole.clip.logit_scale.exp()).backward()
    batches = micro_batches(pairs, [4, 4, 4])
    cached_backward(embed_with(cached), batches, lambda i, t: ClipLoss()(i, t, cached.clip.logit_scale.exp()))
    assert relative_difference(gradients(cached), gradients(whole)) <= 1e-5


def test_the_temperature_would_be_wrong_if_the_loss_were_summed_over_micro_batches() -> None:
    """What the equality above is worth: 3 losses of 4 pairs each are another problem."""
    whole, naive = small_clip(), small_clip()
    pairs = some_pairs(12)
    ClipLoss()(*embed_with(whole)(pairs), whole.clip.logit_scale.exp()).backward()
    for batch in micro_batches(pairs, [4, 4, 4]):
        (ClipLoss()(*embed_with(naive)(batch), naive.clip.logit_scale.exp()) / 3).backward()
    assert relative_difference(gradients(naive), gradients(whole)) > 0.1


def test_gradients_add_to_those_that_are_there() -> None:
    once, twice = small_clip(), small_clip()
    batches = micro_batches(some_pairs(6), [4, 2])
    for model in (once, twice, twice):
        cached_backward(embed_with(model), batches, scaled_clip_loss(model))
    doubled = {k: 2 * v for k, v in gradients(once).items()}
    assert relative_difference(gradients(twice), doubled) <= 1e-6


@pytest.mark.parametrize("frozen", ["visual", "text", "both"])
def test_frozen_towers_are_left_alone_and_the_rest_is_as_before(frozen: str) -> None:
    free, model = small_clip().double(), small_clip().double()  # processors round float32 differently
    batches = micro_batches(some_pairs(6), [4, 2])
    for name, parameter in model.named_parameters():
        is_visual = name.startswith("clip.visual")
        parameter.requires_grad_(
            name == "clip.logit_scale" or (frozen == "visual" and not is_visual) or (frozen == "text" and is_visual)
        )
    for each in (free, model):
        cached_backward(embed_with(each), batches, scaled_clip_loss(each))
    found = gradients(model)
    assert "clip.logit_scale" in found
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert relative_difference(found, {k: v for k, v in gradients(free).items() if k in found}) <= 1e-12


def test_dropped_patches_are_the_same_in_both_runs_and_the_random_numbers_go_on_after_them() -> None:
    batches = micro_batches(some_pairs(8), [4, 4])
    features: list[Tensor] = []
    model = small_clip(patch_dropout=0.5)

    def embed(pairs: Pairs) -> tuple[Tensor, Tensor]:
        out = embed_with(model)(pairs)
        features.append(out[0].detach())
        return out

    torch.manual_seed(7)
    cached_backward(embed, batches, scaled_clip_loss(model))
    after = torch.rand(1)
    for first, second in zip(features[:2], features[2:], strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    torch.manual_seed(7)
    with torch.no_grad():
        alike = [embed_with(model)(batch)[0] for batch in batches]
    assert torch.equal(torch.rand(1), after)  # as if each micro-batch had been run once
    torch.testing.assert_close(alike[1], features[1], atol=1e-6, rtol=0)
    with torch.no_grad():
        assert not torch.allclose(embed_with(model)(batches[0])[0], features[0], atol=1e-3)  # the layer does drop


@pytest.mark.parametrize(("batches", "told"), [([], "got none"), (iter([1]), "got list_iterator")])
def test_what_cannot_be_read_twice_is_refused(batches: Any, told: str) -> None:
    with pytest.raises(InputError, match=f"batches must be a sequence of at least one micro-batch.*{told}"):
        cached_backward(lambda batch: batch, batches, lambda i, t: i.sum())


# --- the losses ------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(count=st.integers(1, 40), at_once=st.integers(1, 200), seed=st.integers(0, 99))
def test_slices_of_any_size_give_open_clips_losses(count: int, at_once: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves = F.normalize(torch.randn(2, count, 5, generator=generator, dtype=torch.float64), dim=-1)
    cases = (
        (lambda i, t, s, b: clip_loss(i, t, s), lambda i, t, s, b: ClipLoss()(i, t, s)),
        (siglip_loss, SigLipLoss()),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.cached_contrastive, "LOGITS_AT_ONCE", at_once)
        for ours, theirs in cases:
            inputs = [[*leaves.clone(), torch.tensor(9.0).double(), torch.tensor(-3.0).double()] for _ in range(2)]
            values = []
            for loss, tensors in zip((ours, theirs), inputs, strict=True):
                values.append(loss(*[t.requires_grad_() for t in tensors]))
                values[-1].backward()
            torch.testing.assert_close(*values)
            for found, expected in zip(*inputs, strict=True):
                if expected.grad is not None:
                    torch.testing.assert_close(found.grad, expected.grad, atol=1e-10, rtol=1e-8)


def test_pairs_of_one_group_are_positives_of_each_other() -> None:
    image, text = F.normalize(torch.randn(2, 6, 8), dim=-1)
    group, scale, bias = torch.tensor([0, 1, 0, 2, 1, 0]), torch.tensor(7.0), torch.tensor(-2.0)
    expected = multi_positive_loss(image, text, scale, group)
    assert clip_loss(image, text, scale, group).item() == pytest.approx(expected.item(), rel=1e-6)
    asked = 0.0
    for i in range(6):
        for j in range(6):
            logit = scale * image[i] @ text[j] + bias
            asked -= F.logsigmoid(logit if group[i] == group[j] else -logit).item() / 6
    assert siglip_loss(image, text, scale, bias, group).item() == pytest.approx(asked, rel=1e-5)


def test_by_hand() -> None:
    e = torch.eye(2)
    right = clip_loss(e, e, torch.tensor(0.0)).item()  # nothing is told apart: log 2
    assert right == pytest.approx(0.6931472, abs=1e-6)
    assert clip_loss(e, e, torch.tensor(100.0)).item() < 1e-6
    assert clip_loss(e, e.flip(0), torch.tensor(100.0)).item() == pytest.approx(100.0)


# --- memory ----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once, whoever holds them, without a model and its gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = [*model.buffers(), *model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self.apart = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}  # views of them come up, too
        self.peak = 0
        self.alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {ref: n for ref, n in self.alive.items() if ref not in self.apart and not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


class Loaded(Sequence[Pairs]):
    """Micro-batches that are made when asked for, as from a disk."""

    def __init__(self, length: int, size: int) -> None:
        self.length, self.size = length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if index >= self.length:
            raise IndexError(index)
        return some_pairs(self.size)


def peak(step: Callable[[], object], model: nn.Module) -> int:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.disable()  # memory that only the garbage collector gives back is not flat
    try:
        with LiveBytes(model) as live:
            step()
    finally:
        gc.enable()
    return live.peak


def loss_of(kind: str) -> Loss:
    scale, bias = torch.tensor(9.0), torch.tensor(-1.0)
    return lambda i, t: clip_loss(i, t, scale) if kind == "clip" else siglip_loss(i, t, scale, bias)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_peak_memory_is_flat_as_the_batch_grows_16_fold(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.cached_contrastive, "LOGITS_AT_ONCE", 2**12)  # few, as is the rest of this model
    model, loss = small_clip(), loss_of(kind)

    def cached(batch: int) -> int:
        return peak(lambda: cached_backward(embed_with(model), Loaded(batch // 16, 16), loss), model)

    small, large = cached(16), cached(256)
    assert large <= 1.1 * small
    assert large - small <= (256 - 16) * 2 * 2 * 16 * 4  # image and text features, and the gradient there; float32
    assert peak(lambda: loss(*embed_with(model)(some_pairs(256))).backward(), model) > 12 * small


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_logits_of_the_whole_batch_are_never_held(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.cached_contrastive, "LOGITS_AT_ONCE", 2**14)
    features = nn.Parameter(F.normalize(torch.randn(2, 2048, 4), dim=-1))
    ours = peak(lambda: loss_of(kind)(*features).backward(), nn.ParameterList([features]))
    assert ours < 2**20  # 16 tensors of that many logits, and the gradients; all logits are 16 MB
    everything = peak(lambda: ClipLoss()(*features, torch.tensor(9.0)).backward(), nn.ParameterList([features]))
    assert everything > 3 * 2**24
