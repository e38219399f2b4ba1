"""BiFormer: bi-level routing attention, and plain attention in the last stage, for images of any size.

Source: BiFormer (arXiv 2303.08810), section 3.3. State dict keys are those of the released weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vision_attn.backbones.pyramid import Pyramid, default_cfg, drop_path_rates, initialise, register
from vision_attn.layout import TokenLayout
from vision_attn.operators.bilevel_routing import BiLevelRouting


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention of a map, and a depthwise convolution of its values.

    The routes have no gradient: queries and keys learn by the attention within the chosen regions alone.

    Args:
        dim: Channels.
        num_heads: Heads, which divide `dim`.
        regions: Regions along each axis; clipped to the map. Where they do not divide it they differ by a token along
            it; the released code refuses such maps or pads them with zeros that take part in the softmax.
        topk: Regions that each region attends, clipped to their number.

    Raises:
        ValueError, TypeError: a number that does not fit the others.

    Source: arXiv 2303.08810, section 3.2. The scale is that of the released weights, `dim ** -0.5` over all heads.
    """

    def __init__(self, dim: int, num_heads: int, regions: int, topk: int) -> None:
        super().__init__()
        _check_heads(self, dim, num_heads)
        self.num_heads, self.scale, self.routing = num_heads, dim**-0.5, BiLevelRouting(regions, topk)
        self.qkv = nn.Sequential(OrderedDict(qkv=nn.Linear(dim, 3 * dim)))
        self.lepe = _local(dim)
        self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, C]` to the same."""
        qkv = self.qkv(x)
        query, key, value = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        output = self.routing(query, key, value, TokenLayout((x.shape[1], x.shape[2])), self.scale)
        output = output.flatten(2).view_as(x) + _convolved(self.lepe, qkv.chunk(3, -1)[2])
        projected: Tensor = self.wo(output)
        return projected


class ConvolvedAttention(nn.Module):
    """Plain attention of a map, and a depthwise convolution of its input.

    Args:
        dim: Channels.
        num_heads: Heads, which divide `dim`.

    Raises:
        ValueError: a number that does not fit the others.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(self, dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = _local(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, C]` to the same."""
        query, key, value = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        output = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).view_as(x)
        projected: Tensor = self.proj(output + _convolved(self.lepe, x))
        return projected


def _check_heads(module: nn.Module, dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{type(module).__name__}: num_heads must divide dim={dim}, got {num_heads}")


def _local(dim: int) -> nn.Conv2d:
    """The positions that attention itself does not tell."""
    return nn.Conv2d(dim, dim, 5, padding=2, groups=dim)


def _convolved(convolution: nn.Module, x: Tensor) -> Tensor:
    """A convolution of `[B, Y, X, C]`."""
    output: Tensor = convolution(x.permute(0, 3, 1, 2))
    return output.permute(0, 2, 3, 1)


class BiFormerBlock(nn.Module):
    """A depthwise convolution, attention and an MLP, the last two with a norm before, each with a residual around.

    Args:
        dim: Channels.
        attention: Attention of maps `[B, Y, X, dim]`.
        mlp_ratio: Hidden channels of the MLP over `dim`.
        drop_path: Rate of stochastic depth.
    """

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        # The released code has an optional convolution in the second place, and so the last layer's name is "3".
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.Identity(), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, Y, X]` to the same."""
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class BiFormer(Pyramid):
    """A pyramid of bi-level routing attention.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for none.
        global_pool: `"avg"` or `""`.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        regions: Regions along each axis.
        topks: Regions that each region attends, per stage; None for plain attention.
        head_dim: Channels of a head of routing attention, a divisor of `embed_dims`.
        num_heads: Heads of plain attention.
        mlp_ratio: Of the MLPs.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of stochastic depth in the last block.

    Raises:
        ValueError, TypeError: a number that does not fit the others.
    """

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512), depths: Sequence[int] = (4, 4, 18, 4), regions: int = 7,
        topks: Sequence[int | None] = (1, 4, 16, None), head_dim: int = 32, num_heads: int = 8, mlp_ratio: float = 3.0,
        drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(embed_dims, num_classes, global_pool, drop_rate)
        for name, given in (("embed_dims", embed_dims), ("topks", topks)):
            if len(given) != len(depths):
                raise ValueError(f"BiFormer: {name} must have {len(depths)} values, got {given}")
        half = embed_dims[0] // 2
        stem = nn.Sequential(*_halving(in_chans, half), nn.GELU(), *_halving(half, embed_dims[0]))
        others = (nn.Sequential(*_halving(*dims)) for dims in pairwise(embed_dims))
        self.downsample_layers, self.stages = nn.ModuleList([stem, *others]), nn.ModuleList()
        for dim, topk, rates in zip(embed_dims, topks, drop_path_rates(drop_path_rate, depths), strict=True):
            if head_dim < 1 or dim % head_dim:
                raise ValueError(f"BiFormer: head_dim must divide embed_dims={tuple(embed_dims)}, got {head_dim}")
            attention: Callable[[], nn.Module] = (
                partial(ConvolvedAttention, dim, num_heads)
                if topk is None
                else partial(BiLevelRoutingAttention, dim, dim // head_dim, regions, topk)
            )
            blocks = (BiFormerBlock(dim, attention(), mlp_ratio, rate) for rate in rates)
            self.stages.append(nn.Sequential(*blocks))
        self.norm: nn.Module = nn.BatchNorm2d(embed_dims[-1])
        self.apply(initialise)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """One stage, `[B, channels, Y, X]` to the same kind of map."""
        x = self.downsample_layers[index](x)
        for block in self._blocks(index):
            x = self.call_block(block, x)
        return x

    def _blocks(self, index: int) -> Any:
        return self.stages[index]

    def finish(self, x: Tensor) -> Tensor:
        """The last map with a norm."""
        output: Tensor = self.norm(x)
        return output

    def drop_stages(self, kept: int) -> None:
        """Delete the parameters of the stages after so many."""
        if kept < len(self.stages):
            self.downsample_layers, self.stages = self.downsample_layers[:kept], self.stages[:kept]
            self.norm = nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from the image to the classifier."""
        blocks = [(r"^(?:downsample_layers|stages)\.(\d+)", None)] if coarse else [
            (r"^downsample_layers\.(\d+)", (-1,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,)),
        ]  # fmt: skip
        return {"stem": r"^downsample_layers\.0", "blocks": blocks}


def _halving(channels: int, dim: int) -> tuple[nn.Module, nn.Module]:
    """A map of half the rows and columns, rounded up."""
    return nn.Conv2d(channels, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim)


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 8, 2)},
    "small": {"depths": (4, 4, 18, 4)},
    "base": {"depths": (4, 4, 18, 4), "embed_dims": (96, 192, 384, 768)},
}
# No address: the released files' all end alike, and timm keeps downloads by the ending.
_CFG = default_cfg(
    first_conv="downsample_layers.0.0",
    license="mit",
    origin_url="https://github.com/rayleizhu/BiFormer",
    paper_ids="arXiv:2303.08810",
)
default_cfgs = generate_default_cfgs({f"va_biformer_{size}": _CFG for size in _SIZES})
va_biformer_tiny, va_biformer_small, va_biformer_base = (
    register(BiFormer, f"va_biformer_{size}", f"BiFormer-{size[0].upper()}.", defaults)
    for size, defaults in _SIZES.items()
)
