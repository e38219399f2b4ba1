"""What an operator costs for a layout, counted from its window (no mask is built, nothing is run)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_attn.kernels.reach import Ball, Reach
from vision_attn.layout import TokenLayout

BYTES_PER_ELEMENT = 2  # half precision, as the large models run

# Tokens of a key tile per grid rank: what a GPU kernel loads at once.
KV_TILE = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


@dataclass(frozen=True)
class Cost:
    """Cost of one attention call for one batch item.

    Attributes:
        flops: Two matrix products, `4 * head_dim * heads` per visible query-key pair (CLEAR's count); pairs that a
            tile computes and masks are not counted.
        bytes: Query, key, value and output once, in half precision: the least memory traffic.
        kv_tiles: Pairs of a 64-token query tile and a 64-token key tile (64, 8x8 or 4x4x4 tokens of the grid)
            that hold at least one visible pair, per head; tokens off the grid count in tiles of 64.
    """

    flops: int
    bytes: int
    kv_tiles: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.kv_tiles + other.kv_tiles)


def pairs_cost(pairs: int, tokens: int, heads: int, head_dim: int, kv_tiles: int) -> Cost:
    """Cost of `pairs` visible query-key pairs per head in a sequence of `tokens`."""
    return Cost(4 * pairs * heads * head_dim, 4 * tokens * heads * head_dim * BYTES_PER_ELEMENT, kv_tiles)


def window_cost(reach: Reach, layout: TokenLayout, heads: int, head_dim: int) -> Cost:
    """Cost of a window on the grid of a sequence whose text is seen by all and sees everything."""
    text = layout.text_tokens
    pairs = reach.count() + text * (layout.image_tokens + layout.tokens)
    return pairs_cost(pairs, layout.tokens, heads, head_dim, visited_tiles(reach) + text_tiles(layout.grid, text))


def text_tiles(grid: tuple[int, ...], text: int) -> int:
    """Tile pairs of `text` tokens that are seen by every grid token and see every token."""
    grid_tiles = math.prod(-(-n // t) for n, t in zip(grid, KV_TILE[len(grid)], strict=True))
    return chunks(text) * (2 * grid_tiles + chunks(text))


def chunks(tokens: int) -> int:
    """Tiles of 64 tokens."""
    return -(-tokens // 64)


def visited_tiles(reach: Reach) -> int:
    """Pairs of query tile and key tile of `KV_TILE` with at least one visible pair."""
    squares, counts = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
    for axis, tile in enumerate(KV_TILE[len(reach.grid)]):
        distance = _nearest(reach, axis, tile)
        here, here_counts = distance[distance >= 0].unique(return_counts=True)
        weight = reach.weights[axis] if isinstance(reach, Ball) else 1
        squares = (squares[:, None] + weight * here.square()).flatten()
        counts = (counts[:, None] * here_counts).flatten()
    limit = reach.limit if isinstance(reach, Ball) else math.inf
    return int(counts[squares < limit].sum())


def _nearest(reach: Reach, axis: int, tile: int) -> Tensor:
    """Per pair of tiles of one axis: the least distance of a visible pair, -1 where there is none."""
    first, count = reach.axis_windows(axis)
    n, dilation = reach.grid[axis], reach.dilation[axis]
    tiles = -(-n // tile)
    if not isinstance(reach, Ball):
        return torch.where(_box_tiles(first, count, n, tile, dilation), 0, -1)
    start = torch.arange(tiles) * tile
    last = (start + tile - 1).clamp(max=n - 1)
    gap = torch.maximum(start[:, None] - last, start - last[:, None]).clamp(min=0)
    return torch.where(gap <= reach.extent(axis), gap, -1)


def _box_tiles(first: Tensor, count: Tensor, n: int, tile: int, dilation: int) -> Tensor:
    """Bool `[tiles, tiles]`: which key tiles hold a key of which query tile's windows."""
    tiles = -(-n // tile)
    low = torch.arange(tiles) * tile
    # First key of each query's window at or after each tile's start, on the window's own dilation raster.
    steps = ((low - first[:, None] + dilation - 1) // dilation).clamp(min=0)
    key = first[:, None] + steps * dilation
    seen = (steps < count[:, None]) & (key < low + tile)
    query_tile = torch.arange(n) // tile
    return torch.zeros(tiles, tiles, dtype=torch.long).index_add_(0, query_tile, seen.long()) > 0
