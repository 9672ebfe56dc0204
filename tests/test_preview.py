import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import tiny_vaes
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_artifacts.errors import CheckpointError, ConfigError, InputError, LatentSpaceError
from moe_artifacts.latent_spaces import LATENT_SPACES
from moe_artifacts.preview import METADATA, LinearPreview, TinyPreview, VaePreview, r2
from moe_artifacts.preview_fit import FactorFit, PreviewError

PREVIEWS = {
    "linear": lambda: LinearPreview(4, patch=2),
    "tiny": lambda: TinyPreview(tiny_vaes.tiny()),
    "vae": lambda: VaePreview(tiny_vaes.kl()),
    "vae-dc": lambda: VaePreview(tiny_vaes.dc()),
    "vae-qwen": lambda: VaePreview(tiny_vaes.qwen()),
    "vae-flux2": lambda: VaePreview(tiny_vaes.flux2(latent_channels=1)),
}
SPACE = LATENT_SPACES["fashion"]


def fitted(path, **changes):
    """A file as the fit writes it."""
    torch.manual_seed(0)
    preview = LinearPreview(4, patch=2)
    preview.save(path, dataclasses.replace(SPACE, **changes), {"r2": 0.5})
    return preview


@given(channels=st.integers(1, 5), patch=st.integers(1, 4), height=st.integers(1, 4), width=st.integers(1, 4))
def test_each_latent_pixel_becomes_its_own_patch(channels, patch, height, width):
    preview = LinearPreview(channels, patch)
    latents = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0)) * 0.1
    weight = preview.factors.weight.detach().numpy().reshape(3, patch, patch, channels)
    bias = preview.factors.bias.detach().numpy().reshape(3, patch, patch)
    expected = np.empty((2, 3, height * patch, width * patch), dtype=np.float32)
    for b, rgb, y, x in np.ndindex(expected.shape):
        row, column = y % patch, x % patch
        value = weight[rgb, row, column] @ latents[b, :, y // patch, x // patch].numpy() + bias[rgb, row, column]
        expected[b, rgb, y, x] = min(max(0.5 + 0.5 * value, 0.0), 1.0)
    np.testing.assert_allclose(preview(latents).detach().numpy(), expected, atol=1e-6)  # sums of 5 float32 products


@pytest.mark.parametrize("patch", [1, 4])
def test_fit_recovers_the_factors_that_made_the_images(patch):
    torch.manual_seed(0)
    truth = LinearPreview(4, patch)
    latents = 0.2 * torch.randn(1_500, 4, 3, 2) + 0.1  # more than one chunk, and no colour is clipped
    images = truth(latents).detach()
    assert ((images > 0) & (images < 1)).all()
    fitted = LinearPreview.fit(latents, images)
    torch.testing.assert_close(fitted.factors.weight, truth.factors.weight, atol=1e-5, rtol=0)  # images are float32
    torch.testing.assert_close(fitted.factors.bias, truth.factors.bias, atol=1e-5, rtol=0)
    assert r2(fitted, latents, images) == pytest.approx(1.0, abs=1e-9)


def test_fit_is_ordinary_least_squares():
    rng = np.random.default_rng(0)
    latents = rng.normal(3.0, 1.0, (50, 2, 2, 2))
    images = rng.random((50, 3, 2, 2))
    design = np.column_stack([latents.transpose(0, 2, 3, 1).reshape(-1, 2), np.ones(200)])
    expected, *_ = np.linalg.lstsq(design, 2 * images.transpose(0, 2, 3, 1).reshape(-1, 3) - 1, rcond=None)
    fitted = LinearPreview.fit(torch.from_numpy(latents), torch.from_numpy(images))
    np.testing.assert_allclose(fitted.factors.weight.detach()[:, :, 0, 0].T, expected[:2], atol=1e-6)
    np.testing.assert_allclose(fitted.factors.bias.detach(), expected[2], atol=1e-6)


@given(ridge=st.floats(0, 2), seed=st.integers(0, 9))
def test_ridge_agrees_with_the_formula(ridge, seed):
    rng = np.random.default_rng(seed)
    latents, images = rng.normal(2.0, 3.0, (6, 3, 2, 2)), rng.random((6, 3, 2, 2))
    x, y = latents.transpose(0, 2, 3, 1).reshape(-1, 3), 2 * images.transpose(0, 2, 3, 1).reshape(-1, 3) - 1
    centred = x - x.mean(axis=0)
    penalty = ridge * len(x) * x.var(axis=0).mean()
    weight = np.linalg.solve(centred.T @ centred + penalty * np.eye(3), centred.T @ (y - y.mean(axis=0)))
    bias = y.mean(axis=0) - x.mean(axis=0) @ weight  # not penalised
    found = LinearPreview.fit(torch.from_numpy(latents), torch.from_numpy(images), ridge=ridge)
    np.testing.assert_allclose(found.factors.weight.detach()[:, :, 0, 0].T, weight, atol=1e-6)  # stored in float32
    np.testing.assert_allclose(found.factors.bias.detach(), bias, atol=1e-6)


def test_a_fit_in_parts_is_the_fit_of_all():
    torch.manual_seed(0)
    latents, images = torch.randn(7, 4, 2, 3), torch.rand(7, 3, 4, 6)
    parts = FactorFit(channels=4, patch=2)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
        parts.add(latents[rows], images[rows])
    whole = LinearPreview.fit(latents, images, ridge=0.1)
    torch.testing.assert_close(LinearPreview.from_factors(*parts.solve(0.1)).state_dict(), whole.state_dict())


def test_fit_takes_a_constant_channel():
    latents = torch.rand(20, 3, 2, 2)
    latents[:, 1] = 0.7  # the bias and this channel say the same: there are many solutions
    images = latents.flip(1) * 0.5
    fitted = LinearPreview.fit(latents, images)
    assert fitted.factors.weight.isfinite().all()
    torch.testing.assert_close(fitted(latents).detach(), images, atol=1e-5, rtol=0)


def test_r2_agrees_with_its_formula_and_is_zero_for_the_mean_colour():
    torch.manual_seed(0)
    latents, images = torch.randn(30, 4, 2, 2), torch.rand(30, 3, 2, 2)
    preview = LinearPreview(4)
    shown = preview(latents).detach()
    residual = images - images.mean(dim=(0, 2, 3), keepdim=True)
    expected = 1 - (shown - images).square().sum() / residual.square().sum()
    assert r2(preview, latents, images) == pytest.approx(expected.item(), rel=1e-5)  # the formula here is float32
    with torch.no_grad():
        preview.factors.weight.zero_()
        preview.factors.bias.copy_(2 * images.mean(dim=(0, 2, 3)) - 1)
    assert r2(preview, latents, images) == pytest.approx(0.0, abs=1e-6)


def test_psnr_is_the_mean_over_images():
    images = torch.full((3, 3, 4, 4), 0.5)
    shown = images.clone()
    shown[0] += 0.1  # mean square 0.01: 20 dB
    shown[1] += 0.01  # 40 dB
    error = PreviewError()
    error.add(shown[:1], images[:1])
    error.add(shown[1:], images[1:])
    assert error.psnr == pytest.approx((20 + 40 + 100) / 3, abs=1e-4)  # 0.51 in float32; equal images count as 100 dB


def test_sdxl_factors_are_the_published_ones_on_a_scale_of_255():
    """The function of diffusers' docs/source/en/using-diffusers/callback.md, written out."""
    latents = torch.randn(2, 4, 3, 5)
    weights = torch.tensor([[60.0, -60, 25, -70], [60, -5, 15, -50], [60, 10, -5, -35]])
    biases = torch.tensor([150.0, 140, 130])
    expected = torch.einsum("blhw,rl->brhw", latents, weights) + biases[:, None, None]
    preview = LinearPreview.sdxl()
    torch.testing.assert_close(preview(latents), expected.clamp(0, 255) / 255, atol=1e-6, rtol=0)
    assert preview.space == LATENT_SPACES["sdxl"]
    assert preview(torch.zeros(1, 4, 1, 1)).flatten().tolist() == pytest.approx([150 / 255, 140 / 255, 130 / 255])


def test_tiny_decodes_the_latents_of_the_scheduler_as_they_are():
    autoencoder, latents = tiny_vaes.tiny(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        shown = TinyPreview(autoencoder)(latents)
        # The original TAESD decoder ends at [0, 1]; diffusers then maps to [-1, 1], and the preview maps back.
        raw = autoencoder.decoder.layers(torch.tanh(latents / 3) * 3)
    assert shown.shape == (2, 3, 16, 16)
    torch.testing.assert_close(shown, raw.clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [None, 0.1])
def test_vae_undoes_scaling_and_shift(shift):
    autoencoder, raw = tiny_vaes.kl(shift_factor=shift), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        shown = VaePreview(autoencoder)((raw - (shift or 0.0)) * 0.5)
        expected = (autoencoder.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=0)  # one rounding more before a small network


def test_a_vae_that_overflows_in_float16_decodes_in_float32_as_its_pipeline_does():
    autoencoder = tiny_vaes.kl(force_upcast=True)
    with torch.no_grad():
        autoencoder.decoder.conv_in.weight.mul_(1e5)  # the norm after it divides it out again
        latents = torch.randn(2, 4, 8, 8).half()
        autoencoder.half()
        assert not autoencoder.decode(latents).sample.isfinite().all()
        weights = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
        shown = VaePreview(autoencoder)(latents)
        expected = VaePreview(copy.deepcopy(autoencoder).float())(latents.float())
    torch.testing.assert_close(shown, expected, atol=1e-6, rtol=0)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in autoencoder.state_dict().items())
    assert autoencoder.dtype == torch.float16


@pytest.mark.parametrize("kind", PREVIEWS)
def test_a_preview_takes_latents_of_another_device(kind):
    """Fake tensors: shapes, dtypes and devices without data, so that this needs no accelerator."""
    preview = PREVIEWS[kind]()
    with FakeTensorMode(allow_non_fake_inputs=True):
        shown = preview(torch.empty(2, preview.channels, 8, 8, device="cuda"))
    assert shown.device.type == "cpu" and shown.dtype == torch.float32


def test_qwen_and_flux2_are_shown_as_their_pipelines_would():
    latents = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        vae = tiny_vaes.qwen()
        mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, 4, 1, 1, 1) for name in ("mean", "std"))
        image = vae.decode(latents[:, :, None] * std + mean).sample[:, :, 0]
        torch.testing.assert_close(VaePreview(vae)(latents), (image / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)

        vae = tiny_vaes.flux2(latent_channels=1)
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        raw = latents * std.view(1, 4, 1, 1) + vae.bn.running_mean.view(1, 4, 1, 1)
        # Channel 2 * y + x is the pixel (y, x) of each patch.
        raw = raw.view(2, 2, 2, 3, 5).permute(0, 3, 1, 4, 2).reshape(2, 1, 6, 10)
        shown = VaePreview(vae)(latents)
        torch.testing.assert_close(shown, (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    assert shown.shape == (2, 3, 12, 20)


@pytest.mark.parametrize("kind", PREVIEWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_previews_are_float32_in_the_unit_interval_whatever_comes(kind, dtype):
    preview = PREVIEWS[kind]()
    with torch.no_grad():
        shown = preview((30 * torch.randn(2, 4, 4, 4)).to(dtype))
    assert shown.dtype == torch.float32
    assert shown.min() >= 0 and shown.max() <= 1


@pytest.mark.parametrize("kind", PREVIEWS)
def test_gradients_reach_the_latents(kind):
    latents = (0.1 * torch.randn(1, 4, 4, 4)).requires_grad_()
    PREVIEWS[kind]()(latents).sum().backward()
    assert latents.grad.isfinite().all() and latents.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", PREVIEWS)
def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(kind):
    preview, latents = PREVIEWS[kind](), torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        clean = preview(latents)
        latents[1, 0, 0, 0] = float("nan")
        shown = preview(latents)
    assert not shown[1].isfinite().all()
    torch.testing.assert_close(shown[[0, 2]], clean[[0, 2]], atol=0, rtol=0)


@pytest.mark.parametrize("kind", PREVIEWS)
def test_other_latents_are_refused(kind):
    preview = PREVIEWS[kind]()
    with pytest.raises(LatentSpaceError, match="4 channels, got 16"):
        preview(torch.zeros(1, 16, 4, 4))
    for wrong in (
        torch.zeros(1, 4, 3, 4, 4),
        torch.zeros(1, 16, 64),
        torch.zeros(1, 4, 0, 4),
        torch.zeros(1, 4, 4, 4).int(),
    ):
        with pytest.raises(InputError, match="latents must be float"):
            preview(wrong)


def test_a_fit_of_things_that_do_not_belong_together_is_refused():
    latents, images = torch.rand(4, 2, 3, 3), torch.rand(4, 3, 6, 6)
    for wrong in (images[:3], images[:, :2], images[0], images[:, :, :5], images[..., :2, :2]):
        with pytest.raises(InputError):
            LinearPreview.fit(latents, wrong)
    with pytest.raises(InputError):
        LinearPreview.fit(latents[:0], images[:0])
    images[0, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match="NaN or infinity"):
        LinearPreview.fit(latents, images)
    with pytest.raises(InputError, match="one colour"):
        r2(LinearPreview(2), latents, torch.full((4, 3, 3, 3), 0.25))
    with pytest.raises(InputError, match="like the previews"):
        r2(LinearPreview(2), latents, torch.rand(4, 3, 6, 6))
    with pytest.raises(InputError, match="ridge must be a finite number"):
        LinearPreview.fit(latents, latents[:, :1].expand(-1, 3, -1, -1), ridge=-1.0)
    with pytest.raises(InputError, match="there is nothing to fit"):
        FactorFit(4, 1).solve()
    with pytest.raises(InputError, match="images be 3 times as large"):
        FactorFit(2, 3).add(latents, torch.rand(4, 3, 6, 6))
    with pytest.raises(InputError, match="at least one image"):
        _ = PreviewError().psnr
    with pytest.raises(InputError, match="factors must be"):
        LinearPreview.from_factors(torch.zeros(6, 4), torch.zeros(6))


# --- files


def test_a_saved_preview_comes_back(tmp_path):
    path = tmp_path / "a.safetensors"
    preview = fitted(path)
    again = LinearPreview.from_file(path, SPACE)
    latents = torch.randn(2, 4, 3, 5)
    assert torch.equal(again(latents), preview(latents))
    assert again.space == SPACE
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]  # no temporary file is left


def test_the_file_of_another_latent_space_is_refused(tmp_path):
    fitted(tmp_path / "a.safetensors")
    with pytest.raises(LatentSpaceError, match=r"latent space 'fashion', expected 'sd1': scaling_factor"):
        LinearPreview.from_file(tmp_path / "a.safetensors", LATENT_SPACES["sd1"])


def test_packing_does_not_matter_to_a_preview(tmp_path):
    fitted(tmp_path / "a.safetensors")
    LinearPreview.from_file(tmp_path / "a.safetensors", dataclasses.replace(SPACE, packing="2x2"))


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"format_version": 2}, CheckpointError, "format_version 2, this release reads 1"),
        ({"preview": {"kind": "tiny", "channels": 4}}, CheckpointError, "kind 'tiny'"),
        ({"preview": {"kind": "linear", "channels": 5, "patch": 2}}, CheckpointError, "factors.weight of shape"),
        ({"preview": {"kind": "linear", "channels": 10**9}}, ConfigError, "channels must be between"),
        ({"preview": []}, ConfigError, "must be a JSON object"),
        ({"latent_space": {"name": "a"}}, ConfigError, "lacks the keys"),
    ],
)
def test_a_file_with_other_metadata_is_refused(tmp_path, changes, error, told):
    path = tmp_path / "a.safetensors"
    fitted(path)
    config = {"kind": "linear", "channels": 4, "patch": 2}
    good = {"format_version": 1, "preview": config, "latent_space": dataclasses.asdict(SPACE)}
    save_file(load_file(path), path, metadata={METADATA: json.dumps(good)})
    LinearPreview.from_file(path)
    save_file(load_file(path), path, metadata={METADATA: json.dumps(good | changes)})
    with pytest.raises(error, match=told):
        LinearPreview.from_file(path)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "{}", '{"format_version": 1}'])
def test_a_file_with_damaged_metadata_is_refused(tmp_path, text):
    path = tmp_path / "a.safetensors"
    fitted(path)
    save_file(load_file(path), path, metadata={METADATA: text})
    with pytest.raises(CheckpointError, match=r"damaged metadata|format_version None"):
        LinearPreview.from_file(path)


def test_files_that_are_no_whole_previews_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        LinearPreview.from_file(path)
    fitted(path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            LinearPreview.from_file(path)
    save_file({"factors.weight": torch.zeros(3, 4, 1, 1)}, path)
    with pytest.raises(CheckpointError, match="not a linear preview"):
        LinearPreview.from_file(path)
    with torch.no_grad():
        preview = LinearPreview(4)
        preview.factors.bias[0] = math.nan
    preview.save(path, SPACE, {})
    with pytest.raises(CheckpointError, match="NaN"):
        LinearPreview.from_file(path)
