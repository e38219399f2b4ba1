"""Bi-level routing attention: regions choose regions."""

import pytest
import torch

import vision_attn as va


def draw(layout, heads=3, heads_kv=3, width=4, batch=2):
    shapes = (heads, heads_kv, heads_kv)
    return [torch.randn(batch, layout.tokens, h, width, dtype=torch.float64) for h in shapes]


def region_of(grid, counts):
    """Region number of every token: region i of c on an axis of n begins at floor(i n / c)."""
    axes = []
    for n, c in zip(grid, counts, strict=True):
        starts = [i * n // c for i in range(c)]
        axes.append([max(i for i in range(c) if starts[i] <= x) for x in range(n)])
    return torch.tensor([y * counts[1] + x for y in axes[0] for x in axes[1]])


def truth(q, k, v, layout, counts, topk):
    """Token by token: text sees all, an image token text and the chosen regions of its own region."""
    region, image = region_of(layout.grid, counts), layout.image_slice
    regions, group = int(region.max()) + 1, q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))

    def means(x):
        return torch.stack([x[:, image][:, region == r].flatten(2).mean(1) for r in range(regions)], 1)

    chosen = (means(q) @ means(k).transpose(1, 2)).topk(topk, -1).indices
    outputs = []
    for b in range(len(q)):
        mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
        mask[image, image] = (chosen[b][region][:, None] == region[None, :, None]).any(-1)
        logits = torch.einsum("qhd,khd->hqk", q[b], k[b]) * q.shape[-1] ** -0.5
        weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v[b]))
    return torch.stack(outputs)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize(
    ("grid", "regions", "topk"),
    [((6, 8), (3, 2), 2), ((7, 11), (3, 4), 5), ((7, 11), (2, 11), 1)],  # even, both axes uneven, one
)
def test_definition(grid, regions, topk, backend):
    layout = va.TokenLayout(grid, text_before=3, text_after=2)
    q, k, v = draw(layout, 4, 2)
    output = va.BiLevelRouting(regions, topk)(q, k, v, layout, backend=backend)
    torch.testing.assert_close(output, truth(q, k, v, layout, regions, topk))


@pytest.mark.parametrize("regions", [1, 3, 99])
@pytest.mark.parametrize("grid", [(13,), (5, 7), (2, 5, 4)])
def test_all_regions_are_dense(regions, grid):
    layout = va.TokenLayout(grid, text_after=2)
    op, inputs = va.BiLevelRouting(regions, 999), draw(layout)
    torch.testing.assert_close(op(*inputs, layout), va.Dense()(*inputs, layout))


def test_more_regions_err_less():
    torch.manual_seed(0)
    layout = va.TokenLayout((8, 8))
    inputs = draw(layout)
    dense = va.Dense()(*inputs, layout)
    errors = [(va.BiLevelRouting(4, k)(*inputs, layout) - dense).square().mean().item() for k in (1, 4, 12, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-20


@pytest.mark.parametrize("grid", [(6, 8), (7, 9)])
def test_masked_keys_are_hidden(grid):
    layout = va.TokenLayout(grid, text_before=3)
    q, k, v = draw(layout)
    mask = torch.ones(1, 1, 1, layout.tokens, dtype=torch.bool)
    mask[..., [1, 9]] = False
    op = va.BiLevelRouting(2, 4)
    torch.testing.assert_close(op(q, k, v, layout, attn_mask=mask), va.Dense()(q, k, v, layout, attn_mask=mask))


def test_cost_of_even_regions_counts_their_pairs():
    cost = va.BiLevelRouting((2, 4), 3).cost(va.TokenLayout((8, 16), text_before=5), 2, 8)
    assert cost.flops == 4 * 2 * 8 * (128 * 3 * 16 + 5 * (128 + 133))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "BiLevelRouting: regions must be at least 1, got 0"),
        ((7, 0), ValueError, "BiLevelRouting: topk must be at least 1, got 0"),
        ((7, 2.5), TypeError, "BiLevelRouting: topk must be an integer, got 2.5"),
    ],
)
def test_bad_values_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        va.BiLevelRouting(*arguments)
