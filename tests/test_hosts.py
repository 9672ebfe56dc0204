"""The two loops of docs/hosts.md: the page shows the files in examples/, and they do what it says."""

from __future__ import annotations

import dataclasses
import logging
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SD3Transformer2DModel,
)
from diffusers.modular_pipelines import StableDiffusion3AutoBlocks

from examples.k_diffusion_loop import sample_euler, wrapped
from examples.modular_pipeline import AllAborted, watched
from moe_artifacts import ArtifactGuard, ArtifactScorer, bundled_pipeline
from moe_artifacts.config import ThresholdConfig
from moe_artifacts.schedulers import set_scheduler

ROOT = Path(__file__).parents[1]
ATOL = 1e-5  # latents of order 1 in float32: a smaller batch sums in another order


def test_the_page_shows_the_files():
    page = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (examples/\w+\.py)\n(.*?)```", page, re.DOTALL)
    files = {f"examples/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")}
    assert dict(blocks) == files
    assert page.count("```") == 2 * len(blocks)  # nothing else on it is code


# k-diffusion


class Scripted(tiny.ScriptedScorer):
    """One that leaves its input as it is: this loop goes on with the very tensor."""

    def session(self, *args, **kwargs):
        session = super().session(*args, **kwargs)
        step = session.step
        session.step = lambda *, x0, **rest: step(x0=x0.clone(), **rest)
        return session


def sampled(scorer, x, denoise, sigmas, prompts=None):
    with torch.no_grad():
        return sample_euler(denoise, x, sigmas, scorer, prompts)


@pytest.fixture(scope="module")
def loop():
    """A start of four images on a grid of six sigmas, and a denoiser that knows which image a row is."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(4, 4, 8, 8, generator=generator)
    sigmas = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.4, 0.1, 0.0])
    x = targets + sigmas[0] * torch.randn(4, 4, 8, 8, generator=generator)
    return x, lambda x, sigma, rows: targets[rows] + 0.1 * torch.tanh(x), sigmas


def test_the_k_diffusion_example_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "k_diffusion_loop.py"), run_name="__main__")
    assert re.fullmatch(r"\d\d of 32 images kept, aborted \[\d+.*\]\n", capsys.readouterr().out)


@pytest.mark.parametrize("abort_at", [{}, {1: 0, 3: 0}, {0: 1, 2: 3, 3: 3}, {2: 5}], ids=str)
def test_rows_of_the_k_diffusion_loop_equal_those_of_the_full_run(loop, abort_at):
    full, everyone = sampled(Scripted(), *loop)
    assert everyone.tolist() == [0, 1, 2, 3]
    assert (full[1:] - full[:-1]).abs().amax(dim=(1, 2, 3)).min() > 1000 * ATOL  # a mistaken row would show
    scorer = Scripted(abort_at)
    x, alive = sampled(scorer, *loop)
    assert alive.tolist() == [i for i in range(4) if i not in abort_at]
    torch.testing.assert_close(x, full[alive], atol=ATOL, rtol=0)
    assert [images for images, *_ in scorer.seen] == [
        [i for i in range(4) if abort_at.get(i, 9) >= step] for step in range(6)
    ]


def test_the_k_diffusion_loop_ends_once_nothing_is_left(loop):
    scorer = Scripted(dict.fromkeys(range(4), 2))
    x, alive = sampled(scorer, *loop)
    assert (x.shape, alive.tolist(), len(scorer.seen)) == ((0, 4, 8, 8), [], 3)


def test_a_row_that_is_not_finite_leaves_the_k_diffusion_loop(loop):
    x, denoise, sigmas = loop
    full, _ = sampled(Scripted(), *loop)
    broken = x.clone()
    broken[2, 0, 0, 0] = torch.nan
    found, alive = sampled(Scripted(), broken, denoise, sigmas)
    assert alive.tolist() == [0, 1, 3]
    torch.testing.assert_close(found, full[alive], atol=ATOL, rtol=0)


def test_the_k_diffusion_loop_and_the_guard_agree():
    """Same noise, same sigmas, same scorer: the same images go, and the latents of the others are the same."""
    prompts, steps = ["an ankle boot", "a pullover", "a bag", "a dress"] * 2, 10
    pipe, _ = bundled_pipeline("fashion")
    scorer = ArtifactScorer.from_pretrained("fashion")
    rule = ThresholdConfig(rule="posterior", threshold=0.06)
    scorer.config = dataclasses.replace(scorer.config, threshold=rule)
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    set_scheduler(pipe, "euler")
    pipe.scheduler.set_timesteps(steps)
    sigmas, unit = pipe.scheduler.sigmas, pipe.scheduler.init_noise_sigma
    x, alive = sampled(scorer, noise * unit, wrapped(pipe, prompts)[0], sigmas, prompts)
    output = ArtifactGuard(scorer)(
        pipe, prompts, latents=noise, num_inference_steps=steps, guidance_scale=1.0, output_type="latent"
    )
    assert 2 <= len(alive) <= 6  # there is something to agree on
    assert alive.tolist() == output.kept_indices
    torch.testing.assert_close(x, output.images, atol=1e-4, rtol=0)  # sigma is found again from a float32 table


# modular pipelines


@pytest.fixture(scope="module")
def parts():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 16}
        transformer = SD3Transformer2DModel(
            **sizes, sample_size=8, in_channels=4, out_channels=4, num_layers=2, caption_projection_dim=16,
            pooled_projection_dim=16, pos_embed_max_size=8,
        ).eval()  # fmt: skip
        vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0).eval()
    return {"transformer": transformer, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}


def modular(parts: dict[str, Any], *, watch: bool = True) -> Any:
    """Without the text encoders: embeddings are given."""
    blocks = StableDiffusion3AutoBlocks()
    for name in ("text_encoder", "vae_encoder"):
        blocks.sub_blocks.pop(name)
    pipe = (watched(blocks) if watch else blocks).init_pipeline()
    pipe.update_components(**parts)
    loop = pipe._blocks.sub_blocks["denoise"].sub_blocks["text2image"].sub_blocks["denoise"]
    loop.set_progress_bar_config(disable=True)
    return pipe


def arguments(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        **{name: (4, 6, 16) for name in ("prompt_embeds", "negative_prompt_embeds")},
        **{name: (4, 16) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")},
        "latents": (4, 4, 8, 8),
    }
    values: dict[str, Any] = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**values, "num_inference_steps": 6, "output_type": "pt", "output": ["images", "kept_indices"], **changes}


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("abort_at", [{}, {1: 0, 3: 0}, {0: 1, 2: 3, 3: 3}, {2: 5}], ids=str)
def test_rows_of_the_modular_pipeline_equal_those_of_the_plain_one(parts, abort_at, guided):
    given = arguments() if guided else arguments(negative_prompt_embeds=None, negative_pooled_prompt_embeds=None)
    full = modular(parts, watch=False)(**given | {"output": "images"})
    assert (full[1:] - full[:-1]).abs().amax(dim=(1, 2, 3)).min() > 1000 * ATOL  # a mistaken row would show
    pipe, scorer = modular(parts), tiny.ScriptedScorer(abort_at)
    for _ in range(2):  # nothing is left over for a second call
        out = pipe(**given, scorer=scorer)
        assert out["kept_indices"].tolist() == [i for i in range(4) if i not in abort_at]
        torch.testing.assert_close(out["images"], full[out["kept_indices"]], atol=ATOL, rtol=0)
        assert [len(images) for images, *_ in scorer.seen] == [
            sum(abort_at.get(i, 9) >= step for i in range(4)) for step in range(6)
        ]


def test_the_modular_loop_ends_once_nothing_is_left(parts, caplog):
    scorer = tiny.ScriptedScorer(dict.fromkeys(range(4), 2))
    with pytest.raises(AllAborted):
        modular(parts)(**arguments(), scorer=scorer)
    assert len(scorer.seen) == 3
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_row_that_is_not_finite_leaves_the_modular_loop(parts):
    full = modular(parts, watch=False)(**arguments(output="images"))
    given = arguments()
    given["latents"][2, 0, 0, 0] = torch.nan
    out = modular(parts)(**given, scorer=tiny.ScriptedScorer())
    assert out["kept_indices"].tolist() == [0, 1, 3]
    torch.testing.assert_close(out["images"], full[[0, 1, 3]], atol=ATOL, rtol=0)


def test_the_modular_block_refuses_a_scheduler_that_remembers_the_batch(parts):
    pipe = modular(parts | {"scheduler": FlowMatchHeunDiscreteScheduler()})
    with pytest.raises(TypeError, match="FlowMatchHeunDiscreteScheduler may remember the full batch"):
        pipe(**arguments(), scorer=tiny.ScriptedScorer())
