"""Bi-level routing attention: each region of the image attends the regions that resemble it most.

    I_r = the `topk` regions s of largest  mean(Q_r) · mean(K_s);   out_i = softmax(scale * q_i K_I(i)^T) V_I(i)

Regions are compared over all heads at once, without a gradient: they share one choice.

Source: BiFormer (arXiv 2303.08810), section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vision_attn.backends import full, resolve
from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import joint_inputs, no_autocast, per_axis, resolve_scale
from vision_attn.operators.cost import Cost, chunks, pairs_cost, text_tiles
from vision_attn.operators.joint import split_mask, with_text_queries
from vision_attn.operators.neighborhood import checked_size
from vision_attn.operators.registry import register_operator


@register_operator("bilevel_routing")
@dataclass(frozen=True)
class BiLevelRouting:
    """Bi-level routing attention as an operator for whole sequences; text is seen by all and sees everything.

    Nothing is trained: the model's own queries and keys choose. Where the number of regions does not divide an axis,
    they differ by a token along it; the released BiFormer pads such maps with zeros that take part in the softmax.

    Args:
        regions: Regions along each axis, one value or one per grid axis; clipped to the grid.
        topk: Regions that each region attends, clipped to their number: then it is dense.

    Raises:
        ValueError, TypeError: a value out of range.

    Source: arXiv 2303.08810, section 3.2, where `regions` is S and `topk` k; the scale is the model's own, not that of
        the released weights (full width).
    """

    regions: int | tuple[int, ...] = 7
    topk: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", checked_size("BiLevelRouting", "regions", self.regions))
        if isinstance(self.topk, bool) or not isinstance(self.topk, int):
            raise TypeError(f"BiLevelRouting: topk must be an integer, got {self.topk!r}")
        if self.topk < 1:
            raise ValueError(f"BiLevelRouting: topk must be at least 1, got {self.topk}")

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
        where = "BiLevelRouting"
        query, key, value = joint_inputs(where, query, key, value, layout)
        factor, chosen = resolve_scale(where, scale, query.shape[-1]), resolve(backend, where, query, value)
        image = layout.image_slice
        with no_autocast(query):
            bias, text_mask = split_mask(where, attn_mask, query, layout)
            regions = _Regions.of(layout.grid, self._counts(layout.grid), query.device)
            routes = self._routes(query[:, image], key[:, image], regions)
            listed, visible = _listed(routes, regions, layout)
            if bias is not None:
                bias = _rows(bias, listed)
            if not regions.even:
                bias = (0.0 if bias is None else bias) + torch.where(visible, 0.0, float("-inf")).to(query.dtype)
            own = query[:, image][:, regions.members]
            output = _attend(own, _rows(key, listed), _rows(value, listed), bias, factor, chosen)
            output = output.flatten(1, 2)[:, regions.places]
            return with_text_queries(output, query, key, value, layout, text_mask, factor, chosen)

    def cost(self, layout: TokenLayout, heads: int, head_dim: int) -> Cost:
        """Cost of one call, one batch item: as if all regions were of mean size, and the choice cost nothing."""
        image, text, counts = layout.image_tokens, layout.text_tokens, self._counts(layout.grid)
        regions = math.prod(counts)
        size, topk = -(-image // regions), min(self.topk, regions)
        pairs = image * image * topk // regions + text * (image + layout.tokens)
        tiles = regions * chunks(size) * chunks(size * topk) + text_tiles(layout.grid, text)
        return pairs_cost(pairs, layout.tokens, heads, head_dim, tiles)

    def _counts(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(min, per_axis("BiLevelRouting", "regions", self.regions, len(grid)), grid))

    @torch.no_grad()
    def _routes(self, query: Tensor, key: Tensor, regions: _Regions) -> Tensor:
        """Chosen regions of each region, `[B, R, k]`."""
        queries, keys = (regions.means(x) for x in (query, key))
        keys = keys.repeat_interleave(query.shape[2] // key.shape[2], 2)
        scores = torch.einsum("brhd,bshd->brs", queries, keys)
        return scores.topk(min(self.topk, scores.shape[-1]), -1).indices


class _Regions(NamedTuple):
    """The regions of a grid, which differ by at most one token along an axis.

    Attributes:
        members: Image tokens of each, `[R, m]`; a smaller one repeats its first.
        exists: Which of them are no repetition, `[R, m]`.
        places: Where each image token is among the flattened members, `[N]`.
        even: Whether nothing is repeated.
    """

    members: Tensor
    exists: Tensor
    places: Tensor
    even: bool

    @classmethod
    def of(cls, grid: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> _Regions:
        """The regions of a grid with so many along each axis."""
        members = torch.zeros(1, 1, dtype=torch.long, device=device)
        exists = torch.ones(1, 1, dtype=torch.bool, device=device)
        for n, count in zip(grid, counts, strict=True):
            start = torch.arange(count, device=device) * n // count
            stop = torch.arange(1, count + 1, device=device) * n // count
            token = start[:, None] + torch.arange(-(-n // count), device=device)
            here = token < stop[:, None]
            token = torch.where(here, token, start[:, None])
            members = (members[:, None, :, None] * n + token[:, None]).flatten(2).flatten(0, 1)
            exists = (exists[:, None, :, None] & here[:, None]).flatten(2).flatten(0, 1)
        even = all(n % count == 0 for n, count in zip(grid, counts, strict=True))
        # Repetitions sort behind all tokens.
        tokens = math.prod(grid)
        places = torch.where(exists, members, tokens).flatten().argsort(stable=True)[:tokens]
        return cls(members, exists, places, even)

    def means(self, x: Tensor) -> Tensor:
        """`[B, N, H, D]` to the regions' means `[B, R, H, D]`, in single precision or better."""
        wide = x if x.dtype == torch.float64 else x.float()
        weight = (self.exists / self.exists.sum(1, keepdim=True)).to(wide.dtype)
        return torch.einsum("brmhd,rm->brhd", wide[:, self.members], weight)


def _listed(routes: Tensor, regions: _Regions, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Keys that each region attends, rows of the sequence `[B, R, n]`, text last; and which are no repetition."""
    image, shape = layout.image_slice, routes.shape[:2]
    keys = regions.members[routes].flatten(2) + image.start
    text = torch.arange(layout.text_tokens, device=keys.device)
    text = torch.where(text < image.start, text, text + layout.image_tokens).expand(*shape, -1)
    exists = regions.exists[routes].flatten(2)
    return torch.cat([keys, text], -1), torch.cat([exists, torch.ones_like(text, dtype=torch.bool)], -1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `[B, R, n, ...]` of a sequence `[B, S, ...]`."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[batch, index]


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, factor: float, backend: str) -> Tensor:
    """Attention of each region `[B, R, m, H, D]` over its keys `[B, R, n, Hkv, D]`."""
    mask = None if bias is None else bias.flatten(0, 1)[:, None, None]
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    return full(q, k, v, mask, factor, backend=backend)[0].unflatten(0, query.shape[:2])
