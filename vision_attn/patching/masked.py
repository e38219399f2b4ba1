"""Windows under attention masks of their own: dense attention that hides what the window hides."""

from __future__ import annotations

from typing import Any

import torch

from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import checked_mask
from vision_attn.operators.dense import Dense


class MaskedSoftmax:
    """Softmax over the keys that an operator's window shows, under any mask or bias: exact, and no faster than dense.

    Windows are computed without `[S, S]` scores and so take no bias per head or query. Here the window is one more
    mask. A query that sees no key gives zeros.

    Args:
        operator: An operator that is a masked softmax, `mask(layout)` telling which token sees which.
        visible: That mask, bool `[S, S]`.
    """

    def __init__(self, operator: Any, visible: torch.Tensor) -> None:
        self.operator = operator
        self.visible = visible

    def __str__(self) -> str:
        return str(self.operator)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: TokenLayout,
        scale: float | None = None,
        *,
        attn_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Attention on `[B, S, H, D]`; `attn_mask` broadcastable to `[B, H, S, S]`, bool (True = visible) or added."""
        bias = checked_mask("patch", attn_mask, query)
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, float("-inf"))
        bias = bias.masked_fill(~self.visible.to(query.device), float("-inf"))
        blind = (bias == float("-inf")).all(-1, keepdim=True)
        output = Dense()(query, key, value, layout, scale, attn_mask=bias.masked_fill(blind, 0.0))
        return output.masked_fill(blind.transpose(1, 2), 0.0)


def masked_softmax(operator: Any, layout: TokenLayout, attn_mask: Any) -> MaskedSoftmax | None:
    """The operator as a mask on dense attention; `None` if it is more than a masked softmax or `attn_mask` no mask."""
    if not isinstance(attn_mask, torch.Tensor) or not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        return None
    if getattr(operator, "proportional", False):  # has a scale of its own too
        return None
    mask = getattr(operator, "mask", None)
    visible = None if mask is None else mask(layout)
    return None if visible is None else MaskedSoftmax(operator, visible)
