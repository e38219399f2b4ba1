"""Triton pieces that every windowed kernel shares: boxes of tokens in place, and which boxes a fixed one meets.

A program holds one fixed box of tokens (queries in the forward pass and for dQ, keys for dK and dV) and walks over the
boxes of the other kind that its windows reach. `TRANSPOSED` says which is fixed: False for queries, True for keys. All
positions are those of a dilation group; an axis that the grid lacks has length 1. Geometry comes in tuples (T, Y, X).

Two tuples go from hand to hand. `geometry` is (grid, window, stride, dilation, limit): per axis, a box has `window`
(kernel size), `stride` and `CAUSAL`; a ball has `window` (weight of the squared steps) and one `limit`, which weighted
squares stay below. `tile` is the fixed box, (residue, length, first, last): its dilation group's residue and length,
and its first and last positions on the grid.
"""

from __future__ import annotations

from types import FunctionType

import triton
import triton.language as tl

from . import bounds
from .token_rows import sequence_row


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
def hold_tile(index, geometry, split, jump, TILE: tl.constexpr):
    """The `index`-th box of the grid: itself, whether it holds a token, and its tokens.

    Boxes of one group follow each other, so that neighbours run together and share keys in the L2 cache. All groups
    have as many boxes as the longest one: a short group's last box may lie wholly outside.

    Returns:
        `tile`; whether any of it is on the grid; its tokens' positions (three vectors), whether each is on the grid,
        and its row in a sequence that leaves out `jump` rows at `split`.
    """
    grid, _window, _stride, dilation, _limit = geometry
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
    last = (
        min(first[0] + TILE[0], length[0]) - 1,
        min(first[1] + TILE[1], length[1]) - 1,
        min(first[2] + TILE[2], length[2]) - 1,
    )
    tile = (residue, length, first, last)
    position = moved(first, tile_steps(TILE))
    row = sequence_row(flat_token(position, tile, geometry), split, jump)
    return tile, inside(first, tile), position, inside(position, tile), row


@triton.jit
def tile_steps(TILE: tl.constexpr):
    """Steps (T, Y, X) of a box's tokens from its first one, three vectors `[tokens of the box]`."""
    token = tl.arange(0, TILE[0] * TILE[1] * TILE[2])
    return token // (TILE[1] * TILE[2]), token // TILE[2] % TILE[1], token % TILE[2]


@triton.jit
def moved(start, steps):
    """Positions at these steps from a start."""
    return start[0] + steps[0], start[1] + steps[1], start[2] + steps[2]


@triton.jit
def flat_offset(steps, geometry):
    """Row-major distance in tokens that these steps (T, Y, X) of a dilation group make on the grid."""
    grid, _window, _stride, dilation, _limit = geometry
    return (steps[0] * dilation[0] * grid[1] + steps[1] * dilation[1]) * grid[2] + steps[2] * dilation[2]


@triton.jit
def flat_token(position, tile, geometry):
    """Row-major token number of a group's position (T, Y, X)."""
    grid, residue = geometry[0], tile[0]
    return flat_offset(position, geometry) + (residue[0] * grid[1] + residue[1]) * grid[2] + residue[2]


@triton.jit
def inside(position, tile):
    """Whether positions (T, Y, X) lie within the tile's dilation group."""
    length = tile[1]
    return (position[0] < length[0]) & (position[1] < length[1]) & (position[2] < length[2])


@triton.jit
def box_interval(axis: tl.constexpr, position, tile, geometry, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What a position of the fixed kind meets on one axis, `[start, stop)`; neither ever falls with the position."""
    length, window, stride = tile[1][axis], geometry[1][axis], geometry[2][axis]
    if TRANSPOSED:
        start = _box_first_query(position, length, window, stride, CAUSAL[axis])
        stop = _box_last_query(position, length, window, stride, CAUSAL[axis]) + 1
    else:
        start = _box_start(position, length, window, stride, CAUSAL[axis])
        stop = _box_stop(position, start, window, CAUSAL[axis])
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
def met_range(
    axis: tl.constexpr, tile, geometry, budget, BALL: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Range of positions on an axis that any position of the fixed box meets, a ball's within a budget of squares."""
    _residue, length, first, last = tile
    if BALL:
        extent = _ball_extent(budget, geometry[1][axis])
        start = max(first[axis] - extent, 0)
        stop = start + max(min(last[axis] + extent + 1, length[axis]) - start, 0) * min(extent + 1, 1)
    else:
        start, _stop = box_interval(axis, first[axis], tile, geometry, CAUSAL, TRANSPOSED)
        _start, stop = box_interval(axis, last[axis], tile, geometry, CAUSAL, TRANSPOSED)
    return start, stop


@triton.jit
def tile_range(start, stop, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """First position and number of the boxes that cover a range; `ALIGNED` ones start at multiples of their size."""
    if ALIGNED:
        start = start // TILE * TILE
    return start, tl.cdiv(max(stop - start, 0), TILE)


@triton.jit
def squared_gap(axis: tl.constexpr, start, tile, geometry, WALK: tl.constexpr):
    """Least weighted squared steps between a walked box's positions on an axis and those of the fixed box."""
    _residue, length, first, last = tile
    gap = _nearest(start, min(start + WALK[axis], length[axis]) - 1, first[axis], last[axis])
    return geometry[1][axis] * gap * gap


@triton.jit
def squared_span(axis: tl.constexpr, start, tile, geometry, WALK: tl.constexpr):
    """Largest weighted squared steps between a walked box's positions on an axis and those of the fixed box."""
    span = _farthest(start, start + WALK[axis] - 1, tile[2][axis], tile[3][axis])
    return geometry[1][axis] * span * span


# ---- the walk: slabs of boxes that start at one position on T, in them rows of boxes that start at one on Y ----


@triton.jit
def open_walk(tile, exists, geometry, BALL: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr,
              WALK: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Position of the first slab, and the number of slabs; none for a box that is not on the grid."""
    start, stop = met_range(0, tile, geometry, geometry[4], BALL, CAUSAL, TRANSPOSED)
    t, slabs = tile_range(start, stop, WALK[0], ALIGNED)
    return t, tl.where(exists, slabs, 0)


@triton.jit
def open_slab(t, tile, geometry, BALL: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr,
              WALK: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """First box (y, x) of a slab, boxes left in its row, boxes in all rows, and the budget of squares on Y and X.

    Every row of a slab holds a box, so the walk over a slab is one loop without holes, which Triton can pipeline.
    """
    budget = geometry[4]
    if BALL:
        budget -= squared_gap(0, t, tile, geometry, WALK)
    start, stop = met_range(1, tile, geometry, budget, BALL, CAUSAL, TRANSPOSED)
    y, rows = tile_range(start, stop, WALK[1], ALIGNED)
    x, x_left = boxes_of_row(y, budget, tile, geometry, BALL, CAUSAL, TRANSPOSED, WALK, ALIGNED)
    boxes = rows * x_left
    if BALL:
        boxes = 0
        for row in range(rows):
            _x, more = boxes_of_row(y + row * WALK[1], budget, tile, geometry, BALL, CAUSAL, TRANSPOSED, WALK, ALIGNED)
            boxes += more
    return y, x, x_left, boxes, budget


@triton.jit
def boxes_of_row(y, budget, tile, geometry, BALL: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr,
                 WALK: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """First position on the X axis and number of the boxes that start at `y` and are met."""
    if BALL:
        budget -= squared_gap(1, y, tile, geometry, WALK)
    start, stop = met_range(2, tile, geometry, budget, BALL, CAUSAL, TRANSPOSED)
    return tile_range(start, stop, WALK[2], ALIGNED)


@triton.jit
def next_box(y, x, x_left, budget, tile, geometry, BALL: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr,
             WALK: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """The box after (y, x) in its slab; without a branch, which would keep Triton from pipelining the loads."""
    row_end = x_left == 1
    row_x, row_boxes = boxes_of_row(y + WALK[1], budget, tile, geometry, BALL, CAUSAL, TRANSPOSED, WALK, ALIGNED)
    y = tl.where(row_end, y + WALK[1], y)
    x = tl.where(row_end, row_x, x + WALK[2])
    return y, x, tl.where(row_end, row_boxes, x_left - 1)


# ---- which pairs of a fixed and a walked box are visible ----


@triton.jit
def is_interior(start, tile, geometry, BALL: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr,
                WALK: tl.constexpr):  # fmt: skip
    """Whether the walked box at `start` is wholly on the grid and every pair with the fixed box is visible."""
    if BALL:
        squares = (
            squared_span(0, start[0], tile, geometry, WALK)
            + squared_span(1, start[1], tile, geometry, WALK)
            + squared_span(2, start[2], tile, geometry, WALK)
        )
        end = moved(start, (WALK[0] - 1, WALK[1] - 1, WALK[2] - 1))
        result = (squares < geometry[4]) & inside(end, tile)
    else:
        result = (
            _all_meet(0, start[0], tile, geometry, CAUSAL, TRANSPOSED, WALK)
            & _all_meet(1, start[1], tile, geometry, CAUSAL, TRANSPOSED, WALK)
            & _all_meet(2, start[2], tile, geometry, CAUSAL, TRANSPOSED, WALK)
        )
    return result


@triton.jit
def _all_meet(axis: tl.constexpr, start, tile, geometry, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr,
              WALK: tl.constexpr):  # fmt: skip
    """Whether every position of the fixed box meets all of the walked one on an axis."""
    _first_start, common_stop = box_interval(axis, tile[2][axis], tile, geometry, CAUSAL, TRANSPOSED)
    common_start, _last_stop = box_interval(axis, tile[3][axis], tile, geometry, CAUSAL, TRANSPOSED)
    return (start >= common_start) & (start + WALK[axis] <= common_stop)


@triton.jit
def penalties(
    start, walked, intervals, tile, geometry, BALL: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr,
    AXES: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """What to add to the logits `[fixed, walked]` of the box at `start`: `-inf` where hidden; and if it is interior.

    Nothing is compared for an interior box. The branch yields what is added, not the logits: between two products a
    branch hides from Triton that they are chained, and their layouts are then converted in shared memory.
    """
    interior = is_interior(start, tile, geometry, BALL, CAUSAL, TRANSPOSED, WALK)
    result = tl.zeros([intervals[2][0].shape[0], walked[2].shape[0]], tl.float32)
    if not interior:
        result = tl.where(visible_pairs(intervals, walked, tile, geometry, BALL, AXES), 0.0, float("-inf"))
    return result, interior


@triton.jit
def fixed_intervals(position, tile, geometry, BALL: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Per token of the fixed box, what it meets on each axis, (start, stop) thrice; of a ball, its position twice."""
    if BALL:
        result = ((position[0], position[0]), (position[1], position[1]), (position[2], position[2]))
    else:
        result = (
            box_interval(0, position[0], tile, geometry, CAUSAL, TRANSPOSED),
            box_interval(1, position[1], tile, geometry, CAUSAL, TRANSPOSED),
            box_interval(2, position[2], tile, geometry, CAUSAL, TRANSPOSED),
        )
    return result


@triton.jit
def visible_pairs(intervals, walked, tile, geometry, BALL: tl.constexpr, AXES: tl.constexpr):
    """Which pair of fixed token (row) and walked token (column) the window holds, bool `[fixed, walked]`.

    Boxes have one token on an axis before the first of the `AXES`: nothing is to be seen there.
    """
    if BALL:
        squares = _squares(2, intervals, walked, geometry)
        if AXES > 1:
            squares += _squares(1, intervals, walked, geometry)
        if AXES > 2:
            squares += _squares(0, intervals, walked, geometry)
        result = (squares < geometry[4]) & inside(walked, tile)[None, :]
    else:
        result = _meets(2, intervals, walked)
        if AXES > 1:
            result &= _meets(1, intervals, walked)
        if AXES > 2:
            result &= _meets(0, intervals, walked)
    return result


@triton.jit
def _squares(axis: tl.constexpr, intervals, walked, geometry):
    steps = intervals[axis][0][:, None] - walked[axis][None, :]
    return steps * steps * geometry[1][axis]


@triton.jit
def _meets(axis: tl.constexpr, intervals, walked):
    start, stop = intervals[axis]
    return (walked[axis][None, :] >= start[:, None]) & (walked[axis][None, :] < stop[:, None])
