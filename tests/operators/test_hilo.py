"""HiLo attention: hi heads in windows, lo heads on a pooled image."""

import oracle
import pytest
import torch

import vision_attn as va


def draw(layout, heads=3, heads_kv=3, width=4, batch=2):
    shapes = (heads, heads_kv, heads_kv)
    return [torch.randn(batch, layout.tokens, h, width, dtype=torch.float64) for h in shapes]


def lo_truth(q, k, v, layout, side):
    """Cell by cell: image queries see text and the means of cells, text sees every token."""
    rows, columns = layout.grid
    image, before = layout.image_slice, layout.text_before
    cells = [
        [y * columns + x for y in range(top, min(top + side, rows)) for x in range(left, min(left + side, columns))]
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]

    def pooled(x):
        means = torch.stack([x[:, image][:, cell].mean(1) for cell in cells], 1)
        return torch.cat([x[:, :before], means, x[:, image.stop :]], 1)

    output = oracle.attention(q, k, v)[0]
    output[:, image] = oracle.attention(q[:, image], pooled(k), pooled(v))[0]
    return output


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("grid", [(6, 8), (5, 7)])
def test_definition(grid, backend):
    layout = va.TokenLayout(grid, text_before=3, text_after=2)
    q, k, v = draw(layout)
    output = va.HiLo(0.4, 2)(q, k, v, layout, backend=backend)  # of 3 heads, int(1.2) is lo
    hi = oracle.attention(*(x[:, :, :2] for x in (q, k, v)), va.Neighborhood(2, stride=2).mask(layout))[0]
    torch.testing.assert_close(output[:, :, :2], hi)
    torch.testing.assert_close(output[:, :, 2:], lo_truth(*(x[:, :, 2:] for x in (q, k, v)), layout, 2))


def test_grouped_heads():
    layout = va.TokenLayout((4, 6), text_before=1)
    q, k, v = draw(layout, 6, 2)
    wide = [x.repeat_interleave(3, 2) for x in (k, v)]
    torch.testing.assert_close(va.HiLo(0.5, 2)(q, k, v, layout), va.HiLo(0.5, 2)(q, *wide, layout))


@pytest.mark.parametrize("op", [va.HiLo(0.3, 1), va.HiLo(0, 99)], ids=str)
def test_dense_limits(op):
    """Nothing to pool, or only hi heads and a window of the whole grid."""
    layout = va.TokenLayout((4, 7), text_before=2, text_after=1)
    inputs = draw(layout)
    torch.testing.assert_close(op(*inputs, layout), va.Dense()(*inputs, layout))


def test_frames_are_kept_apart():
    """Windows and cells of a video lie within a frame."""
    video, frame = va.TokenLayout((2, 4, 6)), va.TokenLayout((4, 6))
    inputs = draw(video)
    hi = va.HiLo(0, 2)(*inputs, video).unflatten(1, (2, 24))
    frames = [va.HiLo(0, 2)(*(x.unflatten(1, (2, 24))[:, t] for x in inputs), frame) for t in range(2)]
    torch.testing.assert_close(hi, torch.stack(frames, 1))
    assert va.HiLo(1, 2).cost(video, 1, 1).flops == 4 * 48 * 12


def test_masks_of_text_are_honoured_and_those_of_pooled_tokens_refused():
    layout = va.TokenLayout((4, 6), text_before=3)
    inputs = draw(layout)
    mask = torch.ones(1, 1, 1, layout.tokens, dtype=torch.bool)
    mask[..., 1] = False
    shorter = va.TokenLayout((4, 6), text_before=2)
    kept = [0, *range(2, layout.tokens)]
    output = va.HiLo(0.5, 2)(*inputs, layout, attn_mask=mask)
    torch.testing.assert_close(output[:, kept], va.HiLo(0.5, 2)(*(x[:, kept] for x in inputs), shorter))
    mask[..., 9] = False
    with pytest.raises(va.UnsupportedError, match="HiLo: attn_mask must leave all image keys visible"):
        va.HiLo(0.5, 2)(*inputs, layout, attn_mask=mask)
    expected = va.Dense()(*inputs, layout, attn_mask=mask)
    torch.testing.assert_close(va.HiLo(0.5, 1)(*inputs, layout, attn_mask=mask), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.5,), ValueError, "HiLo: alpha must be 0 to 1, got 1.5"),
        (("half",), TypeError, "HiLo: alpha must be a number, got 'half'"),
        ((0.5, 0), ValueError, "HiLo: window must be at least 1, got 0"),
        ((0.5, (2, 2)), TypeError, r"HiLo: window must be an integer, got \(2, 2\)"),
        ((float("nan"),), ValueError, "HiLo: alpha must be 0 to 1, got nan"),
    ],
)
def test_bad_values_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        va.HiLo(*arguments)
