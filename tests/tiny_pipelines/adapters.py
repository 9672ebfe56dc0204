"""Pipelines with something beside the denoiser: ControlNet and IP-Adapter."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)

from .case import Case, normal, pictures, random_weights
from .packed import ROPE, SIGMAS_FLOW, TRUE_CFG, flux
from .transformers import CFG, FLOW, SIZE, pooled_embeddings, stable_diffusion_3
from .transformers import POOLED as POOLED_3
from .transformers import WIDTH as WIDTH_3
from .unets import (
    EPSILON,
    NOISING,
    WIDTH,
    embeddings,
    stable_diffusion,
    stable_diffusion_xl,
    unet,
    xl_embeddings,
    xl_unet,
)

EMBED = 12  # width of an image embedding
XL_SCHEDULERS = {"euler": EPSILON["euler"], **EPSILON}
GUESS = {"guess": {"guidance_scale": 3.0, "guess_mode": True}}  # the ControlNet sees the conditional half only
CONTROL = {"conditioning_embedding_out_channels": (8, 8)}  # its control images have twice the side of the latents


def _controlled(build: Any, denoiser: Any, kind: type) -> Any:
    return build(kind, unet=denoiser, controlnet=random_weights(ControlNetModel.from_unet(denoiser, **CONTROL), seed=4))


def _union_controlled() -> Any:
    denoiser = xl_unet()
    names = set(inspect.signature(ControlNetUnionModel).parameters)
    config = {name: value for name, value in denoiser.config.items() if name in names and not name.startswith("_")}
    added = {"num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}  # as wide as the first block
    controlnet = random_weights(ControlNetUnionModel(**config | CONTROL | added), seed=4)
    return stable_diffusion_xl(StableDiffusionXLControlNetUnionPipeline, unet=denoiser, controlnet=controlnet)


def _sd3_controlled() -> Any:
    pipe = stable_diffusion_3()
    layers = pipe.transformer.config.num_layers - 1  # the last one is of another form
    controlnet = SD3ControlNetModel.from_transformer(pipe.transformer, layers, num_extra_conditioning_channels=0)
    return stable_diffusion_3(StableDiffusion3ControlNetPipeline, controlnet=random_weights(controlnet, seed=4))


def _flux_controlled() -> Any:
    controlnet = FluxControlNetModel(
        **ROPE, axes_dims_rope=(4, 2, 2), in_channels=16, joint_attention_dim=WIDTH_3, pooled_projection_dim=POOLED_3
    )
    return flux(FluxControlNetPipeline, controlnet=random_weights(controlnet, seed=4))


def _adapted(pipe: Any) -> Any:
    """``pipe`` with an IP-Adapter, which makes four tokens of an image embedding."""
    denoiser, width = pipe.unet, WIDTH
    layers = [name.removesuffix(".processor") for name in denoiser.attn_processors if ".attn2." in name]
    weights = {
        f"{2 * i + 1}.{part}.weight": normal(1, denoiser.get_submodule(name).to_q.in_features, width, seed=i)[0] / 4
        for i, name in enumerate(layers)
        for part in ("to_k_ip", "to_v_ip")
    }
    projection = {
        "proj.weight": normal(1, 4 * width, EMBED, seed=7)[0] / 4,
        "proj.bias": normal(1, 4 * width, seed=8)[0],
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    denoiser._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    return pipe


def _with_image(scale: float) -> dict[str, Any]:
    """The pipeline repeats the one embedding for every image; with guidance there is a negative one before it."""
    embeds = normal(2 if scale > 1 else 1, 1, EMBED, seed=6)
    return {"guidance_scale": scale, "ip_adapter_image_embeds": [embeds]}


IP_GUIDANCE = {"none": _with_image(1.0), "cfg": _with_image(3.0)}
CASES = (
    Case(
        name="sd-controlnet",
        build=lambda: _controlled(stable_diffusion, unet(), StableDiffusionControlNetPipeline),
        arguments=lambda count: embeddings(count) | {"image": pictures(count)},
        schedulers=EPSILON,
        guidance=CFG | GUESS,
        representative=("ddim", "unipc"),
    ),
    Case(
        name="sd-controlnet-img2img",
        build=lambda: _controlled(stable_diffusion, unet(), StableDiffusionControlNetImg2ImgPipeline),
        arguments=lambda count: (
            embeddings(count) | {"image": pictures(count), "control_image": pictures(count, seed=8), "strength": 0.7}
        ),
        schedulers=NOISING,
        guidance=CFG,
        representative=("ddim",),
        steps=9,
    ),
    Case(
        name="sdxl-controlnet",
        build=lambda: _controlled(stable_diffusion_xl, xl_unet(), StableDiffusionXLControlNetPipeline),
        arguments=lambda count: xl_embeddings(count) | {"image": pictures(count)},
        schedulers=XL_SCHEDULERS,
        guidance=CFG | GUESS,
        representative=("euler",),
    ),
    Case(
        name="sdxl-controlnet-img2img",
        build=lambda: _controlled(stable_diffusion_xl, xl_unet(), StableDiffusionXLControlNetImg2ImgPipeline),
        arguments=lambda count: (
            xl_embeddings(count) | {"image": pictures(count), "control_image": pictures(count, seed=8), "strength": 0.7}
        ),
        schedulers={"euler": NOISING["euler"], **NOISING},
        guidance=CFG,
        representative=("euler",),
        steps=9,
    ),
    Case(
        name="sdxl-controlnet-union",
        build=_union_controlled,
        arguments=lambda count: xl_embeddings(count) | {"control_image": [pictures(count)], "control_mode": [1]},
        schedulers=XL_SCHEDULERS,
        guidance=CFG,
        representative=("euler",),
    ),
    Case(
        name="sd3-controlnet",
        build=_sd3_controlled,
        arguments=lambda count: pooled_embeddings(count) | {"control_image": pictures(count)} | SIZE,
        schedulers=FLOW,
        guidance=CFG,
        representative=("flow-euler",),
    ),
    Case(
        name="flux-controlnet",
        build=_flux_controlled,
        arguments=lambda count: pooled_embeddings(count) | {"control_image": pictures(count)} | SIZE,
        schedulers=SIGMAS_FLOW,
        guidance=TRUE_CFG,
        representative=("flow-euler",),
    ),
    Case(
        name="sd-ip-adapter",
        build=lambda: _adapted(stable_diffusion()),
        arguments=embeddings,
        schedulers=EPSILON,
        guidance=IP_GUIDANCE,
        representative=("ddim",),
    ),
    Case(
        name="sdxl-ip-adapter",
        build=lambda: _adapted(stable_diffusion_xl()),
        arguments=xl_embeddings,
        schedulers=XL_SCHEDULERS,
        guidance=IP_GUIDANCE,
        representative=("euler",),
    ),
)
