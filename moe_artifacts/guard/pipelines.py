"""What the guard knows of each diffusers pipeline: which inputs of its denoiser hold one entry per image.

A loop that gets fewer rows back from ``scheduler.step`` goes on with a smaller batch. What it computes from the latents
follows by itself: the timestep, the residuals of a ControlNet. What it made before the loop still counts the full batch
and is cut on its way into the denoiser (conditioning.py): ``PipelineSpec.batched``. Read in the sources of diffusers
0.42.1; tests/test_pipelines.py runs every pipeline here and compares the rows of a shrinking run with the full one.

Images stand in the batch in the order asked for. Where guidance doubles the batch, the copies stand one after the
other: image k is row k of each. The denoiser joins its inputs row by row, so every input is cut at the same rows,
whatever it holds there: the size ids of SDXL stand in another order, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from moe_artifacts.errors import UnsupportedPipelineError


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """How rows leave the batch of one pipeline class.

    Names are those of the parameters of ``forward``; a member of a dict is written after a dot.
    """

    denoiser: str = "transformer"  # attribute of the pipeline: the module whose calls are worth saving
    also: tuple[str, ...] = ()  # further modules run on the batch at each step: "controlnet"
    batched: frozenset[str]  # made before the loop, one entry per image and guidance copy; tensors, or lists of them
    listed: frozenset[str] = frozenset()  # those of ``batched`` that are lists with one member per image
    shared: frozenset[str]  # the same for all images, or computed in the loop and hence of the right size
    # Whether the loop itself counts on the full batch, in locals that no hook reaches. Its latents then keep their
    # size, and rows leave inside the denoiser only: it computes the running ones and hands back zeros for the others.
    keeps_batch: bool = False
    refused_arguments: Mapping[str, str] = field(default_factory=dict)  # argument of the call -> why it is refused
    refused_channels: Mapping[int, str] = field(default_factory=dict)  # input channels of the denoiser -> why
    # Height and width where the call gives none: the `default_sample_size` of the pipeline, also where a control image
    # given as a tensor goes before; the `sample_size` of the denoiser; that of an image given; or so many pixels.
    default_size: Literal["pipeline", "control", "denoiser", "image"] | int = "pipeline"

    def modules(self, pipe: Any) -> list[nn.Module]:
        """The modules that are called with the batch at each step."""
        return [getattr(pipe, name) for name in (self.denoiser, *self.also)]


def spec_of(pipe: Any) -> PipelineSpec:
    """How rows leave the batch of this pipeline.

    Raises:
        UnsupportedPipelineError: If the pipeline is not known to work with the guard; with the reason where there is
            one.
    """
    name = type(pipe).__name__
    # By the exact class of diffusers, not by isinstance: a subclass may have another loop.
    if not type(pipe).__module__.startswith("diffusers.") or name not in SPECS.keys() | REFUSED.keys():
        families = ", ".join(known.removesuffix("Pipeline") for known in SPECS if not known.endswith(_VARIANTS))
        raise UnsupportedPipelineError(
            f"pipe is a {name}; the guard supports the pipelines {families} and most of their kin for img2img, "
            "ControlNet and the like, not their subclasses; docs/compatibility.md lists all"
        )
    if name in REFUSED:
        raise UnsupportedPipelineError(f"the guard cannot watch a {name}: {REFUSED[name]}")
    spec = SPECS[name]
    if spec.refused_channels:
        channels = getattr(pipe, spec.denoiser).config.in_channels
        if channels in spec.refused_channels:
            reason = spec.refused_channels[channels]
            raise UnsupportedPipelineError(
                f"the guard cannot watch a {name} whose denoiser takes {channels} channels: {reason}"
            )
    return spec


_VARIANTS = tuple(f"{kind}Pipeline" for kind in ("Img2Img", "Inpaint", "ControlNet", "Control", "Adapter"))

_STEP = frozenset({"timestep"})
_TEXT = frozenset({"encoder_hidden_states"})
_MASKED_TEXT = _TEXT | {"encoder_attention_mask"}
_TOKENS = _TEXT | {"pooled_projections", "joint_attention_kwargs.ip_adapter_image_embeds"}
_IDS = _STEP | {"txt_ids", "img_ids"}  # positions, alike for every image; Flux2 repeats them and reads the first
_UNET = _TEXT | {"timestep_cond", "added_cond_kwargs.image_embeds", "down_intrablock_additional_residuals"}
_UNET_XL = _UNET | {"added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"}
_UNET_SHARED = _STEP | {"cross_attention_kwargs.ip_adapter_masks"}  # one for each adapter image, not for each image
_RESIDUALS = frozenset({"down_block_additional_residuals", "mid_block_additional_residual", "conditioning_scale"})

_NOISY_END = {"denoising_end": "the run then ends before the scheduler's last step, which the guard needs to see"}
_BLENDS = "its loop blends the latents with those of the image given after every step, also after the last one"
_REFERENCE = {"image": "its latents join those of the images in the loop, and the size of the images follows from it"}

_SD = PipelineSpec(denoiser="unet", batched=_UNET, shared=_UNET_SHARED, default_size="denoiser")
_SDXL = PipelineSpec(denoiser="unet", batched=_UNET_XL, shared=_UNET_SHARED, refused_arguments=_NOISY_END)
_SD_CONTROLNET = replace(
    _SD,
    also=("controlnet",),
    batched=_UNET | {"controlnet_cond"},
    shared=_UNET_SHARED | _RESIDUALS,
    default_size="image",
)
_SDXL_CONTROLNET = replace(
    _SDXL,
    also=("controlnet",),
    batched=_UNET_XL | {"controlnet_cond"},
    shared=_UNET_SHARED | _RESIDUALS,
    default_size="image",
)
_SD3 = PipelineSpec(batched=_TOKENS, shared=_STEP | {"skip_layers"})
_FLUX = PipelineSpec(batched=_TOKENS | {"guidance"}, shared=_IDS)
_FLUX2 = PipelineSpec(batched=_TEXT | {"guidance"}, shared=_IDS, refused_arguments=_REFERENCE)
_FLUX_CONTROLNET = PipelineSpec(
    also=("controlnet",),
    batched=_TOKENS | {"controlnet_cond", "controlnet_mode"},
    # This loop makes the guidance anew at each step.
    shared=_IDS | {"guidance", "conditioning_scale", "controlnet_block_samples", "controlnet_single_block_samples"},
    default_size="control",
)
_CHROMA = PipelineSpec(batched=_TOKENS - {"pooled_projections"} | {"attention_mask"}, shared=_IDS)
_PIXART = PipelineSpec(
    batched=_MASKED_TEXT | {"added_cond_kwargs.resolution", "added_cond_kwargs.aspect_ratio"},
    shared=_STEP,
    default_size="denoiser",
)
_SANA = PipelineSpec(batched=_MASKED_TEXT | {"guidance"}, shared=_STEP)
_HUNYUAN_DIT = PipelineSpec(
    batched=_TEXT
    | {"text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size", "style"},
    shared=_STEP | {"image_rotary_emb"},
)
_COGVIEW = PipelineSpec(
    batched=_TEXT | {"original_size", "target_size", "crop_coords"}, shared=_STEP, default_size="denoiser"
)
_QWEN = PipelineSpec(
    batched=_TEXT | {"encoder_hidden_states_mask", "guidance"},
    shared=_STEP | {"img_shapes"},  # a list over prompts, all alike, of which the first is read
)
_Z_IMAGE = PipelineSpec(
    batched=frozenset({"x", "t", "cap_feats"}),
    listed=frozenset({"x", "cap_feats"}),
    shared=frozenset(),
    keeps_batch=True,  # with guidance the loop splits the outputs at a local `actual_batch_size`
    default_size=1024,
)


def _from_image(spec: PipelineSpec) -> PipelineSpec:
    """The same loop on images of any size."""
    return replace(spec, default_size="image")


def _joined(spec: PipelineSpec, *latents: str) -> PipelineSpec:
    """A loop that joins its latents with others, made before it: those keep the full batch, and so do its inputs."""
    return replace(spec, batched=spec.batched.union(latents), shared=spec.shared.difference(latents), keeps_batch=True)


def _controlled(spec: PipelineSpec, residuals: str = "controlnet_block_samples") -> PipelineSpec:
    """The same loop with a ControlNet that takes the inputs of the denoiser."""
    return replace(
        spec,
        also=("controlnet",),
        batched=spec.batched | {"controlnet_cond"},
        shared=spec.shared | {"conditioning_scale", residuals},
        default_size="control",
    )


SPECS: Mapping[str, PipelineSpec] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _from_image(_SD),
    "StableDiffusionInpaintPipeline": replace(_joined(_SD, "sample"), refused_channels={4: _BLENDS}),
    "StableDiffusionInstructPix2PixPipeline": _from_image(_joined(_SD, "sample")),
    "StableDiffusionControlNetPipeline": _SD_CONTROLNET,
    "StableDiffusionControlNetImg2ImgPipeline": _SD_CONTROLNET,
    "StableDiffusionAdapterPipeline": _from_image(_SD),
    "LatentConsistencyModelPipeline": _SD,
    "LatentConsistencyModelImg2ImgPipeline": _from_image(_SD),
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _from_image(_SDXL),
    "StableDiffusionXLInpaintPipeline": replace(
        _joined(_SDXL, "sample"), refused_channels={4: _BLENDS}, default_size="denoiser"
    ),
    "StableDiffusionXLInstructPix2PixPipeline": _joined(_SDXL, "sample"),
    "StableDiffusionXLControlNetPipeline": _SDXL_CONTROLNET,
    "StableDiffusionXLControlNetImg2ImgPipeline": _SDXL_CONTROLNET,
    "StableDiffusionXLAdapterPipeline": _from_image(_SDXL),
    "KolorsPipeline": _SDXL,
    "KolorsImg2ImgPipeline": _from_image(_SDXL),
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusion3Img2ImgPipeline": _SD3,
    "StableDiffusion3ControlNetPipeline": _controlled(_SD3, "block_controlnet_hidden_states"),
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
    "FluxFillPipeline": _joined(_FLUX, "hidden_states", "timestep"),
    "FluxControlPipeline": _joined(_FLUX, "hidden_states", "timestep"),
    "FluxControlImg2ImgPipeline": _joined(_FLUX, "hidden_states", "timestep"),
    "FluxControlNetPipeline": _FLUX_CONTROLNET,
    "FluxControlNetImg2ImgPipeline": _FLUX_CONTROLNET,
    "Flux2Pipeline": _FLUX2,
    "Flux2KleinPipeline": _FLUX2,
    "ChromaPipeline": _CHROMA,
    "ChromaImg2ImgPipeline": _CHROMA,
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "SanaPipeline": _SANA,
    "SanaSprintPipeline": _SANA,
    "SanaSprintImg2ImgPipeline": _SANA,
    "SanaControlNetPipeline": _controlled(_SANA),
    "LuminaPipeline": PipelineSpec(batched=_TEXT | {"encoder_mask"}, shared=_STEP | {"image_rotary_emb"}),
    "Lumina2Pipeline": PipelineSpec(batched=_MASKED_TEXT, shared=_STEP),
    "AuraFlowPipeline": PipelineSpec(batched=_TEXT, shared=_STEP, default_size="denoiser"),
    "HunyuanDiTPipeline": _HUNYUAN_DIT,
    "HunyuanDiTControlNetPipeline": _controlled(_HUNYUAN_DIT),
    "CogView3PlusPipeline": _COGVIEW,
    "CogView4Pipeline": _COGVIEW,
    "CogView4ControlPipeline": _joined(_COGVIEW, "hidden_states", "timestep"),
    "QwenImagePipeline": _QWEN,
    "QwenImageImg2ImgPipeline": _QWEN,
    "QwenImageControlNetPipeline": _controlled(_QWEN),
    "ZImagePipeline": _Z_IMAGE,
    "ZImageImg2ImgPipeline": _from_image(_Z_IMAGE),
}

_REFUSED_FOR: Mapping[str, tuple[str, ...]] = {
    _BLENDS: (
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusion3InpaintPipeline",
        "FluxInpaintPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetInpaintPipeline",
        "FluxKontextInpaintPipeline",
        "Flux2KleinInpaintPipeline",
        "ChromaInpaintPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditInpaintPipeline",
        "ZImageInpaintPipeline",
    ),
    "its ControlNet attends across the images of the batch, so what one becomes depends on the others": (
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    ),
    "it takes the perturbed attention out of its denoiser after the loop, so a run that ends early leaves it in": (
        "StableDiffusionPAGPipeline",
        "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionControlNetPAGInpaintPipeline",
        "StableDiffusionXLPAGPipeline",
        "StableDiffusionXLPAGImg2ImgPipeline",
        "StableDiffusionXLPAGInpaintPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLControlNetPAGImg2ImgPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
        "HunyuanDiTPAGPipeline",
        "KolorsPAGPipeline",
        "PixArtSigmaPAGPipeline",
        "SanaPAGPipeline",
    ),
    "it chooses the size of its images itself, so its tokens cannot be laid out as an image": ("FluxKontextPipeline",),
    "it denoises pixels: it has no VAE, and so no latent space that a scorer could be made for": (
        "IFPipeline",
        "IFImg2ImgPipeline",
        "IFSuperResolutionPipeline",
        "IFImg2ImgSuperResolutionPipeline",
        "IFInpaintingPipeline",
        "IFInpaintingSuperResolutionPipeline",
        "PRXPixelPipeline",
        "DDPMPipeline",
        "DDIMPipeline",
    ),
    "its images are made by two denoisers in turn, and the first one's latents are no image yet": (
        "StableCascadePriorPipeline",
        "StableCascadeDecoderPipeline",
        "StableCascadeCombinedPipeline",
        "KandinskyPriorPipeline",
        "KandinskyPipeline",
        "KandinskyCombinedPipeline",
        "KandinskyV22PriorPipeline",
        "KandinskyV22Pipeline",
        "KandinskyV22CombinedPipeline",
        "StableUnCLIPPipeline",
    ),
}
REFUSED: Mapping[str, str] = {name: reason for reason, names in _REFUSED_FOR.items() for name in names}
