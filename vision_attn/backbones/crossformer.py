"""CrossFormer: tokens of several scales, and attention in groups that alternate short and long distance.

Source: CrossFormer (arXiv 2108.00154), section 3; state dict keys are those of the released weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from vision_attn.backbones.pyramid import (
    Level,
    LevelPyramid,
    default_cfg,
    drop_path_rates,
    initialise,
    register,
    released_weights,
)

# Sides of the patches that make one token, of the image and between stages; the first is the step between tokens.
PATCHES, MERGED = (4, 8, 16, 32), (2, 4)
Group = tuple[int, int]


class DynamicPositionBias(nn.Module):
    """A small network that makes each head's bias from the steps between query and key.

    Args:
        dim: Channels of the attention, at least 16.
        num_heads: Heads.

    Source: arXiv 2108.00154, section 3.3.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        hidden = dim // 16
        self.pos_proj = nn.Linear(2, hidden)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, out))
            for out in (hidden, hidden, num_heads)
        )

    def forward(self, group: Group) -> Tensor:
        """`[H, y * x, y * x]` for a group of y rows and x columns."""
        weight, (y, x) = self.pos_proj.weight, group
        rows, columns = (torch.arange(size, device=weight.device) for size in group)
        steps = torch.cartesian_prod(*(torch.arange(1 - size, size, device=weight.device) for size in group))
        table = self.pos3(self.pos2(self.pos1(self.pos_proj(steps.to(weight.dtype)))))
        table = table.view(2 * y - 1, 2 * x - 1, -1)
        down, right = rows[:, None] - rows + y - 1, columns[:, None] - columns + x - 1
        return table[down[:, None, :, None], right[:, None]].flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


class GroupAttention(nn.Module):
    """Attention within groups of tokens, short or long distance, with a dynamic position bias.

    On a map whose sides are multiples of the group it is the operator `LSDA` with the bias added. Other maps are padded
    at their end, as the released detection code does, and the padding is hidden.

    Args:
        dim: Channels, at least 16.
        num_heads: Heads, which divide `dim`.
        group_size: Tokens of a group along each axis; a shorter axis is one group.
        long: Whether a group holds tokens one interval apart, which spans the map, instead of neighbours. The interval
            is the number of groups along the axis.
        qkv_bias: Whether the projection to query, key and value has a bias.
        attn_drop: Dropout of the attention map.
        proj_drop: Dropout of the output.

    Raises:
        ValueError: a number that does not fit the others.

    Source: arXiv 2108.00154, section 3.2, where `group_size` is G.
    """

    def __init__(
        self, dim: int, num_heads: int, group_size: int = 7, long: bool = False, qkv_bias: bool = True,
        attn_drop: float = 0.0, proj_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim < 16:
            raise ValueError(f"GroupAttention: dim must be at least 16, got {dim}")
        if dim % num_heads:
            raise ValueError(f"GroupAttention: num_heads must divide dim={dim}, got {num_heads}")
        if group_size < 1:
            raise ValueError(f"GroupAttention: group_size must be at least 1, got {group_size}")
        self.num_heads, self.group_size, self.long, self.attn_drop = num_heads, group_size, long, attn_drop
        self.pos = DynamicPositionBias(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, C]` to the same."""
        rows, columns = x.shape[1:3]
        group = min(self.group_size, rows), min(self.group_size, columns)
        groups = -(-rows // group[0]), -(-columns // group[1])
        padding = (0, 0, 0, groups[1] * group[1] - columns, 0, groups[0] * group[0] - rows)
        qkv = to_groups(pad(self.qkv(x), padding), group, self.long)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        bias = self.pos(group).expand(groups[0] * groups[1], -1, -1, -1)  # [groups, H, N, N]
        if any(padding):
            real = to_groups(pad(x.new_ones(1, rows, columns, 1), padding), group, self.long)
            bias = bias.masked_fill(real.view(-1, 1, 1, group[0] * group[1]) == 0, float("-inf"))
        dropout = self.attn_drop if self.training else 0.0
        output = scaled_dot_product_attention(query, key, value, attn_mask=bias.flatten(0, 1), dropout_p=dropout)
        output = output.unflatten(1, (-1, self.num_heads)).transpose(2, 3).flatten(3)
        return self.proj_drop(self.proj(from_groups(output, group, groups, self.long)[:, :rows, :columns]))


def to_groups(x: Tensor, group: Group, long: bool) -> Tensor:
    """`[B, Y, X, C]` to `[B, groups, y * x, C]`."""
    if long:  # [B, y, groups, x, groups, C]
        parts = x.unflatten(2, (group[1], -1)).unflatten(1, (group[0], -1)).permute(0, 2, 4, 1, 3, 5)
    else:  # [B, groups, y, groups, x, C]
        parts = x.unflatten(2, (-1, group[1])).unflatten(1, (-1, group[0])).permute(0, 1, 3, 2, 4, 5)
    return parts.flatten(3, 4).flatten(1, 2)


def from_groups(x: Tensor, group: Group, groups: Group, long: bool) -> Tensor:
    """`[B, groups, y * x, C]` to `[B, Y, X, C]`."""
    parts = x.unflatten(2, group).unflatten(1, groups)
    parts = parts.permute(0, 3, 1, 4, 2, 5) if long else parts.permute(0, 1, 3, 2, 4, 5)
    return parts.flatten(3, 4).flatten(1, 2)


class CrossFormerBlock(nn.Module):
    """Attention in groups and an MLP, each with a norm before and a residual around.

    Args:
        dim: Channels.
        num_heads: Heads.
        mlp_ratio: Hidden channels of the MLP over `dim`.
        drop_path: Rate of stochastic depth.
        options: Further arguments of `GroupAttention`.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, **options: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GroupAttention(dim, num_heads, **options)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=options.get("proj_drop", 0.0))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, C]` to the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossScaleEmbedding(nn.Module):
    """Tokens of the image, each from patches of several sizes around one place."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.projs = _cross_scale(channels, dim, PATCHES)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, rows, columns]` to `[B, rows // 4, columns // 4, dim]`."""
        return self.norm(torch.cat([proj(x) for proj in self.projs], 1).permute(0, 2, 3, 1))


class CrossScaleMerging(nn.Module):
    """A map of half the rows and columns and twice the channels, from patches of several sizes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reductions = _cross_scale(dim, 2 * dim, MERGED)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y, X, dim]` to `[B, Y // 2, X // 2, 2 * dim]`."""
        x = self.norm(x).permute(0, 3, 1, 2)
        return torch.cat([reduction(x) for reduction in self.reductions], 1).permute(0, 2, 3, 1)


def _cross_scale(channels: int, dim: int, sides: Sequence[int]) -> nn.ModuleList:
    """Convolutions that share their centres; each gets half the channels of the one before, the last as many as it."""
    halves = [dim // 2 ** min(index + 1, len(sides) - 1) for index in range(len(sides))]
    step = sides[0]
    return nn.ModuleList(
        nn.Conv2d(channels, width, side, stride=step, padding=(side - step) // 2)
        for width, side in zip(halves, sides, strict=True)
    )


class CrossFormer(LevelPyramid):
    """CrossFormer, for images of any size.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for none.
        global_pool: `"avg"` or `""`.
        embed_dim: Channels of the first stage, a multiple of 16; each further one doubles them.
        depths: Blocks per stage; every second one attends over long distance.
        num_heads: Heads per stage.
        group_size: Tokens of a group along each axis.
        mlp_ratio: Of the MLPs.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        attn_drop_rate: Dropout of attention maps.
        drop_path_rate: Rate of stochastic depth in the last block.

    Raises:
        ValueError: a number that does not fit the others; an image too small for its stages.
    """

    level_list = "layers"

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24), group_size: int = 7,
        mlp_ratio: float = 4.0, drop_rate: float = 0.0, proj_drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        if embed_dim < 1 or embed_dim % 16:
            raise ValueError(f"CrossFormer: embed_dim must be a multiple of 16, got {embed_dim}")
        dims = [embed_dim * 2**index for index in range(len(depths))]
        super().__init__(dims, num_classes, global_pool, drop_rate)
        if len(num_heads) != len(depths):
            raise ValueError(f"CrossFormer: num_heads must have {len(depths)} values, got {num_heads}")
        self.patch_embed = CrossScaleEmbedding(in_chans, embed_dim)
        self.layers = nn.ModuleList()
        for index, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            block = partial(
                CrossFormerBlock, dims[index], num_heads[index], mlp_ratio, group_size=group_size,
                attn_drop=attn_drop_rate, proj_drop=proj_drop_rate,
            )  # fmt: skip
            blocks = [block(drop_path=rate, long=place % 2 == 1) for place, rate in enumerate(rates)]
            self.layers.append(Level(blocks, CrossScaleMerging(dims[index]) if index + 1 < len(dims) else None))
        self.norm = nn.LayerNorm(dims[-1])
        self.apply(initialise)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """One stage, `[B, channels, Y, X]` to the same kind of map."""
        least = 4 * 2 ** (self.num_stages - 1)
        if index == 0 and min(x.shape[2:]) < least:
            raise ValueError(f"CrossFormer: x must have at least {least} rows and columns, got {tuple(x.shape[2:])}")
        return super().stage(index, x)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: CrossFormer) -> dict[str, Tensor]:
    """The released state dict for a model, without the tables of positions that it makes itself."""
    tables = ("biases", "relative_position_index")
    weights = released_weights(state_dict, model)
    return {name: value for name, value in weights.items() if name.rpartition(".")[2] not in tables}


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 64, "depths": (1, 1, 8, 6), "num_heads": (2, 4, 8, 16)},
    "small": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "large": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
_CFG = default_cfg(
    first_conv=tuple(f"patch_embed.projs.{index}" for index in range(len(PATCHES))),
    license="mit",
    origin_url="https://github.com/cheerss/CrossFormer",
    paper_ids="arXiv:2108.00154",
)
default_cfgs = generate_default_cfgs({f"va_crossformer_{size}": _CFG for size in _SIZES})
va_crossformer_tiny, va_crossformer_small, va_crossformer_base, va_crossformer_large = (
    register(CrossFormer, f"va_crossformer_{size}", f"CrossFormer-{size[0].upper()}.", defaults, checkpoint_filter_fn)
    for size, defaults in _SIZES.items()
)
