"""The scorer: one step at a time, whole trajectories, and its file."""

from __future__ import annotations

import dataclasses
import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from scorers import TINY_CLIP, tiny_config, tiny_scorer
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_artifacts.accumulator import Accumulated
from moe_artifacts.config import EmbedderConfig, FeatureConfig, PreviewConfig
from moe_artifacts.errors import CheckpointError, ConfigError, InputError, LatentSpaceError
from moe_artifacts.preview import VaePreview
from moe_artifacts.scorer import ArtifactScorer, step_features
from moe_artifacts.trajectory import Trajectory

LOG_SNRS = (-4.0, -1.0, 2.5, 6.0)
PROMPTS = ["a coat", "a bag", "a coat", "a boot", "a shirt"]
SCORES = ("artifact_prob", "exit_prob", "exit_cdf", "cumulative_artifact_prob", "cumulative_clean_prob")


def latents(seed: int = 0, batch: int = 5) -> torch.Tensor:
    """[batch step channel height width]"""
    return torch.randn(batch, len(LOG_SNRS), 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def trajectory(x0: torch.Tensor) -> Trajectory:
    return Trajectory(
        prompts=PROMPTS[: len(x0)],
        seeds=list(range(len(x0))),
        step=[1, 3, 6, 9],
        log_snr=torch.tensor(LOG_SNRS),
        scores={},
        num_steps=10,
        x0=x0,
        latents=x0.flip(0),
    )


@pytest.mark.parametrize("use_noisy", [False, True])
def test_steps_one_by_one_equal_the_whole_trajectory(use_noisy):
    scorer, x0 = tiny_scorer(use_noisy=use_noisy), latents()
    whole = scorer.score(trajectory(x0)).scores
    session = scorer.session(5, PROMPTS)
    for t, log_snr in enumerate(LOG_SNRS):
        score = session.step(x0=x0[:, t], log_snr=log_snr, latents=x0.flip(0)[:, t] if use_noisy else None)
        for name in SCORES:  # float32 sums in another order
            torch.testing.assert_close(getattr(score, name), whole[name][:, t], atol=1e-5, rtol=1e-4)
        assert score.gate_weights.sum(dim=-1).tolist() == pytest.approx([1.0] * 5, abs=1e-6)
        assert score.finite.all()


def test_a_scorer_of_noisy_latents_sees_nothing_else():
    scorer, x0 = tiny_scorer(shows="noisy"), latents()
    recorded = trajectory(x0)
    whole = scorer.score(recorded).scores["cumulative_artifact_prob"]
    other = scorer.score(dataclasses.replace(recorded, x0=latents(seed=1))).scores["cumulative_artifact_prob"]
    assert torch.equal(whole, other)
    as_prediction = tiny_scorer().score(dataclasses.replace(recorded, x0=recorded.latents))
    assert torch.equal(whole, as_prediction.scores["cumulative_artifact_prob"])
    session = scorer.session(5, PROMPTS)
    for t, log_snr in enumerate(LOG_SNRS):
        score = session.step(x0=x0[:, t], log_snr=log_snr, latents=x0.flip(0)[:, t])
        torch.testing.assert_close(score.cumulative_artifact_prob, whole[:, t], atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="looks at the noisy latents: pass latents, or record them"):
        scorer.score(dataclasses.replace(recorded, latents=None))


def test_rows_that_leave_do_not_change_the_others():
    scorer, x0 = tiny_scorer(), latents()
    whole = scorer.score(trajectory(x0)).scores["cumulative_artifact_prob"]
    session, alive = scorer.session(5, PROMPTS), torch.arange(5)
    for t, log_snr in enumerate(LOG_SNRS):
        score = session.step(x0=x0[alive, t], log_snr=log_snr)
        torch.testing.assert_close(score.cumulative_artifact_prob, whole[alive, t], atol=1e-5, rtol=1e-4)
        keep = torch.arange(len(alive))[1:] if t % 2 == 0 else torch.arange(len(alive))[::2]
        session.keep(keep)
        alive = alive[keep]
    assert len(alive) >= 1


def test_a_score_does_not_depend_on_batch_mates():
    scorer, x0 = tiny_scorer(), latents()
    together = scorer.score(trajectory(x0)).scores["artifact_prob"]
    alone = scorer.score(trajectory(x0[:1])).scores["artifact_prob"]
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_is_nan_from_then_on_and_its_neighbours_are_untouched(bad):
    scorer, x0 = tiny_scorer(), latents()
    expected = scorer.score(trajectory(x0)).scores["cumulative_artifact_prob"]
    x0[2, 1, 0, 0, 0] = bad
    whole = scorer.score(trajectory(x0)).scores["cumulative_artifact_prob"]
    session = scorer.session(5, PROMPTS)
    for t, log_snr in enumerate(LOG_SNRS):
        score = session.step(x0=x0[:, t], log_snr=log_snr)
        assert score.finite.tolist() == [True, True, t < 1, True, True]
        assert score.cumulative_artifact_prob[2].isnan() == (t >= 1)
        others = [0, 1, 3, 4]
        torch.testing.assert_close(score.cumulative_artifact_prob[others], expected[others, t], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole[others, t], expected[others, t], atol=1e-5, rtol=1e-4)
    assert whole[2].isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_any_float_type_are_scored_in_float32(dtype):
    scorer, x0 = tiny_scorer(), latents().half().to(dtype)
    score = scorer.session(5, PROMPTS).step(x0=x0[:, 0], log_snr=-4.0)
    same = scorer.session(5, PROMPTS).step(x0=x0[:, 0].float(), log_snr=-4.0)
    assert score.artifact_prob.dtype == torch.float32
    torch.testing.assert_close(score.artifact_prob, same.artifact_prob)


def test_noise_levels_outside_the_range_are_clamped():
    scorer, x0 = tiny_scorer(), latents()
    below = scorer.session(5, PROMPTS).step(x0=x0[:, 0], log_snr=-50.0)
    at = scorer.session(5, PROMPTS).step(x0=x0[:, 0], log_snr=-5.0)
    torch.testing.assert_close(below.artifact_prob, at.artifact_prob)
    assert below.exit_prob.tolist() == [0.0] * 5  # no progress made, so nothing can be decided


def test_the_prompt_changes_the_score_and_is_only_read_where_the_config_says_so():
    scorer, x0 = tiny_scorer(), latents()[:, 0]
    one = scorer.session(5, ["a coat"] * 5).step(x0=x0, log_snr=0.0).artifact_prob
    two = scorer.session(5, ["a handbag"] * 5).step(x0=x0, log_snr=0.0).artifact_prob
    assert not torch.allclose(one, two)
    blind = tiny_scorer(use_prompt=False)
    assert blind.session(5).step(x0=x0, log_snr=0.0).artifact_prob.isfinite().all()


def test_the_change_is_per_unit_of_progress():
    config = FeatureConfig(embed_dim=2, use_prompt=False)
    now, before = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    features = step_features(config, now, before, torch.tensor([[0.5]]))
    assert features.tolist() == [[1.0, 0.0, 2.0, -2.0]]
    assert step_features(config, now, now, torch.tensor([[0.5]])).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_what_cannot_be_scored_is_refused():
    scorer, x0 = tiny_scorer(), latents()[:, 0]
    with pytest.raises(InputError, match="pass prompts"):
        scorer.session(5)
    with pytest.raises(InputError, match="one per image, 5, got 2"):
        scorer.session(5, ["a", "b"])
    session = scorer.session(5, PROMPTS)
    with pytest.raises(LatentSpaceError, match=r"4, height, width.*\(5, 16, 8, 8\)"):
        session.step(x0=torch.zeros(5, 16, 8, 8), log_snr=0.0)
    with pytest.raises(InputError, match="5 rows, the living images, got 3"):
        session.step(x0=x0[:3], log_snr=0.0)
    with pytest.raises(InputError, match="pass latents"):
        tiny_scorer(use_noisy=True).session(5, PROMPTS).step(x0=x0, log_snr=0.0)
    recorded = trajectory(latents())
    with pytest.raises(InputError, match="holds no x0"):
        scorer.score(dataclasses.replace(recorded, x0=None))


def test_a_saved_scorer_is_the_same_scorer(tmp_path):
    scorer, x0 = tiny_scorer(), latents()
    scorer.save_pretrained(tmp_path / "scorer")
    again = ArtifactScorer.from_pretrained(tmp_path / "scorer")
    assert again.config == scorer.config
    before, after = (s.score(trajectory(x0)).scores["cumulative_artifact_prob"] for s in (scorer, again))
    assert torch.equal(before, after)
    assert sorted(p.name for p in (tmp_path / "scorer").iterdir()) == ["config.json", "model.safetensors"]


def test_float16_files_are_half_the_size_and_nearly_the_same(tmp_path):
    scorer, x0 = tiny_scorer(), latents()
    scorer.save_pretrained(tmp_path / "full")
    scorer.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    half = ArtifactScorer.from_pretrained(tmp_path / "half")
    before, after = (s.score(trajectory(x0)).scores["artifact_prob"] for s in (scorer, half))
    torch.testing.assert_close(before, after, atol=5e-3, rtol=0)  # ten bits of mantissa through a few layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_hash_of_the_clip_weights_is_that_of_the_file(tmp_path, dtype):
    embedder = tiny_config().embedder
    told = dataclasses.replace(embedder, weights_sha256=tiny_scorer().embedder.weights_sha256())
    scorer = tiny_scorer(embedder=told)
    scorer.save_pretrained(tmp_path, dtype=dtype)
    again = ArtifactScorer.from_pretrained(tmp_path)
    assert again.config.embedder.weights_sha256 == again.embedder.weights_sha256()
    again.save_pretrained(tmp_path / "again", dtype=dtype)  # rounding twice changes nothing
    assert ArtifactScorer.from_pretrained(tmp_path / "again").config == again.config
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["embedder.clip.logit_scale"] += 1
    save_file(state, path)
    with pytest.raises(CheckpointError, match="SHA-256"):
        ArtifactScorer.from_pretrained(tmp_path)


@pytest.fixture
def named_clip(monkeypatch):
    """open_clip knows a tiny model by name, and of its pretrained tags none."""
    import open_clip.factory

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", TINY_CLIP)
    return EmbedderConfig(model="tiny-clip", embed_dim=TINY_CLIP["embed_dim"])


def test_the_weights_of_a_named_model_without_a_tag_are_in_the_checkpoint(named_clip, tmp_path):
    scorer, x0 = tiny_scorer(embedder=named_clip, use_prompt=False), latents()[:, 0]
    scorer.save_pretrained(tmp_path)
    again = ArtifactScorer.from_pretrained(tmp_path)
    assert torch.equal(again.embed(x0), scorer.embed(x0))


def test_named_weights_are_fetched_into_the_cache_that_was_named_or_not_at_all(named_clip, tmp_path, monkeypatch):
    import open_clip

    calls, create = [], open_clip.create_model

    def created(model, pretrained, **options):
        calls.append((pretrained, options["cache_dir"]))
        return create(model)

    monkeypatch.setattr(open_clip, "create_model", created)
    tiny_scorer(embedder=dataclasses.replace(named_clip, pretrained="a-tag")).save_pretrained(tmp_path)
    assert "embedder.clip.logit_scale" not in load_file(tmp_path / "model.safetensors")
    calls.clear()
    ArtifactScorer.from_pretrained(tmp_path, cache_dir="/cache")
    assert calls == [("a-tag", "/cache")]
    with pytest.raises(ConfigError, match=r"tiny-clip \(a-tag\) in the network; set HF_HUB_OFFLINE=1"):
        ArtifactScorer.from_pretrained(tmp_path, local_files_only=True)
    assert len(calls) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ArtifactScorer.from_pretrained(tmp_path, local_files_only=True)
    assert len(calls) == 2


def test_many_previews_are_embedded_a_few_at_a_time(monkeypatch):
    scorer, x0 = tiny_scorer(use_noisy=True), latents()
    expected = scorer.score(trajectory(x0)).scores
    sizes = []
    embed = scorer.embed
    monkeypatch.setattr(scorer, "embed", lambda x: sizes.append(len(x)) or embed(x))
    monkeypatch.setattr("moe_artifacts.scorer.PREVIEWS_AT_ONCE", 7)
    found = scorer.score(trajectory(x0)).scores
    assert max(sizes) == 7 and sum(sizes) == 2 * 20
    for name in SCORES:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)


def test_a_scorer_takes_latents_of_another_device():
    """Fake tensors: shapes, dtypes and devices without data, so that this needs no accelerator."""
    scorer = tiny_scorer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        embedding = scorer.embed(torch.empty(2, 4, 8, 8, device="cuda", dtype=torch.float16))
    assert embedding.device.type == "cpu" and embedding.dtype == torch.float32


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, found none")
@pytest.mark.parametrize("scorer_moves", [False, True])
def test_scores_do_not_depend_on_where_scorer_and_latents_are(scorer_moves):
    scorer, x0 = tiny_scorer(), latents()
    expected = scorer.score(trajectory(x0)).scores["artifact_prob"]
    device = torch.accelerator.current_accelerator()
    if scorer_moves:
        scorer.to(device)
    session = scorer.session(5, PROMPTS)
    steps = [session.step(x0=x0[:, i].to(device), log_snr=s).artifact_prob.cpu() for i, s in enumerate(LOG_SNRS)]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(scorer.score(trajectory(x0)).scores["artifact_prob"], expected, atol=1e-4, rtol=0)


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path):
    tiny_scorer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["experts"]["hidden_dim"] = config["exit_head"]["state_dim"] = 20
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected"):
        ArtifactScorer.from_pretrained(tmp_path)


def test_a_preview_of_the_users_own_is_asked_for_and_not_stored(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=4,
    ).eval()
    config = tiny_config(preview=PreviewConfig(kind="vae", channels=4))
    with pytest.raises(ConfigError, match="pass preview="):
        ArtifactScorer(config)
    scorer = ArtifactScorer(config, VaePreview(vae))
    scorer.save_pretrained(tmp_path)
    again = ArtifactScorer.from_pretrained(tmp_path, preview=VaePreview(vae))
    x0 = latents()[:, 0]
    scores = [s.session(5, PROMPTS).step(x0=x0, log_snr=0.0).artifact_prob for s in (scorer, again)]
    assert torch.equal(*scores)
    with pytest.raises(ConfigError, match="leave preview out"):
        ArtifactScorer(tiny_config(), VaePreview(vae))


def test_scores_are_sums_of_the_exit_distribution():
    scores = tiny_scorer().score(trajectory(latents())).scores
    total = scores["cumulative_artifact_prob"] + scores["cumulative_clean_prob"] + 1 - scores["exit_cdf"]
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    assert (scores["cumulative_artifact_prob"].diff(dim=1) >= 0).all()
    assert {f.name for f in dataclasses.fields(Accumulated)} >= set(SCORES) - {"artifact_prob"}
