"""Masks of the models' own: key padding and per-text-row masks are honoured, everything else is refused."""

import math

import oracle
import pytest
import torch

import vision_attn as va
from vision_attn.errors import UnsupportedError

LAYOUT = va.TokenLayout((4, 6), text_before=3, text_after=2)
POOLED = va.Clear(2, down_factor=2)
OPERATORS = [va.Clear(2), POOLED, va.Neighborhood(3), va.Neighborhood(99)]


def qkv(heads=2):
    return [torch.randn(2, LAYOUT.tokens, heads, 4, dtype=torch.float64) for _ in range(3)]


def expected(op, q, k, v, visible):
    """Attention where `visible` `[B, S, S]` limits the operator's own mask."""
    mask = op.mask(LAYOUT) & visible
    if getattr(op, "down_factor", 1) == 1:
        return torch.cat([oracle.attention(q[[b]], k[[b]], v[[b]], mask[b])[0] for b in range(2)])
    image = LAYOUT.image_slice
    pooled = [x[:, image].unflatten(1, (2, 2, 3, 2)).mean((2, 4)).flatten(1, 2) for x in (k, v)]
    seen = torch.zeros(LAYOUT.tokens, 6, dtype=torch.bool)
    seen[image] = True
    joint = [torch.cat([m, seen], 1) for m in mask]
    return torch.cat(
        [
            oracle.attention(
                q[[b]], torch.cat([k[[b]], pooled[0][[b]]], 1), torch.cat([v[[b]], pooled[1][[b]]], 1), joint[b]
            )[0]
            for b in range(2)
        ]
    )


def padding(op):
    visible = torch.ones(2, 1, 1, LAYOUT.tokens, dtype=torch.bool)
    visible[0, ..., 1:3] = False
    visible[1, ..., -1:] = False
    if op != POOLED:
        visible[1, ..., 9] = False  # an image key
    return visible


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("kind", ["bool", "float", "rows"])
@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_key_padding_is_honoured(op, kind, backend):
    q, k, v = qkv()
    mask = padding(op)
    given = {
        "bool": mask,
        "float": torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf")),
        "rows": mask.expand(-1, -1, LAYOUT.tokens, -1),
    }[kind]
    ours = op(q, k, v, LAYOUT, attn_mask=given, backend=backend)
    torch.testing.assert_close(ours, expected(op, q, k, v, mask[:, 0].expand(-1, LAYOUT.tokens, -1)))


@pytest.mark.parametrize("kind", ["key padding", "rows of their own"])
@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_masks_reach_the_triton_kernels(op, kind):
    q, k, v = (x.float() for x in qkv())
    mask = padding(op)
    if kind == "rows of their own":
        mask = mask.expand(-1, -1, LAYOUT.tokens, -1).clone()
        mask[:, :, 0, 2:7] = False
    ours = op(q, k, v, LAYOUT, attn_mask=mask, backend="triton")
    torch.testing.assert_close(ours, op(q, k, v, LAYOUT, attn_mask=mask, backend="dense"))


@pytest.mark.parametrize("op", [va.Clear(2), va.Neighborhood(3)], ids=str)
def test_text_queries_may_have_masks_of_their_own(op):
    q, k, v = qkv()
    visible = torch.ones(2, 1, LAYOUT.tokens, LAYOUT.tokens, dtype=torch.bool)
    visible[:, :, 0, 2:7] = False
    visible[1, :, -1, :5] = False
    torch.testing.assert_close(op(q, k, v, LAYOUT, attn_mask=visible), expected(op, q, k, v, visible[:, 0]))


def test_pooled_keys_do_not_leak_hidden_image_tokens():
    q, k, v = qkv()
    hidden = torch.ones(2, 1, 1, LAYOUT.tokens, dtype=torch.bool)
    hidden[..., 20:] = False
    with pytest.raises(va.UnsupportedError, match="attn_mask must leave all image keys visible where keys are pooled"):
        POOLED(q, k, v, LAYOUT, attn_mask=hidden)


def test_a_bias_on_keys_is_added():
    q, k, v = qkv()
    bias = torch.randn(2, 1, 1, LAYOUT.tokens, dtype=torch.float64)
    op = va.Neighborhood(3)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2 + bias
    truth = torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~op.mask(LAYOUT), float("-inf")).softmax(-1), v)
    torch.testing.assert_close(op(q, k, v, LAYOUT, attn_mask=bias), truth)


def test_dense_operator_takes_any_mask():
    q, k, v = qkv()
    mask = torch.rand(2, 2, LAYOUT.tokens, LAYOUT.tokens) < 0.7
    mask[..., 0] = True
    truth = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(va.Dense()(q, k, v, LAYOUT, attn_mask=mask), truth.transpose(1, 2))


@pytest.mark.parametrize("op", [va.Clear(2), va.Neighborhood(3)], ids=str)
def test_masks_of_image_queries_or_heads_are_refused(op):
    q, k, v = qkv()
    rows = torch.ones(1, 1, LAYOUT.tokens, LAYOUT.tokens, dtype=torch.bool)
    rows[..., 7, 8] = False
    with pytest.raises(
        va.UnsupportedError, match=r"attn_mask must be the same for all image queries, got shape \(1, 1, 29, 29\)"
    ):
        op(q, k, v, LAYOUT, attn_mask=rows)
    with pytest.raises(
        va.UnsupportedError, match=r"attn_mask must be the same for all heads, got shape \(1, 2, 1, 29\)"
    ):
        op(q, k, v, LAYOUT, attn_mask=torch.zeros(1, 2, 1, 29))
    with pytest.raises(va.UnsupportedError, match=r"attn_mask must be bool or floating point, got torch.int64"):
        op(q, k, v, LAYOUT, attn_mask=torch.zeros(29, dtype=torch.long))
    with pytest.raises(TypeError, match="attn_mask must be a tensor or None, got 'x'"):
        op(q, k, v, LAYOUT, attn_mask="x")
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to \(2, 2, 29, 29\), got shape \(2, 1, 1, 28\)"):
        op(q, k, v, LAYOUT, attn_mask=torch.ones(2, 1, 1, 28, dtype=torch.bool))


@pytest.mark.parametrize("op", [va.Dense(), *OPERATORS], ids=str)
def test_a_sequence_of_another_length_is_refused(op):
    x = torch.zeros(1, 28, 1, 4)
    with pytest.raises(ValueError, match=r"query must have 29 tokens \(3 before, grid \(4, 6\), 2 after\), got 28"):
        op(x, x, x, LAYOUT)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("hidden", [slice(None), slice(3, None)], ids=["all", "window"])
def test_gradients_ignore_a_padded_batch_item(backend, hidden):
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(2, 1, 1, 29, dtype=torch.bool)
    mask[0, ..., hidden] = False
    out = va.Clear(2)(q, k, v, LAYOUT, attn_mask=mask, backend=backend)
    for grad in torch.autograd.grad(out[1].sum(), [q, k, v]):
        assert torch.isfinite(grad).all()
        assert not grad[0].any()


def test_a_mask_that_needs_a_gradient_is_refused():
    q, k, v = qkv()
    mask = torch.zeros(1, 1, 1, 29, dtype=q.dtype, requires_grad=True)
    with pytest.raises(UnsupportedError, match="Neighborhood: attn_mask must not need a gradient"):
        va.Neighborhood(3)(q, k, v, LAYOUT, attn_mask=mask)
    with torch.no_grad():
        va.Neighborhood(3)(q, k, v, LAYOUT, attn_mask=mask)


@pytest.mark.parametrize("op", [va.Dense(), va.Clear(2)])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 3), ValueError, r"attn_mask must broadcast to \(2, \d, 29, 29\), got shape \(3, 3\)"),
        (torch.ones(1, 29, device="meta"), ValueError, "attn_mask must be on the query's device cpu, got meta"),
        (torch.ones(1, 29, dtype=torch.long), UnsupportedError, "attn_mask must be bool or floating point, got torch.int64"),
        ("all", TypeError, "attn_mask must be a tensor or None, got 'all'"),
    ],
)  # fmt: skip
def test_bad_masks_are_named_by_every_operator(op, mask, error, message):
    with pytest.raises(error, match=f"{type(op).__name__}: {message}"):
        op(*qkv(), LAYOUT, attn_mask=mask)


@pytest.mark.parametrize("op", [va.Dense(), va.Clear(9)])
def test_masks_of_one_axis_and_other_precisions_are_honoured(op):
    q, k, v = qkv()
    bias = torch.linspace(-2, 2, 29, dtype=q.dtype)
    truth = op(q, k, v, LAYOUT, attn_mask=bias.view(1, 1, 1, 29))
    torch.testing.assert_close(op(q, k, v, LAYOUT, attn_mask=bias), truth)
    torch.testing.assert_close(op(q, k, v, LAYOUT, attn_mask=bias.float()), truth, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("op", [va.Dense(), va.Clear(9)])
def test_the_lowest_float_hides_all_keys_alike_in_half_precision(op):
    # As stock attention on fully padded prompts: what it is without a mask, to the rounding of such sums; not zeros.
    q, k, v = (x.half() for x in qkv())
    lowest = torch.full((1, 29), torch.finfo(torch.float32).min)
    out = op(q, k, v, LAYOUT, attn_mask=lowest)
    torch.testing.assert_close(out, op(q, k, v, LAYOUT), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("scale", ["a", math.nan, True])
def test_dense_refuses_scales_as_others_do(scale):
    with pytest.raises((TypeError, ValueError), match=f"Dense: scale must be .* got {scale!r}"):
        va.Dense()(*qkv(), LAYOUT, scale=scale)


def test_several_scales_compile():
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(lambda s: va.Neighborhood(3)(q, k, v, LAYOUT, s), fullgraph=True, backend="aot_eager")
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(scale), va.Neighborhood(3)(q, k, v, LAYOUT, scale))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
def test_forward_mode_derivatives_are_refused_not_zero():
    q, k, v = qkv()
    with pytest.raises(
        NotImplementedError, match="backend='tiled' has no forward-mode derivative: use backend='dense'"
    ):
        torch.func.jvp(lambda x: va.Clear(2)(x, k, v, LAYOUT), (q,), (torch.ones_like(q),))
    tangent = torch.func.jvp(lambda x: va.Clear(2)(q, k, x, LAYOUT, backend="dense"), (v,), (torch.ones_like(v),))[1]
    torch.testing.assert_close(tangent, torch.ones_like(tangent))  # rows of attention weights sum to 1


def test_meta_test_the_oracle_can_fail():
    q, k, v = qkv()
    wrong = op_mask = va.Neighborhood(3).mask(LAYOUT).clone()
    wrong[10, 11] = ~op_mask[10, 11]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(va.Neighborhood(3)(q, k, v, LAYOUT), oracle.attention(q, k, v, wrong)[0])
