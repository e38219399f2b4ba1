"""Generalized Neighborhood Attention against NATTEN's outputs, brute-force windows and identities."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vision_attn as va
from vision_attn.kernels.reach import Box

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "gna.npz")
CASES = json.loads(str(GOLDEN["configs_out"]))
MASKS = json.loads(str(GOLDEN["configs_mask"]))
NA = {1: va.na1d, 2: va.na2d, 3: va.na3d}
TENSORS = ("q", "k", "v", "ak", "av")


def golden_inputs(case, dtype, one_head=False):
    """Query, key, value, extra key and value; on request of one batch item and the query heads of one key head."""
    arrays = [GOLDEN.get(f"{case}_{name}") for name in TENSORS]
    if one_head:
        group = arrays[0].shape[-2] // arrays[1].shape[-2]
        arrays = [a if a is None else a[:1, ..., : group if i == 0 else 1, :] for i, a in enumerate(arrays)]
    return [None if a is None else torch.from_numpy(a).to(dtype).requires_grad_() for a in arrays]


def call(config, tensors, backend):
    q, k, v, ak, av = tensors
    return NA[len(config["shape"])](
        q, k, v, config["kernel"], config["stride"], config["dilation"], config["causal"], scale=config["scale"],
        additional_keys=ak, additional_values=av, return_lse=True, backend=backend,
    )  # fmt: skip


def oracle_call(config, tensors):
    q, k, v, ak, av = tensors
    grid = tuple(config["shape"])
    mask = oracle.box_mask(grid, config["kernel"], config["stride"], config["dilation"], config["causal"])
    flat = [x.flatten(1, len(grid)) for x in (q, k, v)]
    out, lse = oracle.attention(*flat, mask, config["scale"], ak, av)
    return out.unflatten(1, grid), lse.unflatten(1, grid)


@pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_golden_outputs(case, backend):
    out, lse = call(CASES[case], golden_inputs(case, torch.float32), backend)
    torch.testing.assert_close(out, torch.from_numpy(GOLDEN[f"{case}_out"]), atol=5e-6, rtol=0)
    torch.testing.assert_close(lse, torch.from_numpy(GOLDEN[f"{case}_lse"]), atol=5e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_golden_outputs_in_half_precision(case, backend, dtype, tolerance):
    out, lse = call(CASES[case], golden_inputs(case, dtype), backend)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.float(), torch.from_numpy(GOLDEN[f"{case}_out"]), atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_golden_gradients_match_the_float64_oracle(case, backend):
    config, one_head = CASES[case], backend == "triton"  # interpreted: one head says what many do
    wide = golden_inputs(case, torch.float64, one_head)
    _, expected = oracle.gradients(lambda: oracle_call(config, wide), [x for x in wide if x is not None])
    ours = golden_inputs(case, torch.float32, one_head)
    outputs, grads = oracle.gradients(lambda: call(config, ours, backend), [x for x in ours if x is not None])
    assert outputs[0].dtype == torch.float32
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), truth, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("index", range(len(MASKS)))
def test_golden_masks(index):
    config = MASKS[index]
    window = (tuple(config[name]) for name in ("shape", "kernel", "stride", "dilation", "causal"))
    reach = Box(*window)
    mask = reach.mask()
    assert zlib.crc32(np.packbits(mask.numpy().astype(np.uint8)).tobytes()) == int(GOLDEN["mask_crc32"][index])
    assert reach.count() == int(mask.sum()) == int(GOLDEN["mask_nnz"][index])


def test_every_window_of_short_axes_matches_a_brute_force_search():
    checked = 0
    for n in range(1, 17):
        for d in range(1, n + 1):
            for k in range(1, n // d + 1):
                for s in range(1, k + 1):
                    for causal in (False, True):
                        mask = Box((n,), (k,), (s,), (d,), (causal,)).mask()
                        truth = torch.zeros(n, n, dtype=torch.bool)
                        for i in range(n):
                            truth[i, oracle.axis_window(i, n, k, s, d, causal)] = True
                        assert torch.equal(mask, truth), (n, k, s, d, causal)
                        checked += 1
    assert checked == 2552  # 2 * sum over n <= 16 and d of m(m + 1) / 2 with m = n // d


@st.composite
def problems(draw):
    axes = draw(st.integers(1, 3))
    grid = tuple(draw(st.integers(1, (40, 11, 7)[axes - 1])) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, min(3, n))) for n in grid)
    kernel = tuple(draw(st.integers(1, n // d)) for n, d in zip(grid, dilation, strict=True))
    stride = tuple(draw(st.integers(1, k)) for k in kernel)
    causal = tuple(draw(st.booleans()) for _ in grid)
    heads_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sizes = {"batch": draw(st.integers(1, 2)), "heads_kv": heads_kv, "heads": heads_kv * group}
    sizes |= {"width": draw(st.sampled_from([1, 3, 8])), "width_v": draw(st.sampled_from([1, 3, 8, 10]))}
    window = {"shape": grid, "kernel": kernel, "stride": stride, "dilation": dilation, "causal": causal}
    return (
        window
        | sizes
        | {"scale": draw(st.sampled_from([None, 0.0, -0.7, 1.3])), "extra": draw(st.sampled_from([0, 0, 1, 5]))}
    )


def random_inputs(config, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    b, hkv, grid = config["batch"], config["heads_kv"], config["shape"]
    q = tensor(b, *grid, config["heads"], config["width"])
    k, v = tensor(b, *grid, hkv, config["width"]), tensor(b, *grid, hkv, config["width_v"])
    if not config["extra"]:
        return [q, k, v, None, None]
    return [
        q,
        k,
        v,
        tensor(b, config["extra"], hkv, config["width"]),
        tensor(b, config["extra"], hkv, config["width_v"]),
    ]


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@settings(max_examples=120)
@given(config=problems())
def test_any_problem_matches_the_oracle_forward_and_backward(backend, config):
    tensors = random_inputs(config)
    given_tensors = [x for x in tensors if x is not None]
    expected, expected_grads = oracle.gradients(lambda: oracle_call(config, tensors), given_tensors)
    outputs, grads = oracle.gradients(lambda: call(config, tensors, backend), given_tensors)
    for ours, truth in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_gradcheck_with_extra_keys_grouped_heads_and_lse(backend):
    config = {
        "shape": (3, 5), "kernel": (2, 3), "stride": (2, 1), "dilation": (1, 1), "causal": (False, True), "batch": 2,
        "heads_kv": 1, "heads": 2, "width": 3, "width_v": 2, "scale": None, "extra": 2,
    }  # fmt: skip
    tensors = random_inputs(config)
    assert torch.autograd.gradcheck(lambda *x: call(config, x, backend), tensors)


def x2d(grid=(9, 14), heads=3, width=5, batch=2, dtype=torch.float64):
    return [torch.randn(batch, *grid, heads, width, dtype=dtype) for _ in range(3)]


def test_kernel_of_the_grids_size_is_dense_attention():
    q, k, v = x2d()
    truth, _ = oracle.attention(*(x.flatten(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(va.na2d(q, k, v, (9, 14)), truth.unflatten(1, (9, 14)))


def test_stride_of_the_kernels_size_is_window_partition():
    q, k, v = x2d((8, 15))
    out = va.na2d(q, k, v, (4, 5), stride=(4, 5))
    for y in range(0, 8, 4):
        for x in range(0, 15, 5):
            block = [t[:, y : y + 4, x : x + 5].flatten(1, 2) for t in (q, k, v)]
            truth = oracle.attention(*block)[0].unflatten(1, (4, 5))
            torch.testing.assert_close(out[:, y : y + 4, x : x + 5], truth)


def test_dilation_is_independent_attention_on_each_residue():
    q, k, v = (torch.randn(2, 23, 2, 4, dtype=torch.float64) for _ in range(3))
    out = va.na1d(q, k, v, 4, stride=2, dilation=3)
    for residue in range(3):
        part = va.na1d(*(x[:, residue::3] for x in (q, k, v)), 4, stride=2)
        torch.testing.assert_close(out[:, residue::3], part)


def test_extra_keys_equal_the_merge_of_two_attentions():
    q, k, v = x2d()
    ak, av = torch.randn(2, 6, 3, 5, dtype=torch.float64), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    joint, joint_lse = va.na2d(q, k, v, 5, additional_keys=ak, additional_values=av, return_lse=True)
    window, window_lse = va.na2d(q, k, v, 5, return_lse=True)
    text, text_lse = oracle.attention(q.flatten(1, 2), ak, av)
    merged, lse = va.merge_attention([window, text.unflatten(1, (9, 14))], [window_lse, text_lse.unflatten(1, (9, 14))])
    torch.testing.assert_close(joint, merged)
    torch.testing.assert_close(joint_lse, lse)


def test_grouped_heads_equal_repeated_heads():
    q = torch.randn(2, 7, 9, 6, 4)
    k, v = torch.randn(2, 7, 9, 2, 4), torch.randn(2, 7, 9, 2, 4)
    repeated = va.na2d(q, k.repeat_interleave(3, 3), v.repeat_interleave(3, 3), 5)
    torch.testing.assert_close(va.na2d(q, k, v, 5), repeated)


def test_one_frame_in_3d_equals_2d():
    q, k, v = x2d()
    torch.testing.assert_close(va.na3d(*(x[:, None] for x in (q, k, v)), (1, 3, 5))[:, 0], va.na2d(q, k, v, (3, 5)))


def test_interior_windows_move_with_the_content():
    q, k, v = x2d((13, 16))
    out = va.na2d(q, k, v, (3, 5))
    moved = va.na2d(*(x.roll((2, 3), (1, 2)) for x in (q, k, v)), (3, 5))
    torch.testing.assert_close(moved[:, 4:11, 6:13], out[:, 2:9, 3:10])


@settings(max_examples=40)
@given(config=problems())
def test_constant_values_give_constant_outputs(config):
    q, k, v, _, _ = random_inputs(config)
    out = call(config, (q, k, torch.ones_like(v), None, None), "tiled")[0]
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("width", [1, 3, 24, 48, 80, 96, 256])
def test_any_head_dim(width):
    q, k, v = x2d((5, 7), width=width, dtype=torch.float32)
    truth = oracle_call(
        {
            "shape": (5, 7),
            "kernel": (3, 3),
            "stride": (1, 1),
            "dilation": (1, 1),
            "causal": (False,) * 2,
            "scale": None,
        },
        (q, k, v, None, None),
    )[0]
    torch.testing.assert_close(va.na2d(q, k, v, 3).double(), truth, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_strided_and_expanded_inputs(backend):
    heads_first = torch.randn(2, 3, 6, 8, 5).permute(0, 2, 3, 1, 4)
    expanded = torch.randn(1, 6, 8, 1, 5).expand(2, -1, -1, 3, -1)
    sliced = torch.randn(2, 6, 16, 3, 10)[:, :, ::2, :, ::2]
    copies = [x.contiguous() for x in (heads_first, expanded, sliced)]
    assert torch.equal(va.na2d(heads_first, expanded, sliced, 3, backend=backend), va.na2d(*copies, 3, backend=backend))


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_large_logits_do_not_overflow(backend):
    q, k, v = x2d(dtype=torch.float32)
    out, lse = va.na2d(q * 300, k * 300, v, 5, scale=1.0, return_lse=True, backend=backend)
    assert torch.isfinite(out).all()
    assert lse.abs().max() > 1e5


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_values_without_channels(backend):
    q, k, v = x2d()
    out, lse = va.na2d(q, k, v[..., :0], 3, return_lse=True, backend=backend)
    assert out.shape == (2, 9, 14, 3, 0)
    torch.testing.assert_close(lse, va.na2d(q, k, v, 3, return_lse=True)[1])


@pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
def test_empty_batch_with_extra_keys(backend):
    x, extra = torch.randn(0, 4, 6, 2, 3), torch.randn(0, 5, 2, 3)
    assert va.na2d(x, x, x, 3, additional_keys=extra, additional_values=extra, backend=backend).shape == x.shape


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_empty_batch(backend):
    x = torch.randn(0, 4, 6, 2, 3, requires_grad=True)
    out, lse = va.na2d(x, x, x, 3, return_lse=True, backend=backend)
    assert (out.shape, lse.shape) == ((0, 4, 6, 2, 3), (0, 4, 6, 2))


def test_tiled_is_bitwise_repeatable():
    tensors = [x.float().requires_grad_() for x in x2d((20, 22))]
    runs = [oracle.gradients(lambda: [va.na2d(*tensors, 7)], tensors) for _ in range(2)]
    for first, second in zip((*runs[0][0], *runs[0][1]), (*runs[1][0], *runs[1][1]), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kernel", [(3, 5), (6, 6)])
def test_full_graph_compile_forward_and_backward_at_two_sizes(kernel):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: va.na2d(q, k, v, kernel, return_lse=True), fullgraph=True, backend="aot_eager"
    )
    for grid in ((6, 9), (7, 8)):
        tensors = [x.requires_grad_() for x in x2d(grid)]
        ours = oracle.gradients(lambda x=tensors: compiled(*x), tensors)
        eager = oracle.gradients(lambda x=tensors: va.na2d(*x, kernel, return_lse=True), tensors)
        for a, b in zip((*ours[0], *ours[1]), (*eager[0], *eager[1]), strict=True):
            torch.testing.assert_close(a, b)


Q = torch.zeros(2, 8, 12, 4, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel_size": 9}, ValueError, r"na2d: kernel_size=\(9, 9\) does not fit the token grid \(8, 12\) on axis 0: use a kernel of at most 8"),
        ({"kernel_size": 5, "dilation": (1, 3)}, ValueError, r"dilation=\(1, 3\) does not fit .* on axis 1: use a kernel of at most 4"),
        ({"kernel_size": 1, "dilation": (9, 1)}, ValueError, r"on axis 0: use a dilation of at most 8"),
        ({"kernel_size": 0}, ValueError, "na2d: kernel_size must be at least 1 on axis 0, got 0"),
        ({"kernel_size": (3, -1)}, ValueError, "na2d: kernel_size must be at least 1 on axis 1, got -1"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"na2d: kernel_size must be one value or 2 of them .* got \(3, 3, 3\)"),
        ({"kernel_size": 3.5}, TypeError, "na2d: kernel_size must be an integer per axis, got 3.5"),
        ({"kernel_size": True}, TypeError, "na2d: kernel_size must be an integer per axis, got True"),
        ({"kernel_size": None}, TypeError, "na2d: kernel_size must be an integer per axis, got None"),
        ({"stride": 4}, ValueError, "na2d: stride must be at most kernel_size=3 on axis 0, got 4: use stride <= 3"),
        ({"stride": (1, 0)}, ValueError, "na2d: stride must be at least 1 on axis 1, got 0"),
        ({"dilation": 0}, ValueError, "na2d: dilation must be at least 1 on axis 0, got 0"),
        ({"is_causal": 1}, ValueError, "na2d: is_causal must be True or False per axis, got 1"),
        ({"scale": "big"}, TypeError, "na2d: scale must be a number or None, got 'big'"),
        ({"scale": math.inf}, ValueError, "na2d: scale must be finite, got inf"),
        ({"query": Q[0]}, ValueError, r"na2d: query must have 5 axes \[B, Y, X, H, D\], got shape \(8, 12, 4, 6\)"),
        ({"query": Q.long()}, TypeError, "na2d: query must be floating point of 16 to 64 bits, got torch.int64"),
        ({"query": [1]}, TypeError, "na2d: query must be a tensor, got list"),
        ({"query": Q.to_sparse()}, NotImplementedError, "na2d: query must be a dense strided tensor, got torch.sparse_coo"),
        ({"query": Q.to(torch.float8_e4m3fn)}, TypeError, "na2d: query must be floating point of 16 to 64 bits, got torch.float8_e4m3fn"),
        ({"query": Q[..., :0], "key": Q[..., :0]}, ValueError, r"na2d: query must have a head dim of at least 1, got shape \(2, 8, 12, 4, 0\)"),
        ({"query": Q[:, :0], "key": Q[:, :0], "value": Q[:, :0]}, ValueError, r"na2d: query must have at least 1 token on every axis of its grid, got \(0, 12\)"),
        ({"key": Q.half()}, ValueError, "na2d: key must have the query's dtype torch.float32, got torch.float16"),
        ({"key": Q[:, :7]}, ValueError, r"na2d: key must have the query's batch and tokens \(2, 8, 12\), got \(2, 7, 12\)"),
        ({"key": Q[..., :5]}, ValueError, "na2d: key must have the query's head dim 6, got 5"),
        ({"key": Q[..., :3, :], "value": Q[..., :3, :]}, ValueError, "na2d: key must have heads that divide the query's 4, got 3"),
        ({"value": Q[..., :2, :]}, ValueError, r"na2d: value must have the key's batch, tokens and heads .* got \(2, 8, 12, 2\)"),
        ({"key": Q.to("meta")}, ValueError, "na2d: key must be on the query's device cpu, got meta"),
        ({"additional_keys": Q[:, 0]}, ValueError, "na2d: additional_values must be given together with additional_keys"),
        ({"additional_values": Q[:, 0]}, ValueError, "na2d: additional_keys must be given together with additional_values"),
        ({"additional_keys": Q[:1, 0], "additional_values": Q[:, 0]}, ValueError, r"na2d: additional_keys must have shape .* got \[1, 12, 4, 6\]"),
        ({"additional_keys": Q[:, 0], "additional_values": Q[:, 0, :5]}, ValueError, r"na2d: additional_values must have shape .* got \[2, 5, 4, 6\]"),
        ({"backend": "cuda"}, ValueError, "na2d: backend must be one of auto, dense, tiled, flex, triton, natten, got 'cuda'"),
        ({"backend": None}, ValueError, "na2d: backend must be one of .* got None"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    arguments = {"query": Q, "key": Q, "value": Q, "kernel_size": 3} | change
    with pytest.raises(error, match=message):
        va.na2d(**arguments)


def test_operator_clips_kernel_then_stride_then_dilation():
    layout = va.TokenLayout((5, 12), text_before=3, text_after=1)
    reach = va.Neighborhood(kernel_size=(9, 4), stride=(7, 6), dilation=(2, 9)).reach(layout)
    assert reach == Box((5, 12), (5, 4), (5, 4), (1, 3), (False, False))


@pytest.mark.parametrize(
    "op", [va.Neighborhood(3), va.Neighborhood((3, 5), stride=(2, 1), dilation=(2, 1)), va.Neighborhood(99)]
)
def test_operator_equals_dense_attention_with_its_mask(op):
    layout = va.TokenLayout((6, 9), text_before=4, text_after=3)
    q, k, v = (torch.randn(2, layout.tokens, 2, 5, dtype=torch.float64) for _ in range(3))
    reach = op.reach(layout)
    window = oracle.box_mask(reach.grid, reach.kernel_size, reach.stride, reach.dilation, reach.is_causal)
    assert torch.equal(op.mask(layout), oracle.joint_mask(window, 4, 3))
    torch.testing.assert_close(op(q, k, v, layout), oracle.attention(q, k, v, op.mask(layout))[0])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"kernel_size": 0}, ValueError, "Neighborhood: kernel_size must be at least 1, got 0"),
        ({"kernel_size": (3, 0)}, ValueError, r"Neighborhood: kernel_size must be at least 1, got \(3, 0\)"),
        ({"kernel_size": 2.0}, TypeError, "Neighborhood: kernel_size must be an integer per axis, got 2.0"),
        ({"kernel_size": (1, 1, 1, 1)}, ValueError, r"Neighborhood: kernel_size must be one value or 1 to 3 of them"),
        ({"kernel_size": ()}, ValueError, r"Neighborhood: kernel_size must be one value or 1 to 3 of them, got \(\)"),
        ({"kernel_size": 3, "stride": -1}, ValueError, "Neighborhood: stride must be at least 1, got -1"),
        ({"kernel_size": 3, "dilation": "2"}, TypeError, "Neighborhood: dilation must be an integer per axis, got '2'"),
    ],
)
def test_operator_refuses_bad_values(values, error, message):
    with pytest.raises(error, match=message):
        va.Neighborhood(**values)


def test_operator_refuses_a_kernel_of_another_rank():
    x = torch.zeros(1, 12, 1, 4)
    with pytest.raises(ValueError, match=r"Neighborhood: kernel_size must be one value or 3 of them .* got \(3, 3\)"):
        va.Neighborhood((3, 3))(x, x, x, va.TokenLayout((2, 2, 3)))
