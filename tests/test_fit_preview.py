import json
import random

import numpy as np
import pytest
import tiny_vaes
import torch
from diffusers import VQModel
from PIL import Image
from safetensors import safe_open

from moe_artifacts.errors import InputError, LatentSpaceError
from moe_artifacts.latent_spaces import LATENT_SPACES, raw_latents, space_of_vae
from moe_artifacts.preview import METADATA, LinearPreview
from training.data.images import read_image
from training.fit_preview import (
    FitOptions,
    FitReport,
    encode,
    fit_preview,
    load_vae,
    main,
    space_for,
    split,
)


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures of soft random colours, all different."""
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "more").mkdir(parents=True)
    for i in range(20):
        picture = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((16, 16))
        picture.save(tmp_path / "images" / ("more" if i % 2 else ".") / f"{i}.png")
    return tmp_path / "images"


# --- splitting


def test_what_is_held_out_depends_on_seed_and_content_alone(folder):
    fitted, held_out = split(folder, FitOptions(held_out=0.25), FitReport())
    assert len(held_out) == 5 and len(fitted) == 15 and not set(fitted) & set(held_out)
    bytes_held_out = sorted(path.read_bytes() for path in held_out)
    for path in fitted + held_out:
        path.rename(path.with_name(f"renamed-{random.random()}.png"))
    _, again = split(folder, FitOptions(held_out=0.25), FitReport())
    assert sorted(path.read_bytes() for path in again) == bytes_held_out
    _, other = split(folder, FitOptions(held_out=0.25, seed=1), FitReport())
    assert sorted(path.read_bytes() for path in other) != bytes_held_out


def test_copies_of_an_image_are_left_out(folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    report = FitReport()
    fitted, held_out = split(folder, FitOptions(), report)
    assert len(fitted) + len(held_out) == 20 and report.duplicates == 1


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least two different images, found 0"):
        split(tmp_path, FitOptions(), FitReport())


# --- fitting


@pytest.mark.parametrize("kind", tiny_vaes.VAES)
def test_encode_gives_what_the_decoder_takes_back(kind):
    vae = tiny_vaes.VAES[kind]()
    images = torch.rand(2, 3, 8, 12)
    latents = encode(vae, images)
    space = space_of_vae(vae, "t")
    assert latents.shape == (2, space.channels, 8 // space.downsampling, 12 // space.downsampling)
    assert torch.equal(latents, encode(vae, images))  # the mean of the posterior, no draw from it
    with torch.no_grad():
        image = vae.decode(raw_latents(latents, space), return_dict=False)[0]
    assert image.shape[-2:] == (8, 12)


@pytest.mark.parametrize("kind", tiny_vaes.VAES)
@pytest.mark.parametrize("patch", [1, 2])
def test_fits_every_vae_and_measures_on_images_held_out(folder, kind, patch):
    vae = tiny_vaes.VAES[kind]()
    preview, report = fit_preview(vae, folder, FitOptions(size=16, patch=patch, batch_size=3))
    assert (report.fitted, report.held_out, report.broken) == (16, 4, {})
    images = torch.cat([read_image(path, 16) for path in split(folder, FitOptions(), FitReport())[1]])
    side = 16 // space_of_vae(vae, "t").downsampling * patch
    target = torch.nn.functional.interpolate(images, size=(side, side), mode="area")
    shown = preview(encode(vae, images)).detach()
    residual = target - target.mean(dim=(0, 2, 3), keepdim=True)
    assert report.r2 == pytest.approx(1 - ((shown - target).square().sum() / residual.square().sum()).item(), abs=1e-4)
    assert report.psnr == pytest.approx(
        -10 * (shown - target).square().mean(dim=(1, 2, 3)).log10().mean().item(), abs=1e-3
    )


def test_broken_images_are_counted_and_skipped(folder):
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "notes.txt").write_text("not looked at")
    _, report = fit_preview(tiny_vaes.tiny(), folder, FitOptions(size=16))
    assert sorted(name.rpartition("/")[2] for name in report.broken) == ["cut.png", "empty.webp", "text.jpg"]
    assert report.fitted + report.held_out == 20
    assert "3 that could not be read" in str(report)


def test_options_that_do_not_go_together_are_refused(folder):
    for options in (FitOptions(size=17), FitOptions(size=16, patch=3)):
        with pytest.raises(InputError, match="size must be a multiple of 2"):
            fit_preview(tiny_vaes.tiny(), folder, options)
    for wrong in ({"size": 0}, {"batch_size": 0}, {"held_out": 0.0}, {"held_out": 1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            FitOptions(**wrong)
    for path in folder.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match="none of the images"):
        fit_preview(tiny_vaes.tiny(), folder, FitOptions(size=16))


# --- VAEs and their spaces


def test_a_vae_is_loaded_from_its_folder_or_from_that_of_its_pipeline(tmp_path):
    vae = tiny_vaes.kl()
    vae.save_pretrained(tmp_path / "alone")
    vae.half().save_pretrained(tmp_path / "pipeline" / "vae")
    for name in ("alone", "pipeline"):
        found = load_vae(str(tmp_path / name))
        assert found.dtype == torch.float32 and not found.training
        assert space_of_vae(found, "t") == space_of_vae(tiny_vaes.kl(), "t")


def test_folders_without_a_vae_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no VAE in"):
        load_vae(str(tmp_path))
    VQModel(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path)
    with pytest.raises(LatentSpaceError, match="holds a VQModel"):
        load_vae(str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path):
    tiny_vaes.kl().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="there is no VAE in"):
        load_vae(str(tmp_path))


def test_a_space_that_is_known_gets_its_name():
    assert (
        space_for(tiny_vaes.kl(block_out_channels=(4,) * 4, **_four_levels(), scaling_factor=0.18215), None).name
        == "sd1"
    )
    assert space_for(tiny_vaes.kl(), None).name == "AutoencoderKL"


def test_a_tiny_autoencoder_is_told_which_space_it_stands_for():
    blocks = {f"{side}_block_out_channels": (8,) * 4 for side in ("encoder", "decoder")}
    counts = {f"num_{side}_blocks": (1,) * 4 for side in ("encoder", "decoder")}
    taesd3 = tiny_vaes.tiny(latent_channels=16, **blocks, **counts)
    assert space_for(taesd3, "sd3") == LATENT_SPACES["sd3"]
    assert space_for(taesd3, "flux").packing == "none"  # a preview never sees the tokens
    with pytest.raises(LatentSpaceError, match="not one of the latent space 'sdxl': its shape"):
        space_for(taesd3, "sdxl")
    with pytest.raises(LatentSpaceError, match=r"not one of the latent space 'sd1': .*scaling_factor"):
        space_for(tiny_vaes.kl(), "sd1")
    with pytest.raises(LatentSpaceError, match="space must be one of"):
        space_for(taesd3, "sd4")


def _four_levels():
    return {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


# --- the command


def test_the_command_writes_a_file_that_loads(folder, tmp_path, capsys):
    tiny_vaes.kl().save_pretrained(tmp_path / "vae")
    out = tmp_path / "new" / "preview.safetensors"
    arguments = ["--vae", str(tmp_path / "vae"), "--images", str(folder), "--out", str(out), "--size", "16"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "fitted on 16 images; on 4 held out: R2" in told
    preview = LinearPreview.from_file(out, space_of_vae(tiny_vaes.kl(), "t"))
    expected, report = fit_preview(tiny_vaes.kl(), folder, FitOptions(size=16))
    torch.testing.assert_close(preview.state_dict(), expected.state_dict())
    with safe_open(out, framework="pt") as file:
        facts = json.loads(file.metadata()[METADATA])["facts"]
    assert facts["r2"] == report.r2 and facts["psnr"] == report.psnr and facts["fitted_images"] == 16
    first = out.read_bytes()
    assert main(arguments) == 0
    assert out.read_bytes() == first  # the same again, bit by bit


def test_the_command_ends_with_one_line_about_an_error(tmp_path, capsys):
    assert main(["--vae", str(tmp_path), "--images", str(tmp_path), "--out", str(tmp_path / "a.safetensors")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: there is no VAE in") and told.count("\n") == 1
    assert not (tmp_path / "a.safetensors").exists()
