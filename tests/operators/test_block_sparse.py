"""Block-index sparse attention on every backend against attention under the mask that its lists spell out."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vision_attn as va

BACKENDS = ["dense", "tiled", "triton"]


def mask_of(index, blocks, heads, queries, keys):
    """Bool `[B, H, Sq, Sk]`, entry by entry."""
    mask = torch.zeros(index.shape[0], heads, queries, keys, dtype=torch.bool)
    for b in range(index.shape[0]):
        for h in range(heads):
            for row in range(index.shape[2]):
                for block in index[b, h if index.shape[1] > 1 else 0, row].tolist():
                    if block >= 0:
                        rows, columns = (slice(i * n, (i + 1) * n) for i, n in zip((row, block), blocks, strict=True))
                        mask[b, h, rows, columns] = True
    return mask


def truth(q, k, v, mask, scale):
    """Output and log-sum-exp in the inputs' dtype; zeros and -inf where nothing is seen."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(group, 2) for x in (k, v))))
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -1e300)
    seen = mask.any(-1)
    output = (logits.softmax(-1) @ v) * seen.unsqueeze(-1)
    return output.transpose(1, 2), logits.logsumexp(-1).masked_fill(~seen, 0).transpose(1, 2), seen.transpose(1, 2)


def check(q, k, v, index, block_size, backend, scale=None, atol=1e-5):
    blocks = (block_size, block_size) if isinstance(block_size, int) else block_size
    mask = mask_of(index, blocks, q.shape[2], q.shape[1], k.shape[1])
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse, seen = truth(*wide, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    output, lse = va.block_sparse_attention(
        *ours, index, block_size=block_size, scale=scale, return_lse=True, backend=backend
    )
    assert (output.dtype, lse.dtype) == (q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert torch.equal(lse == float("-inf"), ~seen)
    lse = lse.masked_fill(~seen, 0)
    weights = [torch.randn(x.shape) for x in (expected, expected_lse)]
    totals = [sum((x.double() * w).sum() for x, w in zip(pair, weights, strict=True)) for pair in
              ((expected, expected_lse), (output, lse))]  # fmt: skip
    pairs = zip((output, lse, *torch.autograd.grad(totals[1], ours)),
                (expected, expected_lse, *torch.autograd.grad(totals[0], wide)), strict=True)  # fmt: skip
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=1e-4)


def draw(batch, queries, keys, heads, heads_kv, width=6, width_v=None):
    shapes = ((queries, heads, width), (keys, heads_kv, width), (keys, heads_kv, width_v or width))
    return [torch.randn(batch, *shape) for shape in shapes]


LISTS = torch.tensor([[[3, 0], [-1, -1], [2, -1]], [[1, 1], [0, 3], [-1, 2]]])  # heads, rows, entries


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [False, True])
def test_lists_with_gaps_repeats_and_cut_blocks(backend, shared):
    index = torch.stack([LISTS, LISTS.flip(1)])
    check(*draw(2, 13, 11, 2, 1, 6, 5), index[:, :1] if shared else index, (5, 3), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_larger_than_the_kernels_tiles_and_smaller(backend):
    check(*draw(1, 150, 140, 1, 1, 16), torch.tensor([1, 0]).view(1, 1, 2, 1), (100, 90), backend)
    check(*draw(1, 7, 9, 2, 2, 16), torch.randint(-1, 9, (1, 2, 7, 4)), 1, backend)
    check(*draw(1, 18, 20, 2, 1, 132), torch.tensor([[0, 1], [1, -1]]).view(1, 1, 2, 2), (9, 10), backend)  # in parts


@st.composite
def problems(draw_from):
    batch, heads_kv, group = (draw_from(st.integers(1, 2)) for _ in range(3))
    queries, keys, bq, bk = (draw_from(st.integers(1, 20)) for _ in range(4))
    shared = draw_from(st.booleans())
    shape = (batch, 1 if shared else heads_kv * group, -(-queries // bq), draw_from(st.integers(0, 4)))
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 1000)))
    index = torch.randint(-1, -(-keys // bk), shape, generator=generator)
    return (batch, queries, keys, heads_kv * group, heads_kv), index, (bq, bk)


@settings(max_examples=60)
@given(problems())
def test_any_lists_on_plain_pytorch(problem):
    shape, index, blocks = problem
    check(*(x.double() for x in draw(*shape)), index, blocks, "tiled", atol=1e-9)
    check(*(x.double() for x in draw(*shape)), index, blocks, "dense", atol=1e-9)


@settings(max_examples=12, derandomize=True)
@given(problems())
def test_any_lists_on_the_kernels(problem):
    shape, index, blocks = problem
    check(*draw(*shape), index, blocks, "triton")


HALF = [(backend, torch.float16) for backend in BACKENDS] + [("dense", torch.bfloat16), ("tiled", torch.bfloat16)]


@pytest.mark.parametrize(("backend", "dtype"), HALF)  # Triton's interpreter has no bfloat16
def test_half_precision(backend, dtype):
    q, k, v = (x.to(dtype) for x in draw(1, 12, 12, 2, 2, 16))
    index = torch.tensor([[0, 2], [1, -1], [2, 0]]).view(1, 1, 3, 2)
    expected = truth(*(x.double() for x in (q, k, v)), mask_of(index, (4, 4), 2, 12, 12), 0.25)[0]
    output = va.block_sparse_attention(q, k, v, index, block_size=4, backend=backend)
    assert (output.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_block_listed_is_dense_attention(backend):
    q, k, v = draw(1, 10, 14, 2, 1)
    index = torch.arange(3).expand(1, 1, 2, 3)
    output = va.block_sparse_attention(q, k, v, index, block_size=5, backend=backend)
    torch.testing.assert_close(output.double(), oracle.attention(q, k, v)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_keys_or_entries(backend):
    for queries, keys, entries in ((0, 4, 1), (4, 0, 1), (4, 4, 0)):
        q, k, v = (x.requires_grad_() for x in draw(2, queries, keys, 2, 1))
        index = torch.full((2, 1, -(-queries // 3), entries), -1)
        output = va.block_sparse_attention(q, k, v, index, block_size=3, backend=backend)
        assert output.shape == q.shape
        assert (output == 0).all()
        grads = torch.autograd.grad(output.sum(), (q, k, v), materialize_grads=True)
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck_and_full_graph(backend):
    if backend == "tiled":
        from vision_attn.backends.blocks import block_sparse
    else:
        from vision_attn.kernels.block_sparse import block_sparse
    q, k, v = (x.requires_grad_() for x in draw(1, 7, 6, 2, 1, 4))
    index = torch.tensor([[0, 1], [1, -1], [0, -1]]).view(1, 1, 3, 2).int()
    torch.library.opcheck(block_sparse, (q, k, v, index, 3, 4, 0.5))
    torch._dynamo.reset()

    def call(q, k, v):
        return va.block_sparse_attention(q, k, v, index, block_size=(3, 4), backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (compiled, call)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    q, k, v = (x.double().requires_grad_() for x in draw(1, 5, 6, 2, 1, 3))
    index = torch.tensor([[0, -1], [1, 0]]).view(1, 1, 2, 2)
    assert torch.autograd.gradcheck(
        lambda *x: va.block_sparse_attention(*x, index, block_size=3, return_lse=True, backend="tiled"), (q, k, v)
    )


X = torch.randn(2, 12, 4, 8)
INDEX = torch.zeros(2, 1, 3, 2, dtype=torch.long)
WRONG = [
    ({"query": 3}, TypeError, "query must be a tensor, got int"),
    ({"key": X[..., :6]}, ValueError, "key must have the query's head dim 8, got 6"),
    ({"key": X[:1]}, ValueError, "key must have the query's batch 2, got 1"),
    (
        {"value": X[:, :5]},
        ValueError,
        r"value must have the key's batch, tokens and heads \(2, 12, 4\), got \(2, 5, 4\)",
    ),
    ({"block_index": [0]}, TypeError, "block_index must be a tensor, got list"),
    ({"block_index": INDEX.float()}, TypeError, "block_index must hold integers, got torch.float32"),
    (
        {"block_index": INDEX[:, :, :2]},
        ValueError,
        r"block_index must have shape .* = \[2, 4 or 1, 3, n\], got \[2, 1, 2, 2\]",
    ),
    ({"block_index": INDEX.expand(2, 3, 3, 2)}, ValueError, r"got \[2, 3, 3, 2\]"),
    ({"block_index": INDEX + 3}, ValueError, "block_index must be 0 to 2 for 3 key blocks, or -1 for none, got 3"),
    ({"block_index": INDEX - 2}, ValueError, "block_index must be 0 to 2 for 3 key blocks, or -1 for none, got -2"),
    ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ({"block_size": 4.0}, TypeError, r"block_size must be an integer or two of them \(bq, bk\), got 4.0"),
    ({"block_size": (4, 4, 4)}, TypeError, r"block_size must be an integer or two of them \(bq, bk\), got \(4, 4, 4\)"),
    ({"scale": "1"}, TypeError, "scale must be a number or None, got '1'"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, dense, .* got 'cuda'"),
    ({"backend": "flex"}, NotImplementedError, "backend='flex' takes no lists of blocks: use backend='tiled'"),
]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"), WRONG, ids=lambda value: value[:50] if isinstance(value, str) else ""
)
def test_wrong_input_is_named(arguments, kind, message):
    given = {"query": X, "key": X, "value": X, "block_index": INDEX, "block_size": 4} | arguments
    with pytest.raises(kind, match=message):
        va.block_sparse_attention(**given)


@pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_narrow_indices(backend, dtype):
    """200 blocks are more than int8 can count, and an unsigned index has no -1 to compare with."""
    x = torch.randn(1, 200, 1, 4)
    index = (torch.arange(200) % 127).view(1, 1, 200, 1)
    outputs = [
        va.block_sparse_attention(x, x, x, index.to(kind), block_size=1, backend=backend)
        for kind in (dtype, torch.int64)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
@pytest.mark.parametrize(("batch", "heads", "width_v"), [(0, 2, 8), (1, 2, 0)])
def test_empty_axes(backend, batch, heads, width_v):
    x, value = torch.randn(batch, 20, heads, 8), torch.randn(batch, 20, heads, width_v)
    index = torch.zeros(batch, 1, 2, 1, dtype=torch.int64)
    output = va.block_sparse_attention(x, x, value, index, block_size=16, backend=backend)
    assert output.shape == (batch, 20, heads, width_v)


@pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
def test_blocks_far_longer_than_the_sequence(backend):
    x = torch.randn(1, 20, 2, 8)
    output = va.block_sparse_attention(
        x, x, x, torch.zeros(1, 1, 1, 1, dtype=torch.int64), block_size=2**31, backend=backend
    )
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (x, x, x)))
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)
