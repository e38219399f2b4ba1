"""Tile plans: every query once, every visible key present, nothing that no query reaches, masks only at boundaries."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_attn.backends.tiles import MAX_TILE_TOKENS, axis_classes, choose_tile, plan
from vision_attn.kernels.reach import Ball, Box


@st.composite
def reaches(draw):
    axes = draw(st.integers(1, 3))
    grid = tuple(draw(st.integers(1, (50, 14, 8)[axes - 1])) for _ in range(axes))
    if draw(st.booleans()):
        return Ball.of_radius(grid, draw(st.sampled_from([0.5, 1.0, 2.0, 3.3, 5.0, 100.0])))
    dilation = tuple(draw(st.integers(1, min(3, n))) for n in grid)
    kernel = tuple(draw(st.integers(1, n // d)) for n, d in zip(grid, dilation, strict=True))
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    return Box(grid, kernel, stride, dilation, tuple(draw(st.booleans()) for _ in grid))


@settings(max_examples=150)
@given(reach=reaches(), data=st.data())
def test_tiles_rebuild_the_mask_exactly(reach, data):
    tile = data.draw(st.none() | st.tuples(*(st.sampled_from([1, 2, 3, 8]) for _ in reach.grid)))
    tokens = math.prod(reach.grid)
    rebuilt, seen = torch.zeros(tokens, tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.long)
    for group in plan(reach, tile):
        mask = torch.ones(group.queries, group.keys, dtype=torch.bool) if group.mask is None else group.mask
        assert mask.any(0).all()  # no key that no query of the tile reaches
        assert group.mask is None or not mask.all()  # a mask only where the window's boundary crosses
        queries, keys = group.query_rows(), group.key_rows(0, group.tiles)
        assert queries.shape == (group.tiles, group.queries)
        assert keys.shape == (group.tiles, group.keys)
        seen.index_add_(0, queries.flatten(), torch.ones(queries.numel(), dtype=torch.long))
        rebuilt[queries[:, :, None], keys[:, None, :]] = mask
    assert torch.equal(seen, torch.ones_like(seen))
    assert torch.equal(rebuilt, reach.mask())


@pytest.mark.parametrize("grid", [(64, 64), (61, 67), (128, 96)])
def test_the_number_of_groups_does_not_grow_with_the_grid(grid):
    assert len(plan(Ball.of_radius(grid, 8.0), (8, 8))) <= 25


def test_blocked_windows_need_no_mask():
    box = Box((24, 40), (8, 8), (8, 8), (1, 1), (False, False))
    assert [group.mask for group in plan(box)] == [None]


@settings(max_examples=60)
@given(reach=reaches())
def test_chosen_tiles_fit_the_limits(reach):
    tile = choose_tile(reach)
    assert math.prod(tile) <= MAX_TILE_TOKENS
    assert all(1 <= size <= n for size, n in zip(tile, reach.grid, strict=True))


def test_a_plan_of_a_long_row_is_small():
    plan.cache_clear()
    axis_classes.cache_clear()
    groups = plan(Box((32768,), (2048,), (1,), (1,), (False,)))
    stored = sum(x.numel() for g in groups for axis in g.axes for x in (axis.first_query, axis.first_key, axis.allowed))
    assert stored < 4 * MAX_TILE_TOKENS * 4096  # a few masks of one tile; 32768 / 256 tiles list no keys
    assert sum(g.tiles * g.queries for g in groups) == 32768
    assert max(g.keys for g in groups) <= 2048 + MAX_TILE_TOKENS


def test_a_window_in_two_dimensions_touches_few_keys():
    groups = plan(Ball.of_radius((64, 64), 8.0))
    touched = sum(group.tiles * group.queries * group.keys for group in groups)
    row_major = 64 * 64 * (15 + 1) * 64  # 64 queries of a row reach 15 rows of 64 keys, at least
    assert touched < row_major / 2
