"""Pipelines with a U-Net: Stable Diffusion 1 and 2, SDXL, Kolors, LCM, and what hangs on them."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from typing import Any
from unittest import mock

from diffusers import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from .case import SIDE, Case, autoencoder, image_to_image, normal, pictures, random_weights, repeats_embeddings
from .schedulers import discrete

TOKENS, WIDTH, POOLED, WIDE = 5, 16, 12, 14
CFG = {"none": {"guidance_scale": 1.0}, "cfg": {"guidance_scale": 3.0}}
RESCALE = {**CFG, "rescale": {"guidance_scale": 3.0, "guidance_rescale": 0.7}}
# All rows of the added conditioning are alike but for the negative ones, which SDXL puts in between the others.
SIZES = {"sizes": {"guidance_scale": 3.0, "negative_original_size": (8, 4), "negative_target_size": (4, 8)}}
EPSILON, V_PREDICTION = discrete(), discrete("v_prediction")
# Other settings of a class that is there already, and no other state.
VARIANTS = (
    "lms-karras",
    "euler-karras",
    "euler-exponential",
    "euler-beta",
    "dpm-karras",
    "dpm-lu",
    "dpm-3",
    "dpm-heun",
)
VARIANTS += ("dpm-single-3", "unipc-3")
NOISING = {name: build for name, build in EPSILON.items() if name != "ipndm"}  # with `add_noise`, for img2img
SD_ONLY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def unet(**changes: Any) -> nn.Module:
    return random_weights(
        UNet2DConditionModel(
            **{
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "block_out_channels": (8, 16),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "attention_head_dim": 8,
                "cross_attention_dim": WIDTH,
                "sample_size": SIDE // 2,
                **changes,
            }
        ),
        seed=2,
    )


def xl_unet(**changes: Any) -> nn.Module:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return unet(**added, projection_class_embeddings_input_dim=6 * 8 + POOLED, **changes)


def embeddings(count: int) -> dict[str, Any]:
    return {
        "prompt_embeds": normal(count, TOKENS, WIDTH, seed=1),
        "negative_prompt_embeds": normal(count, TOKENS, WIDTH, seed=2),
    }


def xl_embeddings(count: int) -> dict[str, Any]:
    return embeddings(count) | {
        "pooled_prompt_embeds": normal(count, POOLED, seed=3),
        "negative_pooled_prompt_embeds": normal(count, POOLED, seed=4),
    }


def stable_diffusion(kind: type = StableDiffusionPipeline, **parts: Any) -> Any:
    given = {"vae": autoencoder(), "unet": unet(), "scheduler": EPSILON["ddim"](), **SD_ONLY, **parts}
    return kind(text_encoder=None, tokenizer=None, **given)


def stable_diffusion_xl(kind: type = StableDiffusionXLPipeline, **parts: Any) -> Any:
    given = {"vae": autoencoder(), "unet": xl_unet(), "scheduler": EPSILON["euler"](), **parts}
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return kind(**nothing, **given, add_watermarker=False)


@functools.cache
def _kolors_class(module: str, name: str) -> Any:
    # Its tokenizer, which is not built here, needs a package that nothing else of ours does.
    stand_in = types.ModuleType("sentencepiece")
    stand_in.SentencePieceProcessor = type(None)  # type: ignore[attr-defined]
    missing = {} if importlib.util.find_spec("sentencepiece") else {"sentencepiece": stand_in}
    with mock.patch.dict(sys.modules, missing):
        return getattr(importlib.import_module(f"diffusers.pipelines.kolors.{module}"), name)


def _kolors(module: str, name: str) -> Any:
    pipe = _kolors_class(module, name)(
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        unet=xl_unet(encoder_hid_dim=WIDE, encoder_hid_dim_type="text_proj"),
        scheduler=EPSILON["euler"](),
    )
    if name == "KolorsPipeline":
        return repeats_embeddings(pipe)
    pipe.encode_prompt = _encode_kolors  # it takes no embeddings: it loses the pooled ones on the way
    return pipe


def _encode_kolors(prompt: list[str], num_images_per_prompt: int, **_: Any) -> tuple[Tensor, ...]:
    found = _kolors_embeddings(len(prompt))
    order = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return tuple(found[name].repeat_interleave(num_images_per_prompt, dim=0) for name in order)


def _kolors_embeddings(count: int) -> dict[str, Any]:
    wide = {
        "prompt_embeds": normal(count, TOKENS, WIDE, seed=1),
        "negative_prompt_embeds": normal(count, TOKENS, WIDE, seed=2),
    }
    return xl_embeddings(count) | wide


def _lcm(kind: type) -> Any:
    return stable_diffusion(kind, unet=unet(time_cond_proj_dim=8), scheduler=EPSILON["lcm"]())


def _first(name: str, schedulers: dict[str, Any]) -> dict[str, Any]:
    return {name: schedulers[name], **schedulers}


def _inpainting(count: int) -> dict[str, Any]:
    given = {"image": pictures(count), "mask_image": pictures(count)[:, :1].round(), "height": SIDE, "width": SIDE}
    return embeddings(count) | given


CASES = (
    Case(
        name="sd",
        build=stable_diffusion,
        arguments=embeddings,
        schedulers=EPSILON,
        guidance=RESCALE,
        representative=tuple(name for name in EPSILON if name not in VARIANTS),
    ),
    Case(
        name="sd2",
        build=lambda: stable_diffusion(scheduler=V_PREDICTION["ddim"]()),
        arguments=embeddings,
        schedulers=V_PREDICTION,
        guidance=RESCALE,
        representative=("ddim", "euler", "unipc"),
    ),
    Case(
        name="sd-img2img",
        build=lambda: stable_diffusion(StableDiffusionImg2ImgPipeline),
        arguments=lambda count: embeddings(count) | image_to_image(count),
        schedulers=NOISING,
        guidance=CFG,
        representative=("ddim", "euler-a", "dpm", "heun", "unipc"),
        steps=9,
    ),
    Case(
        name="sd-inpaint",
        build=lambda: stable_diffusion(StableDiffusionInpaintPipeline, unet=unet(in_channels=9)),
        arguments=_inpainting,
        schedulers=EPSILON,
        guidance=CFG,
        representative=("ddim", "euler-a"),
    ),
    Case(
        name="sd-inpaint-blended",  # with a U-Net that was not made for it
        build=lambda: stable_diffusion(StableDiffusionInpaintPipeline),
        arguments=_inpainting,
        schedulers={"ddim": EPSILON["ddim"]},
        guidance=CFG,
    ),
    Case(
        name="sdxl",
        build=stable_diffusion_xl,
        arguments=xl_embeddings,
        schedulers=_first("euler", EPSILON),
        guidance=RESCALE | SIZES,
        representative=("euler", "ddim", "dpm", "euler-a"),
    ),
    Case(
        name="sdxl-img2img",
        build=lambda: stable_diffusion_xl(StableDiffusionXLImg2ImgPipeline, unet=xl_unet()),
        arguments=lambda count: xl_embeddings(count) | image_to_image(count),
        schedulers=_first("euler", NOISING),
        guidance=CFG | SIZES,
        representative=("euler", "unipc"),
        steps=9,
    ),
    Case(
        name="kolors",
        build=lambda: _kolors("pipeline_kolors", "KolorsPipeline"),
        arguments=_kolors_embeddings,
        schedulers=_first("euler", EPSILON),
        guidance=CFG | SIZES,
        representative=("euler", "dpm"),
    ),
    Case(
        name="kolors-img2img",
        build=lambda: _kolors("pipeline_kolors_img2img", "KolorsImg2ImgPipeline"),
        arguments=lambda count: {"prompt": ["a prompt"] * count, **image_to_image(count)},
        schedulers=_first("euler", NOISING),
        guidance=CFG,
        representative=("euler",),
        steps=9,
    ),
    Case(
        name="lcm",
        build=lambda: _lcm(LatentConsistencyModelPipeline),
        arguments=lambda count: {"prompt_embeds": embeddings(count)["prompt_embeds"]},
        schedulers={"lcm": EPSILON["lcm"]},
        guidance={"embedded": {"guidance_scale": 3.0}},
    ),
    Case(
        name="lcm-img2img",
        build=lambda: _lcm(LatentConsistencyModelImg2ImgPipeline),
        arguments=lambda count: {"prompt_embeds": embeddings(count)["prompt_embeds"], **image_to_image(count)},
        schedulers={"lcm": EPSILON["lcm"]},
        guidance={"embedded": {"guidance_scale": 3.0}},
    ),
)
