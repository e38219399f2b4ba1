"""Halo attention: each block of queries attends itself and a halo of keys around it.

    out_i = softmax(scale * q_i K_N(i)^T) V_N(i),   N(i) = tokens at most `halo` steps from i's block, per axis

A block at the border has fewer keys: nothing stands for the tokens that are not there.

Source: HaloNet (arXiv 2103.12731), section 3.1, without its relative position embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_attn.kernels.reach import Box
from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import checked_mask, joint_inputs, per_axis
from vision_attn.operators.joint import joint_attention
from vision_attn.operators.neighborhood import checked_size
from vision_attn.operators.registry import register_operator
from vision_attn.operators.window import WindowOperator


@register_operator("halo")
@dataclass(frozen=True)
class Halo(WindowOperator):
    """Halo attention as an operator for whole sequences; text is seen by all and sees everything.

    Unlike timm's `HaloAttn`, which leaves the zeros around the image in the softmax, keys that do not exist have no
    weight. Inside the image it equals `Neighborhood(block + 2 * halo, stride=block)`.

    Args:
        block: Queries of a block along each axis, one value or one per grid axis.
        halo: Keys on each side of a block, at least 0; one value or one per grid axis.

    Raises:
        ValueError: a value below 1 or 0; at the call, a number of values other than the grid's axes.
        TypeError: not an integer.

    Source: arXiv 2103.12731, section 3.1, where `block` is b and `halo` h.
    """

    block: int | tuple[int, ...] = 8
    halo: int | tuple[int, ...] = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", checked_size("Halo", "block", self.block))
        object.__setattr__(self, "halo", checked_size("Halo", "halo", self.halo, least=0))

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
        query, key, value = joint_inputs("Halo", query, key, value, layout)
        reach, around = self.reach(layout).surrounded()
        wider = TokenLayout(reach.grid, layout.text_before, layout.text_after)
        attn_mask = _hide_surroundings(attn_mask, query, layout, around)
        q, k, v = (_surround(x, layout, around) for x in (query, key, value))
        output = joint_attention("Halo", q, k, v, wider, reach, scale, attn_mask, backend=backend)[0]
        return _inside(output, layout, wider, around)

    def reach(self, layout: TokenLayout) -> CutBox:
        """The window on this layout's grid, block and halo clipped to it."""
        grid = layout.grid
        blocks, halos = (per_axis("Halo", name, getattr(self, name), len(grid)) for name in ("block", "halo"))
        block = tuple(map(min, blocks, grid))
        kernel = tuple(b + 2 * min(h, n) for b, h, n in zip(block, halos, grid, strict=True))
        return CutBox(grid, kernel, block, (1,) * len(grid), (False,) * len(grid))


class CutBox(Box):
    """A box that the border cuts instead of shifting it: `stride` queries and as many keys on either side of them."""

    def axis_windows(self, axis: int) -> tuple[Tensor, Tensor]:
        """First key and number of keys of each query on `axis`: two int64 `[grid[axis]]`."""
        n, block = self.grid[axis], self.stride[axis]
        start, halo = torch.arange(n, device="cpu") // block * block, (self.kernel_size[axis] - block) // 2
        first = (start - halo).clamp(min=0)
        return first, (start + block + halo).clamp(max=n) - first

    def surrounded(self) -> tuple[Box, list[tuple[int, int]]]:
        """The same window on a grid with room for every halo, where no box is shifted; and the room around each axis.

        The room before is a multiple of the block, so that blocks begin where queries that share a window do.
        """
        around = []
        for n, kernel, block in zip(self.grid, self.kernel_size, self.stride, strict=True):
            halo = (kernel - block) // 2
            around.append((-(-halo // block) * block, -(-n // block) * block + halo - n))
        grid = tuple(before + n + after for n, (before, after) in zip(self.grid, around, strict=True))
        return Box(grid, self.kernel_size, self.stride, self.dilation, self.is_causal), around


def _surround(x: Tensor, layout: TokenLayout, around: Sequence[tuple[int, int]]) -> Tensor:
    """A sequence `[B, S, ...]` with zeros around its grid."""
    image = layout.image_slice
    padding = [size for pair in reversed(around) for size in pair]
    grid = torch.nn.functional.pad(x[:, image].unflatten(1, layout.grid), [0, 0] * (x.ndim - 2) + padding)
    return torch.cat([x[:, : image.start], grid.flatten(1, len(layout.grid)), x[:, image.stop :]], 1)


def _inside(x: Tensor, layout: TokenLayout, wider: TokenLayout, around: Sequence[tuple[int, int]]) -> Tensor:
    """Inverse of `_surround`."""
    grid = x[:, wider.image_slice].unflatten(1, wider.grid)
    for axis, ((start, _after), n) in enumerate(zip(around, layout.grid, strict=True), 1):
        grid = grid.narrow(axis, start, n)
    return torch.cat([x[:, : wider.text_before], grid.flatten(1, len(around)), x[:, wider.image_slice.stop :]], 1)


def _hide_surroundings(
    attn_mask: Tensor | None, query: Tensor, layout: TokenLayout, around: Sequence[tuple[int, int]]
) -> Tensor:
    """The mask of the wider sequence: its new keys are hidden, its new queries see what the first of the grid sees."""
    places = torch.arange(1, layout.tokens + 1, device=query.device)
    source = _surround(places[None, :, None], layout, around)[0, :, 0]
    exists = source > 0
    if attn_mask is None:
        return exists.view(1, 1, 1, -1)
    source = torch.where(exists, source - 1, layout.text_before)
    mask = checked_mask("Halo", attn_mask, query).expand(-1, -1, -1, layout.tokens)[..., source]
    if mask.shape[2] > 1:
        mask = mask[:, :, source]
    return mask & exists if mask.dtype == torch.bool else mask.masked_fill(~exists, float("-inf"))
