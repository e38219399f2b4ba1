"""Agent-PVT: the pyramid vision transformer with agent attention in all blocks, for images of any size.

Source: Agent Attention (arXiv 2312.08874), tables 2 and 8; PVT (arXiv 2102.12122). State dict keys are those of the
released weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vision_attn.backbones.agent_attention import Grid, ReducedAgentAttention
from vision_attn.backbones.agent_weights import default_cfg, resize_biases

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


class AgentPyramidVisionTransformer(nn.Module):
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
        super().__init__()
        per_stage = {
            "embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios,
            "agents": agents, "sr_ratios": sr_ratios,
        }  # fmt: skip
        for name, given in per_stage.items():
            if len(given) != STAGES:
                raise ValueError(f"AgentPyramidVisionTransformer: {name} must have {STAGES} values, got {given}")
        self.num_classes, self.global_pool, self.num_features = num_classes, _checked_pool(global_pool), embed_dims[-1]
        self.head_hidden_size, self.drop_rate, self.grad_checkpointing = embed_dims[-1], drop_rate, False
        self.num_stages, self.grids = STAGES, _grids(img_size)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**index, "module": f"block{index + 1}"}
            for index, dim in enumerate(embed_dims)
        ]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for index, (grid, dim) in enumerate(zip(self.grids, embed_dims, strict=True)):
            channels, patch = (in_chans, 4) if index == 0 else (embed_dims[index - 1], 2)
            block = partial(
                AgentBlock, dim, grid, num_heads[index], mlp_ratios[index], agents=agents[index],
                sr_ratio=sr_ratios[index], attn_drop=attn_drop_rate, proj_drop=proj_drop_rate,
            )  # fmt: skip
            blocks = [block(drop_path=next(rates)) for _ in range(depths[index])]
            self.add_module(f"patch_embed{index + 1}", PatchEmbedding(channels, dim, patch))
            position = trunc_normal_(torch.empty(1, grid[0] * grid[1], dim), std=0.02)
            self.register_parameter(f"pos_embed{index + 1}", nn.Parameter(position))
            self.add_module(f"block{index + 1}", nn.ModuleList(blocks))
        self.pos_drop = nn.Dropout(proj_drop_rate)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(self.num_features, num_classes)
        self.apply(_initialise)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: positions."""
        biases = [name for name, _ in self.named_parameters() if name.endswith(_POSITIONS)]
        return {*biases, *(f"pos_embed{index + 1}" for index in range(STAGES))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from the image to the classifier."""
        stages = [(rf"^(?:patch_embed|pos_embed|block){i + 1}", (i,)) for i in range(STAGES)]
        blocks = [(rf"^block{i + 1}\.(\d+)", None) for i in range(STAGES)]
        return {"stem": r"^(?:patch_embed1|pos_embed1)", "blocks": stages if coarse else [*blocks, *stages[1:]]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another classifier, freshly initialised."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else _checked_pool(global_pool)
        self.head = _classifier(self.num_features, num_classes).to(self.patch_embed1.proj.weight)
        self.head.apply(_initialise)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """One stage, `[B, channels, Y, X]` to the same kind of map."""
        tokens, grid = getattr(self, f"patch_embed{index + 1}")(x)
        tokens = self.pos_drop(tokens + self._positions(index, grid))
        for block in getattr(self, f"block{index + 1}"):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                tokens = checkpoint(block, tokens, grid)
            else:
                tokens = block(tokens, grid)
        return tokens.transpose(1, 2).unflatten(2, grid)

    def _positions(self, index: int, grid: Grid) -> Tensor:
        positions = getattr(self, f"pos_embed{index + 1}")
        return positions if grid == self.grids[index] else _resize_positions(positions, self.grids[index], grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map `[B, C, Y, X]`."""
        for index in range(self.num_stages):
            x = self.stage(index, x)
        return x

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """Maps of some stages, and the last one; as timm's models.

        Raises:
            ValueError: a format other than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, last = feature_take_indices(STAGES, indices)
        maps = []
        for index in range(last + 1 if stop_early else self.num_stages):
            x = self.stage(index, x)
            if index in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages of `indices` do not need."""
        wanted, last = feature_take_indices(STAGES, indices)
        self.num_stages = last + 1
        for index in range(last + 1, STAGES):
            for name in ("patch_embed", "pos_embed", "block"):
                delattr(self, f"{name}{index + 1}")
        if prune_head:
            self.reset_classifier(0, "")
        return list(wanted)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classes of the last stage's map."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, rows, columns]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))


_POSITIONS = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("", "avg"):
        raise ValueError(f"AgentPyramidVisionTransformer: global_pool must be 'avg' or '', got {global_pool!r}")
    return global_pool


def _classifier(features: int, classes: int) -> nn.Module:
    return nn.Linear(features, classes) if classes > 0 else nn.Identity()


def _grids(img_size: int | Grid) -> list[Grid]:
    rows, columns = to_2tuple(img_size)
    return [(rows // side, columns // side) for side in (4, 8, 16, 32)]


def _resize_positions(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    """`[1, N, C]` on a map of another shape."""
    maps = positions.transpose(1, 2).unflatten(2, old)
    return interpolate(maps, size=new, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: AgentPyramidVisionTransformer) -> dict[str, Tensor]:
    """The released state dict for a model, positions of another image size interpolated; such images are square."""
    weights: Mapping[str, Tensor] = state_dict.get("model", state_dict)
    resized = resize_biases(weights, model)
    for index, grid in enumerate(model.grids):
        name = f"pos_embed{index + 1}"
        if name in resized and resized[name].shape[1] != grid[0] * grid[1]:
            side = round(resized[name].shape[1] ** 0.5)
            resized[name] = _resize_positions(resized[name], (side, side), grid)
    return resized


default_cfgs = generate_default_cfgs(
    {
        f"va_agent_pvt_{size}": default_cfg(pool_size=(7, 7), fixed_input_size=False, first_conv="patch_embed1.proj")
        for size in ("tiny", "small", "medium", "large")
    }
)


def _register(size: str, depths: tuple[int, ...], millions: float) -> Callable[..., AgentPyramidVisionTransformer]:
    name = f"va_agent_pvt_{size}"

    def create(pretrained: bool = False, **arguments: Any) -> AgentPyramidVisionTransformer:
        out_indices = arguments.pop("out_indices", (0, 1, 2, 3))
        model: AgentPyramidVisionTransformer = build_model_with_cfg(
            AgentPyramidVisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"}, **{"depths": depths, **arguments},
        )  # fmt: skip
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Agent-PVT-{size[0].upper()}: {millions} M parameters."
    return register_model(create)


va_agent_pvt_tiny = _register("tiny", (2, 2, 2, 2), 11.6)
va_agent_pvt_small = _register("small", (3, 4, 6, 3), 20.6)
va_agent_pvt_medium = _register("medium", (3, 4, 18, 3), 35.9)
va_agent_pvt_large = _register("large", (3, 8, 27, 3), 48.7)
