"""Halo attention: blocks with a halo that the border cuts."""

import oracle
import pytest
import torch

import vision_attn as va


def draw(layout, heads=2, width=4, batch=2):
    return [torch.randn(batch, layout.tokens, heads, width, dtype=torch.float64) for _ in range(3)]


def seen(grid, block, halo):
    """Bool `[N, N]`, token by token from the definition."""
    tokens = [(y, x) for y in range(grid[0]) for x in range(grid[1])]

    def near(query, key, b, h):
        first = query // b * b
        return first - h <= key <= first + b - 1 + h

    return torch.tensor([[all(map(near, q, k, block, halo)) for k in tokens] for q in tokens])


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize(
    ("grid", "block", "halo"),
    [
        ((7, 11), (3, 4), (2, 5)),  # neither divides, one halo wider than its block
        ((6, 8), (2, 4), (1, 0)),
        ((5, 3), (5, 3), (1, 1)),
    ],
)
def test_definition(grid, block, halo, backend):
    layout = va.TokenLayout(grid, text_before=2, text_after=1)
    op, inputs = va.Halo(block, halo), draw(layout)
    mask = oracle.joint_mask(seen(grid, block, halo), 2, 1)
    assert torch.equal(op.mask(layout), mask)
    torch.testing.assert_close(op(*inputs, layout, backend=backend), oracle.attention(*inputs, mask)[0])


def test_inside_the_image_it_is_a_neighborhood():
    layout = va.TokenLayout((24, 40))
    halo, window = va.Halo(8, 3).mask(layout), va.Neighborhood(14, stride=8).mask(layout)
    inner = torch.zeros(24, 40, dtype=torch.bool)
    inner[8:16, 8:32] = True
    assert torch.equal(halo[inner.flatten()], window[inner.flatten()])
    assert not torch.equal(halo, window)


def test_the_border_gives_nothing_no_weight():
    """timm's zeros around the image would leave 121 of 196 of a constant value in the corner."""
    layout = va.TokenLayout((32, 32))
    assert va.Halo(8, 3).mask(layout)[0].sum() == 121
    q, k, v = draw(layout, 1, 4, 1)
    torch.testing.assert_close(va.Halo(8, 3)(q, k, torch.ones_like(v), layout), torch.ones_like(v))


@pytest.mark.parametrize("grid", [(13,), (2, 5, 6)])
def test_any_rank_and_a_halo_of_the_whole_grid_is_dense(grid):
    layout = va.TokenLayout(grid, text_after=2)
    inputs = draw(layout)
    torch.testing.assert_close(va.Halo(2, 99)(*inputs, layout), va.Dense()(*inputs, layout))
    torch.testing.assert_close(va.Halo(99, 0)(*inputs, layout), va.Dense()(*inputs, layout))


@pytest.mark.parametrize("rows", [1, "all"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_masks(kind, rows):
    layout = va.TokenLayout((5, 7), text_before=3)
    op, inputs = va.Halo(2, 1), draw(layout)
    hidden = torch.rand(2, 1, 1, layout.tokens) < 0.3
    hidden[..., :3] = torch.tensor([False, True, False])
    mask = ~hidden if kind == torch.bool else torch.randn(hidden.shape).double().masked_fill(hidden, float("-inf"))
    if rows == "all":
        mask = mask.expand(-1, -1, layout.tokens, -1).clone()
        mask[:, :, 1] = mask[:, :, 1].flip(-1)  # a text query's own row
    window = torch.zeros(layout.tokens, layout.tokens, dtype=torch.float64).masked_fill(~op.mask(layout), float("-inf"))
    bias = (
        torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf")) if kind == torch.bool else mask
    )
    q, k, v = (x.transpose(1, 2) for x in inputs)
    expected = (q @ k.transpose(-1, -2) / 2 + bias + window).softmax(-1) @ v
    torch.testing.assert_close(op(*inputs, layout, attn_mask=mask), expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1), ValueError, "Halo: block must be at least 1, got 0"),
        ((4, -1), ValueError, "Halo: halo must be at least 0, got -1"),
        ((4, 1.5), TypeError, "Halo: halo must be an integer per axis, got 1.5"),
        (((1, 2, 3, 4), 1), ValueError, r"Halo: block must be one value or 1 to 3 of them, got \(1, 2, 3, 4\)"),
    ],
)
def test_bad_values_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        va.Halo(*arguments)


def test_another_number_of_axes_is_named():
    layout = va.TokenLayout((4, 5))
    x = torch.zeros(1, 20, 1, 2)
    with pytest.raises(ValueError, match=r"Halo: halo must be one value or 2 of them .* got \(1, 1, 1\)"):
        va.Halo(2, (1, 1, 1))(x, x, x, layout)
