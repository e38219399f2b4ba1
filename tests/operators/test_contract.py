"""What every operator promises, checked for all that are registered. A new operator adds a line to `SAMPLES`."""

import inspect
import re

import oracle
import pytest
import torch

import vision_attn as va

SAMPLES = {
    "dense": [va.Dense()],
    "clear": [va.Clear(2.5), va.Clear(2, down_factor=3), va.Clear(3, proportional=True)],
    "neighborhood": [va.Neighborhood(3), va.Neighborhood((2, 5), stride=(2, 3), dilation=(1, 2))],
    "agent": [va.Agent(4), va.Agent((3, 2), k_scale2=0.3)],
    "agent_sd": [va.AgentSD(sx=2, sy=3, k_shortcut=0), va.AgentSD(0.5, None, 2, 2)],
    "bilevel_routing": [va.BiLevelRouting((7, 11), 9), va.BiLevelRouting(2, 3)],
    "halo": [va.Halo(3, 2), va.Halo((2, 4), (0, 3))],
    "hilo": [va.HiLo(0.5, 2), va.HiLo(1, 3), va.HiLo(0.4, 1)],
    "lsda": [va.LSDA(3), va.LSDA((2, 3), interval=(3, 2))],
}
OPERATORS = [op for ops in SAMPLES.values() for op in ops]
LAYOUT = va.TokenLayout((7, 11), text_before=4, text_after=3)
FUNCTIONS = [
    va.na1d,
    va.na2d,
    va.na3d,
    va.clear_attention,
    va.merge_attention,
    va.block_sparse_attention,
    va.agent_attention,
]


def qkv(dtype, batch=2, heads=3, width=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, LAYOUT.tokens, heads, width, generator=generator).to(dtype) for _ in range(3)]


def backends_of(op):
    return ["dense", "tiled"] if "backend" in inspect.signature(type(op).__call__).parameters else [None]


CALLS = [(op, backend) for op in OPERATORS for backend in backends_of(op)]
# The Triton kernels take no float64, and no bfloat16 in their interpreter.
KERNEL_CALLS = [(op, "triton") for op in OPERATORS if backends_of(op) != [None]]
HALF_AND_SINGLE = [
    (op, backend, dtype)
    for op, backend in (*CALLS, *KERNEL_CALLS)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    if (backend, dtype) != ("triton", torch.bfloat16)
]


def call(op, backend, q, k, v):
    return op(q, k, v, LAYOUT, **({} if backend is None else {"backend": backend}))


def test_every_operator_has_samples():
    assert set(SAMPLES) == {name for name, cls in va.operators().items() if cls.__module__.startswith("vision_attn.")}


@pytest.mark.parametrize(("op", "backend", "dtype"), HALF_AND_SINGLE, ids=str)
def test_error_is_within_twice_that_of_eager_attention(op, backend, dtype):
    """Truth is the float64 oracle on the same rounded inputs; the budget is what dense eager code of `dtype` loses."""
    inputs = qkv(dtype)
    truth = call(op, None if backend is None else "dense", *(x.double() for x in inputs))
    q, k, v = (x.transpose(1, 2) for x in inputs)
    eager = (q @ k.transpose(-1, -2) * 6**-0.5).softmax(-1) @ v
    exact = oracle.attention(*(x.double() for x in inputs))[0]
    eager_error = (eager.transpose(1, 2).double() - exact).abs().max()
    rounding = torch.finfo(dtype).eps * truth.abs().max()
    out = call(op, backend, *inputs)
    assert out.dtype == dtype
    assert (out.double() - truth).abs().max() <= 2 * eager_error + rounding


@pytest.mark.parametrize(("op", "backend"), CALLS, ids=str)
def test_gradcheck(op, backend):
    small = va.TokenLayout((3, 4), text_before=1, text_after=1)
    tensors = [torch.randn(1, small.tokens, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    keywords = {} if backend is None else {"backend": backend}
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, small, **keywords), tensors)


# Pooled keys and another scale are not part of a mask; some operators are no masked softmax and have none.
MASKED = [
    op
    for op in OPERATORS
    if op.mask(LAYOUT) is not None and getattr(op, "down_factor", 1) == 1 and not getattr(op, "proportional", False)
]


@pytest.mark.parametrize("op", MASKED, ids=str)
def test_mask_describes_the_output(op):
    inputs = qkv(torch.float64)
    mask = op.mask(LAYOUT)
    assert mask.shape == (LAYOUT.tokens, LAYOUT.tokens)
    torch.testing.assert_close(op(*inputs, LAYOUT), oracle.attention(*inputs, mask)[0])


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_batch_items_and_heads_are_independent(op):
    q, k, v = qkv(torch.float64)
    out = op(q, k, v, LAYOUT)
    batch, heads = torch.tensor([1, 0]), torch.tensor([2, 0, 1])
    if isinstance(op, va.HiLo):  # its heads differ in what they see
        heads = torch.arange(3)
    permuted = op(*(x[batch][:, :, heads] for x in (q, k, v)), LAYOUT)
    torch.testing.assert_close(permuted, out[batch][:, :, heads])


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_strided_inputs_give_the_same_result(op):
    inputs = qkv(torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(op(*strided, LAYOUT), op(*inputs, LAYOUT), atol=1e-6, rtol=0)


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_constant_values_stay_constant(op):
    q, k, v = qkv(torch.float64)
    torch.testing.assert_close(op(q, k, torch.full_like(v, 2.5), LAYOUT), torch.full_like(v, 2.5))


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_full_graph_compile(op):
    torch._dynamo.reset()
    inputs = qkv(torch.float32)
    compiled = torch.compile(lambda q, k, v: op(q, k, v, LAYOUT), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), op(*inputs, LAYOUT))


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPERATORS if op != va.Dense()], ids=str)
def test_inductor_forward_and_backward(op):
    """Inductor checks the strides that custom ops promise; other compilers do not."""
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in qkv(torch.float32)]
    compiled = torch.compile(lambda q, k, v: op(q, k, v, LAYOUT), fullgraph=True)
    ours = oracle.gradients(lambda: [compiled(*inputs)], inputs)
    eager = oracle.gradients(lambda: [op(*inputs, LAYOUT)], inputs)
    for a, b in zip((*ours[0], *ours[1]), (*eager[0], *eager[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("op", "backend"), CALLS, ids=str)
def test_autocast_takes_mixed_dtypes_as_sdpa_does(op, backend):
    q, k, v = qkv(torch.float32)
    half = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = call(op, backend, q, k, half[2])
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, call(op, backend, *half))


@pytest.mark.parametrize(("op", "backend"), CALLS, ids=str)
def test_empty_batch(op, backend):
    empty = [x[:0].requires_grad_() for x in qkv(torch.float32)]
    out = call(op, backend, *empty)
    assert out.shape == (0, LAYOUT.tokens, 3, 6)


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_a_wrong_sequence_or_layout_is_named(op):
    name, x = type(op).__name__, torch.zeros(1, LAYOUT.tokens - 1, 2, 4)
    with pytest.raises(ValueError, match=rf"query must have {LAYOUT.tokens} tokens .* got {LAYOUT.tokens - 1}"):
        op(x, x, x, LAYOUT)
    with pytest.raises(TypeError, match=rf"{name}: layout must be a TokenLayout, got \(7, 11\): write va.TokenLayout"):
        op(x, x, x, (7, 11))


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_text_form_round_trips(op):
    assert va.parse(str(op)) == op


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_docstrings_of_functions_are_complete(function):
    text = inspect.getdoc(function)
    if "everything else as `na2d`" in text:
        assert "Example:" in text
        return
    for section in ("Args:", "Returns:", "Raises:", "Source:", "Example:"):
        assert section in text, section
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^ *{name}: ", text, re.M), name


@pytest.mark.parametrize("name", SAMPLES)
def test_docstrings_of_operators_name_their_fields(name):
    cls = va.operators()[name]
    text = inspect.getdoc(cls)
    for field in cls.__dataclass_fields__:
        assert re.search(rf"^ *{field}: ", text, re.M), field
