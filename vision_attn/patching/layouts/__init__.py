"""Token layouts of diffusers models: one small pure function per model family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vision_attn.patching.layouts.controlnet import CONTROLNET_FAMILIES, REFUSED_CONTROLNET
from vision_attn.patching.layouts.family import Family, find_family
from vision_attn.patching.layouts.image import IMAGE_FAMILIES, REFUSED_IMAGE
from vision_attn.patching.layouts.unet import REFUSED_UNET, UNET_FAMILIES
from vision_attn.patching.layouts.video import REFUSED_VIDEO, VIDEO_FAMILIES

if TYPE_CHECKING:
    from torch import nn

FAMILIES: tuple[Family, ...] = IMAGE_FAMILIES + VIDEO_FAMILIES + UNET_FAMILIES + CONTROLNET_FAMILIES
REFUSED: dict[str, str] = REFUSED_IMAGE | REFUSED_VIDEO | REFUSED_UNET | REFUSED_CONTROLNET

__all__ = ["FAMILIES", "REFUSED", "Family", "family_of"]


def family_of(model: nn.Module) -> Family:
    """Find the layout family of a diffusers model by class name, base classes included.

    Args:
        model: A diffusers transformer, UNet or decoder.

    Returns:
        The family that serves it.

    Raises:
        PatchError: The class is refused (the message gives the reason) or unknown (it tells how to pass `grid=`).
    """
    return find_family(model, FAMILIES, REFUSED)
