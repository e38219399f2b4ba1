"""Query tiles of a window and the keys each of them reaches, without any token-level mask of the whole grid.

Tiles are N-D boxes of tokens: a 2-D window then touches few keys beyond its own. Per axis, tiles that see their keys
in the same way form an `AxisClass`; a product of axis classes is a `TileGroup`, whose tiles share one small mask and
run as one batch. A large grid has few groups (interior, borders, corners), whatever its size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vision_attn.kernels.reach import Ball, Reach

# Largest number of queries in a tile: their logits against one window must stay within a core's cache.
MAX_TILE_TOKENS = 256
# Cost of gathering a key for a tile, and of one more group, in units of one query-key product: a least-squares fit (6 %
# off on average) to 160 timings of the CPU path, windows from 5x5 to 41x41, 7x7x7 and 257, 8 heads of 64.
KEY_COST = 26.0
GROUP_COST = 19_000.0


@dataclass(frozen=True)
class AxisClass:
    """Tiles of one axis that see their keys alike.

    Attributes:
        queries: int64 `[tiles, queries]`, positions on the axis.
        keys: int64 `[tiles, keys]`, positions on the axis of all keys that any query of the tile reaches.
        allowed: bool `[queries, keys]`, which query reaches which key on this axis.
    """

    queries: Tensor
    keys: Tensor
    allowed: Tensor


@dataclass(frozen=True)
class TileGroup:
    """A product of one axis class per axis: `tiles` tiles with one common mask."""

    grid: tuple[int, ...]
    axes: tuple[AxisClass, ...]
    kept: Tensor | None  # int64, columns of the key box that any query reaches; None: all
    mask: Tensor | None  # bool [queries, kept keys]; None: every query of the tile reaches every key

    @property
    def tiles(self) -> int:
        """Tiles of the group."""
        return math.prod(len(axis.queries) for axis in self.axes)

    @property
    def queries(self) -> int:
        """Queries per tile."""
        return math.prod(axis.queries.shape[1] for axis in self.axes)

    @property
    def keys(self) -> int:
        """Keys per tile."""
        return math.prod(axis.keys.shape[1] for axis in self.axes) if self.kept is None else len(self.kept)

    def query_rows(self) -> Tensor:
        """Flat token positions of all tiles' queries, `[tiles, queries]`."""
        return self._rows([axis.queries for axis in self.axes], 0, self.tiles)

    def key_rows(self, start: int, stop: int) -> Tensor:
        """Flat token positions of the keys of tiles `start..stop`, `[tiles, keys]`."""
        rows = self._rows([axis.keys for axis in self.axes], start, stop)
        return rows if self.kept is None else rows[:, self.kept]

    def _rows(self, positions: list[Tensor], start: int, stop: int) -> Tensor:
        flat = torch.zeros(stop - start, 1, dtype=torch.long)
        members = _unravel(torch.arange(start, stop), tuple(len(p) for p in positions))
        for axis_positions, size, member in zip(positions, self.grid, members, strict=True):
            flat = _extend(flat, size, axis_positions[member])
        return flat


@lru_cache(maxsize=64)
def query_order(reach: Reach) -> tuple[Tensor, Tensor]:
    """Flat token positions in the order of `plan`'s tiles, and the inverse permutation, int64 `[N]` each."""
    order = torch.cat([group.query_rows().flatten() for group in plan(reach)])
    return order, order.argsort()


@lru_cache(maxsize=64)
def plan(reach: Reach, tile: tuple[int, ...] | None = None) -> tuple[TileGroup, ...]:
    """All tile groups of a window; together their tiles hold every query exactly once.

    Args:
        reach: The window.
        tile: Queries per axis and tile; None chooses the cheapest shape.
    """
    tile = choose_tile(reach) if tile is None else tile
    classes = [axis_classes(reach, axis, size) for axis, size in enumerate(tile)]
    return tuple(_group(reach, axes) for axes in itertools.product(*classes))


@lru_cache(maxsize=256)
def axis_classes(reach: Reach, axis: int, size: int) -> tuple[AxisClass, ...]:
    """Split one axis into tiles of at most `size` queries of one dilation group, sorted into classes."""
    first, count = (x.tolist() for x in reach.axis_windows(axis))
    dilation, length = reach.dilation[axis], reach.grid[axis]
    members: dict[tuple, list[tuple[range, range]]] = {}
    for residue in range(min(dilation, length)):
        group = range(residue, length, dilation)
        for start in range(0, len(group), size):
            queries = group[start : start + size]
            low = min(first[q] for q in queries)
            high = max(first[q] + dilation * count[q] for q in queries)
            windows = tuple(((first[q] - low) // dilation, count[q]) for q in queries)
            # A ball also needs the distances themselves, so where the keys stand relative to the queries.
            signature = (windows, (queries[0] - low) if isinstance(reach, Ball) else None)
            members.setdefault(signature, []).append((queries, range(low, high, dilation)))
    return tuple(_axis_class(windows, tiles) for (windows, _), tiles in members.items())


def _axis_class(windows: tuple[tuple[int, int], ...], tiles: list[tuple[range, range]]) -> AxisClass:
    queries = torch.tensor([list(queries) for queries, _ in tiles])
    keys = torch.tensor([list(keys) for _, keys in tiles])
    first, count = torch.tensor(windows).unsqueeze(-1).unbind(1)
    column = torch.arange(keys.shape[1])
    return AxisClass(queries, keys, (column >= first) & (column < first + count))


def _group(reach: Reach, axes: tuple[AxisClass, ...]) -> TileGroup:
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        mask = _outer(mask, axis.allowed, torch.logical_and)
    if isinstance(reach, Ball):
        mask = mask & (_squared_distance(axes) < reach.radius**2)
    seen = mask.any(0)
    kept = None if bool(seen.all()) else seen.nonzero().squeeze(1)
    mask = mask if kept is None else mask[:, kept]
    return TileGroup(reach.grid, axes, kept, None if bool(mask.all()) else mask)


def _squared_distance(axes: tuple[AxisClass, ...]) -> Tensor:
    distance = torch.zeros(1, 1, dtype=torch.long)
    for axis in axes:
        distance = _outer(distance, (axis.queries[0, :, None] - axis.keys[0, None, :]).square(), torch.add)
    return distance


def _outer(outer: Tensor, inner: Tensor, combine) -> Tensor:  # type: ignore[no-untyped-def]
    """`[Qo, Ko]` and `[Qi, Ki]` combined over the product grid: `[Qo * Qi, Ko * Ki]`."""
    both = combine(outer[:, None, :, None], inner[None, :, None, :])
    return both.reshape(outer.shape[0] * inner.shape[0], outer.shape[1] * inner.shape[1])


def _extend(flat: Tensor, size: int, positions: Tensor) -> Tensor:
    """Flat positions of a product grid: one more (inner) axis of length `size`."""
    return (flat.unsqueeze(-1) * size + positions.unsqueeze(1)).flatten(1)


def _unravel(index: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    parts = []
    for size in reversed(shape):
        parts.append(index % size)
        index = index // size
    return parts[::-1]


@lru_cache(maxsize=256)
def choose_tile(reach: Reach) -> tuple[int, ...]:
    """The tile shape whose query-key products, gathered keys and groups cost least, by count (nothing is timed)."""
    candidates = [list(_axis_candidates(reach, axis)) for axis in range(len(reach.grid))]
    shapes = [
        shape for shape in itertools.product(*candidates) if math.prod(size for size, *_ in shape) <= MAX_TILE_TOKENS
    ]
    best = min(shapes, key=lambda shape: _cost(shape))
    return tuple(size for size, *_ in best)


def _axis_candidates(reach: Reach, axis: int) -> Iterator[tuple[int, int, int, int]]:
    """`(size, query-key products, keys, classes)` over all tiles of the axis, per candidate tile size."""
    length = -(-reach.grid[axis] // reach.dilation[axis])
    stride = reach.stride[axis]
    sizes = {min(2**power, length) for power in range(9)} | {min(stride * m, length) for m in (1, 2, 4)}
    for size in sorted(size for size in sizes if size <= MAX_TILE_TOKENS):
        classes = axis_classes(reach, axis, size)
        tiles = [(len(c.queries), c.queries.shape[1], c.keys.shape[1]) for c in classes]
        yield size, sum(n * q * k for n, q, k in tiles), sum(n * k for n, _, k in tiles), len(classes)


def _cost(shape: tuple[tuple[int, int, int, int], ...]) -> float:
    pairs, keys, groups = (math.prod(axis[i] for axis in shape) for i in (1, 2, 3))
    return pairs + KEY_COST * keys + GROUP_COST * groups
