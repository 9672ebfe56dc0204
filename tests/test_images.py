import io
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moe_artifacts.errors import InputError
from tests.diffusiondb_fixture import bomb
from training.data.images import FORMATS, BadImage, image_files, read_image, read_rgb, square


def colour(*rgb, size=(8, 8)):
    return Image.new("RGB", size, rgb)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def noise(mode="RGB", size=(24, 16)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


def reason(source):
    with pytest.raises(BadImage) as caught:
        read_rgb(source)
    return caught.value.reason


# --- what can be read


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_from_a_file_and_from_bytes(tmp_path, kind):
    content = encoded(noise("P" if kind == "GIF" else "RGB"), kind)
    (tmp_path / "a").write_bytes(content)  # the name says nothing
    from_file, from_bytes = read_rgb(tmp_path / "a"), read_rgb(content)
    assert from_file.mode == "RGB" and from_file.size == (24, 16)
    assert from_file.tobytes() == from_bytes.tobytes()
    if kind in ("PNG", "BMP", "TIFF"):
        assert from_file.tobytes() == noise().tobytes()  # these lose nothing


def test_other_modes_become_rgb():
    grey_alpha = Image.merge("LA", (Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 51)))
    palette = colour(255, 0, 0).convert("P")
    clear_palette = encoded(palette, "PNG", transparency=palette.getpixel((0, 0)))
    pixels = {
        "cmyk": (encoded(colour(255, 0, 0).convert("CMYK"), "TIFF"), (255, 0, 0)),
        "cmyk jpeg": (encoded(colour(255, 255, 255).convert("CMYK"), "JPEG"), (255, 255, 255)),
        "clear": (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"), (255, 255, 255)),  # on white
        "half clear": (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 51)), "PNG"), (255, 204, 204)),
        "grey and alpha": (encoded(grey_alpha, "PNG"), (204, 204, 204)),
        "grey": (encoded(Image.new("L", (8, 8), 51), "PNG"), (51, 51, 51)),
        "one bit": (encoded(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
        "palette": (encoded(palette, "PNG"), (255, 0, 0)),
        "clear palette": (clear_palette, (255, 255, 255)),
    }
    assert {name: read_rgb(content).getpixel((4, 4)) for name, (content, _) in pixels.items()} == {
        name: value for name, (_, value) in pixels.items()
    }


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(kind):
    for value, expected in ((0, 0), (51 * 257, 51), (65_535, 255)):
        content = encoded(Image.fromarray(np.full((8, 8), value, dtype=np.uint16)), kind)
        assert read_rgb(content).getpixel((0, 0)) == (expected,) * 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_taken(kind):
    content = encoded(
        colour(255, 0, 0), kind, save_all=True, append_images=[colour(0, 255, 0), colour(0, 0, 255)], lossless=True
    )
    assert read_rgb(content).getpixel((4, 4)) == (255, 0, 0)


def test_the_orientation_of_exif_is_followed():
    image = colour(0, 0, 0, size=(8, 4))
    image.paste((255, 255, 255), (0, 0, 8, 2))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter for viewing
    found = np.asarray(read_rgb(encoded(image, "PNG", exif=exif)))
    assert found.shape == (8, 4, 3)
    assert found[:, 2:].min() == 255 and found[:, :2].max() == 0  # the right half


def test_the_middle_square_is_taken(tmp_path):
    image = colour(255, 0, 0, size=(12, 4))
    image.paste((0, 0, 255), (4, 0, 8, 4))
    assert square(image, 4).tobytes() == colour(0, 0, 255, size=(4, 4)).tobytes()
    image.save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", 4)
    assert found.shape == (1, 3, 4, 4) and found.dtype.is_floating_point
    assert found[0, :, 0, 0].tolist() == [0, 0, 1] and (found == found[:, :, :1, :1]).all()


def test_image_files_are_found_in_subfolders_in_a_fixed_order(tmp_path):
    (tmp_path / "b" / "dir.png").mkdir(parents=True)
    for name in ("b/1.PNG", "a.jpeg", "c.webp", "notes.txt", "b/2.json"):
        (tmp_path / name).write_bytes(b"")
    assert [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)] == ["a.jpeg", "b/1.PNG", "c.webp"]


# --- what is refused


def test_every_refusal_has_a_reason(tmp_path):
    assert reason(tmp_path / "none.png") == reason(tmp_path) == reason("a\0b.png") == "missing"
    assert reason(b"") == "empty"
    assert reason(b"no picture at all") == reason(encoded(colour(0, 0, 0), "PCX")) == "format"
    assert reason(encoded(Image.new("F", (8, 8), 0.5), "TIFF")) == "mode"
    assert reason(encoded(Image.new("LAB", (8, 8)), "TIFF")) == "mode"
    assert reason(encoded(Image.new("I", (8, 8), 70_000), "TIFF")) == "mode"


def test_postscript_is_not_handed_to_ghostscript():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"  # Pillow alone would take it
    assert reason(eps) == "format"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_a_truncated_file_is_refused(kind):
    whole = encoded(noise(size=(64, 64)), kind)
    read_rgb(whole)
    for share in (0.2, 0.5, 0.9):
        assert reason(whole[: int(len(whole) * share)]) in ("damaged", "format")  # format: where the header goes on


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert reason(bomb()) == "pixels"
    limit = Image.MAX_IMAGE_PIXELS
    assert limit < 10_000**2 < 2 * limit  # between the two Pillow would only warn
    assert reason(bomb(side=10_000)) == "pixels"


def test_the_limit_is_that_of_pillow(monkeypatch):
    content = encoded(colour(0, 0, 0, size=(30, 30)), "PNG")
    for limit, allowed in ((None, True), (900, True), (899, False), (100, False)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        if allowed:
            assert read_rgb(content).size == (30, 30)
        else:
            assert reason(content) == "pixels"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_damage_anywhere_is_refused_or_harmless(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # a header that states 80 million takes a second to decode
    whole = encoded(noise(), kind)

    @given(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=8))
    def damaged(at, garbage):
        try:
            image = read_rgb(whole[:at] + garbage + whole[at + len(garbage) :])
        except BadImage as error:
            assert error.reason in ("format", "damaged", "pixels", "mode")
        else:
            assert image.mode == "RGB"

    damaged()


def test_an_error_names_the_file_and_crosses_processes(tmp_path):
    shutil.copy(__file__, tmp_path / "code.png")
    with pytest.raises(InputError, match=r"code\.png: is none of PNG, JPEG") as caught:
        read_rgb(tmp_path / "code.png")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, str(again)) == ("format", str(caught.value))
    with pytest.raises(BadImage, match=r"^part-000001\.zip/a\.png: the file is empty"):
        read_rgb(b"", "part-000001.zip/a.png")
