"""HiLo attention: some heads attend small windows, the others a pooled image.

    hi heads: out_i = softmax(scale * q_i K_W(i)^T) V_W(i),   W(i) = the block of `window` tokens per axis around i
    lo heads: out_i = softmax(scale * q_i P(K)^T) P(V),       P = the mean over such blocks

Source: HiLo / LITv2 (arXiv 2205.13213), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vision_attn.backends import full, resolve
from vision_attn.kernels.reach import Box
from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import joint_inputs, no_autocast, resolve_scale
from vision_attn.operators.clear import pooled_cells, pooled_keys
from vision_attn.operators.cost import Cost, chunks, pairs_cost, text_tiles, window_cost
from vision_attn.operators.dense import Dense
from vision_attn.operators.joint import joint_attention, require_visible_grid, split_mask, with_text_queries
from vision_attn.operators.neighborhood import clipped_box
from vision_attn.operators.registry import register_operator


@register_operator("hilo")
@dataclass(frozen=True)
class HiLo:
    """HiLo attention as an operator for whole sequences.

    The first heads are the hi ones, the last `int(alpha * heads)` the lo ones. Windows and cells lie within a frame; a
    window cut by the border is shifted inward, a cell cut by it is the mean of the tokens it holds. Text is seen by all
    and sees every token, pooled by no head. With `window=1` there is nothing to pool: all heads attend everything.
    Keys and values are pooled as they come, after the model's norm and rotation.

    Args:
        alpha: Share of the heads that are lo heads, 0 to 1.
        window: Side of the windows and of the pooled cells in tokens, at least 1.

    Raises:
        ValueError, TypeError: a value out of range.

    Source: arXiv 2205.13213, section 3, where `window` is s.
    """

    alpha: float = 0.5
    window: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise TypeError(f"HiLo: alpha must be a number, got {self.alpha!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"HiLo: alpha must be 0 to 1, got {self.alpha}")
        if isinstance(self.window, bool) or not isinstance(self.window, int):
            raise TypeError(f"HiLo: window must be an integer, got {self.window!r}")
        if self.window < 1:
            raise ValueError(f"HiLo: window must be at least 1, got {self.window}")
        object.__setattr__(self, "alpha", float(self.alpha))

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
        """Attention on `[B, S, H, D]` with `S = layout.tokens`.

        Raises UnsupportedError for a mask it cannot honour: one that differs between image queries or heads, or, with
        lo heads, one that touches image keys.
        """
        query, key, value = joint_inputs("HiLo", query, key, value, layout)
        if self.window == 1:
            resolve(backend, "HiLo", query, value)
            return Dense()(query, key, value, layout, scale, attn_mask=attn_mask)
        split_mask("HiLo", attn_mask, query, layout)  # refuses a mask per head while it still has all heads
        heads = query.shape[2]
        if key.shape[2] != heads:  # a group of heads may be hi in part
            key, value = (x.repeat_interleave(heads // x.shape[2], 2) for x in (key, value))
        hi = self._hi_heads(heads)
        outputs = []
        if hi:
            q, k, v = (x[:, :, :hi] for x in (query, key, value))
            reach = self.reach(layout)
            outputs.append(joint_attention("HiLo", q, k, v, layout, reach, scale, attn_mask, backend=backend)[0])
        if hi < heads:
            q, k, v = (x[:, :, hi:] for x in (query, key, value))
            outputs.append(self._lo(q, k, v, layout, scale, attn_mask, backend))
        return torch.cat(outputs, 2)

    def reach(self, layout: TokenLayout) -> Box:
        """The hi heads' window on this layout's grid."""
        side = (1, self.window, self.window)[-len(layout.grid) :]
        return clipped_box("HiLo", layout.grid, ("window", side), ("window", side), ("dilation", 1))

    def cost(self, layout: TokenLayout, heads: int, head_dim: int) -> Cost:
        """Counted cost of one call, one batch item; tiles are the mean over heads."""
        if self.window == 1:
            return Dense().cost(layout, heads, head_dim)
        text, image, cells = layout.text_tokens, layout.image_tokens, pooled_cells(layout.grid, self.window)
        hi_heads = self._hi_heads(heads)
        hi = window_cost(self.reach(layout), layout, hi_heads, head_dim)
        tiles = text_tiles(layout.grid, text) + chunks(image) * chunks(cells)
        pairs = image * cells + text * (image + layout.tokens)
        lo = pairs_cost(pairs, layout.tokens, heads - hi_heads, head_dim, tiles)
        mean = -(-(hi_heads * hi.kv_tiles + (heads - hi_heads) * lo.kv_tiles) // heads)
        return Cost(hi.flops + lo.flops, hi.bytes + lo.bytes, mean)

    def _hi_heads(self, heads: int) -> int:
        return heads - int(self.alpha * heads)

    def _lo(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float | None,
        attn_mask: Tensor | None, backend: str,
    ) -> Tensor:  # fmt: skip
        factor, chosen = resolve_scale("HiLo", scale, query.shape[-1]), resolve(backend, "HiLo", query, value)
        image = layout.image_slice
        with no_autocast(query):
            bias, text_mask = split_mask("HiLo", attn_mask, query, layout)
            if bias is not None:
                require_visible_grid("HiLo", bias[:, image])
            [(cells, cell_values, _)] = pooled_keys("HiLo", key, value, layout, self.window, None)
            keys, values = _replaced(key, layout, cells), _replaced(value, layout, cell_values)
            if bias is not None:
                bias = _replaced(bias, layout, bias.new_zeros(cells.shape[:2]))[:, None, None]
            output = full(query[:, image], keys, values, bias, factor, backend=chosen)[0]
            return with_text_queries(output, query, key, value, layout, text_mask, factor, chosen)


def _replaced(x: Tensor, layout: TokenLayout, grid: Tensor) -> Tensor:
    """A sequence with something else in its grid's place."""
    image = layout.image_slice
    return torch.cat([x[:, : image.start], grid, x[:, image.stop :]], 1)
