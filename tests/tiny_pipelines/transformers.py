"""Pipelines with a transformer whose latents keep their grid: SD3, PixArt, Sana, HunyuanDiT, CogView. More in lumina.py."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import (
    CogView3PlusPipeline,
    CogView4Pipeline,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

from .case import SIDE, Case, autoencoder, image_to_image, masks, normal, pictures, random_weights, repeats_embeddings
from .schedulers import WITH_SCALE_NOISE, WITH_TIMESTEPS, discrete, flow

CFG = {"none": {"guidance_scale": 1.0}, "cfg": {"guidance_scale": 3.0}}
RESCALE = {"rescale": {"guidance_scale": 3.0, "guidance_rescale": 0.7}}
SIZE = {"height": SIDE, "width": SIDE}
SANA_SIZE = {"height": 32, "width": 32, "use_resolution_binning": False}  # it takes multiples of 32 only
TOKENS, WIDTH, POOLED, LENGTHS = 6, 16, 12, (6, 3, 5, 2)
DISCRETE, FLOW = discrete(), flow()
COGVIEW_FLOW = flow(only=WITH_TIMESTEPS, base_shift=0.25, max_shift=0.75)
COGVIDEO = {"cogvideox-ddim": diffusers.CogVideoXDDIMScheduler, "cogvideox-dpm": diffusers.CogVideoXDPMScheduler}


def transformer(name: str, **config: Any) -> Any:
    return random_weights(getattr(diffusers, name)(**config), seed=3)


def embeddings(count: int, tokens: int = TOKENS, width: int = WIDTH) -> dict[str, Any]:
    return {
        "prompt_embeds": normal(count, tokens, width, seed=1),
        "negative_prompt_embeds": normal(count, tokens, width, seed=2),
    }


def masked_embeddings(count: int) -> dict[str, Any]:
    return embeddings(count) | {
        "prompt_attention_mask": masks(count, LENGTHS, TOKENS),
        "negative_prompt_attention_mask": masks(count, LENGTHS[::-1], TOKENS),
    }


def pooled_embeddings(count: int) -> dict[str, Any]:
    return embeddings(count) | {
        "pooled_prompt_embeds": normal(count, POOLED, seed=3),
        "negative_pooled_prompt_embeds": normal(count, POOLED, seed=4),
    }


def only_positive(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if not name.startswith("negative")}


def sd3_transformer(**changes: Any) -> Any:
    return transformer(
        "SD3Transformer2DModel",
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": POOLED,
            "pos_embed_max_size": 8,
            **changes,
        },
    )


def stable_diffusion_3(kind: type = StableDiffusion3Pipeline, **parts: Any) -> Any:
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    given = {
        "transformer": sd3_transformer(),
        "vae": autoencoder(shift_factor=0.1),
        "scheduler": FLOW["flow-euler"](),
        **parts,
    }
    return repeats_embeddings(kind(**dict.fromkeys(encoders), **given))


def _pixart(kind: type, **changes: Any) -> Any:
    denoiser = transformer(
        "PixArtTransformer2DModel",
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        **changes,
    )
    return kind(tokenizer=None, text_encoder=None, vae=autoencoder(), transformer=denoiser, scheduler=DISCRETE["dpm"]())


def _sana(kind: type, scheduler: Any, **changes: Any) -> Any:
    denoiser = transformer(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=1,
        **changes,
    )
    return kind(tokenizer=None, text_encoder=None, vae=_deep_compression(), transformer=denoiser, scheduler=scheduler)


def _sprint(kind: type) -> Any:
    return _sana(kind, diffusers.SCMScheduler(), guidance_embeds=True, qk_norm="rms_norm_across_heads")


def _sprint_arguments(count: int) -> dict[str, Any]:
    return only_positive(masked_embeddings(count)) | SANA_SIZE | {"intermediate_timesteps": None}


def _deep_compression() -> Any:
    """Sana's kind of VAE; this one makes a quarter of each side."""
    blocks = {
        "block_types": "ResBlock",
        "block_out_channels": (8, 8, 8),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), ()),
    }
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
    vae = diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.41407, **both)
    return random_weights(vae, seed=1)


def _cogview3() -> Any:
    denoiser = transformer(
        "CogView3PlusTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
    )
    pipe = CogView3PlusPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(),
        transformer=denoiser,
        scheduler=COGVIDEO["cogvideox-ddim"](),
    )
    return repeats_embeddings(pipe)


def _hunyuan_dit() -> Any:
    denoiser = transformer(
        "HunyuanDiT2DModel",
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        hidden_size=16,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=POOLED,
        text_len=TOKENS,
        text_len_t5=TOKENS,
        activation_fn="gelu-approximate",
    )
    pipe = HunyuanDiTPipeline(
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=denoiser,
        scheduler=DISCRETE["ddpm"](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return repeats_embeddings(pipe)


def _hunyuan_dit_arguments(count: int) -> dict[str, Any]:
    first = masked_embeddings(count)
    second = {f"{name}_2": value.roll(1, 0).flip(1) for name, value in first.items()}
    return first | second | SIZE | {"use_resolution_binning": False}


def _cogview4() -> Any:
    denoiser = transformer(
        "CogView4Transformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(16, 16),
    )
    pipe = CogView4Pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(),
        transformer=denoiser,
        scheduler=COGVIEW_FLOW["flow-euler"](),
    )
    return repeats_embeddings(pipe)


CASES = (
    Case(
        name="sd3",
        build=stable_diffusion_3,
        arguments=pooled_embeddings,
        schedulers=FLOW,
        guidance=CFG
        | {"skip-layer": {"guidance_scale": 3.0, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6}},
        representative=("flow-euler", "flow-heun", "flow-dpm", "flow-unipc"),
    ),
    Case(
        name="sd3-img2img",
        build=lambda: stable_diffusion_3(StableDiffusion3Img2ImgPipeline),
        arguments=lambda count: pooled_embeddings(count) | image_to_image(count) | SIZE,
        schedulers=flow(only=WITH_SCALE_NOISE),
        guidance=CFG,
        representative=("flow-euler",),
        steps=9,
        images_per_prompt=False,  # with a generator list it takes the images of the first prompts only
    ),
    Case(
        name="pixart-alpha",
        build=lambda: _pixart(PixArtAlphaPipeline),
        arguments=lambda count: (
            masked_embeddings(count) | SIZE | {"use_resolution_binning": False, "negative_prompt": None}
        ),
        schedulers={"dpm": DISCRETE["dpm"], **DISCRETE},
        guidance=CFG,
        representative=("dpm",),
        callback=False,
    ),
    Case(
        name="pixart-sigma",
        build=lambda: _pixart(PixArtSigmaPipeline, use_additional_conditions=False),
        arguments=lambda count: (
            masked_embeddings(count) | SIZE | {"use_resolution_binning": False, "negative_prompt": None}
        ),
        schedulers={"dpm": DISCRETE["dpm"], **DISCRETE},
        guidance=CFG,
        representative=("dpm", "ddim", "euler-a"),
        callback=False,
    ),
    Case(
        name="sana",
        build=lambda: _sana(SanaPipeline, FLOW["flow-dpm"]()),
        arguments=lambda count: masked_embeddings(count) | SANA_SIZE | {"negative_prompt": None},
        schedulers={"flow-dpm": FLOW["flow-dpm"], **FLOW},
        guidance=CFG,
        representative=("flow-dpm", "flow-euler"),
    ),
    Case(
        name="sana-sprint",
        build=lambda: _sprint(SanaSprintPipeline),
        arguments=_sprint_arguments,
        schedulers={"scm": diffusers.SCMScheduler},
        guidance={"embedded": {"guidance_scale": 4.5}},
    ),
    Case(
        name="sana-sprint-img2img",
        build=lambda: _sprint(SanaSprintImg2ImgPipeline),
        arguments=lambda count: _sprint_arguments(count) | {"image": pictures(count, 32), "strength": 0.7},
        schedulers={"scm": diffusers.SCMScheduler},
        guidance={"embedded": {"guidance_scale": 4.5}},
        steps=9,
    ),
    Case(
        name="hunyuan-dit",
        build=_hunyuan_dit,
        arguments=_hunyuan_dit_arguments,
        schedulers={"ddpm": DISCRETE["ddpm"], **DISCRETE},
        guidance=CFG | RESCALE,
        representative=("ddpm", "dpm"),
    ),
    Case(
        name="cogview3",
        build=_cogview3,
        arguments=lambda count: embeddings(count) | SIZE,
        schedulers=COGVIDEO | DISCRETE,
        guidance=CFG,
        representative=("cogvideox-ddim", "ddim"),
    ),
    Case(
        name="cogview4",
        build=_cogview4,
        arguments=lambda count: embeddings(count) | SIZE,
        schedulers=COGVIEW_FLOW,
        guidance=CFG,
        representative=("flow-euler",),
    ),
)
