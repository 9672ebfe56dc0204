import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from hypothesis import given
from hypothesis import strategies as st

from moe_artifacts.errors import InputError, LatentSpaceError
from moe_artifacts.preview import LinearPreview, TinyPreview, VaePreview, r2


def _tiny():
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(latent_channels=4, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **blocks).eval()


def _vae(**kwargs):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **blocks, **kwargs).eval()


PREVIEWS = {
    "linear": lambda: LinearPreview(4, patch=2),
    "tiny": lambda: TinyPreview(_tiny()),
    "vae": lambda: VaePreview(_vae(scaling_factor=0.5)),
}


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


def test_tiny_decodes_the_latents_of_the_scheduler_as_they_are():
    autoencoder, latents = _tiny(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        shown = TinyPreview(autoencoder)(latents)
        # The original TAESD decoder ends at [0, 1]; diffusers then maps to [-1, 1], and the preview maps back.
        raw = autoencoder.decoder.layers(torch.tanh(latents / 3) * 3)
    assert shown.shape == (2, 3, 16, 16)
    torch.testing.assert_close(shown, raw.clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [None, 0.1])
def test_vae_undoes_scaling_and_shift(shift):
    autoencoder, raw = _vae(scaling_factor=0.5, shift_factor=shift), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        shown = VaePreview(autoencoder)((raw - (shift or 0.0)) * 0.5)
        expected = (autoencoder.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=0)  # one rounding more before a small network


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
