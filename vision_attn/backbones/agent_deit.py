"""Agent-DeiT: timm's vision transformer with agent attention in its first blocks.

Source: Agent Attention (arXiv 2312.08874), tables 1 and 8; keys of the state dict are those of the released weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as _resize_position_embedding
from torch import Tensor

from vision_attn.backbones.agent_attention import AgentAttention
from vision_attn.backbones.agent_weights import agent_cfg, position_biases, resize_biases


class AgentVisionTransformer(VisionTransformer):
    """A vision transformer whose first blocks attend through agents.

    Args:
        agents: Agents per block, a square number.
        agent_blocks: Number of blocks, from the first, with agent attention; None for all.
        arguments: Those of timm's `VisionTransformer`; `qk_norm`, `scale_attn_norm`, `proj_bias=False` and
            `patch_drop_rate` have no meaning for agents on a map and are refused. With `dynamic_img_size` and gradient
            checkpointing, call backward before a forward of another size.

    Raises:
        ValueError: a number that does not fit the others.
    """

    def __init__(self, *, agents: int = 49, agent_blocks: int | None = None, **arguments: Any) -> None:
        refused = [name for name in ("qk_norm", "scale_attn_norm", "patch_drop_rate") if arguments.get(name)]
        refused += [] if arguments.get("proj_bias", True) else ["proj_bias=False"]
        if refused:
            raise ValueError(
                f"AgentVisionTransformer: {refused[0]} must be left out, agent attention of a map has none"
            )
        super().__init__(**arguments)
        count = len(self.blocks) if agent_blocks is None else agent_blocks
        if not 0 <= count <= len(self.blocks):
            raise ValueError(f"AgentVisionTransformer: agent_blocks must be 0 to {len(self.blocks)}, got {count}")
        for block in self.blocks[:count]:
            block.attn = _replacement(block.attn, agents, self.patch_embed.grid_size, self.num_prefix_tokens)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: timm's, and position biases."""
        return set(super().no_weight_decay()) | position_biases(self)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As timm's; the position biases of the agents are interpolated."""
        super().set_input_size(img_size, patch_size)
        self._tell_grid(self.patch_embed.grid_size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.dynamic_img_size:  # x is [B, Y, X, C] here
            self._tell_grid((x.shape[1], x.shape[2]))
        return super()._pos_embed(x)

    def _tell_grid(self, grid: tuple[int, int]) -> None:
        for block in self.blocks:
            if isinstance(block.attn, AgentAttention):
                block.attn.grid = grid[0], grid[1]


def _replacement(attn: Any, agents: int, grid: tuple[int, int], prefix: int) -> AgentAttention:
    """Agent attention with the sizes, and the initial weights, of a timm attention."""
    replacement = AgentAttention(
        attn.qkv.in_features, attn.num_heads, agents=agents, grid=(grid[0], grid[1]), num_prefix_tokens=prefix,
        qkv_bias=attn.qkv.bias is not None, attn_drop=attn.attn_drop.p, proj_drop=attn.proj_drop.p,
    )  # fmt: skip
    replacement.qkv, replacement.proj = attn.qkv, attn.proj
    return replacement.to(attn.qkv.weight)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: AgentVisionTransformer) -> dict[str, Tensor]:
    """The released state dict for a model: position embedding and biases of rows and columns resized to its map."""
    return resize_biases(_resize_position_embedding(dict(state_dict), model), model)


default_cfgs = generate_default_cfgs(
    {
        "va_agent_deit_tiny_patch16_224": agent_cfg(),
        "va_agent_deit_small_patch16_224": agent_cfg(),
        "va_agent_deit_small_patch16_448": agent_cfg(input_size=(3, 448, 448)),
        "va_agent_deit_base_patch16_224": agent_cfg(),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], changes: dict[str, Any]) -> Any:
    arguments = {"patch_size": 16, "depth": 12, **defaults, **changes}
    return build_model_with_cfg(
        AgentVisionTransformer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"}, **arguments,
    )  # fmt: skip


@register_model
def va_agent_deit_tiny_patch16_224(pretrained: bool = False, **arguments: Any) -> AgentVisionTransformer:
    """Agent-DeiT-T, 49 agents in all blocks: 6.0 M parameters."""
    defaults = {"embed_dim": 192, "num_heads": 3}
    return _create("va_agent_deit_tiny_patch16_224", pretrained, defaults, arguments)


@register_model
def va_agent_deit_small_patch16_224(pretrained: bool = False, **arguments: Any) -> AgentVisionTransformer:
    """Agent-DeiT-S, 49 agents in all blocks: 22.7 M parameters."""
    defaults = {"embed_dim": 384, "num_heads": 6}
    return _create("va_agent_deit_small_patch16_224", pretrained, defaults, arguments)


@register_model
def va_agent_deit_small_patch16_448(pretrained: bool = False, **arguments: Any) -> AgentVisionTransformer:
    """Agent-DeiT-S for 448 pixels: 23.1 M parameters."""
    defaults = {"embed_dim": 384, "num_heads": 6, "img_size": 448}
    return _create("va_agent_deit_small_patch16_448", pretrained, defaults, arguments)


@register_model
def va_agent_deit_base_patch16_224(pretrained: bool = False, **arguments: Any) -> AgentVisionTransformer:
    """Agent-DeiT-B, 81 agents in the first 4 blocks, softmax in the others: 87.2 M parameters."""
    defaults = {"embed_dim": 768, "num_heads": 12, "agents": 81, "agent_blocks": 4}
    return _create("va_agent_deit_base_patch16_224", pretrained, defaults, arguments)
