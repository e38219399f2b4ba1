"""Token layouts of text-to-image transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vision_attn.layout import TokenLayout
from vision_attn.patching.layouts.family import Family

if TYPE_CHECKING:
    from torch import nn


def _sd3(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Image, then text; tokens are `patch_size` squares of the latent."""
    rows, columns = call["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    return TokenLayout((rows // patch, columns // patch), text_after=call["encoder_hidden_states"].shape[1])


IMAGE_FAMILIES: tuple[Family, ...] = (
    Family("sd3", ("SD3Transformer2DModel",), _sd3, image_only=("*.attn2",)),
)

REFUSED_IMAGE: dict[str, str] = {}
