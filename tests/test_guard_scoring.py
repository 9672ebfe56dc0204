from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from moe_artifacts.config import FeatureConfig
from moe_artifacts.errors import InputError
from moe_artifacts.guard.guard import ArtifactGuard
from tests.guarded import ATOL, PROMPTS, guarded, settings, statuses, undisturbed, unwatched


@pytest.mark.parametrize("name", ["ddim", "euler", "pndm"])
def test_only_the_check_steps_are_scored(name):
    scorer = tiny.ScriptedScorer(check_progress=(0.5, 0.75))
    output = guarded(scorer, name, num_inference_steps=12)
    assert output.trajectory.step == list(output.setting.scored_steps)
    assert 2 <= len(scorer.seen) == len(output.trajectory.step) <= 3
    assert output.trajectory.step[-1] == output.trajectory.num_steps - 1
    torch.testing.assert_close(output.trajectory.log_snr, torch.tensor([log_snr for *_, log_snr, _ in scorer.seen]))
    first = (output.trajectory.log_snr[0].item() + 6) / 14
    assert first >= 0.5


def test_x0_of_the_last_step_is_what_the_scheduler_ends_at():
    scorer = tiny.ScriptedScorer()
    pipe = tiny.stable_diffusion("euler")  # its last step goes all the way to the prediction
    output = ArtifactGuard(scorer)(pipe, PROMPTS, **settings(output_type="latent"))
    torch.testing.assert_close(scorer.seen[-1][1], output.images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_noisy_latents_are_shown_at_variance_one(name):
    features = FeatureConfig(embed_dim=4, use_delta=False, use_prompt=False, use_noisy=True)
    embedder, gate = tiny.EmbedderConfig(model="custom", embed_dim=4, model_config={}), tiny.scorer_config().gate
    gate = tiny.GateConfig(num_experts=2, embed_dim=4, log_snr_range=gate.log_snr_range)
    scorer = tiny.ScriptedScorer(features=features, embedder=embedder, gate=gate)
    guarded(scorer, name)
    latents = scorer.seen[0][3]
    assert latents.std().item() == pytest.approx(1, abs=0.1)  # of 1024 numbers; Euler's own start has a deviation of 14
    assert tiny.ScriptedScorer().seen == []


def test_the_scorer_is_told_one_prompt_per_image_in_the_pipelines_order():
    scorer = tiny.ScriptedScorer(abort_at={1: 2})
    output = guarded(scorer, prompt=["a shoe", "a bag"], num_images_per_prompt=2)
    assert scorer.prompts == ["a shoe", "a shoe", "a bag", "a bag"]
    assert output.trajectory.prompts == scorer.prompts
    assert [(v.prompt, v.seed) for v in output.verdicts] == list(zip(scorer.prompts, [100, 101, 102, 103], strict=True))


def test_a_seed_is_known_only_for_a_generator_of_ones_own():
    one = torch.Generator().manual_seed(3)
    assert guarded(tiny.ScriptedScorer(), generator=one).trajectory.seeds == [None] * 4
    one.manual_seed(3)
    assert guarded(tiny.ScriptedScorer(), prompt="a shoe", generator=one).trajectory.seeds == [3]


def test_prompt_embeds_need_prompts_only_for_a_scorer_that_looks_at_them():
    pipe = tiny.stable_diffusion()
    positive, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    given = settings(prompt_embeds=positive, negative_prompt_embeds=negative)
    output = ArtifactGuard(tiny.ScriptedScorer({1: 2}))(pipe, **given)
    torch.testing.assert_close(output.images, undisturbed()[[0, 2, 3]], atol=ATOL, rtol=0)
    assert output.verdicts[0].prompt == ""

    looks = tiny.ScriptedScorer(
        features=FeatureConfig(embed_dim=4, use_delta=False, use_prompt=True),
        embedder=tiny.EmbedderConfig(model="custom", embed_dim=4, model_config={}),
        gate=tiny.GateConfig(num_experts=2, embed_dim=4, log_snr_range=(-6.0, 8.0)),
    )
    with pytest.raises(InputError, match=r"give prompts=\[\.\.\.\] beside prompt_embeds"):
        ArtifactGuard(looks)(pipe, **given)
    with pytest.raises(InputError, match="prompts has 1 entries, expected 4"):
        ArtifactGuard(looks)(pipe, prompts=["a shoe"], **given)
    ArtifactGuard(looks)(pipe, prompts=PROMPTS, **given | {"generator": tiny.generators(4)})
    assert looks.prompts == PROMPTS


def test_the_trajectory_can_be_saved_and_read(tmp_path):
    output = guarded(tiny.ScriptedScorer({1: 2}, {2: 1}))
    output.trajectory.save(tmp_path / "run")
    loaded = type(output.trajectory).load(tmp_path / "run")
    assert loaded.prompts == PROMPTS
    assert loaded.meta["scheduler"] == "DDIMScheduler"
    torch.testing.assert_close(
        loaded.scores["statistic"], output.trajectory.scores["statistic"], equal_nan=True, rtol=0, atol=0
    )


# rows that are not finite


@pytest.mark.parametrize(
    ("on_abort", "name"), [("record", "dpm"), *(("drop", name) for name in ("euler-a", "unipc", "pndm"))]
)
def test_a_row_that_is_not_finite_is_an_error_and_leaves_its_neighbours_alone(on_abort, name):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    broken = latents.clone()
    broken[1, 0, 0, 0] = torch.nan
    scorer = tiny.ScriptedScorer({2: 3})
    output = guarded(scorer, name, on_abort=on_abort, latents=broken, output_type="latent")
    expected = unwatched(name, latents=latents, output_type="latent")
    assert statuses(output) == ["kept", "error", "aborted", "kept"]
    assert output.verdicts[1].step == 0
    assert np.isnan(output.verdicts[1].artifact_prob)
    assert [images for images, *_ in scorer.seen][1] == [0, 2, 3]
    assert output.kept_indices == ([0, 3] if on_abort == "drop" else [0, 1, 2, 3])
    others = [i for i in output.kept_indices if i != 1]
    images = output.images[[output.kept_indices.index(i) for i in others]]
    torch.testing.assert_close(images, expected[others], atol=ATOL, rtol=0)
    assert images.isfinite().all()


@pytest.mark.parametrize("on_abort", ["drop", "record"])
def test_an_image_that_breaks_after_it_was_cleared_is_an_error(on_abort):
    def spoil(pipe, i, t, tensors):
        if i == 3:
            tensors["latents"][2] = torch.inf
        return tensors

    scorer = tiny.ScriptedScorer(clear_at=dict.fromkeys(range(4), 1))
    output = guarded(scorer, on_abort=on_abort, callback_on_step_end=spoil, output_type="latent")
    assert statuses(output) == ["cleared", "cleared", "error", "cleared"]
    assert output.verdicts[2].step == 5
    assert len(output.images) == (3 if on_abort == "drop" else 4)
