"""A small Stable Diffusion pipeline from scratch: VAE, then text encoder and denoiser together.

    python -m training.generator                                    the bundled pipeline, of Fashion-MNIST
    python -m training.generator --images FOLDER --out WORK         of any pictures, a sub-folder for each class

The second writes ``WORK/pipeline``, a StableDiffusionPipeline folder, ``WORK/prompts.parquet`` for ``training.own.collect``, and
``WORK/classes.json``, by which a judge of ``training.judges`` finds the class of a prompt. Each part resumes from its last
saved state, with the options that it was begun with (``WORK/generator.json``).

Latent diffusion after Rombach et al. (arXiv:2112.10752), velocity prediction after Salimans and Ho (arXiv:2202.00512),
prompt dropout for classifier-free guidance after Ho and Salimans (arXiv:2207.12598).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTokenizer

from moe_artifacts.errors import ConfigError, MoeArtifactsError
from moe_artifacts.files import atomic_path, read_json, write_json
from moe_artifacts.loading import checked_device
from moe_artifacts.shapes import Preview
from training.data.class_images import ClassImages, EvenClasses, fashion_classes
from training.data.class_prompts import TEMPLATES, clear_templates, fill, prompts_table, read_templates
from training.data.columns import write_table
from training.data.fashion import LabelledImages, to_rgb
from training.data.folder import SIZES, folder_classes, stored_counts
from training.data.prompts import CLASS_NAMES, prompts_of
from training.generator_models import assemble, build_scheduler, build_text_encoder, build_unet, build_vae
from training.state import load_state, save_state, step_generator
from training.tokenizer import build_tokenizer, fit_context
from training.workspace import Stage, progress, work_folder

CONTEXT_LENGTH = 16  # tokens of a prompt; longer where the name of a class needs it
FASHION = "Fashion-MNIST"  # in place of a folder of images


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

    def __post_init__(self) -> None:
        for name in ("vae_steps", "denoiser_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("vae_lr", "denoiser_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


def train_vae(recipe: GeneratorRecipe, data: ClassImages | None = None, device: str = "cpu") -> Path:
    """Autoencode the training images; the result is ``vae/vae.safetensors`` with the latents' scale in its metadata.

    Args:
        data: Fashion-MNIST where it is not given.
    Raises:
        ConfigError: If the loss or its gradient stops being a number, or the work folder holds a run with another recipe.
    """
    _same_run(({"images": FASHION} if data is None else {}) | {"recipe": asdict(recipe)})
    stage = Stage("vae")
    result = stage.folder / "vae.safetensors"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)  # a precaution: denormals are slow on CPUs
    data = data or fashion_classes()
    vae = build_vae(data.size).to(device, memory_format=torch.channels_last)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, weight_decay=1e-4)
    modules: dict[str, nn.Module] = {"vae": vae, "ema": ema}
    start = load_state(stage.folder / "state.safetensors", modules, optimizer)
    with progress(recipe.vae_steps, start, "vae") as bar:
        for step in range(start, recipe.vae_steps):
            generator = step_generator(recipe.seed, step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.vae_lr * _warm_cosine(step, recipe.vae_steps, warmup=100)
            rows = torch.randint(len(data.train), (recipe.vae_batch,), generator=generator)
            pixels = data.train.rgb(rows).to(device) * 2 - 1
            with torch.autocast(device, torch.bfloat16):
                posterior = vae.encode(pixels).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
                latents = posterior.mean + posterior.std * noise
                decoded = vae.decode(latents).sample
            error = decoded.float() - pixels
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
            # Edges carry the garment's outline: the gradient term keeps them sharper than plain L1 does.
            loss = error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean() + 1e-4 * kl
            _require_finite("loss", loss, step, f"--vae-lr below {recipe.vae_lr}")
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            _require_finite("gradient", norm, step, f"--vae-lr below {recipe.vae_lr}")
            optimizer.step()
            ema.update_parameters(vae)
            bar.update()
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.vae_steps:
                save_state(stage.folder / "state.safetensors", step + 1, modules, optimizer)
                stage.track(step + 1, loss=loss.item(), l1=error.abs().mean().item(), kl=kl.item())
    final: Any = ema.module.cpu().eval()
    some = slice(0, 2000 * 32**2 // data.size**2)  # the same memory for every size
    with torch.no_grad():
        latents = final.encode(data.train.rgb(some) * 2 - 1).latent_dist.mean
    held_out = data.held_out.rgb(some) * 2 - 1
    with torch.no_grad():
        mse = (final.decode(final.encode(held_out).latent_dist.mean).sample - held_out).pow(2).mean().item()
    scale = 1 / latents.std().item()
    stage.log.info("held-out PSNR %.2f dB, scaling factor %.4f", 10 * math.log10(4 / mse), scale)
    with atomic_path(result) as temporary:
        facts = {"scaling_factor": repr(scale), "size": str(data.size)}
        save_file({k: v.contiguous() for k, v in final.state_dict().items()}, temporary, facts)
    return result


def load_vae(path: Path) -> AutoencoderKL:
    """The trained VAE in evaluation mode, its scaling factor registered in its config."""
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    scale = float(facts["scaling_factor"])
    vae = build_vae(int(facts.get("size", 32)))  # the first ones did not say
    vae.load_state_dict(load_file(path))
    vae.register_to_config(scaling_factor=scale)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, batch: int = 500) -> Tensor:
    """Scaled latents float32 [image 4 8 8] of the uint8 images of Fashion-MNIST."""
    return encode(vae, (to_rgb(part) for part in images.split(batch)))


@torch.no_grad()
def encode(vae: AutoencoderKL, parts: Iterable[Preview]) -> Tensor:
    """Scaled latents float32 of RGB images in [0, 1], which come a few at a time."""
    means = [vae.encode(part.to(vae.device) * 2 - 1).latent_dist.mean.cpu() for part in parts]
    return torch.cat(means) * vae.config.scaling_factor


def train_denoiser(
    recipe: GeneratorRecipe,
    vae: AutoencoderKL,
    data: LabelledImages | None = None,
    prompts: Sequence[Sequence[str]] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Train text encoder and U-Net together; the result is a StableDiffusionPipeline folder.

    Args:
        data: Fashion-MNIST where it is not given; latents of all of it are held in memory, 1 KB for 32x32 pixels.
        prompts: Of each class, as many for one as for another; those of Fashion-MNIST where they are not given.
        dtype: Of the weights in the folder.
    Raises:
        InputError: If the tokenizer cannot tell two classes apart by their prompts.
        ConfigError: If the loss or its gradient stops being a number, or the work folder holds a run with another recipe.
    """
    _same_run({"recipe": asdict(recipe)})
    stage = Stage("denoiser")
    result = work_folder() / "pipeline"
    if result.exists():
        return result
    torch.manual_seed(recipe.seed + 1)
    torch.set_flush_denormal(True)
    data = data or fashion_classes().train
    prompts = prompts or [prompts_of(k, "all") for k in range(len(CLASS_NAMES))]
    at_once = 500 * 32**2 // data.size**2
    latents = encode(vae.to(device), (data.rgb(slice(i, i + at_once)) for i in range(0, len(data), at_once)))
    tokenizer = build_tokenizer([p for group in prompts for p in group], stage.folder / "tokenizer", CONTEXT_LENGTH)
    fit_context(tokenizer, prompts, CONTEXT_LENGTH)
    tokens = torch.stack([_tokenize(tokenizer, group) for group in prompts])  # label prompt position
    empty = _tokenize(tokenizer, [""])[0]

    text_encoder = build_text_encoder(tokenizer)
    unet = build_unet(data.size).to(memory_format=torch.channels_last)
    both = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).to(device)
    ema = AveragedModel(both, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer = torch.optim.AdamW(both.parameters(), lr=recipe.denoiser_lr, weight_decay=1e-2, betas=(0.9, 0.99))
    modules: dict[str, nn.Module] = {"both": both, "ema": ema}
    start = load_state(stage.folder / "state.safetensors", modules, optimizer)
    alphas_cumprod, sampler = build_scheduler().alphas_cumprod, EvenClasses(data.labels)
    running = None
    with progress(recipe.denoiser_steps, start, "denoiser") as bar:
        for step in range(start, recipe.denoiser_steps):
            generator = step_generator(recipe.seed + 1, step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.denoiser_lr * _warm_cosine(step, recipe.denoiser_steps, warmup=300)
            rows = sampler.draw(recipe.denoiser_batch, generator)
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
            with torch.autocast(device, torch.bfloat16):
                states = text_encoder(input_ids.to(device)).last_hidden_state
                noisy = (alpha * x0 + sigma * noise).to(device, memory_format=torch.channels_last)
                predicted = unet(noisy, timesteps.to(device), states).sample
            loss = F.mse_loss(predicted.float(), velocity.to(device))
            _require_finite("loss", loss, step, f"--denoiser-lr below {recipe.denoiser_lr}")
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            _require_finite("gradient", norm, step, f"--denoiser-lr below {recipe.denoiser_lr}")
            optimizer.step()
            ema.update_parameters(both)
            running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
            bar.update()
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.denoiser_steps:
                save_state(stage.folder / "state.safetensors", step + 1, modules, optimizer)
                stage.track(step + 1, loss=running)
    final: Any = ema.module.cpu()
    pipe = assemble(vae.cpu(), final["text_encoder"], tokenizer, final["unet"])
    temporary = result.with_name("pipeline-unfinished")
    # In the dtype that is shipped already here: the trajectories must come from the very same weights.
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.save_pretrained(temporary, safe_serialization=True)
    temporary.rename(result)
    return result


def train_on_folder(
    images: Path, recipe: GeneratorRecipe, size: int | None = None, templates: Path | None = None, device: str = "cpu"
) -> Path:
    """The pipeline, the prompts and the classes of a folder of images, in the work folder; returns the pipeline.

    Args:
        images: Has a sub-folder for each class.
        size: Pixels a side; see :func:`training.data.folder.folder_classes`.
        templates: A text file; see ``training.data.class_prompts``.
    Raises:
        InputError: If the folder or the templates cannot be used.
        ConfigError: If the work folder holds a pipeline that was begun with other images, another recipe or other templates.
    """
    work = work_folder()
    chosen = TEMPLATES if templates is None else read_templates(templates)
    data = folder_classes(images, work / "images", size, recipe.seed)
    names = [name for name, *_ in data.names]
    clear = clear_templates(names, chosen)
    _same_run({"images": str(images.resolve()), "recipe": asdict(recipe), "templates": list(clear)})
    write_json(work / "classes.json", [list(name) for name in data.names])
    left_out = [template for template in chosen if template not in clear]
    write_table(prompts_table(names, clear), work / "prompts.parquet", {"templates_left_out": left_out})
    print(stored_counts(work / "images"), file=sys.stderr)
    print(f"{len(clear)} templates, {len(left_out)} left out: a class has their words for its name", file=sys.stderr)
    vae = load_vae(train_vae(recipe, data, device))
    prompts = [[fill(template, name) for template in clear] for name in names]
    # float32: loaded without a dtype, transformers keeps float16 and diffusers does not, and the two do not go together.
    return train_denoiser(recipe, vae, data.train, prompts, device, torch.float32)


def _tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def _same_run(run: dict[str, object]) -> None:
    """Keep what the run in the work folder was begun with, as far as it is known; its state fits no other."""
    path = work_folder() / "generator.json"
    before = read_json(path) if path.exists() else {}
    if any((path.parent / name).exists() for name in ("vae", "pipeline")):
        before = {"images": FASHION} | before  # the first runs of it did not say so
    if changed := [name for name in run if before.get(name, run[name]) != run[name]]:
        raise ConfigError(
            f"{path.parent} holds a run that differs in {', '.join(changed)} (see {path}); use what it was started with, or "
            "another folder (--out)"
        )
    write_json(path, before | run)


def _require_finite(what: str, value: Tensor, step: int, rate: str) -> None:
    if not value.isfinite():
        raise ConfigError(
            f"the {what} became {value.item()} at step {step}: start again in another folder (--out), with {rate}"
        )


def _warm_cosine(step: int, total: int, warmup: int) -> float:
    """Learning rate factor: a linear rise, then half a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / warmup)
    return rise * (0.55 + 0.45 * math.cos(math.pi * step / total))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with a sub-folder of images for each class")
    parser.add_argument("--out", type=Path, help="work folder; without it MOE_ARTIFACTS_WORK or ~/.cache/moe-artifacts")
    parser.add_argument("--size", type=int, choices=SIZES, help=f"pixels a side, of --images ({SIZES[0]})")
    parser.add_argument(
        "--steps", type=int, default=GeneratorRecipe.denoiser_steps, help="of the denoiser (%(default)s)"
    )
    parser.add_argument("--vae-steps", type=int, default=GeneratorRecipe.vae_steps, help="of the VAE (%(default)s)")
    parser.add_argument(
        "--denoiser-lr", type=float, default=GeneratorRecipe.denoiser_lr, help="learning rate (%(default)s)"
    )
    parser.add_argument("--vae-lr", type=float, default=GeneratorRecipe.vae_lr, help="learning rate (%(default)s)")
    parser.add_argument("--templates", type=Path, help="prompts of --images, one a line, with {} for the class; the last "
                        "third is held out")  # fmt: skip
    parser.add_argument("--seed", type=int, default=GeneratorRecipe.seed, help="(%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (%(default)s)")
    parser.add_argument("--only", choices=("vae", "denoiser"), help="train one part; the VAE comes first")
    args = parser.parse_args(arguments)
    if args.images is None and (args.size is not None or args.templates is not None):
        parser.error("--size and --templates belong to --images")
    if args.images is not None and args.only is not None:
        parser.error("--only does not go with --images")
    if args.out is not None:
        os.environ["MOE_ARTIFACTS_WORK"] = str(args.out)
    try:
        checked_device(args.device)
        recipe = GeneratorRecipe(
            seed=args.seed,
            vae_steps=args.vae_steps,
            vae_lr=args.vae_lr,
            denoiser_steps=args.steps,
            denoiser_lr=args.denoiser_lr,
        )
        if args.images is not None:
            print(train_on_folder(args.images, recipe, args.size, args.templates, args.device))
            return 0
        vae_path = train_vae(recipe, device=args.device)
        if args.only != "vae":
            print(train_denoiser(recipe, load_vae(vae_path), device=args.device))
    except (MoeArtifactsError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
