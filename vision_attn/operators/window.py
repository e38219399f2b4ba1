"""What operators share whose image tokens attend a window of the grid, and all text."""

from __future__ import annotations

from torch import Tensor

from vision_attn.kernels.reach import Box
from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import joint_inputs
from vision_attn.operators.cost import Cost, window_cost
from vision_attn.operators.joint import joint_attention, joint_mask


class WindowOperator:
    """An operator that is told by its window; subclasses write `reach`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        scale: float | None = None,
        *,
        attn_mask: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Attention on `[B, S, H, D]` with `S = layout.tokens`; raises UnsupportedError for a mask it cannot honour."""
        where = type(self).__name__
        query, key, value = joint_inputs(where, query, key, value, layout)
        return joint_attention(where, query, key, value, layout, self.reach(layout), scale, attn_mask, backend=backend)[
            0
        ]

    def reach(self, layout: TokenLayout) -> Box:
        """The window on this layout's grid."""
        raise NotImplementedError

    def mask(self, layout: TokenLayout) -> Tensor:
        """Bool `[S, S]`: which token sees which."""
        return joint_mask(self.reach(layout), layout)

    def cost(self, layout: TokenLayout, heads: int, head_dim: int) -> Cost:
        """Counted cost of one call, one batch item."""
        return window_cost(self.reach(layout), layout, heads, head_dim)
