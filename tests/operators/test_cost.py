"""Costs are counted from windows; here they are compared with counts of the masks themselves."""

import math

import pytest
import torch

import vision_attn as va
from vision_attn.operators.cost import KV_TILE, Cost

LAYOUTS = [
    va.TokenLayout((20, 33)),
    va.TokenLayout((9, 17), text_before=70, text_after=3),
    va.TokenLayout((3, 10, 9), text_before=5),
    va.TokenLayout((100,)),
]
OPERATORS = [
    va.Dense(),
    va.Neighborhood(3),
    va.Neighborhood(7, stride=4),
    va.Neighborhood(3, dilation=3),
    va.Neighborhood(1000),
    va.Halo(4, 2),
    va.Halo(5, 0),
    va.LSDA(4, interval=3),
    va.Clear(2.5),
    va.Clear(9),
    va.Clear(1000),
]


def tile_of(layout):
    """Tile number of every token: the grid in boxes, the text around it in runs of 64 counted as one sequence."""
    axes = [torch.arange(n) // t for n, t in zip(layout.grid, KV_TILE[len(layout.grid)], strict=True)]
    flat = torch.zeros(1, dtype=torch.long)
    for axis in axes:
        flat = (flat[:, None] * (int(axis.max()) + 1) + axis).flatten()
    text = torch.arange(layout.text_tokens) // 64 + int(flat.max()) + 1
    return torch.cat([text[: layout.text_before], flat, text[layout.text_before :]])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_flops_and_tiles_match_the_mask(op, layout):
    mask, cost = op.mask(layout), op.cost(layout, heads=3, head_dim=16)
    assert cost.flops == 4 * 3 * 16 * int(mask.sum())
    assert cost.bytes == 4 * layout.tokens * 3 * 16 * 2
    if isinstance(op, va.Dense):
        assert cost.kv_tiles == math.ceil(layout.tokens / 64) ** 2
        return
    tiles = tile_of(layout)
    visited = torch.zeros(int(tiles.max()) + 1, int(tiles.max()) + 1, dtype=torch.bool)
    queries, keys = mask.nonzero(as_tuple=True)
    visited[tiles[queries], tiles[keys]] = True
    assert cost.kv_tiles == int(visited.sum())


def test_heads_that_differ_are_counted_each():
    """Of 3 heads 2 see windows of 2 x 2 and text, one the 5 x 9 cells and text; text sees 184 tokens."""
    cost = va.HiLo(0.5, 2).cost(va.TokenLayout((10, 18), text_before=4), 3, 8)
    assert cost.flops == 4 * 8 * (2 * (180 * 4) + 180 * 5 * 9 + 3 * 4 * (180 + 184))
    assert cost.bytes == 4 * 184 * 3 * 8 * 2


def test_agents_are_counted_on_both_sides():
    cost = va.Agent((2, 3)).cost(va.TokenLayout((10, 18), text_before=4), 3, 8)
    assert cost.flops == 4 * 3 * 8 * (6 * (180 + 184) + 4 * 184)
    assert cost.kv_tiles == 3 + 3 + 3


def test_pooled_keys_are_counted():
    layout = va.TokenLayout((10, 18), text_before=4)
    plain, pooled = (va.Clear(3, down_factor=f).cost(layout, 2, 8) for f in (1, 4))
    assert pooled.flops - plain.flops == 4 * 2 * 8 * 180 * (3 * 5)
    assert pooled.kv_tiles - plain.kv_tiles == 3


def test_costs_add():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


def test_large_grids_cost_nothing_to_count():
    cost = va.Clear(8).cost(va.TokenLayout((512, 512), text_before=512), heads=24, head_dim=128)
    assert cost.flops == pytest.approx(3915e9, rel=2e-4)  # the paper's 8k row, in GFLOPS per layer
