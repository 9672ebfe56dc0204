import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
)
from diffusers.utils import remote_utils
from hypothesis import given
from hypothesis import strategies as st
from tiny_pipelines import CASES
from tiny_vaes import VAES, flux2, kl, qwen

from moe_artifacts.config import ConfigError, LatentSpaceConfig, from_dict, to_dict
from moe_artifacts.errors import InputError, LatentSpaceError
from moe_artifacts.guard.space import check_latent_space, latent_space_of, unpack
from moe_artifacts.latent_spaces import LATENT_SPACES, differences, raw_latents, scheduler_latents, space_of_vae

BUNDLED = Path(__file__).parent.parent / "moe_artifacts" / "bundled" / "fashion" / "pipeline"
# But for those that put known parts of an image into the latents after the step; the guard refuses them.
DECODED = [name for name in CASES if "blended" not in name]
PACKED = {"flux": FluxPipeline, "chroma": ChromaPipeline, "qwen": QwenImagePipeline}


def space(**changes):
    return LatentSpaceConfig(
        **{"name": "t", "vae_class": "AutoencoderKL", "channels": 4, "scaling_factor": 0.5} | changes
    )


def holding(kind, vae):
    """A pipeline without weights: its class, its VAE and nothing else."""
    pipe = object.__new__(kind)
    pipe.__dict__["vae"] = vae
    return pipe


def default_config(kind):
    """The configuration that a class of diffusers has when nothing is said, without making its weights."""
    with torch.device("meta"):
        return kind()


# --- unpack


@pytest.mark.parametrize("kind", PACKED.values(), ids=PACKED)
@given(h=st.integers(1, 4), w=st.integers(1, 4), channels=st.integers(1, 3), spare=st.integers(0, 15))
def test_unpacks_as_the_pipelines_do(kind, h, w, channels, spare):
    latents = torch.randn(2, channels, 2 * h, 2 * w, generator=torch.Generator().manual_seed(0))
    tokens = kind._pack_latents(latents, 2, channels, 2 * h, 2 * w)
    height, width = 16 * h + spare, 16 * w + spare  # pixels that make no whole token are cut off
    found = unpack(tokens, space(channels=channels, packing="2x2"), height, width)
    assert torch.equal(found, latents)
    theirs = kind._unpack_latents(tokens, height, width, 8)
    assert torch.equal(found, theirs[:, :, 0] if kind is QwenImagePipeline else theirs)


@pytest.mark.parametrize("kind", [Flux2Pipeline, Flux2KleinPipeline])
@given(h=st.integers(1, 4), w=st.integers(1, 4), spare=st.integers(0, 15))
def test_unpacks_as_flux2_does(kind, h, w, spare):
    latents = torch.randn(2, 8, h, w, generator=torch.Generator().manual_seed(0))
    tokens, ids = kind._pack_latents(latents), kind._prepare_latent_ids(latents)
    flux2_space = space(vae_class="AutoencoderKLFlux2", channels=8, downsampling=16, packing="tokens")
    found = unpack(tokens, flux2_space, 16 * h + spare, 16 * w + spare)
    assert torch.equal(found, latents)
    theirs = kind._unpack_latents_with_ids(tokens, ids, *((h, w) if kind is Flux2KleinPipeline else ()))
    assert torch.equal(found, theirs)


def test_latents_that_are_not_packed_pass_as_they_are():
    latents = torch.randn(2, 4, 3, 5)
    assert unpack(latents, space(), None, None) is latents


@pytest.mark.parametrize(
    ("shape", "packing", "pixels"),
    [
        ((2, 3, 8, 8), "none", (64, 64)),
        ((2, 4, 1, 8, 8), "none", (64, 64)),
        ((2, 16, 16), "none", (64, 64)),
        ((2, 16, 16), "2x2", (64, 128)),
        ((2, 16, 4), "2x2", (64, 64)),
        ((2, 4, 8, 8), "2x2", (64, 64)),
        ((2, 16, 4), "tokens", (64, 64)),
        ((2, 64, 16), "tokens", (64, 64)),
    ],
)
def test_latents_of_another_shape_are_refused(shape, packing, pixels):
    with pytest.raises(InputError, match="latents must be"):
        unpack(torch.zeros(shape), space(packing=packing), *pixels)


@pytest.mark.parametrize("pixels", [(None, 64), (64, None)])
def test_tokens_without_a_size_are_refused(pixels):
    with pytest.raises(InputError, match="height and width are needed"):
        unpack(torch.zeros(2, 16, 16), space(packing="2x2"), *pixels)


# --- to the decoder


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers and transformers about themselves
@pytest.mark.parametrize("name", DECODED)
def test_raw_latents_are_what_the_pipeline_decodes(name):
    """A whole run: what the scheduler holds at its end, unpacked and made raw, against the argument of vae.decode."""
    case = CASES[name]
    pipe = case.pipe()
    held, decoded = [], []
    step, decode = pipe.scheduler.step, pipe.vae.decode

    def watched_step(*args, **kwargs):
        result = step(*args, **kwargs)
        held[:] = result
        return result

    def watched_decode(latents, *args, **kwargs):
        decoded.append(latents)
        return decode(latents, *args, **kwargs)

    watched_step.__wrapped__ = step  # pipelines look at its signature
    pipe.scheduler.step, pipe.vae.decode = watched_step, watched_decode
    result = pipe(**case.call(2, next(iter(case.guidance)), num_inference_steps=2)).images
    latents = held[0]
    if name.startswith("lcm"):
        latents = held[1]  # these decode the estimate of x0
    elif name.startswith("sana-sprint"):
        latents = held[1] / pipe.scheduler.config.sigma_data
    found = latent_space_of(pipe, name)
    raw = raw_latents(unpack(latents, found, result.shape[-2], result.shape[-1]), found)
    assert len(decoded) == 1
    torch.testing.assert_close(raw, decoded[0], atol=1e-5, rtol=1e-5)  # the same sums, in another order


@pytest.mark.parametrize("kind", VAES)
def test_scheduler_latents_and_raw_latents_undo_each_other(kind):
    vae = VAES[kind]()
    found = space_of_vae(vae, kind)
    latents = torch.randn(2, found.channels, 4, 6)
    raw = raw_latents(latents, found)
    torch.testing.assert_close(scheduler_latents(raw, found), latents, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        image = vae.decode(raw, return_dict=False)[0]  # also of the rank and the size that this VAE takes
    assert image.shape[-2:] == (4 * found.downsampling, 6 * found.downsampling)


def test_scheduler_latents_agree_with_flux2():
    vae = flux2()
    encoded = torch.randn(1, 2, 4, 6)
    pipe = SimpleNamespace(vae=vae, _patchify_latents=Flux2Pipeline._patchify_latents)
    vae.encode = lambda image: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: encoded))
    theirs = Flux2Pipeline._encode_vae_image(pipe, torch.zeros(1, 3, 8, 12), generator=None)
    torch.testing.assert_close(scheduler_latents(encoded, space_of_vae(vae, "t")), theirs)


def test_playgrounds_statistics_of_an_autoencoder_kl_are_undone_with_its_scaling():
    vae = kl(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0, 4.0, 6.0, 8.0])
    raw = raw_latents(torch.ones(1, 4, 1, 1), space_of_vae(vae, "t"))
    assert raw.flatten().tolist() == [5.0, 10.0, 15.0, 20.0]  # 1 * std / 0.5 + mean


def test_flux2_without_statistics_is_refused():
    with pytest.raises(LatentSpaceError, match="does not state mean and std"):
        raw_latents(torch.zeros(1, 128, 2, 2), LATENT_SPACES["flux2"])


# --- the table


def test_every_latent_space_is_named_and_survives_json():
    for name, found in LATENT_SPACES.items():
        assert found.name == name
        assert from_dict(LatentSpaceConfig, json.loads(json.dumps(to_dict(found)))) == found


def test_a_configuration_of_an_older_release_still_loads():
    old = {"name": "a", "vae_class": "AutoencoderKL", "channels": 4, "scaling_factor": 0.5, "shift_factor": 0.0}
    found = from_dict(LatentSpaceConfig, old | {"downsampling": 8})
    assert (found.packing, found.mean, found.std) == ("none", None, None)


def test_the_table_agrees_with_what_diffusers_says():
    sd1 = space_of_vae(default_config(AutoencoderKL), "sd1")
    assert sd1.scaling_factor == LATENT_SPACES["sd1"].scaling_factor
    assert sd1.channels == LATENT_SPACES["sd1"].channels
    assert space_of_vae(default_config(AutoencoderKLQwenImage), "qwen") == dataclasses.replace(
        LATENT_SPACES["qwen"], packing="none"
    )
    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
        transformer = FluxTransformer2DModel(num_layers=0, num_single_layers=0)
    vae.bn = torch.nn.BatchNorm2d(128, affine=False)  # the statistics alone are needed
    assert not differences(space_of_vae(vae, "flux2"), dataclasses.replace(LATENT_SPACES["flux2"], packing="none"))
    assert transformer.config.in_channels == 4 * LATENT_SPACES["flux"].channels
    told = remote_utils.remote_decode.__doc__
    assert f"SD XL: {LATENT_SPACES['sdxl'].scaling_factor}" in told
    assert f"Flux: {LATENT_SPACES['flux'].scaling_factor}" in told
    assert f"Flux: {LATENT_SPACES['flux'].shift_factor}" in told


def test_the_table_agrees_with_the_bundled_pipeline():
    vae = AutoencoderKL.from_pretrained(BUNDLED, subfolder="vae")
    assert space_of_vae(vae, "fashion") == LATENT_SPACES["fashion"]


# --- comparing


def test_the_packing_is_that_of_the_pipeline():
    assert latent_space_of(holding(StableDiffusion3Pipeline, kl()), "t").packing == "none"
    assert latent_space_of(holding(FluxPipeline, kl()), "t").packing == "2x2"
    assert latent_space_of(holding(QwenImagePipeline, qwen()), "t").packing == "2x2"
    assert latent_space_of(holding(Flux2Pipeline, flux2()), "t").packing == "tokens"


def test_a_pipeline_of_the_same_space_is_taken():
    for kind, vae in ((FluxPipeline, kl(shift_factor=0.1)), (Flux2Pipeline, flux2()), (QwenImagePipeline, qwen())):
        pipe = holding(kind, vae)
        check_latent_space(pipe, latent_space_of(pipe, "t"))


def test_flux2_loaded_in_bfloat16_is_the_same_space():
    check_latent_space(
        holding(Flux2Pipeline, flux2().bfloat16()), latent_space_of(holding(Flux2Pipeline, flux2()), "t")
    )


def test_a_flux2_space_without_statistics_takes_any_weights():
    pipe = holding(Flux2Pipeline, flux2())
    check_latent_space(pipe, dataclasses.replace(latent_space_of(pipe, "t"), mean=None, std=None))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"packing": "none"}, "packing '2x2' instead of 'none'"),
        ({"mean": (9.0, -1.0, 0.25, 2.0)}, "mean (0.5, -1.0, 0.25, 2.0) instead of (9.0, -1.0, 0.25, 2.0)"),
        ({"mean": None, "std": None}, "std (2.0, 0.5, 1.5, 3.0) instead of None"),
        ({"vae_class": "AutoencoderKL"}, "vae_class 'AutoencoderKLQwenImage' instead of 'AutoencoderKL'"),
        ({"scaling_factor": 0.5, "downsampling": 8}, "scaling_factor 1.0 instead of 0.5, downsampling 2 instead of 8"),
    ],
)
def test_another_latent_space_is_refused_with_all_differences(changes, told):
    pipe = holding(QwenImagePipeline, qwen())
    with pytest.raises(LatentSpaceError) as error:
        check_latent_space(pipe, dataclasses.replace(latent_space_of(pipe, "t"), **changes))
    assert told in str(error.value)


def test_statistics_of_many_channels_do_not_bury_the_message():
    pipe = holding(Flux2Pipeline, flux2())
    with pytest.raises(
        LatentSpaceError, match=r"mean \([^)]*\.\.\. 8 in all\) instead of \(9, 9, 9, \.\.\. 8 in all\)"
    ):
        check_latent_space(pipe, dataclasses.replace(latent_space_of(pipe, "t"), mean=(9.0,) * 8))


def test_unknown_vaes_and_packings_are_refused():
    with pytest.raises(LatentSpaceError, match="FluxPipeline has no vae"):
        latent_space_of(holding(FluxPipeline, None), "t")
    with pytest.raises(LatentSpaceError, match="vae is a AsymmetricAutoencoderKL"):
        space_of_vae(default_config(AsymmetricAutoencoderKL), "t")
    with pytest.raises(LatentSpaceError, match="QwenImageLayeredPipeline packs its latents in a way that is not known"):
        latent_space_of(holding(QwenImageLayeredPipeline, qwen()), "t")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"packing": "4x4"}, "packing must be one of none, 2x2, tokens"),
        ({"mean": (0.0,) * 4}, "mean and latent_space.std come together"),
        ({"mean": (0.0,) * 3, "std": (1.0,) * 4}, "mean must be 4 finite numbers"),
        ({"mean": (0.0,) * 4, "std": (1.0, 0.0, 1.0, 1.0)}, "std must be 4 positive numbers"),
        ({"mean": (float("nan"),) * 4, "std": (1.0,) * 4}, "mean must be 4 finite numbers"),
        ({"mean": (), "std": ()}, "mean must be 4 finite numbers"),
        ({"shift_factor": float("inf")}, "shift_factor must be a finite number"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        space(**changes)
