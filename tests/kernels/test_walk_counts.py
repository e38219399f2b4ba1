"""Key tiles that the kernels' walk visits and masks, against the simulator, at the sizes of real models.

The walk alone is run, by the functions that the attention kernels walk with; small grids tie its counts to theirs.
"""

import itertools
import math
import random

import pytest
import torch
import triton
import triton.language as tl
from published import PUBLISHED

from vision_attn.kernels import windowed
from vision_attn.kernels.geometry import geometry_of
from vision_attn.kernels.launch import LaunchConfig, tile_shape
from vision_attn.kernels.reach import Ball, Box, to_arguments
from vision_attn.kernels.tile_walk import hold_tile, is_interior, next_box, open_slab, open_walk
from vision_attn.simulator import _axis_tiles, _ball_tile


@triton.jit
def _count_kernel(
    counter_ptr, index_ptr, grid, window, stride, dilation, limit, BALL: tl.constexpr, CAUSAL: tl.constexpr,
    Q_TILE: tl.constexpr, KV_TILE: tl.constexpr,
):  # fmt: skip
    """Visited and masked key boxes of the query boxes `index`, as the forward kernel counts them."""
    program = tl.program_id(0)
    geometry = (grid, window, stride, dilation, limit)
    tile, exists, _position, _valid, _row = hold_tile(tl.load(index_ptr + program), geometry, 0, 0, Q_TILE)
    visited, masked = 0, 0
    t, slabs = open_walk(tile, exists, geometry, BALL, CAUSAL, False, KV_TILE, True)
    for _slab in range(slabs):
        y, x, x_left, boxes, budget = open_slab(t, tile, geometry, BALL, CAUSAL, False, KV_TILE, True)
        for _box in range(boxes):
            visited += 1
            masked += tl.where(is_interior((t, y, x), tile, geometry, BALL, CAUSAL, False, KV_TILE), 0, 1)
            y, x, x_left = next_box(y, x, x_left, budget, tile, geometry, BALL, CAUSAL, False, KV_TILE, True)
        t += KV_TILE[0]
    tl.store(counter_ptr + 2 * program, visited)
    tl.store(counter_ptr + 2 * program + 1, masked)


def counts(reach, q_tile, kv_tile, index):
    geometry = geometry_of(*to_arguments(reach))
    counters = torch.full((len(index), 2), -1, dtype=torch.int32)
    _count_kernel[(len(index),)](
        counters, torch.tensor(index, dtype=torch.int32), geometry.grid, geometry.window, geometry.stride,
        geometry.dilation, geometry.limit, BALL=geometry.limit > 0, CAUSAL=geometry.is_causal,
        Q_TILE=three(q_tile), KV_TILE=three(kv_tile),
    )  # fmt: skip
    return counters.tolist()


def three(tile):
    return (1,) * (3 - len(tile)) + tuple(tile)


@pytest.mark.parametrize(
    "reach",
    [
        Box((11, 13), (3, 4), (2, 1), (2, 3), (True, False)),
        Box((4, 6, 7), (2, 3, 5), (2, 1, 1), (1, 2, 1), (False, False, True)),
        Ball.of_radius((13, 14), 4.5),
    ],
    ids=str,
)
def test_the_walk_counts_as_the_attention_kernel_does(reach):
    geometry = geometry_of(*to_arguments(reach))
    config = LaunchConfig(16, 16, 4, 1)
    tile = tile_shape(16, geometry.group_lengths)
    query, key, value = torch.randn(3, 1, math.prod(reach.grid), 1, 16)
    call = windowed.Call(query, key, value, None, None, None, None, geometry, 0, 1.0)
    counters = torch.full((geometry.tiles(tile), 2), -1, dtype=torch.int32)
    windowed.forward(call, config, counters=counters, aligned=True)
    assert counts(reach, tile, tile, range(len(counters))) == counters.tolist()


def of_axes(reach, q_tile, kv_tile):
    """Per axis, what each query tile visits and needs no mask for."""
    return [
        [tile[:2] for tile in _axis_tiles(reach, axis, q_tile[axis], kv_tile[axis], False)]
        for axis in range(len(reach.grid))
    ]


@pytest.mark.parametrize(("tiles", "time", "window", "stride", "worst", "whole", "mixed"), PUBLISHED)
def test_published_windows(tiles, time, window, stride, worst, whole, mixed):
    """The busiest query tile and, where that is quick, a corner's and one between them."""
    grid, q_tile, kv_tile = tiles
    reach = Box(grid, window, stride, (1,) * len(grid), (False,) * len(grid))
    axes = of_axes(reach, q_tile, kv_tile)
    busiest = tuple(max(range(len(axis)), key=lambda place: axis[place][0]) for axis in axes)
    last = tuple(len(axis) - 1 for axis in axes)
    between = tuple(random.Random(0).randrange(len(axis)) for axis in axes)
    chosen = sorted({busiest, last, between}) if worst < 100 else [busiest]
    numbers = list(itertools.product(*(range(len(axis)) for axis in axes)))
    counted = counts(reach, q_tile, kv_tile, [numbers.index(places) for places in chosen])
    for places, (visited, masked) in zip(chosen, counted, strict=True):
        found = [axis[place] for axis, place in zip(axes, places, strict=True)]
        assert visited == math.prod(tile[0] for tile in found)
        assert visited - masked == math.prod(tile[1] for tile in found)
    assert max(visited for visited, _ in counted) == worst


@pytest.mark.parametrize("radius", [8, 16, 32])
def test_clears_circle_at_2048_pixels(radius):
    """FLUX's 128x128 tokens: visited are the tiles that hold a reachable key, masked those that hold another too."""
    reach, tile = Ball.of_radius((128, 128), radius), (8, 8)
    corners = [(0, 0), (0, 64), (64, 64), (120, 120), (72, 8)]
    counted = counts(reach, tile, tile, [y // 8 * 16 + x // 8 for y, x in corners])
    for corner, (visited, masked) in zip(corners, counted, strict=True):
        expected, dense, _whole = _ball_tile(reach, corner, tile, tile, False)
        assert (visited, visited - masked) == (expected, dense)
