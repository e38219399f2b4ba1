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
        first_query: int64 `[tiles]`, position on the axis.
        first_key: int64 `[tiles]`, position on the axis of the first key that any query of the tile reaches.
        step: Between neighbouring queries and keys of a tile.
        allowed: bool `[queries, keys]`, which query reaches which key on this axis.
    """

    first_query: Tensor
    first_key: Tensor
    step: int
    allowed: Tensor

    @property
    def tiles(self) -> int:
        """Tiles of the class."""
        return len(self.first_query)

    @property
    def queries(self) -> int:
        """Queries per tile."""
        return self.allowed.shape[0]

    @property
    def keys(self) -> int:
        """Keys per tile."""
        return self.allowed.shape[1]


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
        return math.prod(axis.tiles for axis in self.axes)

    @property
    def queries(self) -> int:
        """Queries per tile."""
        return math.prod(axis.queries for axis in self.axes)

    @property
    def keys(self) -> int:
        """Keys per tile."""
        return math.prod(axis.keys for axis in self.axes) if self.kept is None else len(self.kept)

    def query_rows(self) -> Tensor:
        """Flat token positions of all tiles' queries, `[tiles, queries]`."""
        return self._rows([(axis.first_query, axis.queries) for axis in self.axes], 0, self.tiles)

    def key_rows(self, start: int, stop: int) -> Tensor:
        """Flat token positions of the keys of tiles `start..stop`, `[tiles, keys]`."""
        rows = self._rows([(axis.first_key, axis.keys) for axis in self.axes], start, stop)
        return rows if self.kept is None else rows[:, self.kept]

    def _rows(self, runs: list[tuple[Tensor, int]], start: int, stop: int) -> Tensor:
        """Flat positions of tiles `start..stop`; a run per axis: the first position in every tile, and the length."""
        flat = torch.zeros(stop - start, 1, dtype=torch.long, device="cpu")
        members = _unravel(torch.arange(start, stop, device="cpu"), tuple(axis.tiles for axis in self.axes))
        for axis, (first, length), size, member in zip(self.axes, runs, self.grid, members, strict=True):
            positions = first[member].unsqueeze(1) + axis.step * torch.arange(length, device="cpu")
            flat = (flat.unsqueeze(-1) * size + positions.unsqueeze(1)).flatten(1)
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
    classes = []
    for tiles in _equal_tiles(reach, axis, size):
        kinds, kind_of = tiles.kinds()
        for kind, (first, count) in enumerate(tiles.windows[[_first(kind_of == k) for k in range(kinds)]]):
            members = kind_of == kind
            column = torch.arange(int((first + count).max()), device="cpu")
            allowed = (column >= first.unsqueeze(1)) & (column < (first + count).unsqueeze(1))
            classes.append(AxisClass(tiles.first_query[members], tiles.first_key[members], tiles.step, allowed))
    return tuple(classes)


@dataclass(frozen=True)
class _EqualTiles:
    """All tiles of an axis with the same number of queries.

    Attributes:
        first_query: int64 `[tiles]`.
        first_key: int64 `[tiles]`.
        windows: int64 `[tiles, 2, queries]`, each query's first key, counted from the tile's, and number of keys.
        step: Between neighbouring queries and keys.
        by_distance: Whether tiles are also told apart by where their keys stand relative to the queries.
    """

    first_query: Tensor
    first_key: Tensor
    windows: Tensor
    step: int
    by_distance: bool

    def kinds(self) -> tuple[int, Tensor]:
        """Number of kinds of tiles that see their keys alike, and the kind of each tile `[tiles]`."""
        signature = self.windows.flatten(1)
        if self.by_distance:
            signature = torch.cat([signature, (self.first_query - self.first_key).unsqueeze(1)], 1)
        unique, kind_of = signature.unique(dim=0, return_inverse=True)
        return len(unique), kind_of


def _equal_tiles(reach: Reach, axis: int, size: int) -> Iterator[_EqualTiles]:
    """The tiles of one axis, by their number of queries: `size`, and what is left at the end of a dilation group."""
    first, count = reach.axis_windows(axis)
    step, length = reach.dilation[axis], reach.grid[axis]
    by_length: dict[int, list[Tensor]] = {}
    for residue in range(min(step, length)):
        for tile in torch.arange(residue, length, step, device="cpu").split(size):
            by_length.setdefault(len(tile), []).append(tile)
    for tiles in by_length.values():
        queries = torch.stack(tiles)
        first_key = first[queries].amin(1)
        windows = torch.stack([(first[queries] - first_key.unsqueeze(1)) // step, count[queries]], 1)
        yield _EqualTiles(queries[:, 0], first_key, windows, step, isinstance(reach, Ball))


def _first(found: Tensor) -> int:
    return int(found.nonzero()[0, 0])


def _group(reach: Reach, axes: tuple[AxisClass, ...]) -> TileGroup:
    mask = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for axis in axes:
        mask = _outer(mask, axis.allowed, torch.logical_and)
    if isinstance(reach, Ball):
        mask = mask & (_squared_distance(reach, axes) < reach.limit)
    seen = mask.any(0)
    kept = None if bool(seen.all()) else seen.nonzero().squeeze(1)
    mask = mask if kept is None else mask[:, kept]
    return TileGroup(reach.grid, axes, kept, None if bool(mask.all()) else mask)


def _squared_distance(reach: Ball, axes: tuple[AxisClass, ...]) -> Tensor:
    distance = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    for axis, weight in zip(axes, reach.weights, strict=True):
        shift = axis.first_query[0] - axis.first_key[0]
        query, key = (axis.step * torch.arange(n, device="cpu") for n in axis.allowed.shape)
        distance = _outer(distance, weight * (shift + query.unsqueeze(1) - key).square(), torch.add)
    return distance


def _outer(outer: Tensor, inner: Tensor, combine) -> Tensor:  # type: ignore[no-untyped-def]
    """`[Qo, Ko]` and `[Qi, Ki]` combined over the product grid: `[Qo * Qi, Ko * Ki]`."""
    both = combine(outer[:, None, :, None], inner[None, :, None, :])
    return both.reshape(outer.shape[0] * inner.shape[0], outer.shape[1] * inner.shape[1])


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
        pairs = keys = classes = 0
        for tiles in _equal_tiles(reach, axis, size):
            reached = int(tiles.windows.sum(1).amax(1).sum())
            keys, pairs = keys + reached, pairs + reached * tiles.windows.shape[2]
            classes += tiles.kinds()[0]
        yield size, pairs, keys, classes


def _cost(shape: tuple[tuple[int, int, int, int], ...]) -> float:
    pairs, keys, groups = (math.prod(axis[i] for axis in shape) for i in (1, 2, 3))
    return pairs + KEY_COST * keys + GROUP_COST * groups
