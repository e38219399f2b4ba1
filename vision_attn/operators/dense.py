"""Plain softmax attention: the stock result, and what every other operator is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import checked_mask, joint_inputs, resolve_scale
from vision_attn.operators.cost import Cost, chunks, pairs_cost
from vision_attn.operators.registry import register_operator


@register_operator("dense")
@dataclass(frozen=True)
class Dense:
    """Every token sees every token, by torch's own `scaled_dot_product_attention`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        scale: float | None = None,
        *,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention on `[B, S, H, D]`; `attn_mask` broadcastable to `[B, H, S, S]`, bool (True = visible) or added."""
        query, key, value = joint_inputs("Dense", query, key, value, layout)
        if attn_mask is not None:
            attn_mask = checked_mask("Dense", attn_mask, query)
        if scale is not None:
            scale = resolve_scale("Dense", scale, query.shape[-1])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        grouped = query.shape[2] != key.shape[2]
        output = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale, enable_gqa=grouped)
        return output.transpose(1, 2)

    def mask(self, layout: TokenLayout) -> Tensor:
        """Bool `[S, S]`, all True."""
        return torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)

    def cost(self, layout: TokenLayout, heads: int, head_dim: int) -> Cost:
        """Counted cost of one call, one batch item."""
        tokens = layout.tokens
        return pairs_cost(tokens**2, tokens, heads, head_dim, chunks(tokens) ** 2)
