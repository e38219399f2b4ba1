"""Agent attention on every backend against its formula, head by head in float64."""

import pytest
import torch

import vision_attn as va
from vision_attn.kernels.biased import Call, backward, forward
from vision_attn.kernels.launch import LaunchConfig

BACKENDS = ["dense", "tiled", "triton"]


def inputs(batch=2, queries=9, keys=13, agents=5, heads=4, heads_kv=2, width=6, width_v=7):
    shapes = ((queries, heads, width), (keys, heads_kv, width), (keys, heads_kv, width_v), (agents, heads, width))
    return [torch.randn(batch, *shape) for shape in shapes]


def truth(q, k, v, a, scale, query_scale, agent_bias, query_bias):
    outputs = []
    for head in range(q.shape[2]):
        source = head // (q.shape[2] // k.shape[2])
        collect = torch.einsum("bnd,bsd->bns", a[:, :, head], k[:, :, source]) * scale
        read = torch.einsum("bqd,bnd->bqn", q[:, :, head], a[:, :, head]) * query_scale
        if agent_bias is not None:
            collect = collect + agent_bias.expand(*q.shape[:3:2], *collect.shape[1:])[:, head]
        if query_bias is not None:
            read = read + query_bias.expand(*q.shape[:3:2], *read.shape[1:])[:, head]
        outputs.append(read.softmax(-1) @ (collect.softmax(-1) @ v[:, :, source]))
    return torch.stack(outputs, 2)


# Agents' bias and queries' bias, each with the axes it shares left out or of length 1.
BIASES = {
    "none": (None, None),
    "per head": ((4, 5, 13), (1, 4, 9, 5)),
    "full": ((2, 4, 5, 13), (2, 4, 9, 5)),
    "per key": ((13,), (9, 1)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize(("scale", "query_scale"), [(None, None), (0.7, None), (0.0, -0.4)])
def test_formula_forward_and_backward(backend, biases, scale, query_scale):
    tensors = [*inputs(), *(None if shape is None else torch.randn(shape) for shape in BIASES[biases])]
    check(tensors, scale, query_scale, backend)


def test_wide_heads_on_the_kernels():
    """Their channels are read in parts."""
    check([*inputs(width=132, width_v=70), None, torch.randn(9, 5)], None, None, "triton")


def check(tensors, scale, query_scale, backend):
    ours = [x if x is None else x.clone().requires_grad_() for x in tensors]
    wide = [x if x is None else x.double().requires_grad_() for x in tensors]
    factor = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    expected = truth(*wide[:4], factor, factor if query_scale is None else query_scale, *wide[4:])
    output = va.agent_attention(
        *ours[:4], scale=scale, query_scale=query_scale, agent_bias=ours[4], query_bias=ours[5], backend=backend
    )
    weight = torch.randn(output.shape)
    grads = torch.autograd.grad((output * weight).sum(), [x for x in ours if x is not None])
    truths = torch.autograd.grad((expected * weight).sum(), [x for x in wide if x is not None])
    for a, b in zip((output, *grads), (expected, *truths), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


HALF = [(backend, torch.float16) for backend in BACKENDS] + [("dense", torch.bfloat16), ("tiled", torch.bfloat16)]


@pytest.mark.parametrize(("backend", "dtype"), HALF)  # Triton's interpreter has no bfloat16
def test_half_precision(backend, dtype):
    tensors = [x.to(dtype) for x in inputs(width=16, width_v=16)]
    bias = torch.randn(5, 13, dtype=dtype)
    expected = truth(*(x.double() for x in tensors), 0.25, 0.25, bias.double(), None)
    output = va.agent_attention(*tensors, agent_bias=bias, backend=backend)
    assert output.dtype == dtype
    assert (output.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps


def test_gradcheck():
    tensors = [x.double().requires_grad_() for x in inputs(1, 3, 4, 2, 2, 1, 3, 3)]
    biases = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2, 4), (3, 2))]

    def call(q, k, v, a, agent_bias, query_bias):
        return va.agent_attention(q, k, v, a, agent_bias=agent_bias, query_bias=query_bias)

    assert torch.autograd.gradcheck(call, (*tensors, *biases))


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_parts_of_a_split_loop_make_the_whole(splits):
    """More parts than tiles, too: the last ones have nothing to do."""
    q, k, v, _ = inputs(1, 21, 37, 1, 2, 1, 8, 8)
    bias = torch.randn(2, 21, 37)
    bias[0, 3] = float("-inf")
    config, call = LaunchConfig(16, 16, 4, 1), Call(q, k, v, bias, 0.5)
    whole = forward(call, config, 1)
    parts = forward(call, config, splits)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b)
    assert (parts[0][0, 3, 0] == 0).all()
    weights = torch.randn_like(whole[0]), torch.randn_like(whole[1])
    grads = [backward(call, *whole, *weights, True, (config, config), (n, n)) for n in (1, splits)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert all(grad.isfinite().all() for grad in grads[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("learned", [False, True])
def test_opcheck_and_full_graph_of_the_kernels(learned):
    from vision_attn.kernels.biased import biased

    q, k, v, a = (x.requires_grad_() for x in inputs(1, 4, 5, 3, 2, 1, 4, 4))
    bias = torch.randn(2, 1, 5, requires_grad=learned)
    torch.library.opcheck(biased, (q, k, v, bias, 0.5))
    torch._dynamo.reset()

    def call(q, k, v, a):
        return va.agent_attention(q, k, v, a, agent_bias=bias, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(q, k, v, a).square().sum(), (q, k, v, a)) for f in (compiled, call)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


X, A = torch.randn(2, 6, 4, 8), torch.randn(2, 3, 4, 8)
WRONG = [
    ({"key": X[..., :6]}, ValueError, "key must have the query's head dim 8, got 6"),
    ({"key": X[:, :0], "value": X[:, :0]}, ValueError, r"key must have at least 1 token, got shape \[2, 0, 4, 8\]"),
    ({"agents": None}, TypeError, "agents must be a tensor, got NoneType"),
    ({"agents": A[:1]}, ValueError, r"agents must have shape \[2, n, 4, 8\] .* got \[1, 3, 4, 8\]"),
    ({"agents": A[:, :0]}, ValueError, r"n of at least 1, got \[2, 0, 4, 8\]"),
    ({"agents": A.double()}, ValueError, "agents must be torch.float32 on cpu .* got torch.float64"),
    ({"agent_bias": 0.5}, TypeError, "agent_bias must be a tensor or None, got 0.5"),
    ({"agent_bias": A[0, :, 0, :6].long()}, TypeError, "agent_bias must be floating point .* got torch.int64"),
    ({"agent_bias": A[0, :, 0]}, ValueError, r"agent_bias must broadcast to \[2, 4, 3, 6\], got shape \[3, 8\]"),
    ({"query_bias": A[0, :, 0]}, ValueError, r"query_bias must broadcast to \[2, 4, 6, 3\], got shape \[3, 8\]"),
    ({"scale": "1"}, TypeError, "agent_attention: scale must be a number or None, got '1'"),
    ({"query_scale": float("nan")}, ValueError, "query_scale must be finite, got nan"),
    ({"backend": "natten"}, ImportError, "backend='natten' cannot be used here"),
    ({"backend": "flex"}, NotImplementedError, "backend='flex' has no agent attention: use backend='tiled'"),
]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"), WRONG, ids=lambda value: value[:50] if isinstance(value, str) else ""
)
def test_wrong_input_is_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        va.agent_attention(**{"query": X, "key": X, "value": X, "agents": A} | arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_wider_than_the_query_is_not_rounded(backend):
    """A constant changes nothing, and noise on it must stay: half precision has steps of 8 at 1e4."""
    q, k, v, a = (x.half() for x in inputs())
    bias = torch.randn(5, 13) - 1e4
    expected = truth(*(x.double() for x in (q, k, v, a)), 6**-0.5, 6**-0.5, bias.double(), None)
    output = va.agent_attention(q, k, v, a, agent_bias=bias, backend=backend)
    torch.testing.assert_close(output.double(), expected, atol=6e-3, rtol=6e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_another_dtype(backend):
    q, k, v, a = inputs()
    biases = torch.randn(5, 13, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float16)
    expected = truth(*(x.double() for x in (q, k, v, a)), 6**-0.5, 6**-0.5, *(bias.double() for bias in biases))
    output = va.agent_attention(q, k, v, a, agent_bias=biases[0], query_bias=biases[1], backend=backend)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_agent_and_a_query_from_which_all_is_hidden(backend):
    tensors = [x.requires_grad_() for x in inputs()]
    agent_bias, query_bias = torch.zeros(5, 13), torch.zeros(9, 5)
    agent_bias[1], query_bias[2] = float("-inf"), float("-inf")
    output = va.agent_attention(*tensors, agent_bias=agent_bias, query_bias=query_bias, backend=backend)
    q, k, v, a = (x.detach().double() for x in tensors)
    collect = (torch.einsum("bnhd,bshd->bhns", a, k.repeat_interleave(2, 2)) * 6**-0.5).softmax(-1)
    collect[:, :, 1] = 0
    read = (torch.einsum("bqhd,bnhd->bhqn", q, a) * 6**-0.5).softmax(-1)
    read[:, :, 2] = 0
    expected = torch.einsum("bhqn,bhns,bshd->bqhd", read, collect, v.repeat_interleave(2, 2))
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), tensors))


# ---- the operator ----


def cells_mean(x, grid, raster):
    """Adaptive pooling from its definition: cell i of n holds tokens floor(i N / n) to ceil((i + 1) N / n) - 1."""
    image = x.unflatten(1, grid)

    def spans(tokens, cells):
        return [(i * tokens // cells, -(-(i + 1) * tokens // cells)) for i in range(cells)]

    return torch.stack(
        [
            image[:, top:bottom, left:right].flatten(1, 2).mean(1)
            for top, bottom in spans(grid[0], raster[0])
            for left, right in spans(grid[1], raster[1])
        ],
        1,
    )


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize(("agents", "raster"), [(9, (3, 3)), ((2, 5), (2, 5))])
def test_operator_pools_image_queries_and_leaves_text_dense(agents, raster, backend):
    layout = va.TokenLayout((8, 7), text_before=3, text_after=2)  # 8 rows to 3 cells: uneven, they overlap
    q, k, v = (torch.randn(2, layout.tokens, 2, 4, dtype=torch.float64) for _ in range(3))
    output = va.Agent(agents)(q, k, v, layout, scale=0.7, backend=backend)
    image = layout.image_slice
    pooled = cells_mean(q[:, image], layout.grid, raster)
    torch.testing.assert_close(output[:, image], truth(q[:, image], k, v, pooled, 0.7, 0.7, None, None))
    dense = va.Dense()(q, k, v, layout, scale=0.7)
    text = [*range(3), *range(image.stop, layout.tokens)]
    torch.testing.assert_close(output[:, text], dense[:, text])


def test_operator_pools_each_frame():
    video = va.TokenLayout((2, 4, 5))
    q, k, v = (torch.randn(1, 40, 1, 3, dtype=torch.float64) for _ in range(3))
    pooled = torch.cat([cells_mean(frame, (4, 5), (2, 2)) for frame in q.unflatten(1, (2, 20)).unbind(1)], 1)
    expected = truth(q, k, v, pooled, 3**-0.5, 3**-0.5, None, None)
    torch.testing.assert_close(va.Agent(4)(q, k, v, video), expected)


def test_operator_hides_masked_keys_from_agents_and_text():
    layout = va.TokenLayout((4, 6), text_before=3)
    q, k, v = (torch.randn(2, layout.tokens, 2, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(1, 1, 1, layout.tokens, dtype=torch.bool)
    mask[..., [1, 9]] = False
    changed = [x.clone() for x in (k, v)]
    for x in changed:
        x[:, [1, 9]] = 5.0
    output = va.Agent(4)(q, k, v, layout, attn_mask=mask)
    torch.testing.assert_close(output, va.Agent(4)(q, *changed, layout, attn_mask=mask))
    assert not torch.allclose(output, va.Agent(4)(q, k, v, layout))
    torch.testing.assert_close(output[:, :3], va.Dense()(q, k, v, layout, attn_mask=mask)[:, :3])


@pytest.mark.parametrize(
    ("agents", "error", "message"),
    [
        (0, ValueError, "Agent: agents must be at least 1, .* got 0"),
        ((3, 3, 3), ValueError, r"Agent: agents must be at least 1, .* got \(3, 3, 3\)"),
        (4.0, TypeError, r"Agent: agents must be an integer or \(rows, columns\), got 4.0"),
    ],
)
def test_bad_numbers_of_agents_are_named(agents, error, message):
    with pytest.raises(error, match=message):
        va.Agent(agents)


def test_agents_that_do_not_fit_the_grid_are_named():
    layout, x = va.TokenLayout((4, 9)), torch.zeros(1, 36, 1, 2)
    with pytest.raises(ValueError, match=r"Agent: agents must be a square number on the grid \(4, 9\), got 12: use 9"):
        va.Agent(12)(x, x, x, layout)
    with pytest.raises(va.UnsupportedError, match=r"Agent: agents must be at most \(4, 9\) .* got \(7, 7\): use fewer"):
        va.Agent()(x, x, x, layout)
    assert va.Agent(12)(x, x, x, va.TokenLayout((36,))).shape == x.shape
