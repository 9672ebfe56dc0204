"""A scorer in a diffusers modular pipeline: one more block in the loop, between the denoiser and the scheduler.

pipe = watched(StableDiffusion3AutoBlocks()).init_pipeline("stabilityai/stable-diffusion-3.5-medium")
pipe.load_components()
out = pipe(prompt=["a cat", "a dog"], scorer=scorer, output=["images", "kept_indices"])
"""

from __future__ import annotations

import copy

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines import ComponentSpec, InputParam, ModularPipelineBlocks, OutputParam

from moe_artifacts.decision import Decider
from moe_artifacts.noise import check_steps, noise_levels, predict_x0, progress, variance_preserving


class AllAborted(BaseException):
    """Ends the loop, which a block cannot do otherwise. No ``Exception``: diffusers would log each as an error."""


class WatchStep(ModularPipelineBlocks):
    """Takes an image out of the batch once the scorer's rule says so. Made for Stable Diffusion 3."""

    model_name = "stable-diffusion-3"
    PER_IMAGE = (  # what the other blocks of the loop hold one row an image of
        *("latents", "noise_pred", "prompt_embeds", "negative_prompt_embeds"),
        *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    )

    @property
    def expected_components(self):
        return [ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler)]

    @property
    def inputs(self):
        required = [InputParam(name, required=True) for name in ("latents", "scorer")]
        return [*required, InputParam("prompts")]  # one an image, for a scorer that reads them

    @property
    def intermediate_outputs(self):
        return [OutputParam("kept_indices", type_hint=torch.Tensor)]

    @torch.no_grad()
    def __call__(self, components, block_state, i, t):
        run, scheduler, scorer = block_state, components.scheduler, block_state.scorer
        if i == 0:
            if type(scheduler) is not FlowMatchEulerDiscreteScheduler:
                raise TypeError(f"{type(scheduler).__name__} may remember the full batch; use the one that forgets")
            run.session = scorer.session(len(run.latents), prompts=run.prompts)
            run.decider = Decider(scorer.config.threshold, len(run.latents))
            run.levels = noise_levels(scheduler)
            run.kept_indices = torch.arange(len(run.latents))
        level = run.levels[i]
        if i not in check_steps(run.levels, scorer.config):
            return components, run
        x0 = predict_x0(scheduler, run.noise_pred, run.latents, level)
        noisy = variance_preserving(run.latents, level)
        score = run.session.step(x0=x0, log_snr=level.log_snr, latents=noisy)
        decision = run.decider.step(score, progress(level.log_snr, scorer.config.log_snr_range))
        keep = (score.finite & ~decision.abort.cpu()).nonzero().flatten()
        run.session.keep(keep)
        run.decider.keep(keep)
        run.kept_indices = run.kept_indices[keep]
        if len(keep) == 0:
            raise AllAborted
        for name in self.PER_IMAGE:
            if run[name] is not None:  # no guidance, no negative prompt
                run[name] = run[name][keep.to(run.latents.device)]
        return components, run


def watched(blocks):
    """A copy of ``blocks`` with the step in its loop: a pipeline made of it is called with a scorer too."""
    blocks = copy.deepcopy(blocks)  # the blocks inside are shared by everything that diffusers makes of their class
    loop = blocks.sub_blocks["denoise"].sub_blocks["text2image"].sub_blocks["denoise"]
    place = list(loop.sub_blocks).index("after_denoiser")
    loop.sub_blocks.insert("watch", WatchStep(), place)
    return blocks
