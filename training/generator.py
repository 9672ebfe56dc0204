"""The bundled pipeline from scratch: VAE, then text encoder and denoiser together, as a StableDiffusionPipeline folder.

``python -m training.generator`` trains both and writes the pipeline; each part resumes from its last saved state.
Latent diffusion after Rombach et al. (arXiv:2112.10752), velocity prediction after Salimans and Ho (arXiv:2202.00512),
prompt dropout for classifier-free guidance after Ho and Salimans (arXiv:2207.12598).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from moe_artifacts.files import atomic_path
from training.data.fashion import SIZE, load_fashion, to_rgb
from training.data.prompts import CLASS_NAMES, prompts_of
from training.state import load_state, save_state, step_generator
from training.tokenizer import build_tokenizer
from training.workspace import Stage, progress, work_folder

CONTEXT_LENGTH = 16
TEXT_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class GeneratorRecipe:
    """How long and how fast to train."""

    seed: int = 0
    vae_steps: int = 1_500
    vae_batch: int = 64
    vae_lr: float = 1.5e-3
    denoiser_steps: int = 5_000
    denoiser_batch: int = 128
    denoiser_lr: float = 4e-4
    ema_decay: float = 0.999
    prompt_dropout: float = 0.1
    save_every: int = 100


def build_vae() -> AutoencoderKL:
    """32x32 pixels to 8x8x4 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=1.0,  # set after training, from the latents' standard deviation
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text transformer over the small vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """A U-Net on 8x8 latents with cross attention at 4x4.

    Wide where the latents are large: a call then costs in proportion to its batch, not to the number of its modules.
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(160, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with velocity prediction for usable x0 previews at high noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_vae(recipe: GeneratorRecipe) -> Path:
    """Autoencode the training images; the result is ``vae/vae.safetensors`` with the latents' scale in its metadata."""
    stage = Stage("vae")
    result = stage.folder / "vae.safetensors"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)  # a precaution: denormals are slow on CPUs
    images = load_fashion("train").images
    vae = build_vae().to(memory_format=torch.channels_last)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, weight_decay=1e-4)
    modules: dict[str, nn.Module] = {"vae": vae, "ema": ema}
    start = load_state(stage.folder / "state.safetensors", modules, optimizer)
    with progress(recipe.vae_steps, start, "vae") as bar:
        for step in range(start, recipe.vae_steps):
            generator = step_generator(recipe.seed, step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.vae_lr * _warm_cosine(step, recipe.vae_steps, warmup=100)
            rows = torch.randint(len(images), (recipe.vae_batch,), generator=generator)
            pixels = to_rgb(images[rows]) * 2 - 1
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(pixels).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=generator)
                latents = posterior.mean + posterior.std * noise
                decoded = vae.decode(latents).sample
            error = decoded.float() - pixels
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
            # Edges carry the garment's outline: the gradient term keeps them sharper than plain L1 does.
            loss = error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean() + 1e-4 * kl
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(vae)
            bar.update()
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.vae_steps:
                save_state(stage.folder / "state.safetensors", step + 1, modules, optimizer)
                stage.track(step + 1, loss=loss.item(), l1=error.abs().mean().item(), kl=kl.item())
    final = ema.module.eval()
    with torch.no_grad():
        latents = final.encode(to_rgb(images[:2000]) * 2 - 1).latent_dist.mean
    held_out = to_rgb(load_fashion("test").images[:2000]) * 2 - 1
    with torch.no_grad():
        mse = (final.decode(final.encode(held_out).latent_dist.mean).sample - held_out).pow(2).mean().item()
    scale = 1 / latents.std().item()
    stage.log.info("held-out PSNR %.2f dB, scaling factor %.4f", 10 * math.log10(4 / mse), scale)
    with atomic_path(result) as temporary:
        save_file(
            {k: v.contiguous() for k, v in final.state_dict().items()}, temporary, {"scaling_factor": repr(scale)}
        )
    return result


def load_vae(path: Path) -> AutoencoderKL:
    """The trained VAE in evaluation mode, its scaling factor registered in its config."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        scale = float(file.metadata()["scaling_factor"])
    vae = build_vae()
    vae.load_state_dict(load_file(path))
    vae.register_to_config(scaling_factor=scale)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, batch: int = 500) -> Tensor:
    """Scaled latents float32 [image 4 8 8] of uint8 images."""
    parts = [vae.encode(to_rgb(part) * 2 - 1).latent_dist.mean for part in images.split(batch)]
    return torch.cat(parts) * vae.config.scaling_factor


def train_denoiser(recipe: GeneratorRecipe, vae: AutoencoderKL) -> Path:
    """Train text encoder and U-Net together; the result is a StableDiffusionPipeline folder."""
    stage = Stage("denoiser")
    result = work_folder() / "pipeline"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed + 1)
    torch.set_flush_denormal(True)
    data = load_fashion("train")
    latents = encode_images(vae, data.images)
    prompts = [prompts_of(k, "all") for k in range(len(CLASS_NAMES))]
    tokenizer = build_tokenizer([p for group in prompts for p in group], stage.folder / "tokenizer", CONTEXT_LENGTH)
    tokens = torch.stack([_tokenize(tokenizer, group) for group in prompts])  # label prompt position
    empty = _tokenize(tokenizer, [""])[0]

    text_encoder, unet = build_text_encoder(tokenizer), build_unet().to(memory_format=torch.channels_last)
    both = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    ema = AveragedModel(both, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(both.parameters(), lr=recipe.denoiser_lr, weight_decay=1e-2, betas=(0.9, 0.99))
    modules: dict[str, nn.Module] = {"both": both, "ema": ema}
    start = load_state(stage.folder / "state.safetensors", modules, optimizer)
    alphas_cumprod = build_scheduler().alphas_cumprod
    running = None
    with progress(recipe.denoiser_steps, start, "denoiser") as bar:
        for step in range(start, recipe.denoiser_steps):
            generator = step_generator(recipe.seed + 1, step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.denoiser_lr * _warm_cosine(step, recipe.denoiser_steps, warmup=300)
            rows = torch.randint(len(latents), (recipe.denoiser_batch,), generator=generator)
            x0, labels = latents[rows], data.labels[rows]
            input_ids = tokens[labels, torch.randint(tokens.shape[1], (len(rows),), generator=generator)]
            dropped = torch.rand(len(rows), generator=generator) < recipe.prompt_dropout
            input_ids = torch.where(dropped[:, None], empty, input_ids)
            # Stratified timesteps: one per equal slice of the range, so that a batch covers all noise levels.
            slices = torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)
            timesteps = (slices / len(rows) * len(alphas_cumprod)).long()
            alpha = alphas_cumprod[timesteps].sqrt()[:, None, None, None]
            sigma = (1 - alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
            noise = torch.randn(x0.shape, generator=generator)
            velocity = alpha * noise - sigma * x0
            with torch.autocast("cpu", torch.bfloat16):
                states = text_encoder(input_ids).last_hidden_state
                noisy = (alpha * x0 + sigma * noise).contiguous(memory_format=torch.channels_last)
                predicted = unet(noisy, timesteps, states).sample
            loss = F.mse_loss(predicted.float(), velocity)
            if not loss.isfinite():
                raise RuntimeError(f"the loss became {loss.item()} at step {step}: lower denoiser_lr and start again")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(both)
            running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
            bar.update()
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.denoiser_steps:
                save_state(stage.folder / "state.safetensors", step + 1, modules, optimizer)
                stage.track(step + 1, loss=running)
    final = ema.module
    pipe = assemble(vae, final["text_encoder"], tokenizer, final["unet"])
    temporary = result.with_name("pipeline-unfinished")
    # In float16 already here: the trajectories must come from the very weights that are shipped.
    pipe.to(torch.float16).save_pretrained(temporary, safe_serialization=True)
    temporary.rename(result)
    return result


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as a pipeline, all in evaluation mode."""
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(
        prompts, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def _warm_cosine(step: int, total: int, warmup: int) -> float:
    """Learning rate factor: a linear rise, then half a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / warmup)
    return rise * (0.55 + 0.45 * math.cos(math.pi * step / total))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("vae", "denoiser"), help="train one part; the VAE comes first")
    args = parser.parse_args()
    recipe = GeneratorRecipe()
    vae_path = train_vae(recipe)
    if args.only != "vae":
        print(train_denoiser(recipe, load_vae(vae_path)))


if __name__ == "__main__":
    main()
