"""Runs of the tiny Stable Diffusion pipeline, guarded and not, with the same settings."""

from __future__ import annotations

import functools

import tiny

from moe_artifacts.guard.guard import ArtifactGuard

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


def guarded(scorer, name="ddim", prompt=PROMPTS, on_abort="drop", options=None, **changes):
    guard = ArtifactGuard(scorer, on_abort, **options or {})
    return guard(tiny.stable_diffusion(name), prompt, **settings(**changes))


def statuses(output):
    return [verdict.status for verdict in output.verdicts]


class CountedCalls:
    """How many rows the denoiser and the VAE's decoder were given, call by call."""

    def __init__(self, pipe):
        self.denoiser, self.decoder = [], []
        pipe.unet.register_forward_pre_hook(lambda module, args: self.denoiser.append(len(args[0])))
        decode = pipe.vae.decode
        pipe.vae.decode = lambda z, *args, **kwargs: (self.decoder.append(len(z)), decode(z, *args, **kwargs))[1]
