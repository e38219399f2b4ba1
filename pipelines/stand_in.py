"""Denoisers of the size of known models with random weights: what they cost does not depend on the weights."""

from __future__ import annotations

import diffusers
from torch import nn


def sd15_unet() -> nn.Module:
    """The UNet of Stable Diffusion 1.5, 860 million parameters."""
    unet: nn.Module = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    return unet.eval()
