"""The guard in the hands of a client: pipelines loaded from a folder, offloaded, compiled, in inference mode, at half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scorers
import tiny
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline
from guarded import PROMPTS, CountedCalls, settings, statuses
from tiny_pipelines import CASES

from moe_artifacts import ArtifactGuard
from moe_artifacts.guard.space import latent_space_of

ABORT_AT = {0: 1, 2: 3}
KEPT = [1, 3]
# Images in [0, 1]. A smaller batch sums in another order: a rounding or two of the type, grown by six steps.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
needs_accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, found none")


def scripted(pipe: Any, abort_at: dict[int, int] = ABORT_AT) -> tiny.ScriptedScorer:
    return tiny.ScriptedScorer(abort_at, latent_space=latent_space_of(pipe, "tiny"))


def assert_rows_equal(found: torch.Tensor, full: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert len(found) == len(KEPT)
    torch.testing.assert_close(found.float(), full[KEPT].float(), atol=TOLERANCE[dtype], rtol=0)
    others = [0, 2]
    assert (found - full[others]).abs().amax(dim=(1, 2, 3)).min() > 3 * TOLERANCE[dtype]  # a mistaken row would show


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion as ``save_pretrained`` leaves it."""
    path = tmp_path_factory.mktemp("client") / "stable-diffusion"
    tiny.stable_diffusion("dpm").save_pretrained(path)
    return path


def loaded(folder: Path, loader: Any = StableDiffusionPipeline, **options: Any) -> Any:
    pipe = loader.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def full(folder: Path) -> torch.Tensor:
    """The images of the unwatched run."""
    return loaded(folder)(PROMPTS, **settings()).images


# from_pretrained


@pytest.mark.parametrize("loader", [DiffusionPipeline, AutoPipelineForText2Image])
def test_a_pipeline_loaded_from_a_folder(folder, full, loader):
    pipe = loaded(folder, loader)
    output = ArtifactGuard(scripted(pipe))(pipe, PROMPTS, **settings())
    assert output.kept_indices == KEPT
    assert_rows_equal(output.images, full)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "pixart-sigma"])
def test_other_families_loaded_from_a_folder(name, tmp_path):
    case = CASES[name]
    pipe = case.pipe()
    pipe.save_pretrained(tmp_path)
    absent = {part: None for part, value in pipe.components.items() if value is None}  # the text encoders
    pipe = loaded(tmp_path, DiffusionPipeline, **absent)
    guidance = next(iter(case.guidance))
    full = pipe(**case.call(4, guidance)).images
    output = ArtifactGuard(scripted(pipe))(pipe, **case.call(4, guidance))
    assert output.kept_indices == KEPT
    torch.testing.assert_close(output.images, full[KEPT], atol=TOLERANCE[torch.float32], rtol=0)


# precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(folder, dtype):
    pipe = loaded(folder, dtype=dtype)
    full = pipe(PROMPTS, **settings(output_type="pt")).images
    scorer = scripted(pipe)
    assert_rows_equal(ArtifactGuard(scorer)(pipe, PROMPTS, **settings()).images, full, dtype)
    assert all(x0.dtype is torch.float32 and x0.isfinite().all() for _, x0, *_ in scorer.seen)
    masked = ArtifactGuard(scripted(pipe), "mask")(pipe, PROMPTS, **settings())
    assert_rows_equal(masked.images, full, dtype)
    recorded = ArtifactGuard(scripted(pipe), "record")(pipe, PROMPTS, **settings())
    assert torch.equal(recorded.images, full)


def test_a_scorer_sees_the_same_at_half_precision(folder):
    """A real one, in float32: its probabilities differ by what the rounding of the latents does to them."""

    def probabilities(dtype: torch.dtype) -> torch.Tensor:
        pipe = loaded(folder, dtype=dtype)
        scorer = scorers.tiny_scorer(latent_space=latent_space_of(pipe, "tiny"))
        output = ArtifactGuard(scorer, "record")(pipe, PROMPTS, **settings())
        return output.trajectory.scores["artifact_prob"]

    exact = probabilities(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(probabilities(dtype), exact, atol=0.05, rtol=0)


# inference mode


@pytest.mark.parametrize("on_abort", ["drop", "mask", "record"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_inference_mode(folder, full, mode, on_abort):
    pipe = loaded(folder)
    real = scorers.tiny_scorer(latent_space=latent_space_of(pipe, "tiny"))
    with mode():
        output = ArtifactGuard(scripted(pipe), on_abort)(pipe, PROMPTS, **settings())
        ArtifactGuard(real, on_abort, threshold=0.2)(pipe, PROMPTS, **settings())
    assert not output.images.requires_grad
    if on_abort == "record":
        assert torch.equal(output.images, full)
    else:
        assert_rows_equal(output.images, full)


# compiled denoisers


def compiled(pipe: Any, way: str, backend: str) -> Any:
    if way == "torch.compile":
        pipe.unet = torch.compile(pipe.unet, backend=backend)
    elif way == "compile":
        pipe.unet.compile(backend=backend)
    else:
        pipe.unet.compile_repeated_blocks(backend=backend)
    return pipe


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small() -> Any:
    """A U-Net of one level, which compiles in a few seconds."""
    levels = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",)}
    return tiny.stable_diffusion("dpm", **levels, up_block_types=("CrossAttnUpBlock2D",))


def check_compiled(way: str, backend: str) -> None:
    expected = small()(PROMPTS, **settings()).images
    pipe = compiled(small(), way, backend)
    full = pipe(PROMPTS, **settings()).images
    # Another order of sums, as for a smaller batch.
    torch.testing.assert_close(full, expected, atol=TOLERANCE[torch.float32], rtol=0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        recorded = ArtifactGuard(scripted(pipe), "record")(pipe, PROMPTS, **settings())
        masked = ArtifactGuard(scripted(pipe), "mask")(pipe, PROMPTS, **settings())
        again = pipe(PROMPTS, **settings()).images
        with pytest.raises(torch._dynamo.exc.RecompileError):  # so a graph that is lost is seen here
            ArtifactGuard(scripted(pipe))(pipe, PROMPTS, **settings())
    assert torch.equal(recorded.images, full)
    assert_rows_equal(masked.images, full)
    assert statuses(masked) == ["aborted", "kept", "aborted", "kept"]
    assert torch.equal(again, full)


def test_a_compiled_denoiser_keeps_its_graph_in_mask_mode(fresh_compiler):
    check_compiled("torch.compile", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("way", ["torch.compile", "compile", "compile_repeated_blocks"])
def test_a_denoiser_keeps_its_graph_in_mask_mode_however_it_is_compiled(way, backend, fresh_compiler):
    check_compiled(way, backend)


@pytest.mark.slow
def test_dropping_rows_of_a_compiled_denoiser_is_right_too(fresh_compiler):
    """It costs a new graph for each size of the batch, and one for the hook."""
    full = small()(PROMPTS, **settings()).images
    pipe = compiled(small(), "torch.compile", "aot_eager")
    output = ArtifactGuard(scripted(pipe))(pipe, PROMPTS, **settings())
    assert_rows_equal(output.images, full)


def test_mask_mode_decodes_the_kept_images_only(folder):
    pipe = loaded(folder)
    counted = CountedCalls(pipe)
    output = ArtifactGuard(scripted(pipe), "mask")(pipe, PROMPTS, **settings(guidance_scale=1.0))
    assert (counted.denoiser, counted.decoder) == ([4] * 6, [2])
    assert output.kept_indices == KEPT


# offloaded models


class Freed:
    """Counts the calls of ``pipe.maybe_free_model_hooks`` and lets them through."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        free = pipe.maybe_free_model_hooks

        def counted() -> None:
            self.calls += 1
            free()

        monkeypatch.setattr(pipe, "maybe_free_model_hooks", counted)


def check_offloaded(pipe: Any, full: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = Freed(pipe, monkeypatch)
    output = ArtifactGuard(scripted(pipe))(pipe, PROMPTS, **settings())
    assert_rows_equal(output.images.cpu(), full)
    assert freed.calls == 1  # by the pipeline itself
    output = ArtifactGuard(scripted(pipe, dict.fromkeys(range(4), 2)))(pipe, PROMPTS, **settings())
    assert output.kept_indices == []
    assert freed.calls == 2  # by the guard: the pipeline was cut short

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ArtifactGuard(scripted(pipe))(pipe, PROMPTS, **settings(callback_on_step_end=fail))
    assert freed.calls == 3
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"cpu"}
    assert len(pipe._all_hooks) == 3  # as enable_model_cpu_offload set them up
    assert_rows_equal(ArtifactGuard(scripted(pipe))(pipe, PROMPTS, **settings()).images.cpu(), full)


def test_offload_hooks_are_freed_also_when_the_run_is_cut_short(folder, full, monkeypatch):
    """With the CPU as the device to compute on: the hooks are the same, they only have nowhere to move a model to."""
    pipe = loaded(folder)
    pipe.enable_model_cpu_offload(device="cpu")
    check_offloaded(pipe, full, monkeypatch)


@needs_accelerator
def test_models_offloaded_from_an_accelerator(folder, monkeypatch):
    pipe = loaded(folder)
    pipe.enable_model_cpu_offload()
    full = pipe(PROMPTS, **settings()).images.cpu()
    check_offloaded(pipe, full, monkeypatch)
