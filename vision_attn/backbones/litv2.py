"""LITv2: convolutional MLPs in the early stages, HiLo attention in the late ones, for images of any size.

Source: HiLo / LITv2 (arXiv 2205.13213); deformable token merging: LIT (arXiv 2105.14217), section 3.3. State dict keys
are those of the released weights.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, PatchEmbed
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention
from torchvision.ops import deform_conv2d

from vision_attn.backbones.pyramid import Level, LevelPyramid, default_cfg, drop_path_rates, initialise, register
from vision_attn.layout import TokenLayout
from vision_attn.operators.hilo import HiLo


class HiLoAttention(nn.Module):
    """HiLo attention of a map: the lo heads' keys and values are projections of the pooled map.

    Pooling commutes with a projection: this is the operator `HiLo` on projections of the whole map, with fewer keys
    and values to project.

    Args:
        dim: Channels.
        num_heads: Heads, which divide `dim`.
        window: Side of the windows and of the pooled cells in tokens. At the border both are as the operator `HiLo` has
            them; the released code pads the map with zeros that take part in the softmax. 1 for plain attention.
        alpha: Share of the heads that are lo heads, 0 to 1.
        qkv_bias: Whether the projections to query, key and value have a bias.

    Raises:
        ValueError, TypeError: a number that does not fit the others, or out of range.

    Source: arXiv 2205.13213, section 3.
    """

    def __init__(self, dim: int, num_heads: int, window: int = 2, alpha: float = 0.9, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"HiLoAttention: num_heads must divide dim={dim}, got {num_heads}")
        self.within_windows, self.window = HiLo(alpha=0.0, window=window), window
        self.lo_heads = num_heads if window == 1 else int(HiLo(alpha, window).alpha * num_heads)
        self.hi_heads = num_heads - self.lo_heads
        if self.hi_heads:
            hi = dim // num_heads * self.hi_heads
            self.h_qkv = nn.Linear(dim, 3 * hi, bias=qkv_bias)
            self.h_proj = nn.Linear(hi, hi)
        if self.lo_heads:
            lo = dim // num_heads * self.lo_heads
            self.l_q = nn.Linear(dim, lo, bias=qkv_bias)
            self.l_kv = nn.Linear(dim, 2 * lo, bias=qkv_bias)
            self.l_proj = nn.Linear(lo, lo)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, C]` to the same."""
        outputs = [self._hi(x)] if self.hi_heads else []
        if self.lo_heads:
            outputs.append(self._lo(x))
        return torch.cat(outputs, -1)

    def _hi(self, x: Tensor) -> Tensor:
        query, key, value = self.h_qkv(x).flatten(1, 2).unflatten(-1, (3, self.hi_heads, -1)).unbind(2)
        output = self.within_windows(query, key, value, TokenLayout((x.shape[1], x.shape[2])))
        projected: Tensor = self.h_proj(output.flatten(2))
        return projected.unflatten(1, x.shape[1:3])

    def _lo(self, x: Tensor) -> Tensor:
        cells = avg_pool2d(x.permute(0, 3, 1, 2), self.window, ceil_mode=True).flatten(2).transpose(1, 2)
        query = self.l_q(x).flatten(1, 2).unflatten(-1, (self.lo_heads, -1)).transpose(1, 2)
        key, value = self.l_kv(cells).unflatten(-1, (2, self.lo_heads, -1)).transpose(1, 3).unbind(2)
        output = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        projected: Tensor = self.l_proj(output)
        return projected.unflatten(1, x.shape[1:3])


class ConvolutionalMlp(nn.Module):
    """An MLP with a depthwise convolution of its hidden map, which is all that tells positions.

    Args:
        dim: Channels.
        hidden: Channels of the hidden map.
        drop: Dropout of both maps.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        nn.init.normal_(convolution.weight, std=math.sqrt(2 / 9))
        nn.init.zeros_(convolution.get_parameter("bias"))
        self.dwconv = nn.Sequential(OrderedDict(dwconv=convolution))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, C]` to the same."""
        hidden = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        output: Tensor = self.drop(self.fc2(self.drop(self.act(hidden))))
        return output


class LitBlock(nn.Module):
    """HiLo attention, where the stage has it, and a convolutional MLP, each with a norm before and a residual around.

    Args:
        dim: Channels.
        num_heads: Heads.
        window: Side of the windows and pooled cells; 0 for no attention.
        alpha: Share of the lo heads.
        mlp_ratio: Hidden channels of the MLP over `dim`.
        qkv_bias: Whether the projections to query, key and value have a bias.
        proj_drop: Dropout of the MLP.
        drop_path: Rate of stochastic depth.
    """

    def __init__(
        self, dim: int, num_heads: int, window: int, alpha: float, mlp_ratio: float, qkv_bias: bool, proj_drop: float,
        drop_path: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attn: HiLoAttention | None = None
        if window != 0:
            self.norm1 = nn.LayerNorm(dim)
            self.attn = HiLoAttention(dim, num_heads, window, alpha, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvolutionalMlp(dim, int(dim * mlp_ratio), proj_drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, C]` to the same."""
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DeformableConvolution(nn.Conv2d):
    """A convolution of patches whose tokens are looked up where a second convolution says: at first, in their places.

    Args:
        channels: Of the map.
        dim: Of the output.
        side: Of the patches.
    """

    def __init__(self, channels: int, dim: int, side: int = 2) -> None:
        super().__init__(channels, dim, side, stride=side)
        self.conv_offset = nn.Conv2d(channels, 2 * side**2, side, stride=side)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, Y, X]` to `[B, dim, Y // side, X // side]`, computed in single precision or better."""
        assert self.bias is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        inputs = (t.to(wide) for t in (x, self.conv_offset(x), self.weight, self.bias))
        output: Tensor = deform_conv2d(*inputs, stride=self.stride)
        return output.to(x.dtype)


class TokenMerging(nn.Module):
    """Deformable token merging, which halves a map and doubles its channels; an odd last row or column is left out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dconv = DeformableConvolution(dim, 2 * dim)
        self.norm_layer = nn.BatchNorm2d(2 * dim)
        self.act_layer = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, dim]` to `[B, Y // 2, X // 2, 2 * dim]`.

        Raises:
            ValueError: a map of a single row or column.
        """
        if min(x.shape[1:3]) < 2:
            raise ValueError(
                f"TokenMerging: x must have at least 2 rows and columns, got {tuple(x.shape[1:3])}: use larger images"
            )
        merged: Tensor = self.act_layer(self.norm_layer(self.dconv(x.permute(0, 3, 1, 2))))
        return merged.permute(0, 2, 3, 1)


class LITv2(LevelPyramid):
    """A vision transformer of less attention: none in the early stages, HiLo in the late ones.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for none.
        global_pool: `"avg"` or `""`.
        embed_dim: Channels of the first stage; each further one doubles them.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        windows: Side of the windows and pooled cells per stage; 1 for plain attention, 0 for none.
        alpha: Share of the lo heads, 0 to 1.
        mlp_ratio: Of the MLPs.
        qkv_bias: Whether the projections to query, key and value have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of the MLPs.
        drop_path_rate: Rate of stochastic depth in the last block.

    Raises:
        ValueError, TypeError: a number that does not fit the others.
    """

    level_list = "layers"

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24),
        windows: Sequence[int] = (0, 0, 2, 1), alpha: float = 0.9, mlp_ratio: float = 4.0, qkv_bias: bool = True,
        drop_rate: float = 0.0, proj_drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        dims = [embed_dim * 2**index for index in range(len(depths))]
        super().__init__(dims, num_classes, global_pool, drop_rate)
        for name, given in (("num_heads", num_heads), ("windows", windows)):
            if len(given) != len(depths):
                raise ValueError(f"LITv2: {name} must have {len(depths)} values, got {given}")
        self.patch_embed = PatchEmbed(
            None, 4, in_chans, embed_dim, norm_layer=nn.LayerNorm, output_fmt="NHWC", strict_img_size=False,
            dynamic_img_pad=True,
        )  # fmt: skip
        self.layers = nn.ModuleList()
        for index, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            block = partial(
                LitBlock, dims[index], num_heads[index], windows[index], alpha, mlp_ratio, qkv_bias, proj_drop_rate
            )
            blocks = [block(drop_path=rate) for rate in rates]
            self.layers.append(Level(blocks, TokenMerging(dims[index]) if index + 1 < len(dims) else None))
        self.norm = nn.LayerNorm(dims[-1])
        self.apply(initialise)


_SIZES: dict[str, dict[str, Any]] = {
    "small": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "medium": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}


_RELEASES = "https://github.com/ziplab/LITv2/releases/download/v1.0"
default_cfgs = generate_default_cfgs(
    {
        f"va_litv2_{size}": default_cfg(
            url=f"{_RELEASES}/litv2_{size[0]}.pth",
            first_conv="patch_embed.proj",
            license="apache-2.0",
            origin_url="https://github.com/ziplab/LITv2",
            paper_ids="arXiv:2205.13213",
        )
        for size in _SIZES
    }
)
va_litv2_small, va_litv2_medium, va_litv2_base = (
    register(LITv2, f"va_litv2_{size}", f"LITv2-{size[0].upper()}.", defaults) for size, defaults in _SIZES.items()
)
