"""Agent-PVT: the pyramid vision transformer with agent attention in all blocks, for images of any size.

Source: Agent Attention (arXiv 2312.08874), tables 2 and 8; PVT (arXiv 2102.12122). State dict keys are those of the
released weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vision_attn.backbones.agent_attention import Grid, ReducedAgentAttention
from vision_attn.backbones.agent_weights import agent_cfg, position_biases, resize_biases
from vision_attn.backbones.pyramid import Pyramid, drop_path_rates, initialise, register

STAGES = 4


class PatchEmbedding(nn.Module):
    """Patches of a map as tokens, with a norm.

    Args:
        channels: Of the map.
        dim: Of the tokens.
        patch: Side of a patch; what is left at the border is cut off.
    """

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """`[B, channels, Y, X]` to tokens `[B, N, dim]` and their map's shape."""
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class AgentBlock(nn.Module):
    """Agent attention and an MLP, each with a norm before and a residual around.

    Args:
        dim: Channels.
        grid: The map for which position biases are made.
        num_heads: Heads.
        mlp_ratio: Hidden channels of the MLP over `dim`.
        drop_path: Rate of stochastic depth.
        options: Further arguments of `ReducedAgentAttention`.
    """

    def __init__(
        self, dim: int, grid: Grid, num_heads: int, mlp_ratio: float, drop_path: float, **options: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReducedAgentAttention(dim, grid, num_heads, **options)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=options.get("proj_drop", 0.0))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`[B, Y * X, C]` of a map of this grid to the same."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AgentPyramidVisionTransformer(Pyramid):
    """A pyramid vision transformer of agent attention.

    Args:
        img_size: Pixels, one number or (rows, columns), for which positions are learned; images of other sizes
            interpolate them.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for none.
        global_pool: `"avg"` or `""`.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratios: Of the MLPs, per stage.
        agents: Per stage, square numbers.
        sr_ratios: Side of the patches that make one key, per stage.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections and positions.
        attn_drop_rate: Dropout of attention maps.
        drop_path_rate: Rate of stochastic depth in the last block.

    Raises:
        ValueError: a number that does not fit the others.
    """

    patch_embed1: PatchEmbedding

    def __init__(
        self, img_size: int | Grid = 224, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512), depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8), mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        agents: Sequence[int] = (9, 16, 49, 49), sr_ratios: Sequence[int] = (1, 1, 1, 1), drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0, attn_drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(embed_dims, num_classes, global_pool, drop_rate)
        per_stage = {
            "embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios,
            "agents": agents, "sr_ratios": sr_ratios,
        }  # fmt: skip
        for name, given in per_stage.items():
            if len(given) != STAGES:
                raise ValueError(f"AgentPyramidVisionTransformer: {name} must have {STAGES} values, got {given}")
        self.grids = _grids(img_size)
        rates = drop_path_rates(drop_path_rate, depths)
        for index, (grid, dim) in enumerate(zip(self.grids, embed_dims, strict=True)):
            channels, patch = (in_chans, 4) if index == 0 else (embed_dims[index - 1], 2)
            block = partial(
                AgentBlock, dim, grid, num_heads[index], mlp_ratios[index], agents=agents[index],
                sr_ratio=sr_ratios[index], attn_drop=attn_drop_rate, proj_drop=proj_drop_rate,
            )  # fmt: skip
            blocks = [block(drop_path=rate) for rate in rates[index]]
            self.add_module(f"patch_embed{index + 1}", PatchEmbedding(channels, dim, patch))
            position = trunc_normal_(torch.empty(1, grid[0] * grid[1], dim), std=0.02)
            self.register_parameter(f"pos_embed{index + 1}", nn.Parameter(position))
            self.add_module(f"block{index + 1}", nn.ModuleList(blocks))
        self.pos_drop = nn.Dropout(proj_drop_rate)
        self.apply(initialise)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: positions."""
        return position_biases(self) | {f"pos_embed{index + 1}" for index in range(STAGES)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from the image to the classifier."""
        stages = [(r"^(?:patch_embed|pos_embed|block)(\d)", None)]
        blocks = [(r"^block(\d)\.(\d+)", None), (r"^(?:patch_embed|pos_embed)(\d)", (-1,))]
        return {"stem": r"^(?:patch_embed1|pos_embed1)", "blocks": stages if coarse else blocks}

    def stage(self, index: int, x: Tensor) -> Tensor:
        """One stage, `[B, channels, Y, X]` to the same kind of map."""
        tokens, grid = getattr(self, f"patch_embed{index + 1}")(x)
        tokens = self.pos_drop(tokens + self._positions(index, grid))
        for block in getattr(self, f"block{index + 1}"):
            tokens = self.call_block(block, tokens, grid)
        return tokens.transpose(1, 2).unflatten(2, grid)

    def drop_stages(self, kept: int) -> None:
        """Delete the parameters of the stages after so many."""
        for index in range(kept, STAGES):
            for name in ("patch_embed", "pos_embed", "block"):
                delattr(self, f"{name}{index + 1}")

    def _positions(self, index: int, grid: Grid) -> Tensor:
        positions = getattr(self, f"pos_embed{index + 1}")
        return positions if grid == self.grids[index] else _resize_positions(positions, self.grids[index], grid)


def _grids(img_size: int | Grid) -> list[Grid]:
    rows, columns = to_2tuple(img_size)
    return [(rows // side, columns // side) for side in (4, 8, 16, 32)]


def _resize_positions(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    """`[1, N, C]` on a map of another shape."""
    maps = positions.transpose(1, 2).unflatten(2, old)
    return interpolate(maps, size=new, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: AgentPyramidVisionTransformer) -> dict[str, Tensor]:
    """The released state dict for a model, positions of another image size interpolated."""
    weights: Mapping[str, Tensor] = state_dict.get("model", state_dict)
    resized = resize_biases(weights, model)
    for index, grid in enumerate(model.grids):
        name, biases = f"pos_embed{index + 1}", f"block{index + 1}.0.attn"
        if name in weights and f"{biases}.ha_bias" in weights:  # the biases of rows and columns tell the map's shape
            made_for = weights[f"{biases}.ha_bias"].shape[2], weights[f"{biases}.wa_bias"].shape[3]
            resized[name] = weights[name] if made_for == grid else _resize_positions(weights[name], made_for, grid)
    return resized


default_cfgs = generate_default_cfgs(
    {
        f"va_agent_pvt_{size}": agent_cfg(pool_size=(7, 7), fixed_input_size=False, first_conv="patch_embed1.proj")
        for size in ("tiny", "small", "medium", "large")
    }
)


va_agent_pvt_tiny, va_agent_pvt_small, va_agent_pvt_medium, va_agent_pvt_large = (
    register(
        AgentPyramidVisionTransformer, f"va_agent_pvt_{size}", f"Agent-PVT-{size[0].upper()}: {millions} M parameters.",
        {"depths": depths}, checkpoint_filter_fn,
    )
    for size, millions, depths in (
        ("tiny", 11.6, (2, 2, 2, 2)), ("small", 20.6, (3, 4, 6, 3)), ("medium", 35.9, (3, 4, 18, 3)),
        ("large", 48.7, (3, 8, 27, 3)),
    )
)  # fmt: skip
