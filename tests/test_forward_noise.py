from __future__ import annotations

import dataclasses
import gzip
import json
import math
import re
import struct
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_vaes
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from scheduler_cases import CASES
from scipy.stats import chisquare, kstest

from moe_artifacts.errors import InputError, LatentSpaceError, UnsupportedPipelineError
from moe_artifacts.latent_spaces import space_of_vae
from moe_artifacts.noise import NoiseLevel, noise_levels
from moe_artifacts.preview import LinearPreview, TinyPreview, VaePreview
from tests.kills import kill_ten_times
from training import row_jobs
from training.data.fashion import FILES
from training.data.images import BadImage
from training.data.pairs import read_pairs
from training.fit_preview import encode
from training.forward_chain import add_noise, chain_step, draw_levels
from training.forward_noise import ForwardNoise, NoiseOptions, main, make_preview, noise_job
from training.image_rows import FashionImages, ImageRow, TableImages
from training.noise_grids import NoiseGrid, model_scheduler, parse_grids
from training.row_jobs import parse_shard, shard_files

# diffusers 0.42 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


# A run of one step has pure noise in it and nothing else.
EVERY_CASE = pytest.mark.parametrize("case", [case for case in CASES if case.id != "SCM-one"], ids=lambda case: case.id)


def level(log_snr: float) -> NoiseLevel:
    """Of variance one."""
    return NoiseLevel(math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr))))


def picture(key: str, size: int = 8) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(sum(key.encode())))


def row(key: str, prompt: str | None = "a cat", label: float | None = 0.25) -> ImageRow:
    return ImageRow(key, prompt, label, lambda size: picture(key, size))


def forward(vae=None, schedulers="ddim:10,euler:10,flow:10", preview=True, batch_size=2, **options) -> ForwardNoise:
    vae = vae or tiny_vaes.kl()
    options = NoiseOptions(**{"size": 8, "keep_latents": True} | options)
    shown = VaePreview(vae) if preview else None
    return ForwardNoise(vae, space_of_vae(vae, "tiny"), parse_grids(schedulers), shown, options, batch_size)


def tensors(rows) -> dict[str, torch.Tensor]:
    return {name: torch.cat(parts) for name, parts in rows.tensors.items()}


# --- grids


@EVERY_CASE
def test_a_grid_has_the_steps_of_the_scheduler_scaled_to_variance_one(case):
    scheduler = case._replace(begin=0).build()
    grid = NoiseGrid.from_scheduler("a", scheduler)
    levels = noise_levels(scheduler)
    expected = [i for i, found in enumerate(levels) if not found.half_step and math.isfinite(found.log_snr)]
    assert sorted(grid.steps) == expected
    for step, found in zip(grid.steps, grid.levels, strict=True):
        assert found.alpha**2 + found.sigma**2 == pytest.approx(1, abs=1e-12)
        assert found.log_snr == pytest.approx(levels[step].log_snr, abs=1e-9)  # float64 rounding
    log_snrs = [found.log_snr for found in grid.levels]
    assert log_snrs == sorted(log_snrs)


def test_a_scheduler_is_named_with_steps_and_settings():
    plain, karras, short, flow, quoted = parse_grids(
        'euler:30, euler:30:use_karras_sigmas=true,dpm,flow:28:shift=3,ddim:timestep_spacing="trailing"'
    )
    assert plain.name == "euler:30" and plain.steps == tuple(range(30))
    assert karras.levels[15] != plain.levels[15]
    assert len(short.steps) == 50
    assert flow.steps == tuple(range(1, 28))  # the first is pure noise

    def shifted(sigma):
        return 3 * sigma / (1 + 2 * sigma)

    sigma = shifted(np.linspace(1, shifted(1 / 1000), 28)[1])  # as FlowMatchEulerDiscreteScheduler has it
    assert flow.levels[0].log_snr == pytest.approx(
        2 * math.log((1 - sigma) / sigma), abs=1e-3
    )  # float32, near sigma = 1
    assert quoted.levels[0] != short.levels[0]


def test_the_noise_schedule_is_that_of_stable_diffusion_or_of_the_model():
    first = parse_grids("ddim:10")[0].levels[-1]
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
    assert first.alpha**2 == pytest.approx(alphas[1].item(), abs=1e-6)  # timestep 1: float32 in diffusers
    model = DDIMScheduler(beta_schedule="linear", steps_offset=1)
    assert parse_grids("ddim:10", model)[0].levels[-1].alpha != pytest.approx(first.alpha, abs=1e-6)
    assert parse_grids("flow:10", model) == parse_grids("flow:10")  # which the betas say nothing about
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert parse_grids("flow:10", shifted)[0].levels == parse_grids("flow:10:shift=3")[0].levels
    assert parse_grids("ddim:10", shifted) == parse_grids("ddim:10")


def test_any_supported_class_can_be_named():
    names = "EDMEulerScheduler:8,SCMScheduler:8,IPNDMScheduler:8,DDPMWuerstchenScheduler:8,PNDMScheduler:8"
    for grid in parse_grids(names):
        assert 6 <= len(grid.levels) <= 12


@pytest.mark.parametrize(
    ("schedulers", "message"),
    [
        ("", "one or more"),
        ("ddim,ddim", "different ones"),
        ("nonsense", "must be flow, ddim"),
        ("ddim:0", "positive number, got '0'"),
        ("ddim:ten", "positive number, got 'ten'"),
        ("ddim:10:trailing", "SETTING=VALUE"),
        ("ddim:10:spacing=trailing", "DDIMScheduler has no setting 'spacing'"),
        ("ddim:10:timestep_spacing=dense", "cannot be built: ValueError: dense"),
        ("ddim:2000", "cannot be built: ValueError"),
        ("flow:10:use_dynamic_shifting=true", "give a shift: flow:10:use_dynamic_shifting=false"),
        ("flow:1", "no step with both signal and noise"),
    ],
)
def test_a_scheduler_that_is_none_is_refused(schedulers, message):
    with pytest.raises(InputError, match=message):
        parse_grids(schedulers)


def test_a_setting_with_unknown_levels_is_refused():
    with pytest.raises(UnsupportedPipelineError, match="flow sigmas"):
        parse_grids("dpm:10:prediction_type=flow_prediction")


# --- the forward chain


@EVERY_CASE
def test_the_chain_over_every_step_ends_in_the_closed_form(case):
    """Mean and variance are propagated exactly, so this holds without drawing anything."""
    grid = NoiseGrid.from_scheduler("a", case._replace(begin=0).build())
    signal, variance, last = 1.0, 0.0, NoiseLevel(1.0, 0.0)
    for found in reversed(grid.levels):
        ratio, spread = chain_step(last, found)
        signal, variance, last = ratio * signal, ratio**2 * variance + spread**2, found
        assert signal == pytest.approx(found.alpha, rel=1e-9)
        assert variance == pytest.approx(found.sigma**2, rel=1e-9, abs=1e-12)  # 1000 roundings of float64


@given(st.lists(st.floats(-12, 12), min_size=3, max_size=3, unique=True))
def test_two_steps_are_distributed_like_one_over_both(log_snrs):
    near, middle, far = (level(value) for value in sorted(log_snrs, reverse=True))
    (r1, s1), (r2, s2), (r, s) = chain_step(near, middle), chain_step(middle, far), chain_step(near, far)
    assert r == pytest.approx(r1 * r2, rel=1e-9)
    assert s**2 == pytest.approx((r2 * s1) ** 2 + s2**2, rel=1e-9, abs=1e-12)


def test_equal_levels_add_no_noise():
    for value in np.linspace(-8, 8, 101):
        ratio, spread = chain_step(level(value), level(value))
        assert ratio == 1 and spread < 1e-7


@pytest.mark.parametrize("noise", ["trajectory", "fresh"])
def test_every_level_is_distributed_as_the_closed_form_says(noise):
    levels = [level(value) for value in (-4.0, -1.0, 0.5, 5.0)]
    x0 = torch.full((1, 200, 200), 0.7)
    found = add_noise(x0, levels, noise, torch.Generator().manual_seed(1))
    for at, x in zip(levels, found.flatten(1).double().numpy(), strict=True):
        assert kstest(x, "norm", args=(at.alpha * 0.7, at.sigma)).pvalue > 1e-3  # seed fixed; 40,000 values


def test_fresh_levels_go_together_as_after_a_step_at_every_level():
    """Against the slow chain, which draws at each of 50 steps: the same covariance between the levels that are kept."""
    (grid,) = parse_grids("ddim:50")
    kept = [3, 20, 34, 48]
    x0 = torch.zeros(1, 200, 200)
    fast = add_noise(x0, [grid.levels[i] for i in kept], "fresh", torch.Generator().manual_seed(1))
    slow = add_noise(x0, grid.levels, "fresh", torch.Generator().manual_seed(2))[kept]
    expected = np.array(  # of x_t and the cleaner x_s: alpha_t / alpha_s * sigma_s**2
        [
            [
                grid.levels[min(i, j)].alpha / grid.levels[max(i, j)].alpha * grid.levels[max(i, j)].sigma ** 2
                for i in kept
            ]
            for j in kept
        ]
    )
    for found in (fast, slow):
        assert np.cov(found.flatten(1).double().numpy()) == pytest.approx(
            expected, abs=0.03
        )  # 4 errors of 2**0.5 / 200
    one = add_noise(x0, [grid.levels[i] for i in kept], "trajectory", torch.Generator().manual_seed(1))
    assert np.corrcoef(one.flatten(1).numpy()) == pytest.approx(np.ones((4, 4)), abs=1e-5)  # float32


def test_the_levels_of_a_trajectory_share_one_noise():
    levels = [level(value) for value in (-3.0, 0.0, 3.0)]
    x0 = torch.randn(4, 3, 5)
    eps = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(7))
    found = add_noise(x0, levels, "trajectory", torch.Generator().manual_seed(7))
    for at, x in zip(levels, found, strict=True):
        assert x.equal(at.alpha * x0 + at.sigma * eps)


def test_schedulers_and_levels_are_drawn_evenly_over_the_whole_range():
    grids = parse_grids("ddim:10,euler:6,flow:9")
    generator = torch.Generator().manual_seed(0)
    schedulers, places = Counter(), {grid.name: Counter() for grid in grids}
    for _ in range(3_000):
        grid, drawn = draw_levels(grids, 4, generator)
        assert drawn == sorted(set(drawn)) and len(drawn) == 4
        schedulers[grid.name] += 1
        places[grid.name].update(drawn)
    assert chisquare(list(schedulers.values())).pvalue > 1e-3
    for grid in grids:
        assert len(places[grid.name]) == len(grid.levels)
        assert chisquare(list(places[grid.name].values())).pvalue > 1e-3


# --- rows


@pytest.mark.parametrize("name", tiny_vaes.VAES)
def test_latents_of_any_vae_are_encoded_noised_and_shown(name):
    vae = tiny_vaes.VAES[name]()
    space = space_of_vae(vae, name)
    size = 4 * space.downsampling
    found = forward(vae, size=size)([row("a"), row("b"), row("c")])
    assert len(found) == 12 and not found.rejects
    latents, previews = tensors(found)["latents"], tensors(found)["previews"]
    assert latents.shape == (12, space.channels, 4, 4) and latents.dtype == torch.float16
    assert previews.shape == (12, 3, size, size) and previews.dtype == torch.uint8
    x0 = encode(vae, picture("b", size))[0]
    generator = torch.Generator().manual_seed(found.columns["seed"][4])
    grid, places = draw_levels(parse_grids("ddim:10,euler:10,flow:10"), 4, generator)
    assert found.columns["scheduler"][4:8] == [grid.name] * 4
    assert found.columns["step"][4:8] == [grid.steps[i] for i in places]
    levels = [grid.levels[i] for i in places]
    assert found.columns["log_snr"][4:8] == [at.log_snr for at in levels]
    eps = torch.randn(x0.shape, generator=generator)
    expected = torch.stack([at.alpha * x0 + at.sigma * eps for at in levels])
    torch.testing.assert_close(latents[4:8].float(), expected, atol=1e-3, rtol=1e-3)  # float16
    shown = VaePreview(vae)(expected)
    assert (previews[4:8] - 255 * shown).abs().max() <= 0.5 + 1e-2  # rounded; another batch adds in another order


@pytest.mark.parametrize("noise", ["trajectory", "fresh"])
def test_a_row_does_not_depend_on_its_neighbours(noise):
    keys = [f"{i}" for i in range(7)]
    together = forward(noise=noise, batch_size=7)(row(key) for key in keys)
    alone = [forward(noise=noise, batch_size=1)([row(key)]) for key in reversed(keys)][::-1]
    for name, values in together.columns.items():
        assert values == [value for one in alone for value in one.columns[name]]
    joined = torch.cat([tensors(one)["latents"] for one in alone])
    # The noise is the same to the bit; convolutions of another batch add in another order, float16 may round apart.
    torch.testing.assert_close(tensors(together)["latents"], joined, atol=2e-3, rtol=1e-3)


def test_fresh_noise_is_that_of_the_forward_chain():
    vae = tiny_vaes.kl()
    found = forward(vae, noise="fresh")([row("a")])
    generator = torch.Generator().manual_seed(found.columns["seed"][0])
    grid, places = draw_levels(parse_grids("ddim:10,euler:10,flow:10"), 4, generator)
    expected = add_noise(encode(vae, picture("a"))[0], [grid.levels[i] for i in places], "fresh", generator)
    assert tensors(found)["latents"].equal(expected.half())


def test_another_seed_or_key_gives_other_noise():
    columns = [forward(seed=seed)([row(key)]).columns["seed"][0] for seed, key in ((0, "a"), (0, "b"), (1, "a"))]
    assert len(set(columns)) == 3


def test_x0_is_shown_without_noise_at_the_levels_drawn():
    vae = tiny_vaes.kl()
    noisy, clean = (forward(vae, show=show)([row("a")]) for show in ("noisy", "x0"))
    assert clean.columns == noisy.columns
    x0 = encode(vae, picture("a"))
    assert tensors(clean)["latents"].equal(x0.half().expand(4, -1, -1, -1))
    expected = (255 * VaePreview(vae)(x0)).round()
    assert (tensors(clean)["previews"] - expected).abs().max() <= 1  # rounding of a batch of four


def test_previews_are_of_the_kind_and_size_asked_for():
    vae, tiny = tiny_vaes.kl(), tiny_vaes.tiny()
    space, options = space_of_vae(vae, "a"), NoiseOptions(size=8, levels_per_image=2)
    for preview, size in ((LinearPreview(4), 4), (LinearPreview(4, patch=2), 8), (TinyPreview(tiny), 8)):
        found = tensors(ForwardNoise(vae, space, parse_grids("ddim:10"), preview, options)([row("a")]))
        assert found.keys() == {"previews"} and found["previews"].shape == (2, 3, size, size)
    assert tensors(forward(preview_size=5)([row("a")]))["previews"].shape == (4, 3, 5, 5)
    assert tensors(forward(preview=False, keep_latents=False)([row("a")])).keys() == {"latents"}


def test_a_row_that_cannot_be_used_is_noted_and_its_neighbours_are_untouched():
    def damaged(size):
        raise BadImage("damaged", "b.png", "cut short")

    def infinite(size):
        return torch.full((1, 3, size, size), torch.inf)

    bad = [
        ImageRow("b", "a cat", 0.0, damaged),
        ImageRow("c", "a cat", 0.0, infinite),
        row("d", prompt=None),
        row("e", label=1.5),
        row("f", label=math.nan),
    ]
    good = [row("a"), row("g", prompt="", label=None), row("h", prompt="キャット " * 9_999)]
    found = forward(batch_size=8)([good[0], *bad, *good[1:]])
    assert [(reject["key"], reject["reason"]) for reject in found.rejects] == [
        ("b", "damaged"),
        ("d", "prompt"),
        ("e", "label"),
        ("f", "label"),
        ("c", "latents"),
    ]
    expected = forward(batch_size=8)(good)
    assert found.columns == expected.columns
    torch.testing.assert_close(tensors(found)["latents"], tensors(expected)["latents"], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 9}, "size must be a multiple of 2"),
        ({"size": 0}, "size must be at least 1"),
        ({"levels_per_image": 10}, "at most 9, the levels of scheduler 'flow:10'"),
        ({"levels_per_image": 0}, "levels_per_image must be at least 1"),
        ({"preview_size": 0}, "preview_size must be at least 1"),
        ({"noise": "some"}, "noise must be one of trajectory, fresh"),
        ({"show": "noise"}, "show must be one of noisy, x0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        forward(**options)


def test_a_preview_of_another_latent_space_is_refused(tmp_path):
    vae = tiny_vaes.kl()
    space = space_of_vae(vae, "a")
    with pytest.raises(LatentSpaceError, match="8 channels, those of the VAE have 4"):
        ForwardNoise(vae, space, parse_grids("ddim"), LinearPreview(8), NoiseOptions(size=8))
    with pytest.raises(LatentSpaceError, match="factors sdxl are of another latent space"):
        make_preview("linear", vae, space, "sdxl", None)
    LinearPreview(4).save(tmp_path / "factors.safetensors", space_of_vae(tiny_vaes.kl(scaling_factor=0.7), "b"), {})
    with pytest.raises(LatentSpaceError, match="fitted to the latent space 'b'"):
        make_preview("linear", vae, space, str(tmp_path / "factors.safetensors"), None)
    with pytest.raises(InputError, match="needs factors"):
        make_preview("linear", vae, space, None, None)
    with pytest.raises(InputError, match="needs a decoder"):
        make_preview("tiny", vae, space, None, None)


# --- sources


def write_table(file: Path, **changes) -> Path:
    keys = [f"{i:02d}" for i in range(10)]
    columns = {
        "key": keys,
        "prompt": [f"prompt {i}" for i in range(10)],
        "path": [f"{i}.png" for i in range(10)],
        "label": [i / 10 for i in range(10)],
        "split": ["train" if i % 3 else "test" for i in range(10)],
    }
    columns = {name: values for name, values in (columns | changes).items() if values is not None}
    pq.write_table(pa.table(columns), file, row_group_size=4)
    return file


@pytest.fixture
def data(tmp_path):
    """A table of ten pictures, of which number 7 is damaged, and a VAE."""
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((12, 10)).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:60])
    tiny_vaes.kl().save_pretrained(tmp_path / "vae")
    write_table(tmp_path / "table.parquet")
    return tmp_path


def test_any_range_of_a_table_is_the_same_rows(data):
    source = TableImages(data / "table.parquet", data)
    assert len(source) == 10
    keys = [f"{i:02d}" for i in range(10)]
    for start in range(10):
        for stop in range(start, 13):
            assert [found.key for found in source.rows(start, stop)] == keys[start:stop]
    third = next(source.rows(3, 4))
    assert (third.key, third.prompt, third.label) == ("03", "prompt 3", 0.3)
    assert third.read(4).shape == (1, 3, 4, 4)
    train = TableImages(data / "table.parquet", data, "train")
    assert [found.key for found in train.rows(0, 6)] == ["01", "02", "04", "05"]


def test_a_table_may_lie_in_zip_parts_and_have_no_labels(data):
    with zipfile.ZipFile(data / "part-000001.zip", "w") as file:
        file.write(data / "3.png", "3.png")
    table = write_table(
        data / "zipped.parquet", path=None, label=None, zip=["part-000001.zip"] * 10, member=["3.png"] * 10
    )
    found = next(TableImages(table, data).rows(3, 4))
    assert found.label is None
    assert found.read(4).equal(next(TableImages(data / "table.parquet", data).rows(3, 4)).read(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "no column 'prompt'"),
        ({"path": None}, "no column 'zip'"),
        ({"split": None}, "no column 'split'"),
        ({"key": ["a"] * 3 + list("bcdefgh")}, "2 rows whose key came before"),
        ({"key": [None, *"abcdefghi"]}, "rows without a key"),
        ({"key": ["", *"abcdefghi"]}, "rows without a key"),
        ({"label": ["bad"] * 10}, "row group 0 .* cannot be read"),
    ],
)
def test_a_table_that_is_none_is_refused(data, changes, message):
    with pytest.raises(InputError, match=message):
        list(TableImages(write_table(data / "other.parquet", **changes), data, "train").rows(0, 10))


def test_a_file_that_is_no_table_is_refused(data):
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        TableImages(data / "3.png", data)
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        TableImages(data / "missing.parquet", data)


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Twelve pictures to train on and twelve to test on, as idx files."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for images, labels in FILES.values():
        pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
        (folder / f"{images}.gz").write_bytes(
            gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 12, 28, 28) + pixels.tobytes())
        )
        (folder / f"{labels}.gz").write_bytes(
            gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 12) + bytes(range(10)) + b"\0\1")
        )
    monkeypatch.setenv("MOE_ARTIFACTS_FASHION", str(folder))
    return folder


def test_fashion_mnist_is_a_source(fashion):
    source = FashionImages("train")
    rows = list(source.rows(9, 99))
    assert [found.key for found in rows] == ["fashion-train-00009", "fashion-train-00010", "fashion-train-00011"]
    assert "boot" in rows[0].prompt and [found.prompt for found in source.rows(9, 12)] == [r.prompt for r in rows]
    assert rows[0].read(32).shape == (1, 3, 32, 32)
    assert not rows[0].read(32).equal(rows[1].read(32))
    with pytest.raises(InputError, match="size must be 32"):
        rows[0].read(64)
    with pytest.raises(InputError, match="split must be one of train, test"):
        FashionImages("validation")
    (fashion / f"{FILES['train'][0]}.gz").write_bytes(b"damaged")
    with pytest.raises(InputError, match="not a whole gzip file"):
        FashionImages("train")


# --- the command line


def arguments(data: Path, out: str, *more: str) -> list[str]:
    given = {"--source": "table.parquet", "--images": ".", "--vae": "vae", "--out": out}
    paths = [text for name, value in given.items() for text in (name, str(data / value))]
    shape = ["--size", "8", "--images-per-shard", "3", "--schedulers", "ddim:10,flow:10", "--batch-size", "2"]
    return [*paths, *shape, *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its bytes, temporary ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_writes_shards_that_can_be_read_back(data, capsys):
    assert main(arguments(data, "out")) == 0
    assert "36 rows; rejected: 1 damaged" in capsys.readouterr().out
    shards = shard_files(data / "out")
    assert [path.name for path in shards] == ["000000.parquet", "000001.parquet", "000002.parquet", "000003.parquet"]
    table = pa.concat_tables([pq.read_table(path) for path in shards])
    assert table.schema.names == ["key", "prompt", "label", "seed", "scheduler", "step", "log_snr"]
    keys = [f"{i:02d}" for i in range(10) if i != 7]
    assert table["key"].to_pylist() == [key for key in keys for _ in range(4)]
    assert table["label"].to_pylist()[4] == pytest.approx(0.1)
    assert np.isfinite(table["log_snr"].to_numpy()).all()
    for path in shards:
        assert load_file(path.with_suffix(".safetensors"))["previews"].shape == (
            pq.read_metadata(path).num_rows,
            3,
            8,
            8,
        )
    pairs = read_pairs(data / "out")
    batch = pairs.batch(torch.tensor([35, 4]))
    assert batch.prompts == ["prompt 9", "prompt 1"] and batch.label.tolist() == pytest.approx([0.9, 0.1])
    assert batch.images[0].equal(load_file(shards[3].with_suffix(".safetensors"))["previews"][3] / 255)
    rejects = pq.read_table(data / "out" / "rejects" / "000002.parquet").to_pylist()
    assert [(reject["key"], reject["reason"]) for reject in rejects] == [("07", "damaged")]
    meta = json.loads((data / "out" / "meta.json").read_text())
    assert meta["shards"] == 4 and meta["latent_space"]["scaling_factor"] == 0.5


def test_workers_share_out_the_shards_and_write_what_one_would(data):
    assert main(arguments(data, "one", "--noise", "fresh")) == 0
    for worker in (2, 0, 1):
        assert main(arguments(data, "three", "--noise", "fresh", "--shard", f"{worker}/3")) == 0
    assert contents(data / "three") == contents(data / "one")


def test_a_run_goes_on_with_the_shards_that_are_missing(data):
    assert main(arguments(data, "out")) == 0
    whole = contents(data / "out")
    (data / "out" / "000001.parquet").unlink()  # as if killed before the last of its files was there
    for name in ("000001.safetensors", "000001.parquet"):
        (data / "out" / f".{name}-abc").mkdir()
        (data / "out" / f".{name}-abc" / name).write_bytes(b"half")
    (data / "out" / "000000.safetensors").write_bytes(b"untouched")
    assert [path.name for path in shard_files(data / "out")] == ["000000.parquet", "000002.parquet", "000003.parquet"]
    assert main(arguments(data, "out")) == 0
    assert contents(data / "out") == whole | {"000000.safetensors": b"untouched"}


def test_a_folder_of_another_run_is_refused(data, capsys):
    assert main(arguments(data, "out")) == 0
    for more, message in ((["--seed", "1"], "seed=0, this run has 1"), (["--keep-latents"], "keep_latents=False")):
        assert main(arguments(data, "out", *more)) == 2
        assert message in capsys.readouterr().err
    write_table(data / "table.parquet", label=None)
    assert main(arguments(data, "out")) == 2
    assert "made with source=" in capsys.readouterr().err


def test_a_folder_of_other_weights_by_the_same_name_is_refused(data, capsys):
    space, factors = space_of_vae(tiny_vaes.kl(), "a"), data / "factors.safetensors"
    linear = ["--preview", "linear", "--factors", str(factors)]
    LinearPreview(4).save(factors, space, {})
    assert main(arguments(data, "out", *linear)) == 0
    brighter = LinearPreview(4)
    torch.nn.init.ones_(brighter.factors.bias)
    brighter.save(factors, space, {})
    assert main(arguments(data, "out", *linear)) == 2
    assert "made with preview_sha256=" in capsys.readouterr().err
    vae = tiny_vaes.kl()
    torch.nn.init.zeros_(vae.encoder.conv_in.weight)
    vae.save_pretrained(data / "vae")
    assert main(arguments(data, "out", *linear)) == 2
    assert "made with vae_sha256=" in capsys.readouterr().err


def test_grids_that_differ_between_their_ends_only_are_told_apart(data):
    noise, source = forward(schedulers="ddim:10"), TableImages(data / "table.parquet", data)
    facts = [noise_job(noise, source, data / "out", {}).facts]
    (grid,) = noise.grids
    noise.grids = [dataclasses.replace(grid, levels=(*grid.levels[:4], level(0.123), *grid.levels[5:]))]
    facts.append(noise_job(noise, source, data / "out", {}).facts)
    assert {name for name in facts[0] if facts[0][name] != facts[1][name]} == {"levels_sha256"}


def test_a_device_that_is_none_is_refused_before_anything_is_written(data, capsys):
    assert main(arguments(data, "out", "--device", "gpu")) == 2
    assert capsys.readouterr().err.startswith("error: device 'gpu'") and not (data / "out").exists()


def test_a_full_disk_leaves_whole_shards_and_a_message(data, capsys, monkeypatch):
    assert main(arguments(data, "whole")) == 0
    written = []

    def save(tensors, path):
        written.append(path)
        if len(written) == 3:
            Path(path).write_bytes(b"half of it")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return saved(tensors, path)

    saved = row_jobs.save_file
    monkeypatch.setattr(row_jobs, "save_file", save)
    assert main(arguments(data, "out")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in shard_files(data / "out")] == ["000000.parquet", "000001.parquet"]
    assert main(arguments(data, "out")) == 0
    assert contents(data / "out") == contents(data / "whole")


def test_a_shard_without_rows_has_no_tensors(data, capsys):
    table = write_table(data / "table.parquet", split=["test"] * 3 + ["train"] * 7)
    assert main([*arguments(data, "out", "--split", "train"), "--source", str(table)]) == 0
    assert "24 rows" in capsys.readouterr().out
    assert pq.read_metadata(shard_files(data / "out")[0]).num_rows == 0
    assert not (data / "out" / "000000.safetensors").exists()


def test_fashion_mnist_and_a_pipelines_own_noise_schedule(data, fashion, capsys):
    (data / "pipe").mkdir()
    (data / "vae").rename(data / "pipe" / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(data / "pipe" / "scheduler")
    assert model_scheduler(str(data / "pipe")).config.shift == 3.0
    assert model_scheduler(str(data)) is None
    given = ["--fashion", "--split", "test", "--vae", str(data / "pipe"), "--out", str(data / "out")]
    more = ["--schedulers", "flow:10", "--levels-per-image", "9", "--preview", "none"]
    assert main([*given, *more]) == 0
    assert "108 rows" in capsys.readouterr().out
    (shard,) = shard_files(data / "out")
    assert load_file(shard.with_suffix(".safetensors"))["latents"].shape == (108, 4, 16, 16)
    (shifted,) = parse_grids("flow:10:shift=3")
    expected = [found.log_snr for found in shifted.levels] * 12
    assert pq.read_table(shard)["log_snr"].to_numpy() == pytest.approx(expected, abs=1e-5)  # float32


def test_previews_are_chosen_on_the_command_line(data, capsys):
    space = space_of_vae(tiny_vaes.kl(), "a")
    LinearPreview(4).save(data / "factors.safetensors", space, {})
    tiny_vaes.tiny().save_pretrained(data / "tiny")
    linear = ["--preview", "linear", "--factors", str(data / "factors.safetensors")]
    assert main(arguments(data, "linear", *linear)) == 0
    assert main(arguments(data, "tiny", "--preview", "tiny", "--decoder", str(data / "tiny"))) == 0
    for name, size in (("linear", 4), ("tiny", 8)):
        assert load_file(data / name / "000000.safetensors")["previews"].shape == (12, 3, size, size)
    capsys.readouterr()
    assert main(arguments(data, "other", "--preview", "tiny", "--decoder", str(data / "vae"))) == 2
    assert "decoder must be an AutoencoderTiny, got AutoencoderKL" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["1", "2/2", "-1/2", "a/b", "0/0", ""])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(InputError, match="shard must be i/n"):
        parse_shard(shard)


def test_a_source_needs_its_images(data, capsys):
    given = ["--source", str(data / "table.parquet"), "--vae", str(data / "vae"), "--out", str(data / "out")]
    assert main(given) == 2
    assert "a source needs images" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_ten_times_writes_what_an_uninterrupted_one_does(data):
    given = ["--images-per-shard", "1", "--levels-per-image", "2"]
    start = time.perf_counter()
    assert main(arguments(data, "whole", *given)) == 0
    kill_ten_times(main, arguments(data, "out", *given), data / "out", time.perf_counter() - start)
    assert main(arguments(data, "out", *given)) == 0
    found = {name: content for name, content in contents(data / "out").items() if not re.search(r"(^|/)\.", name)}
    assert found == contents(data / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_ray_writes_what_a_loop_would(data, monkeypatch):
    pytest.importorskip("ray", reason="Ray Data is the optional extra [scale]")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # leaves nothing at home
    assert main(arguments(data, "loop")) == 0
    assert main(arguments(data, "ray", "--ray", "--ray-workers", "2")) == 0
    assert contents(data / "ray") == contents(data / "loop")
