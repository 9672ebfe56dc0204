"""Tiny pipelines beside those of tiny_pipelines: loops that join their latents with others, further adapters."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers
import torch
from diffusers import T2IAdapter
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from tiny_pipelines import adapters, packed, transformers, unets
from tiny_pipelines.case import Case, normal, pictures, random_weights, repeats_embeddings
from torch import nn

CFG = transformers.CFG
SIZE = transformers.SIZE
DISCRETE, FLOW, DYNAMIC_FLOW = transformers.DISCRETE, transformers.FLOW, packed.FLOW
BLOCKS = {  # where the features of a T2I-Adapter fit
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
FOUR_TOKENS = 4  # that an IP-Adapter makes of an image


def _wide_unet(build: Any, name: str, denoiser: nn.Module) -> Any:
    return build(getattr(diffusers, name), unet=denoiser)


def _with_adapter(build: Any, name: str, denoiser: nn.Module) -> Any:
    adapter = T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    parts = build(unet=denoiser).components
    kind = getattr(diffusers, name)
    known = set(inspect.signature(kind).parameters)
    given = {part: module for part, module in parts.items() if part in known}
    return kind(**given, adapter=random_weights(adapter, seed=4))


def _wide_flux(name: str, channels: int) -> Any:
    denoiser = transformers.transformer(
        "FluxTransformer2DModel",
        **packed.ROPE,
        axes_dims_rope=(4, 2, 2),
        in_channels=channels,
        out_channels=16,
        joint_attention_dim=transformers.WIDTH,
        pooled_projection_dim=transformers.POOLED,
        guidance_embeds=True,
    )
    return packed.flux(getattr(diffusers, name), transformer=denoiser)


def _flux_controlled(name: str) -> Any:
    first = adapters._flux_controlled()
    return packed.flux(getattr(diffusers, name), controlnet=first.controlnet)


def _hunyuan_dit_controlled() -> Any:
    first = transformers._hunyuan_dit()
    controlnet = diffusers.HunyuanDiT2DControlNetModel.from_transformer(
        first.transformer, transformer_num_layers=2, load_weights_from_transformer=False
    )
    parts = {name: part for name, part in first.components.items() if name != "safety_checker"}
    pipe = diffusers.HunyuanDiTControlNetPipeline(
        **parts, safety_checker=None, controlnet=random_weights(controlnet, seed=4), requires_safety_checker=False
    )
    return repeats_embeddings(pipe)


def _sana_controlled() -> Any:
    first = transformers._sana(diffusers.SanaPipeline, FLOW["flow-euler"]())
    names = ("num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim")
    config = {name: first.transformer.config[name] for name in (*names, "cross_attention_dim", "caption_channels")}
    controlnet = diffusers.SanaControlNetModel(in_channels=4, out_channels=4, num_layers=1, sample_size=8, **config)
    return diffusers.SanaControlNetPipeline(**first.components, controlnet=random_weights(controlnet, seed=4))


def _qwen_controlled() -> Any:
    first = packed._qwen_image(diffusers.QwenImagePipeline)
    controlnet = diffusers.QwenImageControlNetModel.from_transformer(
        first.transformer, num_layers=1, attention_head_dim=8, num_attention_heads=2
    )
    return diffusers.QwenImageControlNetPipeline(**first.components, controlnet=random_weights(controlnet, seed=4))


def _cogview4_controlled() -> Any:
    first = transformers._cogview4()
    config = {name: value for name, value in first.transformer.config.items() if not name.startswith("_")}
    denoiser = transformers.transformer("CogView4Transformer2DModel", **config | {"in_channels": 8})
    pipe = diffusers.CogView4ControlPipeline(**first.components | {"transformer": denoiser})
    return repeats_embeddings(pipe)


def _tokens_adapted(pipe: Any) -> Any:
    """``pipe`` with an IP-Adapter in its one block of two streams."""
    width = 16  # of the tokens inside the transformer
    weights = {
        f"{2 * i}.{part}.{kind}": normal(1, *shape, seed=i + len(part))[0] / 4
        for i in range(1)
        for part in ("to_k_ip", "to_v_ip")
        for kind, shape in (("weight", (width, transformers.WIDTH)), ("bias", (width,)))
    }
    pipe.transformer._load_ip_adapter_weights([{"image_proj": _projection(transformers.WIDTH), "ip_adapter": weights}])
    return pipe


def _sd3_adapted() -> Any:
    """With an IP-Adapter in every block, which sees the timestep too."""
    pipe = transformers.stable_diffusion_3()
    denoiser, width = pipe.transformer, 16
    projection = IPAdapterTimeImageProjection(
        embed_dim=adapters.EMBED,
        output_dim=width,
        hidden_dim=width,
        depth=1,
        dim_head=8,
        heads=2,
        num_queries=FOUR_TOKENS,
        timestep_in_dim=8,
    )
    denoiser.image_proj = random_weights(projection, seed=5)
    processor = functools.partial(
        SD3IPAdapterJointAttnProcessor2_0,
        hidden_size=width,
        ip_hidden_states_dim=width,
        head_dim=8,
        timesteps_emb_dim=width,
        scale=1.0,
    )
    denoiser.set_attn_processor({name: random_weights(processor(), seed=6) for name in denoiser.attn_processors})
    return pipe


def _projection(width: int) -> dict[str, torch.Tensor]:
    return {
        "proj.weight": normal(1, FOUR_TOKENS * width, adapters.EMBED, seed=7)[0] / 4,
        "proj.bias": normal(1, FOUR_TOKENS * width, seed=8)[0],
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def _with_images(arguments: dict[str, Any]) -> dict[str, Any]:
    given = normal(1, 1, adapters.EMBED, seed=6)
    return arguments | {"ip_adapter_image_embeds": [given], "negative_ip_adapter_image_embeds": [-given]}


def _masked(count: int) -> dict[str, Any]:
    return {"image": pictures(count), "mask_image": pictures(count)[:, :1].round()}


def _qwen_pictures(count: int) -> dict[str, Any]:
    return packed._qwen_arguments(count) | {"control_image": pictures(count)}


PIX2PIX = {"none": {"guidance_scale": 1.0}, "cfg": {"guidance_scale": 3.0, "image_guidance_scale": 1.5}}
CASES = (
    Case(
        name="sdxl-inpaint",
        build=lambda: _wide_unet(
            unets.stable_diffusion_xl, "StableDiffusionXLInpaintPipeline", unets.xl_unet(in_channels=9)
        ),
        arguments=lambda count: unets.xl_embeddings(count) | _masked(count) | SIZE,
        schedulers=DISCRETE,
        guidance=unets.RESCALE,
    ),
    Case(
        name="sd-instruct-pix2pix",
        build=lambda: _wide_unet(
            unets.stable_diffusion, "StableDiffusionInstructPix2PixPipeline", unets.unet(in_channels=8)
        ),
        arguments=lambda count: unets.embeddings(count) | {"image": pictures(count)},
        schedulers=DISCRETE,
        guidance=PIX2PIX,
    ),
    Case(
        name="sdxl-instruct-pix2pix",
        build=lambda: _wide_unet(
            unets.stable_diffusion_xl, "StableDiffusionXLInstructPix2PixPipeline", unets.xl_unet(in_channels=8)
        ),
        arguments=lambda count: unets.xl_embeddings(count) | {"image": pictures(count)} | SIZE,
        schedulers=DISCRETE,
        guidance=PIX2PIX,
        callback=False,
    ),
    Case(
        name="sd-adapter",
        build=lambda: _with_adapter(unets.stable_diffusion, "StableDiffusionAdapterPipeline", unets.unet(**BLOCKS)),
        arguments=lambda count: unets.embeddings(count) | {"image": pictures(count)},
        schedulers=DISCRETE,
        guidance=CFG,
        callback=False,
    ),
    Case(
        name="sdxl-adapter",
        build=lambda: _with_adapter(
            unets.stable_diffusion_xl, "StableDiffusionXLAdapterPipeline", unets.xl_unet(**BLOCKS)
        ),
        arguments=lambda count: unets.xl_embeddings(count) | {"image": pictures(count)},
        schedulers=DISCRETE,
        guidance=CFG,
        callback=False,
    ),
    Case(
        name="flux-fill",
        build=lambda: _wide_flux("FluxFillPipeline", 48),
        arguments=lambda count: (
            transformers.only_positive(transformers.pooled_embeddings(count)) | _masked(count) | SIZE
        ),
        schedulers=DYNAMIC_FLOW,
        guidance={"embedded": {"guidance_scale": 3.0}},
    ),
    Case(
        name="flux-control",
        build=lambda: _wide_flux("FluxControlPipeline", 32),
        arguments=lambda count: (
            transformers.only_positive(transformers.pooled_embeddings(count))
            | {"control_image": pictures(count)}
            | SIZE
        ),
        schedulers=DYNAMIC_FLOW,
        guidance={"embedded": {"guidance_scale": 3.0}},
    ),
    Case(
        name="flux-control-img2img",
        build=lambda: _wide_flux("FluxControlImg2ImgPipeline", 32),
        arguments=lambda count: (
            transformers.only_positive(transformers.pooled_embeddings(count))
            | {"image": pictures(count), "control_image": pictures(count, seed=8)}
            | SIZE
        ),
        schedulers=DYNAMIC_FLOW,
        guidance={"embedded": {"guidance_scale": 3.0}},
        steps=9,
    ),
    Case(
        name="flux-controlnet-img2img",
        build=lambda: _flux_controlled("FluxControlNetImg2ImgPipeline"),
        arguments=lambda count: (
            transformers.only_positive(transformers.pooled_embeddings(count))
            | {"image": pictures(count), "control_image": pictures(count, seed=8)}
            | SIZE
        ),
        schedulers=DYNAMIC_FLOW,
        guidance={"none": {}},
        steps=9,
    ),
    Case(
        name="flux-ip-adapter",
        build=lambda: _tokens_adapted(packed.flux()),
        arguments=lambda count: _with_images(packed._flux_arguments(count)),
        schedulers=DYNAMIC_FLOW,
        guidance=packed.TRUE_CFG,
    ),
    Case(
        name="chroma-ip-adapter",
        build=lambda: _tokens_adapted(packed._chroma(diffusers.ChromaPipeline)),
        arguments=lambda count: _with_images(packed._chroma_arguments(count)),
        schedulers=DYNAMIC_FLOW,
        guidance=CFG,
    ),
    Case(
        name="sd3-ip-adapter",
        build=_sd3_adapted,
        arguments=lambda count: transformers.pooled_embeddings(count) | SIZE,
        schedulers=FLOW,
        guidance={
            name: given | {"ip_adapter_image_embeds": normal(rows, 1, adapters.EMBED, seed=6)}
            for name, given, rows in (("none", CFG["none"], 1), ("cfg", CFG["cfg"], 2))
        },
    ),
    Case(
        name="hunyuan-dit-controlnet",
        build=_hunyuan_dit_controlled,
        arguments=lambda count: transformers._hunyuan_dit_arguments(count) | {"control_image": pictures(count)},
        schedulers={"ddpm": DISCRETE["ddpm"], "ddim": DISCRETE["ddim"]},
        guidance=CFG,
    ),
    Case(
        name="sana-controlnet",
        build=_sana_controlled,
        arguments=lambda count: (
            transformers.masked_embeddings(count)
            | transformers.SANA_SIZE
            | {"control_image": pictures(count, 32), "negative_prompt": None}
        ),
        schedulers=FLOW,
        guidance=CFG,
    ),
    Case(
        name="qwen-image-controlnet",
        build=_qwen_controlled,
        arguments=_qwen_pictures,
        schedulers=DYNAMIC_FLOW,
        guidance=packed.QWEN_CFG,
    ),
    Case(
        name="cogview4-control",
        build=_cogview4_controlled,
        arguments=lambda count: transformers.embeddings(count) | SIZE | {"control_image": pictures(count)},
        schedulers=FLOW,
        guidance=CFG,
    ),
)
