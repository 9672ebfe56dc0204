"""Pipelines with a transformer whose latents keep their grid: SD3, PixArt, Sana, Lumina2, AuraFlow, CogView4, Z-Image, ..."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import (
    AuraFlowPipeline,
    CogView3PlusPipeline,
    CogView4Pipeline,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
)

from .case import SIDE, Case, autoencoder, masks, normal, pictures, random_weights, repeats_embeddings
from .schedulers import WITH_SCALE_NOISE, WITH_SIGMAS, WITH_TIMESTEPS, discrete, flow

CFG = {"none": {"guidance_scale": 1.0}, "cfg": {"guidance_scale": 3.0}}
RESCALE = {"rescale": {"guidance_scale": 3.0, "guidance_rescale": 0.7}}
SIZE = {"height": SIDE, "width": SIDE}
LUMINA_SIZE = {"height": 64, "width": 64}  # it counts on a VAE that makes an eighth of each side
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


def _image_to_image(count: int) -> dict[str, Any]:
    return {"image": pictures(count), "strength": 0.7}


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


def _eighth(**changes: Any) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return autoencoder(block_out_channels=(4, 4, 4, 4), **blocks, **changes)


def _lumina() -> Any:
    denoiser = transformer(
        "LuminaNextDiT2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )
    pipe = LuminaPipeline(
        transformer=denoiser, scheduler=FLOW["flow-euler"](), vae=_eighth(), text_encoder=None, tokenizer=None
    )
    return repeats_embeddings(pipe)


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


def _lumina2() -> Any:
    denoiser = transformer(
        "Lumina2Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=WIDTH,
    )
    pipe = Lumina2Pipeline(
        transformer=denoiser,
        scheduler=FLOW["flow-euler"](),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=None,
        tokenizer=None,
    )
    return repeats_embeddings(pipe)


def _aura_flow() -> Any:
    denoiser = transformer(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        tokenizer=None, text_encoder=None, vae=autoencoder(), transformer=denoiser, scheduler=FLOW["flow-euler"]()
    )


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


def _z_image(kind: type) -> Any:
    denoiser = transformer(
        "ZImageTransformer2DModel",
        all_patch_size=(2,),
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 16, 16],
    )
    return kind(
        scheduler=FLOW["flow-euler"](),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=None,
        tokenizer=None,
        transformer=denoiser,
    )


def _z_image_arguments(count: int) -> dict[str, Any]:
    """Prompts of different lengths, as a list."""
    prompts = embeddings(count)
    return {name: [row[: LENGTHS[i % 4]] for i, row in enumerate(rows)] for name, rows in prompts.items()} | SIZE


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
        arguments=lambda count: pooled_embeddings(count) | _image_to_image(count) | SIZE,
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
        name="lumina",
        build=_lumina,
        arguments=lambda count: masked_embeddings(count) | LUMINA_SIZE,
        schedulers=FLOW,
        guidance=CFG,
        representative=("flow-euler",),
    ),
    Case(
        name="lumina2",
        build=_lumina2,
        arguments=lambda count: masked_embeddings(count) | LUMINA_SIZE,
        schedulers=flow(only=WITH_SIGMAS),
        guidance=CFG | {"truncated": {"guidance_scale": 3.0, "cfg_trunc_ratio": 0.5}},
        representative=("flow-euler", "flow-unipc"),
    ),
    Case(
        name="aura-flow",
        build=_aura_flow,
        arguments=lambda count: masked_embeddings(count) | SIZE,
        schedulers=FLOW,
        guidance=CFG,
        representative=("flow-euler", "flow-heun"),
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
    Case(
        name="z-image",
        build=lambda: _z_image(ZImagePipeline),
        arguments=_z_image_arguments,
        schedulers=flow(only=WITH_TIMESTEPS),
        guidance={"none": {"guidance_scale": 0.0}, "cfg": {"guidance_scale": 3.0}},
        representative=("flow-euler", "flow-euler-sde"),
    ),
    Case(
        name="z-image-img2img",
        build=lambda: _z_image(ZImageImg2ImgPipeline),
        arguments=lambda count: _z_image_arguments(count) | _image_to_image(count),
        schedulers=flow(only=WITH_TIMESTEPS),
        guidance={"none": {"guidance_scale": 0.0}, "cfg": {"guidance_scale": 3.0}},
        representative=("flow-euler",),
        steps=9,
    ),
)
