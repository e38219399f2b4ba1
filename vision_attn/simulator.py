"""What a window saves on tiled hardware, counted: key tiles that each query tile visits, and the speed-up they allow.

A GPU kernel computes whole tiles, so a window's FLOPs alone promise too much. Following GNA, a query tile visits the
box of key tiles from the first key of its first query to the last key of its last query; the slowest query tile sets
the pace. Nothing is run: the counts come from the same arithmetic that the Triton kernels walk by.

Source: Generalized Neighborhood Attention (arXiv 2504.16922), sections 3.3 and B.1; its own simulator is not public.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vision_attn.kernels.bounds import (
    box_start,
    box_stop,
    farthest,
    group_length,
    nearest,
)
from vision_attn.kernels.reach import Ball, Box, Reach
from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import per_axis
from vision_attn.operators.clear import checked_ball
from vision_attn.operators.neighborhood import PerAxis, checked_box


@dataclass(frozen=True)
class Simulation:
    """Counts of key tiles and the speed-ups that follow, for one head.

    Attributes:
        visited_worst: Key tiles that the busiest query tile visits.
        visited_mean: Key tiles that a query tile visits on average.
        total: Key tiles that dense attention visits for a query tile.
        dense_share: Share of the visited tiles, over all query tiles, that lie wholly on the grid and in the windows of
            all the queries: a kernel need not mask them.
        flop_speedup: Query-key pairs of dense attention per visible pair.
        fully_block_sparse: Whether no visited tile holds a token of the grid that one of its queries does not see.
    """

    visited_worst: int
    visited_mean: float
    total: int
    dense_share: float
    flop_speedup: float
    fully_block_sparse: bool

    @property
    def speedup(self) -> float:
        """Dense attention's tiles per tile of the busiest query tile: what a GPU that waits for it can gain."""
        return self.total / self.visited_worst

    @property
    def speedup_mean(self) -> float:
        """Dense attention's tiles per tile that is visited: what is gained where query tiles even out."""
        return self.total / self.visited_mean

    def to_dict(self) -> dict[str, Any]:
        """All numbers, the derived ones too."""
        names = ("visited_worst", "visited_mean", "total", "dense_share", "speedup", "speedup_mean", "flop_speedup")
        return {name: getattr(self, name) for name in names} | {"fully_block_sparse": self.fully_block_sparse}

    def __str__(self) -> str:
        sparse = " (fully block-sparse)" if self.fully_block_sparse else ""
        lines = (
            f"key tiles visited   {self.visited_worst} of {self.total} at worst, {self.visited_mean:.1f} on average",
            f"need no mask        {self.dense_share:.0%}{sparse}",
            f"speed-up by tiles   {self.speedup:.2f}x at worst, {self.speedup_mean:.2f}x on average",
            f"speed-up by FLOPs   {self.flop_speedup:.2f}x",
        )
        return "\n".join(lines)


def simulate(
    grid: Sequence[int],
    kernel_size: PerAxis | None = None,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    *,
    q_tile: PerAxis,
    kv_tile: PerAxis,
    is_causal: bool | Sequence[bool] = False,
    dynamic_kv: bool = False,
    radius: float | Sequence[float] | None = None,
) -> Simulation:
    """Count the key tiles that a window visits.

    Args:
        grid: Tokens per axis, one to three of them.
        kernel_size: As for `na2d`; None with `radius`.
        stride: As for `na2d`.
        dilation: As for `na2d`.
        q_tile: Queries per axis of a tile, one value or one per axis; within a dilation group.
        kv_tile: Keys per axis of a tile.
        is_causal: As for `na2d`.
        dynamic_kv: Whether a query tile's first key tile begins where its window does; else key tiles lie on a raster.
        radius: CLEAR's circle (or ball) instead of a kernel size, in tokens; one value per axis makes an ellipse.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Cost:
        Linear in the tokens of an axis for a box, in the query tiles for a ball.

    Source: arXiv 2504.16922, section B.1.

    Example:
        >>> result = simulate((256, 256), 80, 16, q_tile=16, kv_tile=(16, 8))  # FLUX at 4096 px
        >>> result.visited_worst, result.total, round(result.speedup, 2), result.fully_block_sparse
        (50, 512, 10.24, True)
    """
    where = "simulate"
    grid = _checked_grid(where, grid)
    q_sizes, kv_sizes = (
        _checked_tile(where, name, value, len(grid)) for name, value in (("q_tile", q_tile), ("kv_tile", kv_tile))
    )
    if not isinstance(dynamic_kv, bool):
        raise TypeError(f"{where}: dynamic_kv must be True or False, got {dynamic_kv!r}")
    if (kernel_size is None) == (radius is None):
        given = "neither" if radius is None else "both"
        raise ValueError(f"{where}: kernel_size or radius must be given, got {given}: use one of them")
    if radius is None:
        reach = checked_box(where, grid, kernel_size, stride, dilation, is_causal)
        return simulate_reach(reach, q_sizes, kv_sizes, dynamic_kv)
    for name, value, default in (("stride", stride, 1), ("dilation", dilation, 1), ("is_causal", is_causal, False)):
        if type(value) is not type(default) or value != default:  # True is no stride of 1, 0 is not False
            raise ValueError(f"{where}: {name} must be left out with radius, got {value!r}")
    return simulate_reach(checked_ball(where, grid, radius), q_sizes, kv_sizes, dynamic_kv)


def _checked_grid(where: str, grid: Any) -> tuple[int, ...]:
    try:
        return TokenLayout(grid).grid
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(str(error).replace("TokenLayout", where)) from None


def _checked_tile(where: str, name: str, value: PerAxis, axes: int) -> tuple[int, ...]:
    sizes = per_axis(where, name, value, axes)
    if min(sizes) < 1:
        raise ValueError(f"{where}: {name} must be at least 1 on every axis, got {sizes}")
    return sizes


def simulate_reach(reach: Reach, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], dynamic_kv: bool) -> Simulation:
    """`simulate` for a window that is already checked."""
    if isinstance(reach, Ball):
        tally = _count_ball(reach, q_tile, kv_tile, dynamic_kv)
    else:
        tally = _count_box(reach, q_tile, kv_tile, dynamic_kv)
    total = math.prod(-(-n // size) for n, size in zip(reach.grid, kv_tile, strict=True))
    pairs = math.prod(reach.grid) ** 2 / reach.count()
    visited = tally.visited
    return Simulation(
        tally.worst, visited / tally.tiles, total, tally.dense / visited, pairs, tally.seen_whole == visited
    )


def end_to_end(fraction: float, speedup: float, steps: int = 1, dense_steps: int = 0) -> float:
    """Speed-up of a whole model by Amdahl's law, where attention of a fraction of its time is replaced.

    Args:
        fraction: Share of the time that the replaced attention takes, 0 to 1.
        speedup: Of that attention, above 0.
        steps: Denoising steps.
        dense_steps: Steps that keep dense attention, 0 to `steps`.

    Raises:
        ValueError: a value out of range.

    Source: arXiv 2504.16922, section 4.3; its tables round the speed-up to one decimal first.

    Example:
        >>> round(end_to_end(0.518, 10.2, steps=28, dense_steps=9), 2)
        1.46
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"end_to_end: fraction must be 0 to 1, got {fraction}")
    if not speedup > 0:
        raise ValueError(f"end_to_end: speedup must be above 0, got {speedup}")
    if steps < 1:
        raise ValueError(f"end_to_end: steps must be at least 1, got {steps}")
    if not 0 <= dense_steps <= steps:
        raise ValueError(f"end_to_end: dense_steps must be 0 to steps={steps}, got {dense_steps}")
    replaced = fraction * (steps - dense_steps) / steps
    return 1 / (1 - replaced + replaced / speedup)


@dataclass(frozen=True)
class _Tally:
    """Sums over query tiles.

    Attributes:
        tiles: Query tiles.
        worst: Key tiles that the busiest one visits.
        visited: Key tiles that they visit together.
        dense: Those wholly on the grid that every query sees.
        seen_whole: Those whose tokens on the grid every query sees.
    """

    tiles: int
    worst: int
    visited: int
    dense: int
    seen_whole: int


def _count_box(reach: Box, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], dynamic_kv: bool) -> _Tally:
    """The tiles of a box are products of each axis' tiles, and so are their numbers."""
    axes = [
        list(_axis_tiles(reach, axis, q_size, kv_size, dynamic_kv))
        for axis, (q_size, kv_size) in enumerate(zip(q_tile, kv_tile, strict=True))
    ]
    sums = [[sum(column) for column in zip(*axis, strict=True)] for axis in axes]
    visited, dense, seen_whole = (math.prod(axis[i] for axis in sums) for i in range(3))
    worst = math.prod(max(tile[0] for tile in axis) for axis in axes)
    return _Tally(math.prod(map(len, axes)), worst, visited, dense, seen_whole)


def _axis_tiles(reach: Box, axis: int, q_size: int, kv_size: int, dynamic_kv: bool) -> Iterator[tuple[int, int, int]]:
    """Per query tile of all dilation groups of an axis: key tiles visited, dense, and seen whole."""
    for residue in range(reach.dilation[axis]):
        length = group_length(reach.grid[axis], reach.dilation[axis], residue)
        for first in range(0, length, q_size):
            last = min(first + q_size, length) - 1
            tiles = _axis_keys(reach, axis, length, first, last, kv_size, dynamic_kv)
            yield len(tiles), sum(dense for _, dense, _ in tiles), sum(whole for *_, whole in tiles)


def _axis_keys(
    reach: Box, axis: int, length: int, first: int, last: int, kv_size: int, dynamic_kv: bool
) -> list[tuple[int, bool, bool]]:
    """Key tiles that queries from `first` to `last` visit on an axis: where one begins, if dense, if seen whole."""
    kernel, stride, causal = reach.kernel_size[axis], reach.stride[axis], reach.is_causal[axis]
    # Starts and stops never fall from query to query: the first and the last one bound what all reach and see.
    start, common_start = (box_start(query, length, kernel, stride, causal) for query in (first, last))
    common_stop, stop = (
        box_stop(query, begin, kernel, causal) for query, begin in ((first, start), (last, common_start))
    )
    return [
        (
            begin,
            begin >= common_start and begin + kv_size <= common_stop,
            begin >= common_start and min(begin + kv_size, length) <= common_stop,
        )
        for begin in range(start if dynamic_kv else start // kv_size * kv_size, stop, kv_size)
    ]


def key_boxes(
    reach: Reach, first: tuple[int, ...], last: tuple[int, ...], kv_tile: tuple[int, ...], dynamic_kv: bool
) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Key tiles that the queries from `first` to `last` visit: where each begins, and if it is dense.

    Args:
        reach: A window without dilation.
        first: First query per axis.
        last: Last query per axis.
        kv_tile: Keys per axis.
        dynamic_kv: As for `simulate`.
    """
    if isinstance(reach, Ball):
        for begin in _ball_boxes(reach, first, last, kv_tile, dynamic_kv, 0, reach.limit):
            yield begin, _is_dense(reach, begin, first, last, kv_tile)[0]
        return
    axes = (
        _axis_keys(reach, axis, n, first[axis], last[axis], kv_tile[axis], dynamic_kv)
        for axis, n in enumerate(reach.grid)
    )
    for tiles in itertools.product(*axes):
        yield tuple(begin for begin, _, _ in tiles), all(dense for _, dense, _ in tiles)


def _count_ball(reach: Ball, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], dynamic_kv: bool) -> _Tally:
    tiles = [_ball_tile(reach, first, q_tile, kv_tile, dynamic_kv) for first in _corners(reach.grid, q_tile)]
    visited, dense, seen_whole = (sum(column) for column in zip(*tiles, strict=True))
    return _Tally(len(tiles), max(tile[0] for tile in tiles), visited, dense, seen_whole)


def _ball_tile(
    reach: Ball, first: tuple[int, ...], q_tile: tuple[int, ...], kv_tile: tuple[int, ...], dynamic_kv: bool
) -> tuple[int, int, int]:
    """Key tiles that one query tile visits, dense, and seen whole."""
    last = [min(begin + size, n) - 1 for begin, size, n in zip(first, q_tile, reach.grid, strict=True)]
    boxes = _ball_boxes(reach, first, last, kv_tile, dynamic_kv, 0, reach.limit)
    tiles = [_is_dense(reach, begin, first, last, kv_tile) for begin in boxes]
    return len(tiles), sum(dense for dense, _ in tiles), sum(whole for _, whole in tiles)


def _is_dense(
    reach: Ball, begin: Sequence[int], first: Sequence[int], last: Sequence[int], kv_tile: tuple[int, ...]
) -> tuple[bool, bool]:
    """Whether a key tile is dense for these queries, and whether they see it whole."""
    end = [b + size - 1 for b, size in zip(begin, kv_tile, strict=True)]
    on_grid = [min(e, n - 1) for e, n in zip(end, reach.grid, strict=True)]
    spans = [farthest(*pair) for pair in zip(begin, on_grid, first, last, strict=True)]
    whole = sum(w * span * span for w, span in zip(reach.weights, spans, strict=True)) < reach.limit
    return whole and end == on_grid, whole


def _ball_boxes(
    reach: Ball,
    first: Sequence[int],
    last: Sequence[int],
    kv_tile: tuple[int, ...],
    dynamic_kv: bool,
    axis: int,
    budget: int,
) -> Iterator[tuple[int, ...]]:
    """First positions of the key tiles that hold a key some query reaches, from this axis on."""
    if axis == len(reach.grid):
        yield ()
        return
    n, size, weight = reach.grid[axis], kv_tile[axis], reach.weights[axis]
    extent = math.isqrt((budget - 1) // weight)
    start, stop = max(first[axis] - extent, 0), min(last[axis] + extent + 1, n)
    for begin in range(start if dynamic_kv else start // size * size, stop, size):
        gap = nearest(begin, min(begin + size, n) - 1, first[axis], last[axis])
        rest = _ball_boxes(reach, first, last, kv_tile, dynamic_kv, axis + 1, budget - weight * gap * gap)
        yield from ((begin, *tail) for tail in rest)


def _corners(grid: tuple[int, ...], tile: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(0, n, size) for n, size in zip(grid, tile, strict=True)))
