"""Agent-Swin: timm's Swin transformer with agent attention over the whole map in its first blocks.

Source: Agent Attention (arXiv 2312.08874), tables 3 and 8; keys of the state dict map to those of the released weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as _to_timm
from torch import Tensor

from vision_attn.backbones.agent_attention import WindowAgentAttention
from vision_attn.backbones.agent_weights import agent_cfg, position_biases, resize_biases


class AgentSwinTransformer(SwinTransformer):
    """A Swin transformer whose first blocks attend through agents, each over the whole map of its stage.

    Args:
        agents: Agents of a block, per stage, square numbers.
        agent_blocks: Blocks with agent attention, the first ones, per stage.
        arguments: Those of timm's `SwinTransformer`; `dynamic_img_size`, `strict_img_size=False` and
            `always_partition` would cut maps into windows and are refused.

    Raises:
        ValueError: a number that does not fit the others.
    """

    def __init__(
        self, *, agents: Sequence[int] = (9, 16, 49, 49), agent_blocks: Sequence[int] = (2, 2, 6, 0), **arguments: Any
    ) -> None:
        refused = [name for name in ("dynamic_img_size", "always_partition") if arguments.get(name)]
        refused += [] if arguments.get("strict_img_size", True) else ["strict_img_size=False"]
        if refused:
            raise ValueError(
                f"AgentSwinTransformer: {refused[0]} must be left out, agents see whole maps: use set_input_size"
            )
        super().__init__(**arguments)
        depths = [len(stage.blocks) for stage in self.layers]
        for name, given in (("agents", agents), ("agent_blocks", agent_blocks)):
            if len(given) != len(depths):
                raise ValueError(f"AgentSwinTransformer: {name} must be one per stage, {len(depths)}, got {given}")
        for stage, number, count in zip(self.layers, agents, agent_blocks, strict=True):
            if not 0 <= count <= len(stage.blocks):
                raise ValueError(f"AgentSwinTransformer: agent_blocks must be at most {depths}, got {agent_blocks}")
            for block in stage.blocks[:count]:
                block.attn = _replacement(block.attn, block.input_resolution, number)
        self._use_whole_maps()

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: timm's, and position biases."""
        return set(super().no_weight_decay()) | position_biases(self)

    def set_input_size(self, *arguments: Any, **keywords: Any) -> None:
        """As timm's; agents go on to see whole maps, with interpolated position biases."""
        super().set_input_size(*arguments, **keywords)
        self._use_whole_maps()

    def _use_whole_maps(self) -> None:
        for stage in self.layers:
            for block in stage.blocks:
                if isinstance(block.attn, WindowAgentAttention):
                    block.set_input_size(block.input_resolution, block.input_resolution)


def _replacement(attn: Any, grid: tuple[int, int], agents: int) -> WindowAgentAttention:
    """Agent attention with the sizes, and the initial weights, of a timm attention."""
    replacement = WindowAgentAttention(
        attn.qkv.in_features, (grid[0], grid[1]), attn.num_heads, agents=agents, qkv_bias=attn.qkv.bias is not None,
        attn_drop=attn.attn_drop.p, proj_drop=attn.proj_drop.p,
    )  # fmt: skip
    replacement.qkv, replacement.proj = attn.qkv, attn.proj
    return replacement.to(attn.qkv.weight)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: AgentSwinTransformer) -> dict[str, Tensor]:
    """The released state dict for a model: renamed as timm does, biases of rows and columns resized to its maps."""
    return resize_biases(_to_timm(dict(state_dict), model), model)


default_cfgs = generate_default_cfgs(
    {
        f"va_agent_swin_{size}": agent_cfg(pool_size=(7, 7), first_conv="patch_embed.proj", classifier="head.fc")
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], changes: dict[str, Any]) -> Any:
    arguments = {**defaults, **changes}
    return build_model_with_cfg(
        AgentSwinTransformer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": arguments.pop("out_indices", (0, 1, 2, 3)), "flatten_sequential": True},
        **arguments,
    )  # fmt: skip


@register_model
def va_agent_swin_tiny(pretrained: bool = False, **arguments: Any) -> AgentSwinTransformer:
    """Agent-Swin-T, agents in stages 1 to 3: 29 M parameters."""
    defaults = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "agent_blocks": (2, 2, 6, 0)}
    return _create("va_agent_swin_tiny", pretrained, defaults, arguments)


@register_model
def va_agent_swin_small(pretrained: bool = False, **arguments: Any) -> AgentSwinTransformer:
    """Agent-Swin-S, agents in stages 1 and 2: 50 M parameters."""
    defaults = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "agent_blocks": (2, 2, 0, 0)}
    return _create("va_agent_swin_small", pretrained, defaults, arguments)


@register_model
def va_agent_swin_base(pretrained: bool = False, **arguments: Any) -> AgentSwinTransformer:
    """Agent-Swin-B, agents in stages 1 and 2 and in two blocks of stage 3: 88 M parameters."""
    defaults = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "agent_blocks": (2, 2, 2, 0)}
    return _create("va_agent_swin_base", pretrained, defaults, arguments)
