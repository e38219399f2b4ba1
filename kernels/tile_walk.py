"""Triton pieces that every windowed kernel shares: boxes of tokens in place, and which boxes a fixed one meets.

A program holds one fixed box of tokens (queries in the forward pass and for dQ, keys for dK and dV) and walks over the
boxes of the other kind that its windows reach. `TRANSPOSED` says which is fixed: False for queries, True for keys. All
positions are those of a dilation group; an axis that the grid lacks has length 1. Geometry comes in tuples (T, Y, X).

Window arguments, per axis: a box has `window` (kernel size), `stride` and `CAUSAL`; a ball has `window` (weight of the
squared steps) and one `limit`, which weighted squares stay below.
"""

from __future__ import annotations

from types import FunctionType

import triton
import triton.language as tl

from . import bounds


@triton.jit
def _min(a, b):
    return tl.minimum(a, b)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


def _in_triton(function):
    """The same source as a Triton function, whose `min` and `max` take vectors too."""
    namespace = {"__name__": function.__module__, "tl": tl, "min": _min, "max": _max}
    return triton.jit(FunctionType(function.__code__, namespace, function.__name__))


_group_length = _in_triton(bounds.group_length)
_box_start = _in_triton(bounds.box_start)
_box_stop = _in_triton(bounds.box_stop)
_box_first_query = _in_triton(bounds.box_first_query)
_box_last_query = _in_triton(bounds.box_last_query)
_nearest = _in_triton(bounds.nearest)
_farthest = _in_triton(bounds.farthest)


@triton.jit
def place_tile(index, grid, dilation, TILE: tl.constexpr):
    """Dilation residue, group length and first position, each (T, Y, X), of the `index`-th box of the grid.

    Boxes of one group follow each other, so that neighbours run together and share keys in the L2 cache. All groups
    have as many boxes as the longest one: a short group's last box may lie wholly outside.
    """
    tiles_t = tl.cdiv(tl.cdiv(grid[0], dilation[0]), TILE[0])
    tiles_y = tl.cdiv(tl.cdiv(grid[1], dilation[1]), TILE[1])
    tiles_x = tl.cdiv(tl.cdiv(grid[2], dilation[2]), TILE[2])
    group = index // (tiles_t * tiles_y * tiles_x)
    first = (
        index // (tiles_y * tiles_x) % tiles_t * TILE[0],
        index // tiles_x % tiles_y * TILE[1],
        index % tiles_x * TILE[2],
    )
    residue = (
        group // (dilation[1] * dilation[2]),
        group // dilation[2] % dilation[1],
        group % dilation[2],
    )
    length = (
        _group_length(grid[0], dilation[0], residue[0]),
        _group_length(grid[1], dilation[1], residue[1]),
        _group_length(grid[2], dilation[2], residue[2]),
    )
    return residue, length, first


@triton.jit
def tile_steps(TILE: tl.constexpr):
    """Steps (T, Y, X) of a box's tokens from its first one, three vectors `[tokens of the box]`."""
    token = tl.arange(0, TILE[0] * TILE[1] * TILE[2])
    return token // (TILE[1] * TILE[2]), token // TILE[2] % TILE[1], token % TILE[2]


@triton.jit
def flat_offset(position, grid, dilation):
    """Row-major distance in tokens that these steps (T, Y, X) of a dilation group make on the grid."""
    return (position[0] * dilation[0] * grid[1] + position[1] * dilation[1]) * grid[2] + position[2] * dilation[2]


@triton.jit
def flat_token(position, residue, grid, dilation):
    """Row-major token number of a group's position (T, Y, X)."""
    return flat_offset(position, grid, dilation) + (residue[0] * grid[1] + residue[1]) * grid[2] + residue[2]


@triton.jit
def inside(position, length):
    """Whether positions (T, Y, X) lie within their group."""
    return (position[0] < length[0]) & (position[1] < length[1]) & (position[2] < length[2])


@triton.jit
def box_interval(position, length, window, stride, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What a position of the fixed kind meets on one axis, `[start, stop)`; neither ever falls with the position."""
    if TRANSPOSED:
        start = _box_first_query(position, length, window, stride, CAUSAL)
        stop = _box_last_query(position, length, window, stride, CAUSAL) + 1
    else:
        start = _box_start(position, length, window, stride, CAUSAL)
        stop = _box_stop(position, start, window, CAUSAL)
    return start, stop


@triton.jit
def _ball_extent(budget, weight):
    """Most steps whose weighted square stays below `budget`; -1 where not even the same position does."""
    squares = (tl.maximum(budget, 1) - 1) // weight
    root = tl.sqrt(squares.to(tl.float32)).to(tl.int32)
    # The square root of a rounded number, rounded: it may be one too large or too small.
    root -= (root * root > squares).to(tl.int32)
    root += ((root + 1) * (root + 1) <= squares).to(tl.int32)
    return tl.where(budget > 0, root, -1)


@triton.jit
def ball_interval(first, last, length, weight, budget):
    """What the positions `first` to `last` meet on one axis within a budget of weighted squared steps."""
    extent = _ball_extent(budget, weight)
    start = max(first - extent, 0)
    stop = min(last + extent + 1, length)
    return start, start + max(stop - start, 0) * min(extent + 1, 1)


@triton.jit
def met_range(
    axis: tl.constexpr, first, last, length, window, stride, budget, BALL: tl.constexpr, CAUSAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Range that any position of a fixed box meets on an axis, and the range that all of them meet (a ball: empty)."""
    if BALL:
        start, stop = ball_interval(first[axis], last[axis], length[axis], window[axis], budget)
        all_start, all_stop = start, start
    else:
        start, all_stop = box_interval(first[axis], length[axis], window[axis], stride[axis], CAUSAL[axis], TRANSPOSED)
        all_start, stop = box_interval(last[axis], length[axis], window[axis], stride[axis], CAUSAL[axis], TRANSPOSED)
    return start, stop, all_start, all_stop


@triton.jit
def tile_range(start, stop, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """First position and number of the boxes that cover a range; `ALIGNED` ones start at multiples of their size."""
    if ALIGNED:
        start = start // TILE * TILE
    return start, tl.cdiv(max(stop - start, 0), TILE)


@triton.jit
def squared_gap(axis: tl.constexpr, start, TILE: tl.constexpr, first, last, length, weight):
    """Least weighted squared steps between a walked box's positions on an axis and those of the fixed box."""
    gap = _nearest(start, min(start + TILE[axis], length[axis]) - 1, first[axis], last[axis])
    return weight[axis] * gap * gap


@triton.jit
def squared_span(axis: tl.constexpr, start, TILE: tl.constexpr, first, last, weight):
    """Largest weighted squared steps between a walked box's positions on an axis and those of the fixed box."""
    span = _farthest(start, start + TILE[axis] - 1, first[axis], last[axis])
    return weight[axis] * span * span


@triton.jit
def boxes_of_row(
    y, budget, first, last, length, window, stride, BALL: tl.constexpr, CAUSAL: tl.constexpr,
    TRANSPOSED: tl.constexpr, WALK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """First position on the X axis and number of the boxes that start at `y` and are met."""
    if BALL:
        budget -= squared_gap(1, y, WALK, first, last, length, window)
    start, stop, _, _ = met_range(2, first, last, length, window, stride, budget, BALL, CAUSAL, TRANSPOSED)
    return tile_range(start, stop, WALK[2], ALIGNED)


@triton.jit
def is_interior(
    start, first, last, length, window, stride, limit, BALL: tl.constexpr, CAUSAL: tl.constexpr,
    TRANSPOSED: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Whether the walked box at `start` is wholly on the grid and every pair with the fixed box is visible."""
    if BALL:
        squares = (
            squared_span(0, start[0], WALK, first, last, window)
            + squared_span(1, start[1], WALK, first, last, window)
            + squared_span(2, start[2], WALK, first, last, window)
        )
        end = (start[0] + WALK[0] - 1, start[1] + WALK[1] - 1, start[2] + WALK[2] - 1)
        result = (squares < limit) & inside(end, length)
    else:
        _, _, start_t, stop_t = met_range(0, first, last, length, window, stride, limit, BALL, CAUSAL, TRANSPOSED)
        _, _, start_y, stop_y = met_range(1, first, last, length, window, stride, limit, BALL, CAUSAL, TRANSPOSED)
        _, _, start_x, stop_x = met_range(2, first, last, length, window, stride, limit, BALL, CAUSAL, TRANSPOSED)
        result = (
            (start[0] >= start_t) & (start[0] + WALK[0] <= stop_t)
            & (start[1] >= start_y) & (start[1] + WALK[1] <= stop_y)
            & (start[2] >= start_x) & (start[2] + WALK[2] <= stop_x)
        )  # fmt: skip
    return result


@triton.jit
def fixed_intervals(
    position, length, window, stride, BALL: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Per token of the fixed box, what it meets on each axis: three pairs of vectors; a ball needs none (positions)."""
    if BALL:
        result = (position[0], position[0], position[1], position[1], position[2], position[2])
    else:
        start_t, stop_t = box_interval(position[0], length[0], window[0], stride[0], CAUSAL[0], TRANSPOSED)
        start_y, stop_y = box_interval(position[1], length[1], window[1], stride[1], CAUSAL[1], TRANSPOSED)
        start_x, stop_x = box_interval(position[2], length[2], window[2], stride[2], CAUSAL[2], TRANSPOSED)
        result = (start_t, stop_t, start_y, stop_y, start_x, stop_x)
    return result


@triton.jit
def visible_pairs(intervals, walked, length, window, limit, BALL: tl.constexpr, AXES: tl.constexpr):
    """Which pair of fixed token (row) and walked token (column) the window holds, bool `[fixed, walked]`.

    Boxes have one token on an axis before the first of the `AXES`: nothing is to be seen there.
    """
    if BALL:
        x = intervals[4][:, None] - walked[2][None, :]
        squares = x * x * window[2]
        if AXES > 1:
            y = intervals[2][:, None] - walked[1][None, :]
            squares += y * y * window[1]
        if AXES > 2:
            t = intervals[0][:, None] - walked[0][None, :]
            squares += t * t * window[0]
        result = (squares < limit) & inside(walked, length)[None, :]
    else:
        result = (walked[2][None, :] >= intervals[4][:, None]) & (walked[2][None, :] < intervals[5][:, None])
        if AXES > 1:
            result &= (walked[1][None, :] >= intervals[2][:, None]) & (walked[1][None, :] < intervals[3][:, None])
        if AXES > 2:
            result &= (walked[0][None, :] >= intervals[0][:, None]) & (walked[0][None, :] < intervals[1][:, None])
    return result


@triton.jit
def last_positions(first, length, TILE: tl.constexpr):
    """Last position (T, Y, X) of a box that is on the grid."""
    return (
        min(first[0] + TILE[0], length[0]) - 1,
        min(first[1] + TILE[1], length[1]) - 1,
        min(first[2] + TILE[2], length[2]) - 1,
    )


@triton.jit
def slab_budget(t, first, last, length, window, limit, BALL: tl.constexpr, WALK: tl.constexpr):
    """What weighted squared steps on Y and X may still sum to for the boxes that start at `t`."""
    if BALL:
        limit -= squared_gap(0, t, WALK, first, last, length, window)
    return limit


@triton.jit
def open_slab(
    t, first, last, length, window, stride, limit, BALL: tl.constexpr, CAUSAL: tl.constexpr,
    TRANSPOSED: tl.constexpr, WALK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """First box (y, x) that starts at `t` and is met, boxes left in its row, and boxes in all rows together.

    Every row of a slab holds a box, so the walk over a slab is one loop without holes, which Triton can pipeline.
    """
    budget = slab_budget(t, first, last, length, window, limit, BALL, WALK)
    start, stop, _, _ = met_range(1, first, last, length, window, stride, budget, BALL, CAUSAL, TRANSPOSED)
    y, rows = tile_range(start, stop, WALK[1], ALIGNED)
    x, x_left = boxes_of_row(y, budget, first, last, length, window, stride, BALL, CAUSAL, TRANSPOSED, WALK, ALIGNED)
    boxes = rows * x_left
    if BALL:
        boxes = 0
        for row in range(rows):
            _, more = boxes_of_row(
                y + row * WALK[1], budget, first, last, length, window, stride, BALL, CAUSAL, TRANSPOSED, WALK, ALIGNED
            )
            boxes += more
    return y, x, x_left, boxes


@triton.jit
def next_box(
    y, x, x_left, budget, first, last, length, window, stride, BALL: tl.constexpr, CAUSAL: tl.constexpr,
    TRANSPOSED: tl.constexpr, WALK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The box after (y, x) in its slab; without a branch, which would keep Triton from pipelining the loads."""
    row_end = x_left == 1
    row_x, row_boxes = boxes_of_row(
        y + WALK[1], budget, first, last, length, window, stride, BALL, CAUSAL, TRANSPOSED, WALK, ALIGNED
    )
    y = tl.where(row_end, y + WALK[1], y)
    x = tl.where(row_end, row_x, x + WALK[2])
    return y, x, tl.where(row_end, row_boxes, x_left - 1)
