"""Which tokens timm's attention modules see, one small function per family.

A family is a line in one of two tables:

- `WHOLE_MAPS`, by the class of the model: every attention sees the whole map that one module of the model embeds.
- `FAMILIES`, by the class of the attention: each module tells its own grid, as windows and pyramids need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from vision_attn.layout import TokenLayout
from vision_attn.patching.hooks import LayoutFunction
from vision_attn.patching.token_order import ROWS, Rows, Unrolled


class Served(NamedTuple):
    """How an attention module tells its tokens.

    Attributes:
        layout: `layout(module, arguments of its forward by name)` gives the token layout of its attention call.
        order: The order of the call's tokens.
        scope: The module that `layout` asks, `None` for the attention module itself.
    """

    layout: LayoutFunction
    order: Rows = ROWS
    scope: nn.Module | None = None


Family = Callable[[nn.Module, Any], "Served | str"]
"""`family(model, attention module)` tells how the module is served, or why it is not."""


def embedded_map(embed: Any, arguments: Mapping[str, Any], prefix: int) -> TokenLayout:
    """The map that a patch embedding makes of its image, behind class and register tokens."""
    image = arguments["x"]
    told = getattr(embed, "dynamic_feat_size", None)
    rows, columns = embed.grid_size if told is None else told((image.shape[-2], image.shape[-1]))
    return TokenLayout((int(rows), int(columns)), text_before=prefix)


def naflex_map(embed: Any, arguments: Mapping[str, Any], prefix: int) -> TokenLayout | str:
    """The map of a batch of images, or of patches with coordinates, where these are of whole images of one size."""
    patches, coordinates, valid = arguments["x"], arguments["patch_coord"], arguments["patch_valid"]
    if patches.ndim == 4:
        return embedded_map(embed, arguments, prefix)
    if torch.compiler.is_compiling():
        return "patch coordinates cannot be read in a compiled graph"
    grid = tuple((coordinates[0].amax(0) + 1).tolist())
    whole = torch.cartesian_prod(*(torch.arange(size, device=coordinates.device) for size in grid))
    same = coordinates.shape[1] == math.prod(grid) and bool((coordinates == whole).all())
    if same and (valid is None or bool(valid.all())):
        return TokenLayout(grid, text_before=prefix)
    return "patches must be those of whole images of one size, in rows"


WHOLE_MAPS: dict[str, tuple[str, Callable[..., TokenLayout | str]]] = {
    "VisionTransformer": ("patch_embed", embedded_map),
    "Eva": ("patch_embed", embedded_map),
    "Beit": ("patch_embed", embedded_map),
    "VisionTransformerRelPos": ("patch_embed", embedded_map),
    "NaFlexVit": ("embeds", naflex_map),
}
"""The module that embeds the image, and the function of its arguments that gives the map."""


def _window(module: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout(tuple(module.window_size))


def _channels_last(module: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout(tuple(arguments["x"].shape[1:-1]))


def _channels_first(module: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout(tuple(arguments["x"].shape[2:]))


def _told_size(module: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout(tuple(arguments["feat_size"]))


def _pyramid(model: nn.Module, module: Any) -> Served | str:
    """PVTv2: self-attention only where the keys are not those of a smaller map."""
    if module.pool is None and module.sr is None:
        return Served(_told_size)
    return "its keys are those of a smaller map: no self-attention, stays dense"


def _mask_units(model: nn.Module, module: Any) -> Served | str:
    """Hiera: a mask unit, or the whole map of the stage; the tokens keep the order of poolings to come."""
    if module.q_stride > 1:
        return "its queries are pooled: no self-attention, stays dense"
    told = _poolings_to_come(model, module)
    if told is None:
        return "it is outside of a Hiera, which tells the order of its tokens"
    strides, size = told
    orders = [Unrolled(strides[:count]) for count in range(1, len(strides) + 1)]
    if module.use_mask_unit_attn:
        orders = [order for order in orders if math.prod(order.grid) == module.window_size]
    else:
        pooled = Unrolled(strides).grid if strides else (1,) * len(size)
        orders = [Unrolled((*strides, tuple(n // s for n, s in zip(size, pooled, strict=True))))]
    if not orders:
        return f"its mask unit of {module.window_size} tokens is no product of strides: no map"
    return Served(lambda module, arguments: TokenLayout(orders[0].grid), orders[0])


def _poolings_to_come(model: Any, module: nn.Module) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]] | None:
    """The strides by which Hiera's tokens are unrolled at an attention module, and the size of the map there."""
    for hiera in (part for part in model.modules() if hasattr(part, "reroll")):
        for place, block in enumerate(hiera.blocks):
            if block.attn is module:
                schedule, size = hiera.reroll.schedule[place]
                return tuple(tuple(stride) for stride in schedule), tuple(size)
    return None


_CHANNELS = "it attends channels, not tokens: no map"

FAMILIES: dict[str, Family] = {
    "timm.models.swin_transformer.WindowAttention": lambda model, module: Served(_window),
    "timm.models.maxxvit.AttentionCl": lambda model, module: Served(_channels_last),
    "timm.models.maxxvit.Attention2d": lambda model, module: Served(_channels_first),
    "timm.models.davit.WindowAttention": lambda model, module: Served(_window),
    "timm.models.davit.ChannelAttention": lambda model, module: _CHANNELS,
    "timm.models.davit.ChannelAttentionV2": lambda model, module: _CHANNELS,
    "timm.models.pvt_v2.Attention": _pyramid,
    "timm.models.hiera.MaskUnitAttention": _mask_units,
}


def family_of(attention: type) -> Family | None:
    """The family of an attention class or of a class it derives from."""
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in attention.__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)
