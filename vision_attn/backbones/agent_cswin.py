"""Agent-CSWin: the cross-shaped window transformer with agent attention over the whole map in its first stages.

Source: Agent Attention (arXiv 2312.08874), table 8; CSWin (arXiv 2107.00652). State dict keys are those of the
released weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp, to_2tuple
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vision_attn.backbones.agent_attention import (
    Grid,
    StripeAgentAttention,
    check_stripe,
    depthwise,
    from_stripes,
    to_map,
    to_stripes,
)
from vision_attn.backbones.agent_weights import agent_cfg, position_biases, resize_biases
from vision_attn.backbones.pyramid import Pyramid, drop_path_rates, initialise, note_input_size, register


class StripeAttention(nn.Module):
    """Softmax attention within stripes, and a convolution of the values; it gets projected tokens and projects nothing.

    Args:
        dim: Channels.
        grid: Rows and columns of the token map, which the stripes divide.
        stripe: Rows and columns of a stripe.
        num_heads: Heads, which divide `dim`.
        attn_drop: Dropout of the attention map.

    Raises:
        ValueError: a number that does not fit the others.

    Source: arXiv 2107.00652, section 3.2.
    """

    def __init__(self, dim: int, grid: Grid, stripe: Grid, num_heads: int, *, attn_drop: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"StripeAttention: num_heads must divide dim={dim}, got {num_heads}")
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.set_grid(grid, stripe)
        self.get_v = depthwise(dim)

    def set_grid(self, grid: Grid, stripe: Grid) -> None:
        """Use a map and stripes of other sizes; raises ValueError for stripes that do not divide the map."""
        check_stripe("StripeAttention", grid, stripe)
        self.grid, self.stripe = grid, stripe

    def forward(self, qkv: Tensor) -> Tensor:
        """`[3, B, Y * X, C]` to `[B, Y * X, C]`."""
        stripes = to_stripes(qkv, self.grid, self.stripe)
        query, key, value = stripes.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)
        dropout = self.attn_drop if self.training else 0.0
        output = scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).flatten(2)
        local = self.get_v(to_map(stripes[2], self.stripe)).flatten(2).transpose(1, 2)
        return from_stripes(output + local, self.grid, self.stripe)


class CrossShapedBlock(nn.Module):
    """Attention in stripes and an MLP, each with a norm before and a residual around.

    Args:
        dim: Channels.
        grid: Rows and columns of the token map.
        stripe: Width of the stripes: upright for the first half of the channels and heads, level for the second. None
            for one attention over the whole map.
        num_heads: Heads, an even number for two halves.
        agents: Agents of a stripe, a square number; None for softmax attention.
        mlp_ratio: Hidden channels of the MLP over `dim`.
        drop_path: Rate of stochastic depth.
        attn_drop: Dropout of attention maps.
        proj_drop: Dropout after projections.

    Raises:
        ValueError: a number that does not fit the others.
    """

    def __init__(
        self, dim: int, grid: Grid, stripe: int | None, num_heads: int, agents: int | None, mlp_ratio: float,
        drop_path: float, attn_drop: float = 0.0, proj_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if stripe is not None and num_heads % 2:
            raise ValueError(f"CrossShapedBlock: num_heads must be even with stripes, got {num_heads}")
        make: Callable[..., nn.Module] = (
            StripeAttention if agents is None else partial(StripeAgentAttention, agents=agents)
        )
        shapes = _stripes(grid, stripe)
        halves = len(shapes)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attns = nn.ModuleList(
            make(dim // halves, grid, shape, num_heads // halves, attn_drop=attn_drop) for shape in shapes
        )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path)

    def set_grid(self, grid: Grid, stripe: int | None) -> None:
        """Use a map and stripes of other sizes."""
        attns: Any = self.attns
        for attn, shape in zip(attns, _stripes(grid, stripe), strict=True):
            attn.set_grid(grid, shape)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Y * X, C]` to the same."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1)).permute(2, 0, 1, 3)
        halves = qkv.chunk(len(self.attns), -1)
        output = torch.cat([attn(half) for attn, half in zip(self.attns, halves, strict=True)], -1)
        x = x + self.drop_path(self.proj_drop(self.proj(output)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _stripes(grid: Grid, width: int | None) -> list[Grid]:
    return [grid] if width is None else [(grid[0], width), (width, grid[1])]


class MergeBlock(nn.Module):
    """A convolution that halves a map, with a norm."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, dim, 3, stride=2, padding=1)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, Y, X]` to `[B, dim, ceil(Y / 2), ceil(X / 2)]`."""
        return self.norm(self.conv(x))


class AgentCSWinTransformer(Pyramid):
    """A cross-shaped window transformer with agents in some of its stages.

    Args:
        img_size: Pixels, one number or (rows, columns); `set_input_size` changes it.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for none.
        global_pool: `"avg"` or `""`.
        embed_dim: Channels of the first stage; each further one doubles them.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        agents: Agents of a stripe per stage, square numbers; None for softmax attention.
        stripes: Width of the stripes per stage, which divides both sides of the stage's map; None for the whole map.
        mlp_ratio: Of the MLPs.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        attn_drop_rate: Dropout of attention maps.
        drop_path_rate: Rate of stochastic depth in the last block.

    Raises:
        ValueError: a number that does not fit the others; an image of another size.
    """

    def __init__(
        self, img_size: int | Grid = 224, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
        embed_dim: int = 64, depths: Sequence[int] = (2, 4, 18, 1), num_heads: Sequence[int] = (2, 4, 8, 16),
        agents: Sequence[int | None] = (9, 16, None, None), stripes: Sequence[int | None] = (None, None, 7, None),
        mlp_ratio: float = 4.0, drop_rate: float = 0.0, proj_drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        dims = [embed_dim * 2**index for index in range(len(depths))]
        super().__init__(dims, num_classes, global_pool, drop_rate)
        for name, given in (("num_heads", num_heads), ("agents", agents), ("stripes", stripes)):
            if len(given) != len(depths):
                raise ValueError(f"AgentCSWinTransformer: {name} must have {len(depths)} values, got {given}")
        self.img_size: Grid = to_2tuple(img_size)
        self.stripes = tuple(stripes)
        grids = _checked_grids(self.img_size, self.stripes)
        # The released stem has a module without parameters in the middle; the norm's name counts it.
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=2), nn.Identity(), LayerNorm2d(embed_dim, eps=1e-5)
        )
        for index, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            block = partial(
                CrossShapedBlock, dims[index], grids[index], stripes[index], num_heads[index], agents[index], mlp_ratio,
                attn_drop=attn_drop_rate, proj_drop=proj_drop_rate,
            )  # fmt: skip
            if index > 0:
                self.add_module(f"merge{index}", MergeBlock(dims[index - 1], dims[index]))
            self.add_module(f"stage{index + 1}", nn.ModuleList(block(drop_path=rate) for rate in rates))
        self.norm: nn.Module = LayerNorm2d(dims[-1], eps=1e-5)
        self.apply(initialise)

    def set_input_size(self, img_size: int | Grid | None = None, stripes: Sequence[int | None] | None = None) -> None:
        """Take images of another size, with interpolated position biases, or use stripes of other widths.

        Args:
            img_size: Pixels, one number or (rows, columns); None to keep it.
            stripes: Widths per stage, None where it was None; None to keep them all.

        Raises:
            ValueError: a size that the stripes do not divide, or too small for the agents.
        """
        size: Grid = self.img_size if img_size is None else to_2tuple(img_size)
        widths = self.stripes if stripes is None else tuple(stripes)
        if [width is None for width in widths] != [width is None for width in self.stripes]:
            raise ValueError(f"set_input_size: stripes must be None where they are in {self.stripes}, got {widths}")
        try:
            self._tell_blocks(size, widths)
        except ValueError:
            self._tell_blocks(self.img_size, self.stripes)  # what is refused changes nothing
            raise
        self.img_size, self.stripes = size, widths
        note_input_size(self, size, stripes=widths)

    def _tell_blocks(self, img_size: Grid, stripes: Sequence[int | None]) -> None:
        grids = _checked_grids(img_size, stripes)
        for index in range(self.num_stages):
            for block in getattr(self, f"stage{index + 1}"):
                block.set_grid(grids[index], stripes[index])

    def stage(self, index: int, x: Tensor) -> Tensor:
        """One stage, `[B, channels, Y, X]` to the same kind of map."""
        if index == 0:
            self._check_images(x)
        x = self.stage1_conv_embed(x) if index == 0 else getattr(self, f"merge{index}")(x)
        tokens = x.flatten(2).transpose(1, 2)
        for block in getattr(self, f"stage{index + 1}"):
            tokens = self.call_block(block, tokens)
        return to_map(tokens, (x.shape[2], x.shape[3]))

    def _check_images(self, x: Tensor) -> None:
        if x.shape[2:] != self.img_size:
            raise ValueError(
                f"AgentCSWinTransformer: x must have {self.img_size} rows and columns, got {tuple(x.shape[2:])}: call "
                "set_input_size(img_size=...)"
            )

    def finish(self, x: Tensor) -> Tensor:
        """The last map with a norm."""
        return self.norm(x)

    def drop_stages(self, kept: int) -> None:
        """Delete the parameters of the stages after so many."""
        for index in range(kept, len(self.stripes)):
            delattr(self, f"stage{index + 1}")
            delattr(self, f"merge{index}")
        if kept < len(self.stripes):
            self.norm = nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: position biases."""
        return position_biases(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from the image to the classifier."""
        stages = [(r"^(?:stage|merge)(\d)\.", None)]
        blocks = [(r"^stage(\d)\.(\d+)", None), (r"^merge(\d)", (99,)), (r"^norm", (99999,))]
        return {"stem": r"^stage1_conv_embed", "blocks": stages if coarse else blocks}


def _checked_grids(img_size: Grid, stripes: Sequence[int | None]) -> list[Grid]:
    """Rows and columns of each stage's map, as the convolutions make them."""
    rows, columns = ((pixels + 1) // 4 for pixels in img_size)
    grids = []
    for index, width in enumerate(stripes):
        if width is not None and (width < 1 or rows % width or columns % width):
            raise ValueError(
                f"AgentCSWinTransformer: stripes must divide the map {(rows, columns)} of stage {index + 1} for "
                f"img_size={img_size}, got {width}: use another width, or sides that are multiples of "
                f"{4 * 2**index} * width"
            )
        grids.append((rows, columns))
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    return grids


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: AgentCSWinTransformer) -> dict[str, Tensor]:
    """The released state dict for a model, the averaged one if there is one; biases resized to the model's maps."""
    names = [name for name in ("state_dict_ema", "model") if name in state_dict]
    return resize_biases(state_dict[names[0]] if names else state_dict, model)


default_cfgs = generate_default_cfgs(
    {
        f"va_agent_cswin_{size}": agent_cfg(pool_size=(7, 7), first_conv="stage1_conv_embed.0")
        for size in ("tiny", "small", "base")
    }
)


def _register(size: str, millions: int, **defaults: Any) -> Callable[..., Any]:
    summary = f"Agent-CSWin-{size[0].upper()}: {millions} M parameters."
    return register(AgentCSWinTransformer, f"va_agent_cswin_{size}", summary, defaults, checkpoint_filter_fn)


va_agent_cswin_tiny = _register("tiny", 21, embed_dim=64, depths=(2, 4, 18, 1), num_heads=(2, 4, 8, 16))
va_agent_cswin_small = _register("small", 33, embed_dim=64, depths=(3, 6, 29, 2), num_heads=(2, 4, 8, 16))
va_agent_cswin_base = _register("base", 73, embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32))
