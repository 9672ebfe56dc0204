import copy
import functools
import math
from dataclasses import asdict

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from moe_artifacts.config import EmbedderConfig
from moe_artifacts.embedder import ClipEmbedder, _custom_tokenizer, _normalisation, resize_and_crop, state_sha256
from moe_artifacts.errors import CheckpointError, ConfigError, InputError

TEXT = {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1}
RESNET = {"timm_model_name": "preview_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
CUSTOM = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}


def make(vision=VIT, text=TEXT, **changes):
    torch.manual_seed(0)
    model_config = {**CUSTOM, "vision_cfg": vision, "text_cfg": text, **changes}
    return ClipEmbedder(EmbedderConfig(model="custom", embed_dim=model_config["embed_dim"], model_config=model_config))


def _smooth_image(height, width, rng):
    """Something like a picture: sharp edges and gradients, 8 bits."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x * rng.uniform(0.05, 0.6) + y * rng.uniform(0.05, 0.6)) for _ in range(3)], axis=-1)
    waves[height // 3 : height // 2, width // 4 : width // 2] = rng.uniform(-1, 1, 3)
    return np.uint8(np.round(127.5 + 127.5 * waves))


@pytest.fixture(scope="module")
def embedder():
    return make()


@pytest.fixture(scope="module")
def resnet():
    return make(RESNET)


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "timm"])
def test_embeddings_have_length_one_in_float32(vision):
    embedder = make(vision)
    assert not embedder.training
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        images = embedder.embed_images(torch.rand(3, 3, 20, 40).to(dtype))
        assert images.shape == (3, 24) and images.dtype == torch.float32
        torch.testing.assert_close(images.norm(dim=-1), torch.ones(3))
    texts = embedder.embed_texts(["an ankle boot", "a boot " * 1_000, "", "\u9774 \U0001f462"])
    assert texts.shape == (4, 24) and texts.dtype == torch.float32
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "timm"])
def test_a_tower_in_bfloat16_sees_nearly_the_same(vision):
    exact, rounded = make(vision), make(vision)
    rounded.clip.visual.to(torch.bfloat16)
    previews = torch.rand(3, 3, 32, 32)
    images = rounded.embed_images(previews)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, exact.embed_images(previews), atol=0.02, rtol=0)  # 8 bits, of values under one
    torch.testing.assert_close(rounded.embed_texts(["a bag"]), exact.embed_texts(["a bag"]))


@given(
    height=st.integers(8, 90),
    width=st.integers(8, 90),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    size=st.sampled_from([32, (24, 40)]),
    seed=st.integers(0, 99),
)
def test_resizing_agrees_with_open_clip_on_pil(height, width, mode, interpolation, size, seed):
    if mode == "shortest" and size != 32:
        interpolation = "bicubic"  # what open_clip takes for this case, whatever it is told
    config = PreprocessCfg(size=size, resize_mode=mode, interpolation=interpolation, mean=(0.0,) * 3, std=(1.0,) * 3)
    image = _smooth_image(height, width, np.random.default_rng(seed))
    ours = resize_and_crop(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, asdict(config))[0]
    theirs = image_transform_v2(config, is_train=False)(Image.fromarray(image))
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs()
    assert difference.mean() <= 1 / 255  # PIL rounds to 8 bits twice
    assert difference.max() <= 0.1  # and clamps what overshoots after each of two passes; 0.08 in 3,000 draws


def test_embeddings_agree_with_open_clip_on_pil(resnet):
    transform = image_transform_v2(PreprocessCfg(**resnet.clip.visual.preprocess_cfg), is_train=False)
    image = _smooth_image(70, 55, np.random.default_rng(0))
    with torch.no_grad():
        ours = resnet.embed_images(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
        theirs = resnet.clip.encode_image(transform(Image.fromarray(image))[None], normalize=True)
    assert (ours @ theirs.T).item() > 0.9999


def test_a_preview_of_the_right_size_is_not_resampled(embedder):
    preview = torch.rand(2, 3, 32, 32)
    assert resize_and_crop(preview, embedder.clip.visual.preprocess_cfg) is preview


def test_texts_agree_with_open_clip(embedder):
    texts = ["a pullover", "an ankle boot, seen from the left"]
    with torch.no_grad():
        expected = embedder.clip.encode_text(embedder.tokenizer(texts), normalize=True)
        torch.testing.assert_close(embedder.embed_texts(texts), expected)
        again = embedder.embed_texts(texts[::-1]).flip(0)
    torch.testing.assert_close(again, expected, atol=1e-6, rtol=0)  # a sum in another order


@functools.cache
def test_a_prompt_is_tokenized_once_and_not_all_are_kept(embedder, monkeypatch):
    asked = []
    tokenizer = embedder.tokenizer
    monkeypatch.setattr(embedder, "tokenizer", lambda texts: asked.append(texts) or tokenizer(texts))
    monkeypatch.setattr(embedder, "_tokens", {})
    monkeypatch.setattr("moe_artifacts.embedder.PROMPTS_KEPT", 3)
    batches = [["a", "b", "a"], ["b", "c"], ["a", "d"], ["a", "b", "c", "d", "e"]]
    found = [embedder._tokenize(batch) for batch in batches]
    assert asked == [["a", "b"], ["c"], ["a", "d"], ["a", "b", "c", "d", "e"]]
    assert all(torch.equal(tokens, tokenizer(batch)) for tokens, batch in zip(found, batches, strict=True))


def _tokenizer(size):
    return _custom_tokenizer({"context_length": 400, "vocab_size": size})


@given(text=st.text(max_size=60), size=st.sampled_from([514, 600, 5_000, 49_407]))
def test_a_cut_vocabulary_spells_the_same_text(text, size):
    whole, cut = _tokenizer(49_408), _tokenizer(size)
    tokens = cut(text)[0]
    assert tokens.max() < size
    assert tokens.argmax() == tokens.tolist().index(
        size - 1
    )  # open_clip pools at the largest token, which ends the text
    end, whole_tokens = int(tokens.argmax()), whole(text)[0]
    assert cut.decode(tokens[1:end].tolist()) == whole.decode(whole_tokens[1 : int(whole_tokens.argmax())].tolist())


def test_the_whole_vocabulary_is_that_of_open_clip():
    texts = ["an ankle boot", "Hello, World! 123"]
    expected = open_clip.SimpleTokenizer(context_length=400)(texts)
    torch.testing.assert_close(_tokenizer(49_408)(texts), expected, atol=0, rtol=0)


def test_gradients_reach_weights_and_previews(resnet):
    preview = torch.rand(2, 3, 40, 48, requires_grad=True)
    embedding = resnet.embed_images(preview)
    (embedding @ torch.randn(24)).sum().backward()
    assert preview.grad.isfinite().all() and preview.grad.abs().sum() > 0
    grads = [p.grad for p in resnet.clip.visual.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    resnet.zero_grad()


def test_gradients_are_there_after_a_call_without_them(resnet):
    _normalisation.cache_clear()
    with torch.inference_mode():
        resnet.embed_images(torch.rand(2, 3, 40, 48))
    preview = torch.rand(2, 3, 40, 48, requires_grad=True)
    resnet.embed_images(preview).sum().backward()
    assert preview.grad.abs().sum() > 0
    resnet.zero_grad()


@pytest.mark.parametrize("kind", ["embedder", "resnet"])
def test_a_row_does_not_depend_on_its_batch_mates(kind, request):
    embedder, previews = request.getfixturevalue(kind), torch.rand(5, 3, 32, 32)
    for mode in (True, False):  # no batch statistics, in training either
        embedder.train(mode)
        with torch.no_grad():
            alone = torch.cat([embedder.embed_images(row[None]) for row in previews])
            broken = previews.clone()
            broken[2] = float("nan")
            together = embedder.embed_images(broken)
        rows = [0, 1, 3, 4]
        torch.testing.assert_close(together[rows], alone[rows], atol=1e-5, rtol=0)  # other blocking of the same sums
        assert together[2].isnan().all()


@pytest.mark.parametrize("size", [(32, 32), (20, 40)], ids=["as it is", "resized"])
def test_bytes_are_what_their_255th_parts_are(embedder, size):
    previews = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8)
    before = previews.clone()
    expected = embedder.embed_images(previews.float() / 255)
    torch.testing.assert_close(embedder.embed_images(previews), expected, atol=1e-6, rtol=0)  # of lengths 1
    assert torch.equal(previews, before)
    floats = previews.float() / 255
    before = floats.clone()
    embedder.embed_images(floats)
    assert torch.equal(floats, before)


def test_empty_batches_give_empty_embeddings(embedder):
    assert embedder.embed_images(torch.zeros(0, 3, 50, 50)).shape == (0, 24)
    assert embedder.embed_images(torch.zeros(0, 3, 50, 50, dtype=torch.uint8)).shape == (0, 24)
    assert embedder.embed_texts([]).shape == (0, 24)


def test_other_input_is_refused(embedder):
    for wrong in (torch.rand(3, 32, 32), torch.rand(1, 4, 32, 32), torch.rand(1, 3, 0, 8), torch.rand(1, 3, 2, 8, 8)):
        with pytest.raises(InputError, match=r"\(batch, 3, height, width\)"):
            embedder.embed_images(wrong)
    with pytest.raises(InputError, match=r"or uint8, got torch\.int64"):
        embedder.embed_images(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
    for wrong in ("a boot", [None], [["a boot"]]):
        with pytest.raises(InputError, match="list of strings"):
            embedder.embed_texts(wrong)


def test_the_hash_tells_weights_apart_and_nothing_else():
    embedder = make()
    assert embedder.weights_sha256() == make().weights_sha256()
    state = embedder.clip.state_dict()
    digest = state_sha256(state)
    assert state_sha256(dict(reversed(state.items()))) == digest
    name = "visual.conv1.weight"
    for other in (
        {**state, name: torch.nextafter(state[name], state[name] + 1)},
        {**state, name: state[name].reshape(-1)},
        {**state, name: state[name].half()},
        {**state, "more": torch.zeros(0)},
        {key: value for key, value in state.items() if key != name},
    ):
        assert state_sha256(other) != digest
    assert state_sha256({"a": torch.arange(6).reshape(2, 3).T}) == state_sha256(
        {"a": torch.tensor([[0, 3], [1, 4], [2, 5]])}
    )
    assert len(state_sha256({"a": torch.zeros(2, dtype=torch.bfloat16)})) == 64


def test_weights_are_verified():
    model = EmbedderConfig(model="custom", embed_dim=24, model_config=CUSTOM, weights_sha256=make().weights_sha256())
    torch.manual_seed(0)
    embedder = ClipEmbedder(model)
    embedder.verify_weights()
    with torch.no_grad():
        embedder.clip.visual.proj[0, 0] += 1
    with pytest.raises(CheckpointError, match="trained on CLIP weights with SHA-256"):
        embedder.verify_weights()
    with torch.no_grad():
        embedder.clip.visual.proj[0, 0] = math.inf
    with pytest.raises(CheckpointError, match=r"'visual\.proj' hold NaN or infinity"):
        embedder.verify_weights()


def _changed(tower, **changes):
    values = copy.deepcopy(CUSTOM)
    values[tower].update(changes)
    return values


@pytest.mark.parametrize(
    "model_config, message",
    [
        ({}, "lacks"),
        ({**CUSTOM, "vision_cfg": 3}, "must be a JSON object"),
        ({**CUSTOM, "colour": 3}, "open_clip cannot build"),
        (_changed("vision_cfg", colour=3), "open_clip cannot build"),
        (_changed("vision_cfg", timm_model_name="no_such_model"), "open_clip cannot build"),
        (_changed("vision_cfg", head_width=0), "open_clip cannot build"),
        (_changed("vision_cfg", layers=10**9), "layers must be at most 512"),
        (_changed("vision_cfg", layers=[1, 1, 10**9, 1]), "layers must be at most 512"),
        (_changed("text_cfg", width=10**9), "width must be at most"),
        (_changed("text_cfg", width=60_000, layers=8), "parameters, the limit is"),
        (_changed("text_cfg", vocab_size=100), "vocab_size must be between 514"),
        (_changed("text_cfg", hf_model_name="owner/name"), "would load more"),
        (_changed("text_cfg", hf_tokenizer_name="owner/name"), "would load more"),
        (_changed("vision_cfg", timm_model_name="hf-hub:owner/name"), "would load more"),
        (_changed("vision_cfg", timm_model_name="resnet18", timm_model_pretrained=True), "would load more"),
        ({**CUSTOM, "preprocess_cfg": {"colour": "red"}}, "open_clip cannot build"),
        ({**CUSTOM, "preprocess_cfg": {"resize_mode": "bend"}}, "open_clip cannot build"),
        ({**CUSTOM, "embed_dim": 16}, "embed_dim must be 16"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(model_config, message):
    with pytest.raises(ConfigError, match=message):
        ClipEmbedder(EmbedderConfig(model="custom", embed_dim=24, model_config=model_config))


def test_names_that_open_clip_does_not_know_are_refused():
    with pytest.raises(ConfigError, match="knows no model"):
        ClipEmbedder(EmbedderConfig(model="ViT-B-33", embed_dim=512))
    with pytest.raises(ConfigError, match="folder of one machine"):
        ClipEmbedder(EmbedderConfig(model="local-dir:/tmp/model", embed_dim=512))
    with pytest.raises(CheckpointError, match="not a known tag"):
        ClipEmbedder(EmbedderConfig(model="RN50", embed_dim=1024, pretrained="no-such-tag"))


@pytest.fixture
def tiny_name(tmp_path, monkeypatch):
    """A small model under a name that open_clip knows, and a file of its weights."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"tiny": copy.deepcopy(CUSTOM)})
    torch.manual_seed(3)
    model = open_clip.create_model("tiny")
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    return path, model


def test_a_name_with_pretrained_weights_is_what_open_clip_loads(tiny_name):
    path, model = tiny_name
    config = EmbedderConfig(model="tiny", embed_dim=24, pretrained=str(path))
    embedder, preview = ClipEmbedder(config), torch.rand(2, 3, 32, 32)
    assert embedder.weights_sha256() == state_sha256(model.state_dict())
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key])[:, None, None] for key in ("mean", "std"))
    expected = model.eval().encode_image((preview - mean) / std, normalize=True)
    torch.testing.assert_close(embedder.embed_images(preview), expected)


def test_pretrained_weights_that_are_not_finite_or_not_the_ones_meant_are_refused(tiny_name):
    path, model = tiny_name
    with pytest.raises(CheckpointError, match="SHA-256"):
        ClipEmbedder(EmbedderConfig(model="tiny", embed_dim=24, pretrained=str(path), weights_sha256="0" * 64))
    state = model.state_dict()
    state["logit_scale"].fill_(float("nan"))
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="'logit_scale' hold NaN"):
        ClipEmbedder(EmbedderConfig(model="tiny", embed_dim=24, pretrained=str(path)))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="open_clip cannot load tiny"):
        ClipEmbedder(EmbedderConfig(model="tiny", embed_dim=24, pretrained=str(path)))


def test_the_bundled_tower_is_small_and_tells_contrasts_apart():
    tower = make(RESNET).clip.visual
    assert sum(p.numel() for p in tower.parameters()) < 0.6e6
    for name, weight in tower.named_parameters():
        if name.endswith("bn2.weight"):
            torch.nn.init.ones_(weight)  # timm starts with silent residual branches, as no trained tower has
    pattern = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        faint, strong = F.normalize(tower(torch.cat([pattern, 4 * pattern])), dim=-1)
    assert (faint - strong).norm() > 1e-2  # a norm right after the stem would make them equal
