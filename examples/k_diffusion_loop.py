"""A scorer in one's own sampling loop: k-diffusion's Euler sampler, which stops an image once the scorer's rule says so.

``python examples/k_diffusion_loop.py`` runs it on the bundled pipeline.
"""

from __future__ import annotations

import torch

from moe_artifacts import ArtifactScorer, bundled_pipeline
from moe_artifacts.decision import Decider
from moe_artifacts.noise import NoiseLevel, check_steps, progress, variance_preserving


def sample_euler(denoise, x, sigmas, scorer, prompts=None):
    """Denoise ``x``, which is x0 + sigmas[0] * noise; returns the finished latents and which images they are."""
    session, decider = scorer.session(len(x), prompts=prompts), Decider(scorer.config.threshold, len(x))
    levels = [NoiseLevel(alpha=1.0, sigma=sigma) for sigma in sigmas[:-1].tolist()]
    checks = check_steps(levels, scorer.config)
    alive = torch.arange(len(x))
    for i, level in enumerate(levels):
        denoised = denoise(x, sigmas[i], alive)  # the prediction of x0, for the living rows
        if i in checks:
            score = session.step(x0=denoised, log_snr=level.log_snr, latents=variance_preserving(x, level))
            decision = decider.step(score, progress(level.log_snr, scorer.config.log_snr_range))
            keep = (score.finite & ~decision.abort.cpu()).nonzero().flatten()
            x, denoised, alive = x[keep], denoised[keep], alive[keep]
            session.keep(keep)
            decider.keep(keep)
            if len(keep) == 0:
                break
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x, alive


def wrapped(pipe, prompts):
    """The U-Net of the bundled pipeline, which predicts v, as k-diffusion sees a model; and the sigmas it knows."""
    embeds, _ = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    signal = pipe.scheduler.alphas_cumprod
    sigmas = ((1 - signal) / signal).sqrt()

    def denoise(x, sigma, rows):
        timestep, scale = (sigmas - sigma).abs().argmin(), (1 + sigma**2).sqrt()
        v = pipe.unet(x / scale, timestep, encoder_hidden_states=embeds[rows]).sample
        return x / scale**2 - sigma / scale * v

    return denoise, sigmas


@torch.no_grad()
def main():
    prompts = ["an ankle boot", "a pullover", "a bag", "a dress"] * 8
    pipe, _ = bundled_pipeline("fashion")
    denoise, sigmas = wrapped(pipe, prompts)
    sigmas = torch.cat([sigmas[torch.arange(981, 0, -20)], torch.zeros(1)])  # 50 steps, then no noise
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scorer = ArtifactScorer.from_pretrained("fashion")
    x, alive = sample_euler(denoise, noise * sigmas[0], sigmas, scorer, prompts)
    images = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    aborted = sorted(set(range(len(prompts))) - set(alive.tolist()))
    print(f"{len(images)} of {len(prompts)} images kept, aborted {aborted}")


if __name__ == "__main__":
    main()
