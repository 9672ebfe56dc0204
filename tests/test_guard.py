from __future__ import annotations

import copy
import functools
import inspect

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, HeunDiscreteScheduler, LCMScheduler, StableDiffusionPipeline

from moe_artifacts.config import FeatureConfig, LatentSpaceConfig, ThresholdConfig
from moe_artifacts.errors import ConfigError, GuardStateError, InputError, LatentSpaceError, UnsupportedPipelineError
from moe_artifacts.guard.guard import ArtifactGuard
from moe_artifacts.guard.output import Setting, promise

PROMPTS = ["a shoe", "a bag", "shirt", "coat"]
ATOL = 1e-4  # float32 images: a smaller batch sums in another order


def settings(**changes):
    values = {"num_inference_steps": 6, "guidance_scale": 3.0, "generator": tiny.generators(4), "output_type": "pt"}
    return values | changes


def unwatched(name="ddim", prompt=PROMPTS, **changes):
    return tiny.stable_diffusion(name)(prompt, **settings(**changes)).images


@functools.cache
def undisturbed(name="ddim", guidance_scale=3.0):
    """The full run that many tests compare with; made once."""
    return unwatched(name, guidance_scale=guidance_scale)


def guarded(scorer, name="ddim", prompt=PROMPTS, on_abort="drop", **changes):
    return ArtifactGuard(scorer, on_abort=on_abort)(tiny.stable_diffusion(name), prompt, **settings(**changes))


def statuses(output):
    return [verdict.status for verdict in output.verdicts]


class CountedCalls:
    """How many rows the denoiser and the VAE's decoder were given, call by call."""

    def __init__(self, pipe):
        self.denoiser, self.decoder = [], []
        pipe.unet.register_forward_pre_hook(lambda module, args: self.denoiser.append(len(args[0])))
        decode = pipe.vae.decode
        pipe.vae.decode = lambda z, *args, **kwargs: (self.decoder.append(len(z)), decode(z, *args, **kwargs))[1]


# record


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_record_changes_no_bit(name, guidance_scale):
    scorer = tiny.ScriptedScorer(abort_at={0: 1, 2: 3}, clear_at={1: 2})
    output = guarded(scorer, name, on_abort="record", guidance_scale=guidance_scale)
    assert torch.equal(output.images, undisturbed(name, guidance_scale))
    assert output.kept_indices == [0, 1, 2, 3]
    assert statuses(output) == ["aborted", "cleared", "aborted", "kept"]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_images_come_as_the_output_type_says(output_type):
    expected = unwatched(output_type=output_type)
    for on_abort, kept in (("record", [0, 1, 2, 3]), ("drop", [0, 2])):
        scorer = tiny.ScriptedScorer(abort_at={1: 5, 3: 5})
        output = guarded(scorer, on_abort=on_abort, output_type=output_type)
        assert output.kept_indices == kept
        assert type(output.images) is type(expected)
        for found, i in zip(output.images, kept, strict=True):
            found, image = np.asarray(found, dtype=float), np.asarray(expected[i], dtype=float)
            # The denoiser always ran on the full batch here; only the decoder saw fewer rows, or PIL the other side of
            # a rounding.
            np.testing.assert_allclose(
                found, image, atol={"drop": 1 if output_type == "pil" else ATOL, "record": 0}[on_abort]
            )


def test_record_leaves_the_random_state_of_torch_as_an_unwatched_run_does():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected, after = unwatched("euler-a", generator=None), torch.get_rng_state()
        torch.manual_seed(5)
        output = guarded(tiny.ScriptedScorer(abort_at={0: 1}), "euler-a", on_abort="record", generator=None)
        assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(output.images, expected)


def test_record_goes_on_scoring_what_was_decided():
    scorer = tiny.ScriptedScorer(abort_at={0: 1}, clear_at={1: 2})
    output = guarded(scorer, on_abort="record")
    assert all(images == [0, 1, 2, 3] for images, *_ in scorer.seen)
    assert output.trajectory.scores["artifact_prob"].isfinite().all()
    assert output.verdicts[0].step == 1
    assert output.steps_run == output.steps_full == 24


# drop


@pytest.mark.parametrize(
    ("name", "guidance_scale", "abort_at"),
    [
        *((name, guidance, {0: 1, 2: 1, 3: 3}) for name in tiny.SCHEDULERS for guidance in (1.0, 3.0)),  # 4 to 2 to 1
        *((name, 3.0, {0: 0, 1: 0, 2: 0, 3: 4}) for name in ("ddpm", "pndm")),  # to 1 at the first step, then to 0
        *((name, 3.0, {3: 4}) for name in ("dpm", "unipc")),  # at the last step but one
    ],
)
def test_kept_images_equal_those_of_the_undisturbed_run(name, guidance_scale, abort_at):
    expected = undisturbed(name, guidance_scale)
    output = guarded(tiny.ScriptedScorer(abort_at), name, guidance_scale=guidance_scale)
    assert output.kept_indices == [i for i in range(4) if i not in abort_at]
    if output.kept_indices:
        torch.testing.assert_close(output.images, expected[output.kept_indices], atol=ATOL, rtol=0)
    assert statuses(output) == ["aborted" if i in abort_at else "kept" for i in range(4)]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ["a shoe", "a bag"], "num_images_per_prompt": 2},
        {"prompt": "a shoe", "num_images_per_prompt": 4},
        {"guidance_rescale": 0.7},
        {"negative_prompt": ["coat", "shirt", "a bag", "a shoe"]},
        {"eta": 1.0},
        {"generator": "one"},
        {"generator": "one", "eta": 1.0},
        {"generator": None, "eta": 1.0},
        {"latents": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9))},
        {"timesteps": [900, 700, 500, 300, 100, 5], "scheduler": "ddpm"},
        {"height": 16, "width": 32},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_kept_images_equal_those_of_the_undisturbed_run_for_every_argument(changes):
    def arguments():
        given = settings(**{k: v for k, v in changes.items() if k not in ("prompt", "scheduler")})
        if given["generator"] == "one":
            given["generator"] = torch.Generator().manual_seed(1)
        return given

    prompt, name = changes.get("prompt", PROMPTS), changes.get("scheduler", "ddim")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        expected = tiny.stable_diffusion(name)(prompt, **arguments()).images
        torch.manual_seed(2)
        scorer = tiny.ScriptedScorer({0: 1, 1: 2, 3: 2})
        output = ArtifactGuard(scorer)(tiny.stable_diffusion(name), prompt, **arguments())
    assert output.kept_indices == [2]
    torch.testing.assert_close(output.images, expected[2:3], atol=ATOL, rtol=0)


def test_guidance_embedded_in_the_denoiser_is_cut_too():
    """An LCM-distilled U-Net gets one guidance embedding per image, and no second half of the batch."""
    expected = tiny.stable_diffusion(time_cond_proj_dim=8)(PROMPTS, **settings()).images
    pipe = tiny.stable_diffusion(time_cond_proj_dim=8)
    output = ArtifactGuard(tiny.ScriptedScorer({0: 1, 2: 3}))(pipe, PROMPTS, **settings())
    torch.testing.assert_close(output.images, expected[[1, 3]], atol=ATOL, rtol=0)


def test_prompts_and_seeds_matter_enough_for_these_tests_to_see_a_mistaken_row():
    images = undisturbed()
    others = unwatched(prompt=PROMPTS[1:] + PROMPTS[:1])
    assert (images - others).abs().amax(dim=(1, 2, 3)).min() > 10 * ATOL  # a row with its neighbour's prompt
    assert (images[1:] - images[:-1]).abs().amax(dim=(1, 2, 3)).min() > 10 * ATOL  # a row with its neighbour's noise


@pytest.mark.parametrize("part", ["conditioning", "padding"])
def test_a_row_that_is_taken_from_the_wrong_place_shows(part, monkeypatch):
    """Sabotage: each of the two mechanisms, off by one row."""
    if part == "conditioning":
        monkeypatch.setattr("moe_artifacts.guard.rows.BATCHED_KWARGS", ())
        with pytest.raises(RuntimeError):  # two living rows, four rows of embeddings
            guarded(tiny.ScriptedScorer({0: 1, 2: 1}))
        return
    from moe_artifacts.guard.rows import LiveRows

    right = LiveRows.pad
    monkeypatch.setattr(LiveRows, "pad", lambda self, x: right(self, x).roll(int(not self.complete), 0))
    expected = undisturbed("dpm")
    output = guarded(tiny.ScriptedScorer({0: 1, 2: 1}), "dpm")
    assert (output.images - expected[output.kept_indices]).abs().max() > 10 * ATOL


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_once_no_row_is_left_nothing_more_is_computed(name, guidance_scale):
    pipe = tiny.stable_diffusion(name)
    counted, freed, seen = CountedCalls(pipe), [], []
    pipe.maybe_free_model_hooks = lambda: freed.append(True)
    output = ArtifactGuard(tiny.ScriptedScorer({0: 1, 1: 1, 2: 2, 3: 2}))(
        pipe,
        PROMPTS,
        **settings(guidance_scale=guidance_scale),
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(len(tensors["latents"])) or {},
    )
    half = 2 if guidance_scale > 1 else 1
    # The script counts scored steps; PNDM's half-step, the second call, is not one.
    expected = [4, 4, 4, 2] if name == "pndm" else [4, 4, 2]
    assert counted.denoiser == [half * rows for rows in expected]
    assert counted.decoder == []
    assert freed
    assert output.images.shape == (0, 3, 16, 16)
    assert output.kept_indices == []
    assert statuses(output) == ["aborted"] * 4
    assert output.steps_run == sum(expected)
    assert 0 not in seen
    assert output.steps_full == 4 * (7 if name == "pndm" else 6)


def test_the_steps_of_rows_that_left_are_really_not_run():
    pipe = tiny.stable_diffusion()
    counted = CountedCalls(pipe)
    output = ArtifactGuard(tiny.ScriptedScorer({0: 0, 1: 2, 2: 2}))(pipe, PROMPTS, **settings(guidance_scale=1.0))
    assert counted.denoiser == [4, 3, 3, 1, 1, 1]
    assert counted.decoder == [1]
    assert (output.steps_run, output.steps_full) == (13, 24)
    assert [verdict.step for verdict in output.verdicts] == [0, 2, 2, None]


def test_an_image_caught_at_the_last_step_is_rejected_and_not_decoded():
    pipe = tiny.stable_diffusion()
    counted = CountedCalls(pipe)
    output = ArtifactGuard(tiny.ScriptedScorer({1: 5, 2: 4}))(pipe, PROMPTS, **settings())
    assert statuses(output) == ["kept", "rejected", "aborted", "kept"]
    assert output.kept_indices == [0, 3]
    assert counted.decoder == [2]
    assert output.steps_run == 23  # only the abort at step 4 of 0 to 5 saved one
    assert len(guarded(tiny.ScriptedScorer(dict.fromkeys(range(4), 5))).images) == 0


def test_cleared_images_finish_without_being_scored():
    scorer = tiny.ScriptedScorer(abort_at={0: 2, 1: 4}, clear_at={1: 1, 3: 3})
    expected = undisturbed()
    output = guarded(scorer)
    assert [images for images, *_ in scorer.seen] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 2, 3],
        [2, 3],
        [2],
        [2],
    ]
    assert statuses(output) == ["aborted", "cleared", "kept", "cleared"]
    torch.testing.assert_close(output.images, expected[[1, 2, 3]], atol=ATOL, rtol=0)
    seen = output.trajectory.scores["artifact_prob"].isfinite().sum(dim=1).tolist()
    assert seen == [3, 2, 6, 4]


def test_all_cleared_at_once_scores_no_more():
    scorer = tiny.ScriptedScorer(clear_at=dict.fromkeys(range(4), 1))
    output = guarded(scorer)
    assert len(scorer.seen) == 2
    assert statuses(output) == ["cleared"] * 4
    assert output.trajectory.step == [0, 1]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_no_images_are_a_batch_of_the_same_kind(output_type):
    some = guarded(tiny.ScriptedScorer({0: 1}), output_type=output_type, height=16, width=32).images
    none = guarded(tiny.ScriptedScorer(dict.fromkeys(range(4), 0)), output_type=output_type, height=16, width=32).images
    assert type(none) is type(some)
    assert len(none) == 0
    if output_type != "pil":
        assert none.shape[1:] == some.shape[1:]
        assert none.dtype == some.dtype


# what the scorer sees, what is recorded


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


# callbacks of the caller


def test_a_callback_sees_the_living_rows_and_can_change_them():
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append(len(tensors["latents"]))
        return {"latents": tensors["latents"] * 0.99}

    def quiet(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * 0.99}

    expected = unwatched(callback_on_step_end=quiet)
    output = guarded(tiny.ScriptedScorer({0: 1, 2: 3}), callback_on_step_end=callback)
    assert seen == [4, 3, 3, 2, 2, 2]
    torch.testing.assert_close(output.images, expected[[1, 3]], atol=ATOL, rtol=0)


def test_a_callback_that_switches_guidance_off_works_with_fewer_rows():
    def cutoff(pipe, i, t, tensors):
        if i != 3:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    changes = {"callback_on_step_end": cutoff, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = unwatched(**changes)
    output = guarded(tiny.ScriptedScorer({0: 1, 2: 4}), **changes)
    torch.testing.assert_close(output.images, expected[[1, 3]], atol=ATOL, rtol=0)


@pytest.mark.parametrize("on_abort", ["drop", "record"])
def test_a_callback_may_interrupt_the_run(on_abort):
    def stop(pipe, i, t, tensors):
        pipe._interrupt = i == 2
        return {}

    output = guarded(tiny.ScriptedScorer({0: 1}), on_abort=on_abort, callback_on_step_end=stop)
    assert output.steps_run == (11 if on_abort == "drop" else 12)
    assert output.trajectory.step == [0, 1, 2]
    assert len(output.images) == len(output.kept_indices)


# the pipeline afterwards


class Interrupted(KeyboardInterrupt):
    """So that a test cannot mistake the user's own Ctrl-C for the one it makes."""


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@pytest.mark.parametrize("where", ["callback", "scorer"])
def test_after_an_error_everything_is_as_before(error, where, monkeypatch):
    pipe, freed = tiny.stable_diffusion("dpm"), []
    expected = undisturbed("dpm")
    before = set(vars(pipe.scheduler)), len(pipe.unet._forward_pre_hooks)

    def fail(*args, **kwargs):
        raise error

    scorer, changes = tiny.ScriptedScorer(), {}
    if where == "callback":
        changes = {"callback_on_step_end": fail}
    else:
        monkeypatch.setattr(tiny.ScriptedSession, "step", fail)
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    with pytest.raises(error):
        ArtifactGuard(scorer)(pipe, PROMPTS, **settings(**changes))
    assert (set(vars(pipe.scheduler)), len(pipe.unet._forward_pre_hooks)) == before
    assert freed == [True]
    assert torch.equal(pipe(PROMPTS, **settings()).images, expected)


@pytest.mark.parametrize("name", ["dpm", "pndm"])
@pytest.mark.parametrize("abort_at", [{0: 1, 2: 3}, dict.fromkeys(range(4), 2)], ids=["some", "all"])
def test_the_same_pipeline_can_be_used_again(name, abort_at):
    pipe, expected = tiny.stable_diffusion(name), undisturbed(name)
    guard = ArtifactGuard(tiny.ScriptedScorer(abort_at))
    first = guard(pipe, PROMPTS, **settings())
    again = guard(pipe, PROMPTS, **settings())
    assert again.verdicts == first.verdicts
    assert len(again.images) == len(first.images)
    assert torch.equal(torch.as_tensor(again.images), torch.as_tensor(first.images))
    assert torch.equal(pipe(PROMPTS, **settings()).images, expected)
    assert not pipe.unet._forward_pre_hooks
    copy.deepcopy(pipe.scheduler)


def test_one_guard_inside_another_is_refused():
    pipe, guard = tiny.stable_diffusion(), ArtifactGuard(tiny.ScriptedScorer())

    def again(pipe, i, t, tensors):
        guard(pipe, PROMPTS, **settings())
        return {}

    with pytest.raises(GuardStateError, match="watched already"):
        guard(pipe, PROMPTS, **settings(callback_on_step_end=again))
    assert len(guard(pipe, PROMPTS, **settings()).images) == 4


# what is refused, before the first step


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"prompt": []}, InputError, "prompt is an empty list"),
        ({"prompt": ("a shoe",)}, InputError, "prompt must be a string or a list of strings, got tuple"),
        ({"prompt": ["a shoe", 3, "a", "b"]}, InputError, "prompt must be a string or a list of strings"),
        ({"prompt": None}, InputError, "either prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(4, 8, 16)}, InputError, "either prompt or prompt_embeds"),
        ({"prompts": PROMPTS}, InputError, "with prompt, leave it out"),
        ({"generator": tiny.generators(3)}, InputError, "generator is a list of 3, expected 4: one per image"),
        ({"generator": tuple(tiny.generators(4))}, InputError, "generator must be a torch.Generator or a list"),
        ({"num_images_per_prompt": 0}, InputError, "num_images_per_prompt must be a whole number of at least 1"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, InputError, "latents has 1 rows, expected 4"),
        ({"return_dict": False}, UnsupportedPipelineError, "return_dict=False"),
        ({"output_type": "numpy"}, UnsupportedPipelineError, "output_type must be one of pil, np, pt, latent"),
        ({"ip_adapter_image_embeds": []}, UnsupportedPipelineError, "ip_adapter_image"),
        ({"cross_attention_kwargs": {"gligen": {}}}, UnsupportedPipelineError, r"\['gligen'\]"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(changes, error, told):
    pipe = tiny.stable_diffusion()
    counted = CountedCalls(pipe)
    given = {"prompt": PROMPTS, **settings(), **changes}
    with pytest.raises(error, match=told):
        ArtifactGuard(tiny.ScriptedScorer())(pipe, **given)
    assert counted.denoiser == []
    assert "step" not in vars(pipe.scheduler)


def test_other_pipelines_and_schedulers_are_refused_by_name():
    class MyPipeline(StableDiffusionPipeline):
        pass

    pipe, guard = tiny.stable_diffusion(), ArtifactGuard(tiny.ScriptedScorer())
    mine = MyPipeline(**pipe.components, requires_safety_checker=False)
    for other in (mine, DiffusionPipeline()):
        with pytest.raises(
            UnsupportedPipelineError, match=f"{type(other).__name__}; the guard supports StableDiffusion"
        ):
            guard(other, PROMPTS)
    for scheduler in (HeunDiscreteScheduler, LCMScheduler):
        pipe.scheduler = scheduler()
        with pytest.raises(UnsupportedPipelineError, match=f"scheduler {scheduler.__name__} is not supported"):
            guard(pipe, PROMPTS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"channels": 16}, "channels 4 instead of 16"),
        ({"scaling_factor": 0.13025}, "scaling_factor 0.18215 instead of 0.13025"),
        ({"shift_factor": 0.1}, "shift_factor 0.0 instead of 0.1"),
        ({"downsampling": 8}, "downsampling 2 instead of 8"),
        ({"vae_class": "AutoencoderTiny"}, "vae_class 'AutoencoderKL' instead of 'AutoencoderTiny'"),
    ],
)
def test_another_latent_space_is_refused(changes, told):
    space = {"name": "other", "vae_class": "AutoencoderKL", "channels": 4, "scaling_factor": 0.18215, "downsampling": 2}
    scorer = tiny.ScriptedScorer(latent_space=LatentSpaceConfig(**space | changes))
    with pytest.raises(LatentSpaceError, match=told):
        guarded(scorer)


def test_a_guard_is_refused_without_a_threshold_or_with_an_impossible_one():
    bare = tiny.ScriptedScorer(threshold=None)
    with pytest.raises(ConfigError, match="on_abort='drop' needs a threshold"):
        ArtifactGuard(bare)
    with pytest.raises(ConfigError, match=r"threshold must be in \[0, 1\], got 1.5"):
        ArtifactGuard(tiny.ScriptedScorer(), threshold=1.5)
    with pytest.raises(InputError, match="on_abort must be 'drop' or 'record', got 'mask'"):
        ArtifactGuard(bare, on_abort="mask")
    output = guarded(bare, on_abort="record")
    assert statuses(output) == ["kept"] * 4
    assert "nothing was decided" in output.report()


def test_a_number_as_threshold_keeps_the_rule_but_not_its_promise():
    own = ThresholdConfig(rule="patience", threshold=0.4, patience=2, max_risk=0.05, confidence=0.95)
    guard = ArtifactGuard(tiny.ScriptedScorer(threshold=own), threshold=0.7)
    assert guard.rule == ThresholdConfig(rule="patience", threshold=0.7, patience=2)
    assert ArtifactGuard(tiny.ScriptedScorer(threshold=None), threshold=0.7).rule.rule == "cumulative"
    assert ArtifactGuard(tiny.ScriptedScorer()).rule == tiny.scorer_config().threshold


# the report


def test_the_report_says_what_happened_and_what_is_promised():
    rule = ThresholdConfig(
        rule="cumulative",
        threshold=0.5,
        max_risk=0.05,
        confidence=0.95,
        scheduler="DDIMScheduler",
        num_inference_steps=6,
        guidance_scale=3.0,
        scored_steps=(0, 1, 2, 3, 4, 5),
    )
    scorer = tiny.ScriptedScorer({0: 1, 2: 3}, threshold=rule)
    assert guarded(scorer).report() == (
        "4 images: 2 kept, 2 aborted at steps 2 and 4 of 6; 6 of 24 denoiser steps not run\n"
        "false aborts <= 5 % (95 % sure, over the calibration prompts, DDIM, 6 steps, guidance 3)"
    )
    assert guarded(scorer, "euler", on_abort="record", num_inference_steps=7).report() == (
        "4 images: 4 kept, 2 would be aborted at steps 2 and 4 of 7; 8 of 28 denoiser steps would not be run\n"
        "threshold NOT certified in this setting: EulerDiscrete instead of DDIM, 7 steps instead of 6"
    )
    rejected = tiny.ScriptedScorer({0: 5})
    assert (
        guarded(rejected, latents=torch.full((4, 4, 8, 8), torch.nan))
        .report()
        .startswith(
            "4 images: 0 kept, 4 with non-finite latents; 20 of 24 denoiser steps not run\nthreshold 0.5 promises nothing"
        )
    )
    assert "3 kept, 1 rejected at the last step; 0 of 24" in guarded(rejected).report()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (Setting("DDIMScheduler", 6, 3.0, (1, 5)), None),
        (Setting("PNDMScheduler", 6, 3.0, (1, 5)), "PNDM instead of DDIM"),
        (Setting("DDIMScheduler", 7, 3.0, (1, 6)), "7 steps instead of 6"),
        (Setting("DDIMScheduler", None, 3.0, (1, 5)), "timesteps of your own instead of 6"),
        (Setting("DDIMScheduler", 6, 1.0, (1, 5)), "guidance 1 instead of 3"),
        (Setting("DDIMScheduler", 6, 3.0, (0, 5)), "scored steps [0, 5] instead of [1, 5]"),
    ],
)
def test_a_promise_holds_only_where_it_was_certified(setting, told):
    rule = ThresholdConfig(
        rule="cumulative",
        threshold=0.5,
        max_risk=0.05,
        confidence=0.95,
        scheduler="DDIM",
        num_inference_steps=6,
        guidance_scale=3.0,
        scored_steps=(1, 5),
    )
    text = promise(rule, setting)
    assert text.startswith("false aborts <= 5 %") if told is None else f"NOT certified in this setting: {told}" in text


def test_the_guard_reads_every_argument_of_the_pipeline_it_knows():
    """A new argument of a later diffusers may hold one entry per image: look at it, then add it here."""
    known = set(inspect.signature(StableDiffusionPipeline.__call__).parameters)
    assert known == {
        *("self", "prompt", "height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale"),
        *("negative_prompt", "num_images_per_prompt", "eta", "generator", "latents", "prompt_embeds"),
        *("negative_prompt_embeds", "ip_adapter_image", "ip_adapter_image_embeds", "output_type", "return_dict"),
        *("cross_attention_kwargs", "guidance_rescale", "clip_skip", "callback_on_step_end"),
        *("callback_on_step_end_tensor_inputs", "kwargs"),
    }
