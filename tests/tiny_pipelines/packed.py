"""Pipelines whose latents are packed into tokens: Flux, Flux2, Chroma, Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
)

from .case import SIDE, Case, autoencoder, image_to_image, normal, random_weights, repeats_embeddings
from .schedulers import WITH_MU, WITH_SIGMAS, WITH_TIMESTEPS, flow
from .transformers import (
    POOLED,
    SIZE,
    WIDTH,
    embeddings,
    masked_embeddings,
    only_positive,
    pooled_embeddings,
    transformer,
)

FLOW = flow(dynamic=True, only=WITH_MU)
SIGMAS_FLOW = flow(dynamic=True, only=WITH_SIGMAS)
IMAGE_FLOW = flow(dynamic=True, only=WITH_TIMESTEPS)
CHROMA_FLOW = flow(only=WITH_SIGMAS)
ROPE = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
TRUE_CFG = {"none": {"true_cfg_scale": 1.0}, "true-cfg": {"true_cfg_scale": 3.0}}
QWEN_CFG = {
    "none": {"true_cfg_scale": 1.0, "negative_prompt_embeds": None, "negative_prompt_embeds_mask": None},
    "true-cfg": {"true_cfg_scale": 3.0},
}
REPRESENTATIVE = ("flow-euler", "flow-unipc")


def flux_transformer(**changes: Any) -> Any:
    config = {"in_channels": 16, "joint_attention_dim": WIDTH, "pooled_projection_dim": POOLED}
    return transformer("FluxTransformer2DModel", **ROPE, axes_dims_rope=(4, 2, 2), **config, **changes)


def flux(kind: type = FluxPipeline, guidance_embeds: bool = False, **parts: Any) -> Any:
    given = {
        "scheduler": FLOW["flow-euler"](),
        "vae": autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        "transformer": flux_transformer(guidance_embeds=guidance_embeds),
        **parts,
    }
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return repeats_embeddings(kind(**nothing, **given))


def _flux2(kind: type, **parts: Any) -> Any:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    random_weights(vae, seed=1)
    with torch.no_grad():  # the mean and variance by which it normalises latents
        vae.bn.running_mean.copy_(0.1 * normal(1, 16, seed=5)[0])
        vae.bn.running_var.copy_(0.5 + normal(1, 16, seed=6)[0].sigmoid())
    denoiser = transformer(
        "Flux2Transformer2DModel",
        **ROPE,
        in_channels=16,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=kind is Flux2Pipeline,
    )
    return kind(
        scheduler=FLOW["flow-euler"](), vae=vae, text_encoder=None, tokenizer=None, transformer=denoiser, **parts
    )


def _chroma(kind: type) -> Any:
    denoiser = transformer(
        "ChromaTransformer2DModel",
        **ROPE,
        in_channels=16,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    vae = autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    return kind(scheduler=CHROMA_FLOW["flow-euler"](), vae=vae, text_encoder=None, tokenizer=None, transformer=denoiser)


def _chroma_arguments(count: int) -> dict[str, Any]:
    found = masked_embeddings(count) | SIZE
    return {name: value.float() if "mask" in name else value for name, value in found.items()}


def _qwen_image(kind: type) -> Any:
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.0, 1.2],
    )
    denoiser = transformer(
        "QwenImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    return kind(
        scheduler=FLOW["flow-euler"](),
        vae=random_weights(vae, seed=1),
        text_encoder=None,
        tokenizer=None,
        transformer=denoiser,
    )


def _qwen_arguments(count: int) -> dict[str, Any]:
    found = {name.replace("attention_mask", "embeds_mask"): value for name, value in masked_embeddings(count).items()}
    return found | SIZE


def _flux_arguments(count: int) -> dict[str, Any]:
    return pooled_embeddings(count) | SIZE


CASES = (
    Case(
        name="flux",
        build=flux,
        arguments=_flux_arguments,
        schedulers=FLOW,
        guidance=TRUE_CFG,
        representative=("flow-euler", "flow-euler-sde", "flow-dpm", "flow-unipc"),
    ),
    Case(
        name="flux-distilled",
        build=lambda: flux(guidance_embeds=True),
        arguments=_flux_arguments,
        schedulers=FLOW,
        guidance={"embedded": {"guidance_scale": 3.5}, "true-cfg": {"guidance_scale": 3.5, "true_cfg_scale": 3.0}},
        representative=("flow-euler",),
    ),
    Case(
        name="flux-img2img",
        build=lambda: flux(FluxImg2ImgPipeline),
        arguments=lambda count: _flux_arguments(count) | image_to_image(count),
        schedulers=IMAGE_FLOW,
        guidance=TRUE_CFG,
        representative=("flow-euler",),
        steps=9,
    ),
    Case(
        name="flux2",
        build=lambda: _flux2(Flux2Pipeline),
        arguments=lambda count: only_positive(embeddings(count)) | SIZE,
        schedulers=FLOW,
        guidance={"embedded": {"guidance_scale": 4.0}},
        representative=REPRESENTATIVE,
    ),
    Case(
        name="flux2-klein",
        build=lambda: _flux2(Flux2KleinPipeline),
        arguments=lambda count: embeddings(count) | SIZE,
        schedulers=FLOW,
        guidance={"none": {"guidance_scale": 1.0}, "cfg": {"guidance_scale": 4.0}},
        representative=("flow-euler",),
    ),
    Case(
        name="chroma",
        build=lambda: _chroma(ChromaPipeline),
        arguments=_chroma_arguments,
        schedulers=CHROMA_FLOW,
        guidance={"none": {"guidance_scale": 1.0}, "cfg": {"guidance_scale": 3.0}},
        representative=REPRESENTATIVE,
        images_per_prompt=False,  # it does not repeat the mask of given embeddings
    ),
    Case(
        name="chroma-img2img",
        build=lambda: _chroma(ChromaImg2ImgPipeline),
        arguments=lambda count: _chroma_arguments(count) | image_to_image(count),
        schedulers=flow(only=WITH_TIMESTEPS),
        guidance={"none": {"guidance_scale": 1.0}, "cfg": {"guidance_scale": 3.0}},
        representative=("flow-euler",),
        steps=9,
        images_per_prompt=False,  # it does not repeat the mask of given embeddings
    ),
    Case(
        name="qwen-image",
        build=lambda: _qwen_image(QwenImagePipeline),
        arguments=_qwen_arguments,
        schedulers=SIGMAS_FLOW,
        guidance=QWEN_CFG,
        representative=REPRESENTATIVE,
    ),
    Case(
        name="qwen-image-img2img",
        build=lambda: _qwen_image(QwenImageImg2ImgPipeline),
        arguments=lambda count: _qwen_arguments(count) | image_to_image(count),
        schedulers=IMAGE_FLOW,
        guidance=QWEN_CFG,
        representative=("flow-euler",),
        steps=9,
    ),
)
