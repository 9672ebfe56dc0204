"""A tiny VAE of each class whose latents are known: random weights; each halves the sides once."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderTiny,
)

_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
}


def kl(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**_BLOCKS | {"latent_channels": 4, "scaling_factor": 0.5} | changes).eval()


def flux2(**changes: Any) -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(**_BLOCKS | {"latent_channels": 2} | changes).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 1.5)
    return vae


def qwen(**changes: Any) -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.5, -1.0, 0.25, 2.0], "latents_std": [2.0, 0.5, 1.5, 3.0]}
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    return AutoencoderKLQwenImage(**sizes | statistics | changes).eval()


def dc(**changes: Any) -> AutoencoderDC:
    torch.manual_seed(0)
    sizes = {"latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.4}
    sides = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "qkv_multiscales": ((), (5,)),
        "layers_per_block": (1, 1),
    }
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    kinds = {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
    return AutoencoderDC(**sizes | both | kinds | changes).eval()


def tiny(**changes: Any) -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**blocks | counts | {"latent_channels": 4} | changes).eval()


VAES = {"kl": kl, "flux2": flux2, "qwen": qwen, "dc": dc, "tiny": tiny}
