"""The image tower of the bundled scorer: a timm ResNet small enough to cost less than the denoiser call it watches.

Importing this module registers ``preview_resnet`` with timm, which is how an open_clip model configuration
(``vision_cfg.timm_model_name``) finds it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import GroupNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

# timm looks here for the configurations of the models a module registers; ours has no pretrained weights.
default_cfgs = generate_default_cfgs(
    {"preview_resnet": {"input_size": (3, 32, 32), "pool_size": (2, 2), "first_conv": "conv1", "classifier": "fc"}}
)


class PreviewResNet(ResNet):
    """Three basic blocks, on an 8x8, 4x4 and 2x2 grid for a 32x32 preview; about half a million weights.

    GroupNorm in place of BatchNorm: the score of an image must not depend on its batch mates, and weights averaged by
    WiSE-FT need no new running statistics.
    """

    def __init__(self, channels: tuple[int, int, int] = (64, 96, 128), **kwargs: Any) -> None:
        norm = partial(GroupNorm, num_groups=8)
        super().__init__(BasicBlock, (1, 1, 1), channels=channels, norm_layer=norm, **kwargs)  # type: ignore[arg-type]
        # One patch per latent pixel, when the preview is linear and the VAE downsamples by four: the first stage then
        # sees the latents themselves. No norm after the stem: it would take away brightness and contrast.
        self.conv1 = nn.Conv2d(self.in_chans, 64, kernel_size=4, stride=4, bias=False)  # type: ignore[assignment]
        self.bn1 = nn.Identity()
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        self.layer4 = nn.Sequential()  # the forward pass of timm names four stages
        self.to(memory_format=torch.channels_last)  # a quarter faster on CPUs


@register_model
def preview_resnet(pretrained: bool = False, **kwargs: Any) -> PreviewResNet:
    """Build the tower; timm's factory calls this. There are no pretrained weights outside the bundled checkpoint."""
    return build_model_with_cfg(PreviewResNet, "preview_resnet", pretrained, **kwargs)
