"""Pipelines with a transformer whose latents keep their grid: Lumina, Lumina2, AuraFlow, Z-Image. More in transformers.py."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    Lumina2Pipeline,
    LuminaPipeline,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
)

from .case import Case, autoencoder, image_to_image, repeats_embeddings
from .schedulers import WITH_SIGMAS, WITH_TIMESTEPS, flow
from .transformers import CFG, FLOW, LENGTHS, SIZE, WIDTH, embeddings, masked_embeddings, transformer

LUMINA_SIZE = {"height": 64, "width": 64}  # it counts on a VAE that makes an eighth of each side


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
        vae=_eighth(shift_factor=0.1),
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
        arguments=lambda count: _z_image_arguments(count) | image_to_image(count),
        schedulers=flow(only=WITH_TIMESTEPS),
        guidance={"none": {"guidance_scale": 0.0}, "cfg": {"guidance_scale": 3.0}},
        representative=("flow-euler",),
        steps=9,
    ),
)
