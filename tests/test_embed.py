from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_vaes
import torch
from safetensors.torch import load_file, save_file

from moe_artifacts.config import EmbedderConfig, to_dict
from moe_artifacts.embedder import ClipEmbedder, state_sha256
from moe_artifacts.errors import CheckpointError, InputError, LatentSpaceError
from moe_artifacts.files import read_json, write_json
from moe_artifacts.latent_spaces import space_of_vae
from moe_artifacts.preview import LinearPreview
from moe_artifacts.trajectory import Trajectory
from tests.kills import kill_ten_times
from tests.scorers import EMBED_DIM, TINY_CLIP, tiny_scorer
from tests.some_pairs import trajectory
from training.embed import COLUMNS, Embed, embed_job, load_embedder, main
from training.embedded import EmbeddedRows
from training.forward_noise import ForwardNoise, NoiseOptions, noise_job
from training.image_rows import ImageRow
from training.level_images import NoisedSource, TrajectorySource, open_source
from training.noise_grids import parse_grids
from training.row_jobs import run_job, shard_files

# diffusers 0.42 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


def embedder() -> ClipEmbedder:
    torch.manual_seed(0)
    return ClipEmbedder(EmbedderConfig(model="custom", embed_dim=EMBED_DIM, model_config=TINY_CLIP))


def preview() -> LinearPreview:
    torch.manual_seed(1)
    return LinearPreview(channels=4, patch=2)


def runs(folder: Path) -> Path:
    """Eight images at three steps, and four at the last two of them, without labels, with margins."""
    dataclasses.replace(trajectory([f"a bag {i}" for i in range(4)] * 2, seed=1), meta={}).save(folder / "00000")
    short = trajectory(["a bag 3", "", "ein Schuh", "a bag 0"], seed=2, labelled=False)
    assert short.x0 is not None
    short = dataclasses.replace(
        short,
        step=short.step[1:],
        log_snr=short.log_snr[1:],
        x0=short.x0[:, 1:],
        latents=None,
        meta={"setting": {"scheduler": "dpm"}, "margin": [0.5, None, -1.0, 2.0]},
    )
    short.save(folder / "00001")
    return folder


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs(tmp_path_factory.mktemp("trajectories"))


class Pictures:
    """Nine pictures, of which number 4 cannot be read; a picture of noise each."""

    def __len__(self) -> int:
        return 9

    def rows(self, start: int, stop: int):
        for i in range(start, min(stop, len(self))):
            yield ImageRow(f"{i}", f"prompt {i % 3}", None if i == 0 else i / 10, self._reader(i))

    def facts(self) -> dict[str, Any]:
        return {"pictures": 9}

    def _reader(self, number: int):
        def read(size: int) -> torch.Tensor:
            if number == 4:
                raise ValueError("no picture")
            return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(number))

        return read


def noised(folder: Path, kind: str = "previews") -> Path:
    vae = tiny_vaes.kl()
    options = NoiseOptions(size=8, levels_per_image=4, images_per_shard=4)
    shown = preview() if kind == "previews" else None
    noise = ForwardNoise(vae, space_of_vae(vae, "tiny"), parse_grids("ddim:10,flow:12"), shown, options)
    run_job(noise_job(noise, Pictures(), folder, {}))
    return folder


@pytest.fixture(scope="module")
def previews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noised(tmp_path_factory.mktemp("noised"))


def tables(folder: Path) -> list[dict[str, Any]]:
    return pa.concat_tables([pq.read_table(path) for path in shard_files(folder)]).to_pylist()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its bytes, temporary ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Half a unit in the last place of float16 at 1, and the rounding of batches of other sizes.
CLOSE = {"rtol": 0, "atol": 1e-3}

# --- rows


@pytest.mark.parametrize("batch", [1, 5, 64])
@torch.no_grad()
def test_every_level_of_every_image_is_embedded(trajectories, tmp_path, batch):
    model, shown = embedder(), preview()
    run_job(embed_job(Embed(TrajectorySource(trajectories), model, shown, batch), tmp_path))
    rows = EmbeddedRows(tmp_path)
    found = rows.take(torch.arange(12))
    images = [
        (one, i)
        for name in ("00000", "00001")
        for one in [Trajectory.load(trajectories / name)]
        for i in range(len(one.prompts))
    ]
    assert len(rows) == len(images) == 12
    for row, (one, place) in enumerate(images):
        missing = 3 - len(one.step)
        for level in range(len(one.step)):
            expected = model.embed_images(shown(one.x0[place : place + 1, level].float()))[0]
            torch.testing.assert_close(found.embedding[row, missing + level], expected, **CLOSE)
        torch.testing.assert_close(found.text[row], model.embed_texts([one.prompts[place]])[0], **CLOSE)
        assert found.log_snr[row, missing:].equal(one.log_snr)
        assert found.spent[row, missing:].tolist() == pytest.approx([(step + 1) / 10 for step in one.step])
        assert found.log_snr[row, :missing].isnan().all() and not found.embedding[row, :missing].any()
    assert rows.prompt_id.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 3, 4, 5, 0]


def test_labels_margins_and_settings_come_along(trajectories, tmp_path):
    run_job(embed_job(Embed(TrajectorySource(trajectories), embedder(), preview(), batch=3), tmp_path))
    rows = tables(tmp_path)
    assert [row["label"] for row in rows] == [0, 1] * 4 + [None] * 4
    assert [row["margin"] for row in rows] == [None] * 8 + [0.5, None, -1.0, 2.0]
    assert [row["key"] for row in rows[7:9]] == ["00000/00007", "00001/00000"]
    assert [row["setting"] for row in rows[7:9]] == ["", '{"scheduler": "dpm"}']
    assert {row["num_steps"] for row in rows} == {10}
    assert pq.read_schema(tmp_path / "000000.parquet").equals(COLUMNS)
    meta = read_json(tmp_path / "meta.json")
    assert (meta["embed_dim"], meta["checks"], meta["shards"]) == (EMBED_DIM, 3, 2)
    assert meta["embedder_sha256"] == embedder().weights_sha256()
    assert meta["preview_sha256"] == state_sha256(preview().state_dict())
    assert EmbeddedRows(tmp_path).margin.isnan().tolist() == [True] * 8 + [False, True, False, False]


@torch.no_grad()
def test_previews_of_forward_noise_are_embedded_as_they_are(previews, tmp_path):
    model = embedder()
    run_job(embed_job(Embed(NoisedSource(previews), model, batch=3), tmp_path))
    found, rows = EmbeddedRows(tmp_path), tables(tmp_path)
    batch = found.take(torch.arange(len(found)))
    assert [row["key"] for row in rows] == ["0", "1", "2", "3", "5", "6", "7", "8"]
    assert [row["label"] for row in rows] == [None, *(pytest.approx(i / 10) for i in (1, 2, 3, 5, 6, 7, 8))]
    assert found.prompt_id.tolist() == [0, 1, 2, 0, 2, 0, 1, 2]
    row = 0
    for path in shard_files(previews):
        table, pictures = pq.read_table(path).to_pylist(), load_file(path.with_suffix(".safetensors"))["previews"]
        for start in range(0, len(table), 4):
            expected = model.embed_images(pictures[start : start + 4].float() / 255)
            torch.testing.assert_close(batch.embedding[row], expected, **CLOSE)
            levels = table[start : start + 4]
            assert rows[row]["key"] == levels[0]["key"]
            assert batch.log_snr[row].tolist() == [level["log_snr"] for level in levels]
            steps = 10 if levels[0]["scheduler"] == "ddim:10" else 12
            assert json.loads(rows[row]["setting"]) == {"scheduler": levels[0]["scheduler"]}
            assert rows[row]["num_steps"] == steps
            assert batch.spent[row].tolist() == pytest.approx([(level["step"] + 1) / steps for level in levels])
            row += 1
    assert row == len(found)


def test_latents_of_forward_noise_get_a_preview(previews, tmp_path):
    source = open_source(noised(tmp_path / "latents", "latents"))
    assert (source.kind, open_source(previews).kind) == ("latents", "previews")
    run_job(embed_job(Embed(source, embedder(), preview()), tmp_path / "a"))
    run_job(embed_job(Embed(open_source(previews), embedder()), tmp_path / "b"))
    a, b = (EmbeddedRows(tmp_path / name).take(torch.arange(8)) for name in "ab")
    assert a.log_snr.equal(b.log_snr)
    # Previews are stored in 8 bits and latents in float16; the tower is random, and rounds to about the same.
    torch.testing.assert_close(a.embedding, b.embedding, rtol=0, atol=0.02)


def test_an_image_that_is_not_finite_is_rejected_and_no_other(trajectories, tmp_path):
    one = Trajectory.load(trajectories / "00000")
    broken = one.x0.clone()
    broken[2, 1, 0, 0, 0] = torch.nan
    broken[7, 2] = torch.inf
    dataclasses.replace(one, x0=broken).save(tmp_path / "broken")
    one.save(tmp_path / "whole")
    for name in ("broken", "whole"):
        run_job(embed_job(Embed(TrajectorySource(tmp_path / name), embedder(), preview(), 8), tmp_path / f"{name}-out"))
    rejects = pq.read_table(tmp_path / "broken-out" / "rejects" / "000000.parquet").to_pylist()
    assert [(reject["key"], reject["reason"]) for reject in rejects] == [
        ("broken/00002", "latents"),
        ("broken/00007", "latents"),
    ]
    kept = [0, 1, 3, 4, 5, 6]
    found, expected = (EmbeddedRows(tmp_path / f"{name}-out") for name in ("broken", "whole"))
    a, b = found.take(torch.arange(6)), expected.take(torch.tensor(kept))
    assert a.embedding.equal(b.embedding) and a.text.equal(b.text) and a.label.equal(b.label)


def test_an_embedding_that_is_not_finite_is_rejected(previews, tmp_path, monkeypatch):
    model = embedder()
    broken = torch.zeros(9 * 4, 1)
    broken[6] = torch.nan  # of 16 pictures of the first shard, the third of image 1
    parts = iter(broken.split(3))
    original = model.embed_images
    monkeypatch.setattr(model, "embed_images", lambda shown: original(shown) + next(parts)[: len(shown)])
    run_job(embed_job(Embed(NoisedSource(previews), model, batch=3), tmp_path))
    [reject] = pq.read_table(tmp_path / "rejects" / "000000.parquet").to_pylist()
    assert (reject["key"], reject["reason"]) == ("1", "embedding")
    assert [row["key"] for row in tables(tmp_path)] == ["0", "2", "3", "5", "6", "7", "8"]


def test_an_image_that_the_tower_fails_on_is_rejected_and_no_other(trajectories, tmp_path, monkeypatch):
    model = embedder()

    def embed_images(pictures):
        if (pictures.flatten(1).mean(dim=1) == cursed).any():
            raise RuntimeError("no such picture")
        return original(pictures)

    shown, original = preview(), model.embed_images
    cursed = shown(Trajectory.load(trajectories / "00001").x0[2, 1:].float()).flatten(1).mean(dim=1)
    monkeypatch.setattr(model, "embed_images", embed_images)
    # One picture at a time: a preview of another batch may differ in its last bit.
    run_job(embed_job(Embed(TrajectorySource(trajectories), model, shown, 1), tmp_path))
    assert [row["key"] for row in tables(tmp_path)] == [f"00000/{i:05d}" for i in range(8)] + [
        f"00001/{i:05d}" for i in (0, 1, 3)
    ]
    [reject] = pq.read_table(tmp_path / "rejects" / "000001.parquet").to_pylist()
    assert reject == {"key": "00001/00002", "reason": "error", "detail": "RuntimeError: no such picture"}


def test_a_preview_of_another_latent_space_is_no_reject(trajectories, tmp_path):
    with pytest.raises(LatentSpaceError, match="8 channels"):
        run_job(embed_job(Embed(TrajectorySource(trajectories), embedder(), LinearPreview(8)), tmp_path))


def test_a_batch_of_none_is_refused(trajectories):
    with pytest.raises(InputError, match="batch must be at least 1, got 0"):
        Embed(TrajectorySource(trajectories), embedder(), preview(), batch=0)


# --- sources


def test_a_source_that_is_none_is_refused(previews, tmp_path):
    with pytest.raises(InputError, match=r"not a trajectory folder, nor a folder of them"):
        open_source(tmp_path)
    runs(tmp_path)
    (tmp_path / "00001" / "meta.json").unlink()
    with pytest.raises(InputError, match=r"cannot read .*00001.meta.json"):
        open_source(tmp_path)


def test_meta_that_is_of_something_else_is_refused(tmp_path):
    runs(tmp_path)
    write_json(tmp_path / "00001" / "meta.json", [])
    with pytest.raises(InputError, match=r"00001.meta.json is not that of a trajectory: it lacks steps"):
        open_source(tmp_path)
    write_json(tmp_path / "meta.json", {"levels_per_image": 4, "shards": 1})
    with pytest.raises(InputError, match=r"meta.json lacks num_steps, pictures, show; run training.forward_noise anew"):
        open_source(tmp_path)


def test_it_is_told_what_the_pictures_are_of(tmp_path):
    runs(tmp_path / "runs")
    for folder, shows in ((tmp_path / "runs", "x0"), (noised(tmp_path / "noised"), "noisy")):
        assert embed_job(Embed(open_source(folder), embedder()), tmp_path / "out").facts["shows"] == shows


def test_shards_that_are_missing_are_told(tmp_path):
    folder = noised(tmp_path)
    (folder / "000001.parquet").unlink()
    with pytest.raises(InputError, match=r"has 2 of 3 shards; run the stage"):
        open_source(folder)


@pytest.mark.parametrize("name", ["000001.parquet", "000001.safetensors"])
def test_a_shard_that_is_damaged_is_left_out_and_told(tmp_path, name):
    folder = noised(tmp_path / "noised")
    (folder / name).write_bytes(b"half")
    with pytest.raises(
        InputError, match=r"1 of 3 shards failed, the other shards are complete; the first is shard 1: .*make it again"
    ):
        run_job(embed_job(Embed(open_source(folder), embedder()), tmp_path / "out"))
    assert [path.stem for path in shard_files(tmp_path / "out")] == ["000000", "000002"]


def test_tensors_of_another_length_are_told(tmp_path):
    folder = noised(tmp_path / "noised")
    path = folder / "000001.safetensors"
    save_file({"previews": load_file(path)["previews"][:3]}, path)
    with pytest.raises(InputError, match="has 12 rows, its tensors 3"):
        run_job(embed_job(Embed(open_source(folder), embedder()), tmp_path / "out"))


def test_trajectories_without_x0_or_with_too_few_margins_are_told(tmp_path):
    one = trajectory(["a", "b"])
    dataclasses.replace(one, x0=None).save(tmp_path / "a" / "0")
    dataclasses.replace(one, meta={"margin": [1.0]}).save(tmp_path / "b" / "0")
    for name, message in (("a", "holds no x0: record it again"), ("b", "margin must be one per image, got 1")):
        with pytest.raises(InputError, match=message):
            run_job(
                embed_job(Embed(TrajectorySource(tmp_path / name), embedder(), preview()), tmp_path / f"{name}-out")
            )


# --- embedders


@torch.no_grad()
def test_an_embedder_is_tuned_a_scorer_or_a_model_of_open_clip(tmp_path):
    tuned = embedder()
    for parameter in tuned.parameters():
        parameter.mul_(1.5)
    (tmp_path / "tuned").mkdir()
    state = tuned.clip.state_dict()
    save_file(state, tmp_path / "tuned" / "embedder.safetensors")
    write_json(
        tmp_path / "tuned" / "embedder.json",
        to_dict(dataclasses.replace(tuned.config, weights_sha256=state_sha256(state))),
    )
    found, shown = load_embedder(str(tmp_path / "tuned"))
    assert shown is None and found.weights_sha256() == tuned.weights_sha256()

    scorer = tiny_scorer(seed=5)
    scorer.save_pretrained(tmp_path / "scorer")
    found, shown = load_embedder(str(tmp_path / "scorer"))
    assert found.weights_sha256() == scorer.embedder.weights_sha256()
    assert shown is not None and state_sha256(shown.state_dict()) == state_sha256(scorer.preview.state_dict())

    write_json(tmp_path / "model.json", TINY_CLIP)
    found, shown = load_embedder(str(tmp_path / "model.json"), str(tmp_path / "tuned" / "embedder.safetensors"))
    assert shown is None and found.weights_sha256() == tuned.weights_sha256()

    with pytest.raises(InputError, match="ViT-B-32 needs --pretrained"):
        load_embedder("ViT-B-32")

    for name in ("tuned", "scorer"):
        with pytest.raises(InputError, match="has weights of its own: leave pretrained out"):
            load_embedder(str(tmp_path / name), "openai")
    (tmp_path / "tuned" / "embedder.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"embedder.safetensors"):
        load_embedder(str(tmp_path / "tuned"))


def test_the_bundled_scorer_is_an_embedder():
    found, shown = load_embedder("fashion")
    assert found.config.embed_dim == 128
    assert shown is not None and shown.channels == 4


# --- the command line


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    """With a scorer of random weights beside ``out``."""
    scorer = out.parent / "scorer"
    if not scorer.exists():
        tiny_scorer().save_pretrained(scorer)
    return [str(source), "--embedder", str(scorer), "--out", str(out), "--batch", "8", *more]


def test_workers_write_what_one_would(trajectories, previews, tmp_path, capsys):
    for source in (trajectories, previews):
        one, two = tmp_path / f"{source.name}-one", tmp_path / f"{source.name}-two"
        assert main(arguments(source, one)) == 0
        for worker in (1, 0):
            assert main(arguments(source, two, "--shard", f"{worker}/2")) == 0
        assert contents(two) == contents(one)
    told = capsys.readouterr().out
    assert "12 images; rejected: none" in told and "8 images; rejected: none" in told


def test_the_preview_is_that_of_the_scorer_or_the_one_named(trajectories, previews, tmp_path, capsys):
    assert main(arguments(trajectories, tmp_path / "a")) == 0
    assert read_json(tmp_path / "a" / "meta.json")["preview_sha256"] == state_sha256(tiny_scorer().preview.state_dict())
    named = preview()
    named.save(tmp_path / "named.safetensors", space_of_vae(tiny_vaes.kl(), "a"), {})
    assert main(arguments(trajectories, tmp_path / "b", "--preview", str(tmp_path / "named.safetensors"))) == 0
    assert read_json(tmp_path / "b" / "meta.json")["preview_sha256"] == state_sha256(named.state_dict())
    assert main(arguments(previews, tmp_path / "c")) == 0
    assert read_json(tmp_path / "c" / "meta.json")["preview_sha256"] is None
    capsys.readouterr()
    assert main(arguments(previews, tmp_path / "d", "--preview", "sdxl")) == 2
    assert "hold previews already: leave preview out" in capsys.readouterr().err
    write_json(tmp_path / "model.json", TINY_CLIP)
    assert main([str(trajectories), "--embedder", str(tmp_path / "model.json"), "--out", str(tmp_path / "e")]) == 2
    assert "are latents: name a preview" in capsys.readouterr().err


def test_trajectories_judged_anew_need_another_folder(tmp_path, capsys):
    runs(tmp_path / "runs")
    assert main(arguments(tmp_path / "runs", tmp_path / "out")) == 0
    one = Trajectory.load(tmp_path / "runs" / "00000")
    dataclasses.replace(one, label=1 - one.label).save(tmp_path / "runs" / "00000")
    assert main(arguments(tmp_path / "runs", tmp_path / "out")) == 2
    assert "holds shards made with source=" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_ten_times_writes_what_an_uninterrupted_one_does(tmp_path):
    for number in range(12):
        trajectory(["a bag", "a boot"] * 20, seed=number).save(tmp_path / "runs" / f"{number:05d}")
    start = time.perf_counter()
    assert main(arguments(tmp_path / "runs", tmp_path / "whole")) == 0
    seconds = time.perf_counter() - start
    kill_ten_times(main, arguments(tmp_path / "runs", tmp_path / "out"), tmp_path / "out", seconds)
    assert main(arguments(tmp_path / "runs", tmp_path / "out")) == 0
    found = {
        name: content for name, content in contents(tmp_path / "out").items() if not Path(name).name.startswith(".")
    }
    assert found == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_ray_writes_what_a_loop_would(trajectories, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray Data is the optional extra [scale]")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert main(arguments(trajectories, tmp_path / "loop")) == 0
    assert main(arguments(trajectories, tmp_path / "ray", "--ray", "--ray-workers", "2")) == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "loop")
