"""CLEAR against the reference code's outputs, an independent oracle and its own identities."""

import json
import math
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vision_attn as va

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(FOLDER / "clear.npz")
ABOUT = json.loads((FOLDER / "clear.json").read_text())
CASES = {case["name"]: case for case in ABOUT["attention_cases"]}


def golden(name, dtype=torch.float32):
    return torch.from_numpy(GOLDEN[name]).to(dtype)


def golden_weights(prefix, dtype):
    return {name.removeprefix(prefix): golden(name, dtype) for name in GOLDEN if name.startswith(prefix)}


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def heads_of(x, norm=None):
    x = x.unflatten(-1, (2, 16))
    return x if norm is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm


def rotate(x, case, text, dtype):
    if case["rotary"] is None:
        return x
    y, width = case["grid"]
    cos, sin = (golden(f"rope.{y}x{width}.img.{part}", dtype) for part in ("cos", "sin"))
    cos = torch.cat([torch.ones(text, 16, dtype=dtype), cos])[:, None]
    sin = torch.cat([torch.zeros(text, 16, dtype=dtype), sin])[:, None]
    pairs = x.unflatten(-1, (-1, 2))
    return x * cos + torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2) * sin


def golden_qkv(case, dtype):
    """Queries, keys and values of a FLUX block, from its weights: linear, per-head norm, concatenation, rotary."""
    image, text = golden(case["image_input"], dtype), golden(case["text_input"], dtype)
    w = golden_weights(case["weights"].removesuffix("*"), dtype)
    if case["block"] == "single":
        x = torch.cat([text, image], 1)
        q, k, v = (heads_of(linear(x, w, f"to_{n}"), w.get(f"norm_{n}.weight")) for n in "qkv")
    else:
        ours = [heads_of(linear(image, w, f"to_{n}"), w.get(f"norm_{n}.weight")) for n in "qkv"]
        added = [heads_of(linear(text, w, f"add_{n}_proj"), w.get(f"norm_added_{n}.weight")) for n in "qkv"]
        q, k, v = (torch.cat([t, i], 1) for t, i in zip(added, ours, strict=True))
    return rotate(q, case, text.shape[1], dtype), rotate(k, case, text.shape[1], dtype), v, w


def golden_call(case, q, k, v, backend, dtype, **changes):
    given_weight = case["spatial_weight"]
    arguments = {
        "grid": tuple(case["grid"]),
        "radius": 1000 if case["radius"] is None else case["radius"],
        "text_tokens": case["text_tokens"],
        "down_factor": case["down_factor"],
        "spatial_weight": golden("sw_rand", dtype) if given_weight == "array sw_rand" else None,
        "scale": case["scale"],
    }
    return va.clear_attention(q, k, v, **(arguments | changes), backend=backend)


def golden_outputs(case, attended, w):
    flat, text = attended.flatten(2), case["text_tokens"]
    if case["block"] == "single":
        return [flat]
    return [linear(flat[:, text:], w, "to_out.0"), linear(flat[:, :text], w, "to_add_out")]


@pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_golden_blocks(name, backend):
    case = CASES[name]
    q, k, v, w = golden_qkv(case, torch.float32)
    ours = golden_outputs(case, golden_call(case, q, k, v, backend, torch.float32), w)
    for out, array in zip(ours, case["outputs"], strict=True):
        torch.testing.assert_close(out, golden(array), atol=2e-5, rtol=1e-4)


def wrong_variants(case, q, k, v):
    yield "window <= instead of <", (q, k, v), {"radius": math.sqrt((case["radius"] or 0) ** 2 + 0.5)}
    if case["spatial_weight"] == "array sw_rand":
        swapped = golden("sw_rand").transpose(3, 5)
        yield "spatial_weight row/col swapped", (q, k, v), {"spatial_weight": swapped}
        plain = math.sqrt(math.log(q.shape[1], 4608) / q.shape[-1])
        yield "scale without factor 10", (q, k, v), {"scale": plain}


@pytest.mark.parametrize("name", CASES)
def test_golden_blocks_tell_wrong_variants_apart(name):
    case = CASES[name]
    q, k, v, w = golden_qkv(case, torch.float32)
    known = case["max_abs_error_of_wrong_variants"]
    for variant, tensors, changes in wrong_variants(case, q, k, v):
        if variant in known:
            wrong = golden_outputs(case, golden_call(case, *tensors, "tiled", torch.float32, **changes), w)
            error = max((a - golden(b)).abs().max().item() for a, b in zip(wrong, case["outputs"], strict=True))
            assert error == pytest.approx(known[variant], rel=0.01), variant


@pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
@pytest.mark.parametrize("name", ["local_joint_b2_12x20_w4_T40", "down_single_12x20_w4_prop"])
def test_golden_gradients_match_the_float64_oracle(name, backend):
    case = CASES[name]
    weight = golden("sw_rand", torch.float64) if case["down_factor"] > 1 else None
    text, grid = case["text_tokens"], tuple(case["grid"])
    wide = [x.requires_grad_() for x in golden_qkv(case, torch.float64)[:3]]
    _, expected = oracle.gradients(lambda: [reference(*wide, grid, case["radius"], text, weight, case["scale"])], wide)
    ours = [x.detach().float().requires_grad_() for x in wide]
    _, grads = oracle.gradients(lambda: [golden_call(case, *ours, backend, torch.float32)], ours)
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), truth, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("case", ABOUT["mask_cases"], ids=lambda case: case["array"])
def test_golden_masks(case):
    layout = va.TokenLayout(tuple(case["grid"]), text_before=case["text_tokens"])
    packed = GOLDEN[case["array"]]
    mask = torch.from_numpy(np.unpackbits(packed, axis=1)[:, : case["mask_shape"][1]].astype(bool))
    assert torch.equal(va.Clear(case["radius"]).mask(layout), mask[:, : layout.tokens])


@pytest.mark.parametrize("side", ["1024", "4096"])
def test_flops_are_the_papers(side):
    layout = va.TokenLayout((int(side) // 16,) * 2, text_before=512)
    values = dict(ABOUT["gflops_per_layer"]["values"][side])
    operators = {"full": va.Dense()}
    operators |= {
        name: va.Clear(int(name.removeprefix("r").split("_")[0]), 4 if "down4" in name else 1)
        for name in values
        if name != "full"
    }
    for name, gflops in values.items():
        assert operators[name].cost(layout, heads=24, head_dim=128).flops == pytest.approx(gflops * 1e9, rel=1e-12), (
            name
        )


def reference(q, k, v, grid, radius, text, weight=None, scale=None, text_first=True):
    """CLEAR in float64 from the definition; `weight` pools cells of its shape, the grid must be divisible."""
    tokens = math.prod(grid)
    before, after = (text, 0) if text_first else (0, text)
    mask = oracle.joint_mask(oracle.ball_mask(grid, radius), before, after)
    if weight is None:
        return oracle.attention(q, k, v, mask, scale)[0]
    image = slice(before, before + tokens)
    f = weight.shape[3]
    cells = (math.prod(grid[:-2]), grid[-2] // f, f, grid[-1] // f, f)
    w = weight.reshape(1, 1, 1, f, 1, f, 1, 1)
    pooled_k, pooled_v = (
        (x[:, image].unflatten(1, cells)[:, :, :, :, :, :] * w[0]).sum((3, 5)).flatten(1, 3) for x in (k, v)
    )
    seen = torch.zeros(len(mask), pooled_k.shape[1], dtype=torch.bool)
    seen[image] = True
    return oracle.attention(
        q, torch.cat([k, pooled_k], 1), torch.cat([v, pooled_v], 1), torch.cat([mask, seen], 1), scale
    )[0]


@st.composite
def problems(draw):
    factor = draw(st.sampled_from([1, 1, 2, 3]))
    axes = draw(st.integers(2, 3))
    grid = tuple(draw(st.integers(1, 4)) * factor for _ in range(2))
    grid = (draw(st.integers(1, 3)), *grid) if axes == 3 else grid
    return {
        "grid": grid,
        "radius": draw(st.sampled_from([0.5, 1, 1.5, 2, 2.3, 3, 100])),
        "text_tokens": draw(st.sampled_from([0, 1, 7])),
        "text_first": draw(st.booleans()),
        "down_factor": factor,
        "scale": draw(st.sampled_from([None, 0.0, 0.9])),
        "heads": draw(st.sampled_from([(1, 1), (4, 2), (3, 3)])),
        "width_v": draw(st.sampled_from([3, 5])),
    }


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@settings(max_examples=80)
@given(problem=problems())
def test_any_problem_matches_the_oracle_forward_and_backward(backend, problem):
    p = dict(problem)
    (heads, heads_kv), width_v, f = p.pop("heads"), p.pop("width_v"), p["down_factor"]
    tokens = p["text_tokens"] + math.prod(p["grid"])
    generator = torch.Generator().manual_seed(3)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    leaves = [tensor(2, tokens, heads, 5), tensor(2, tokens, heads_kv, 5), tensor(2, tokens, heads_kv, width_v)]
    weight = None
    if f > 1:
        leaves.append(weight := tensor(1, 1, 1, f, 1, f, 1))
    q, k, v = leaves[:3]
    truth, true_grads = oracle.gradients(
        lambda: [reference(q, k, v, p["grid"], p["radius"], p["text_tokens"], weight, p["scale"], p["text_first"])],
        leaves,
    )
    outputs, grads = oracle.gradients(
        lambda: [va.clear_attention(q, k, v, **p, spatial_weight=weight, backend=backend)], leaves
    )
    for ours, expected in zip((*outputs, *grads), (*truth, *true_grads), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-8)


def qkv(grid, text, heads=2, width=4, batch=2):
    return [torch.randn(batch, text + math.prod(grid), heads, width, dtype=torch.float64) for _ in range(3)]


def test_radius_beyond_the_diagonal_is_dense_attention():
    q, k, v = qkv((5, 8), 3)
    torch.testing.assert_close(
        va.clear_attention(q, k, v, grid=(5, 8), radius=9, text_tokens=3), oracle.attention(q, k, v)[0]
    )


def test_radius_one_leaves_the_token_itself_and_text():
    q, k, v = qkv((5, 8), 3)
    out = va.clear_attention(q, k, v, grid=(5, 8), radius=1, text_tokens=3)
    token = 3 + 17
    keys = [0, 1, 2, token]
    torch.testing.assert_close(out[:, token], oracle.attention(q[:, [token]], k[:, keys], v[:, keys])[0][:, 0])


@pytest.mark.parametrize("text", [0, 1, 40, 333])
@pytest.mark.parametrize("grid", [(1, 13), (7, 11), (10, 18)])
def test_any_text_length_and_grid(text, grid):
    q, k, v = qkv(grid, text)
    out = va.clear_attention(q, k, v, grid=grid, radius=3, text_tokens=text)
    torch.testing.assert_close(out, reference(q, k, v, grid, 3, text))


def test_cells_cut_by_the_border_pool_the_tokens_they_hold():
    grid, f, text = (5, 7), 3, 2
    q, k, v = qkv(grid, text)
    weight = torch.rand(f, f, dtype=torch.float64)
    pooled = {}
    for name, x in (("k", k), ("v", v)):
        image = x[:, text:].unflatten(1, grid)
        cells = []
        for y in range(0, 5, f):
            for column in range(0, 7, f):
                cell = image[:, y : y + f, column : column + f]
                w = weight[: cell.shape[1], : cell.shape[2]]
                w = w * weight.sum() / w.sum()
                cells.append((cell * w[None, :, :, None, None]).sum((1, 2)))
        pooled[name] = torch.stack(cells, 1)
    mask = oracle.joint_mask(oracle.ball_mask(grid, 2), text, 0)
    seen = torch.ones(len(mask), 6, dtype=torch.bool)
    seen[:text] = False
    truth = oracle.attention(
        q, torch.cat([k, pooled["k"]], 1), torch.cat([v, pooled["v"]], 1), torch.cat([mask, seen], 1)
    )[0]
    ours = va.clear_attention(q, k, v, grid=grid, radius=2, text_tokens=text, down_factor=f, spatial_weight=weight)
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("weight", [[[0.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [-0.9999, 1.0]], [[1.0, -1.0], [1.0, -1.0]]])
def test_cells_left_without_mass_stay_finite(weight):
    q, k, v = qkv((5, 7), 2)
    w = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    out = va.clear_attention(q, k, v, grid=(5, 7), radius=2, text_tokens=2, down_factor=2, spatial_weight=w)
    assert out.abs().max() <= 16 * v.abs().max()
    assert torch.isfinite(torch.autograd.grad(out.sum(), w)[0]).all()


def test_a_small_share_of_positive_weights_is_rescaled_exactly():
    weight = torch.tensor([[0.1, 0.3], [0.3, 0.3]], dtype=torch.float64)  # the one token that is held weighs least
    q, k, _ = qkv((1, 1), 0)
    ones = torch.ones_like(k)
    out = va.clear_attention(q, k, ones, grid=(1, 1), radius=1, down_factor=2, spatial_weight=weight)
    torch.testing.assert_close(out, torch.ones_like(out))  # a window key and a pooled key, both with value 1


def test_whole_cells_keep_weights_whose_sum_is_zero():
    weight = torch.tensor([[0.1, 0.2], [-0.3, 0.0]], dtype=torch.float64)
    q, k, v = qkv((5, 5), 0)
    arguments = {"radius": 1, "down_factor": 2, "spatial_weight": weight, "return_lse": True}
    _, cut = va.clear_attention(q, k, v, grid=(5, 5), **arguments)
    interior = (
        k.unflatten(1, (5, 5))[:, :4, :4].unflatten(1, (2, 2)).unflatten(3, (2, 2)) * weight[:, None, :, None, None]
    ).sum((2, 4))
    rows = torch.cat([k[:, [12]], interior.flatten(1, 2), k.new_zeros(k.shape[0], 5, *k.shape[2:])], 1)
    torch.testing.assert_close(cut[:, 12], oracle.attention(q[:, [12]], rows, rows)[1][:, 0])


def test_pooling_on_a_row_of_tokens_is_pooling_on_a_grid_of_one_row():
    q, k, v = qkv((1, 9), 3)
    op = va.Clear(2, down_factor=2)
    row, grid = va.TokenLayout((9,), text_before=3), va.TokenLayout((1, 9), text_before=3)
    torch.testing.assert_close(op(q, k, v, row), op(q, k, v, grid))
    assert op.cost(row, 2, 4).flops == op.cost(grid, 2, 4).flops


@pytest.mark.parametrize("radius", [math.sqrt(5), 1.0000000001, 1.0, math.nextafter(3.0, 4.0)])
@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_radii_are_compared_in_double_precision(backend, radius):
    q, k, v = qkv((3, 5), 1)
    position = torch.cartesian_prod(torch.arange(3.0, dtype=torch.float64), torch.arange(5.0, dtype=torch.float64))
    visible = (position[:, None] - position).square().sum(-1) < torch.tensor(radius, dtype=torch.float64) ** 2
    layout = va.TokenLayout((3, 5), 1)
    assert torch.equal(va.Clear(radius).mask(layout), oracle.joint_mask(visible, 1, 0))
    assert va.Clear(radius).cost(layout, 1, 1).flops == 4 * (int(visible.sum()) + 15 + 16)
    out = va.clear_attention(q, k, v, grid=(3, 5), radius=radius, text_tokens=1, backend=backend)
    torch.testing.assert_close(out, oracle.attention(q, k, v, oracle.joint_mask(visible, 1, 0))[0])


@pytest.mark.parametrize(("radius", "same"), [(1e300, 1000), (1e9, 1000), (10**200, 1000), (1e-200, 1), (0.3, 1)])
def test_extreme_radii_see_everything_or_the_token_itself(radius, same):
    q, k, v = qkv((4, 6), 2)
    calls = [va.clear_attention(q, k, v, grid=(4, 6), radius=r, text_tokens=2) for r in (radius, same)]
    assert torch.equal(*calls)


def test_uniform_weight_is_the_mean_and_the_default():
    q, k, v = qkv((6, 8), 2)
    arguments = {"grid": (6, 8), "radius": 2, "text_tokens": 2, "down_factor": 2}
    uniform = torch.full((2, 2), 0.25, dtype=torch.float64)
    assert torch.equal(
        va.clear_attention(q, k, v, **arguments), va.clear_attention(q, k, v, **arguments, spatial_weight=uniform)
    )


def test_one_frame_equals_two_dimensions():
    q, k, v = qkv((6, 9), 4)
    flat = va.clear_attention(q, k, v, grid=(6, 9), radius=3, text_tokens=4, down_factor=3)
    torch.testing.assert_close(
        va.clear_attention(q, k, v, grid=(1, 6, 9), radius=3, text_tokens=4, down_factor=3), flat
    )


def test_two_sizes_interleaved_do_not_disturb_each_other():
    inputs = {grid: qkv(grid, 3) for grid in ((6, 9), (9, 5))}
    for grid in ((6, 9), (9, 5), (6, 9)):
        out = va.clear_attention(*inputs[grid], grid=grid, radius=2.5, text_tokens=3)
        torch.testing.assert_close(out, reference(*inputs[grid], grid, 2.5, 3))


def test_log_sum_exp_joins_window_text_and_pooled_keys():
    q, k, v = qkv((4, 6), 3)
    out, lse = va.clear_attention(q, k, v, grid=(4, 6), radius=2, text_tokens=3, return_lse=True)
    mask = oracle.joint_mask(oracle.ball_mask((4, 6), 2), 3, 0)
    torch.testing.assert_close(lse, oracle.attention(q, k, v, mask)[1])
    assert lse.shape == out.shape[:-1]


def test_full_graph_compile_with_pooling():
    torch._dynamo.reset()
    weight = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, w):
        return va.clear_attention(q, k, v, grid=(4, 6), radius=2, text_tokens=3, down_factor=2, spatial_weight=w)

    tensors = [*(x.requires_grad_() for x in qkv((4, 6), 3)), weight]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours = oracle.gradients(lambda: [compiled(*tensors)], tensors)
    eager = oracle.gradients(lambda: [call(*tensors)], tensors)
    for a, b in zip((*ours[0], *ours[1]), (*eager[0], *eager[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "op",
    [
        va.Clear(2.5),
        va.Clear(3, down_factor=2),
        va.Clear(2, down_factor=3, proportional=True),
        va.Clear(2, proportional=True),
    ],
)
def test_operator_equals_the_function(op):
    layout = va.TokenLayout((4, 6), text_after=5)
    q, k, v = qkv((4, 6), 5)
    scale = va.proportional_scale(4, 29, factor=10.0 if op.down_factor > 1 else 1.0) if op.proportional else None
    truth = va.clear_attention(
        q, k, v, grid=(4, 6), radius=op.radius, text_tokens=5, text_first=False, down_factor=op.down_factor, scale=scale
    )
    torch.testing.assert_close(op(q, k, v, layout), truth)


def test_operators_learned_parameters_start_at_the_mean():
    assert va.Clear(3).initial_parameters() == {}
    weight = va.Clear(3, down_factor=4).initial_parameters()["spatial_weight"]
    assert torch.equal(weight, torch.full((1, 1, 1, 4, 1, 4, 1), 0.0625))


def test_proportional_scale_is_the_papers():
    assert va.proportional_scale(128, 4608) == pytest.approx(128**-0.5)
    assert va.proportional_scale(16, 752) == pytest.approx(0.22151444885699106)
    assert va.proportional_scale(16, 752, factor=10) == pytest.approx(0.25715516974165414)


X = torch.zeros(2, 5 + 24, 4, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"radius": 0}, ValueError, "clear_attention: radius must be above 0 and finite, got 0"),
        ({"radius": -3}, ValueError, "clear_attention: radius must be above 0 and finite, got -3"),
        ({"radius": math.nan}, ValueError, "clear_attention: radius must be above 0 and finite, got nan"),
        ({"radius": "8"}, TypeError, "clear_attention: radius must be a number of tokens, got '8'"),
        ({"radius": True}, TypeError, "clear_attention: radius must be a number of tokens, got True"),
        ({"grid": (4, 7)}, ValueError, r"query must have text_tokens \+ prod\(grid\) = 5 \+ 28 tokens for grid=\(4, 7\), got 29"),
        ({"grid": (24,)}, ValueError, r"clear_attention: grid must be \(Y, X\) or \(T, Y, X\), got \(24,\)"),
        ({"grid": (0, 24)}, ValueError, r"clear_attention: grid must have axes of at least 1 token, got \(0, 24\)"),
        ({"grid": (4.0, 6)}, TypeError, r"clear_attention: grid must be made of integers, got \(4.0, 6\)"),
        ({"text_tokens": -1}, ValueError, "clear_attention: text_tokens must be at least 0, got -1"),
        ({"text_tokens": 4}, ValueError, r"query must have .* = 4 \+ 24 tokens"),
        ({"down_factor": 0}, ValueError, "clear_attention: down_factor must be at least 1, got 0"),
        ({"down_factor": 2.0}, TypeError, "clear_attention: down_factor must be an integer, got 2.0"),
        ({"spatial_weight": torch.ones(2, 2)}, ValueError, "clear_attention: spatial_weight must be None without pooling, got down_factor=1"),
        ({"down_factor": 2, "spatial_weight": torch.ones(3, 2)}, ValueError, r"spatial_weight must have shape \(2, 2\) or .* got \(3, 2\)"),
        ({"down_factor": 2, "spatial_weight": torch.ones(2, 2, device="meta")}, ValueError, "clear_attention: spatial_weight must be on the key's device cpu, got meta"),
        ({"down_factor": 2, "spatial_weight": torch.ones(2, 2, dtype=torch.long)}, TypeError, "clear_attention: spatial_weight must be floating point of 16 to 64 bits, got torch.int64"),
        ({"text_first": "after"}, TypeError, "clear_attention: text_first must be True or False, got 'after'"),
        ({"text_first": 1}, TypeError, "clear_attention: text_first must be True or False, got 1"),
        ({"down_factor": 2, "spatial_weight": torch.ones(2, 2).to_sparse()}, ValueError, "clear_attention: spatial_weight must be a dense tensor, got torch.sparse_coo"),
        ({"grid": 24}, TypeError, "clear_attention: grid must be a tuple .* got 24"),
        ({"grid": None}, TypeError, "clear_attention: grid must be a tuple .* got None"),
        ({"radius": 10**400}, ValueError, "clear_attention: radius must be above 0 and finite, got 1000"),
        ({"down_factor": 2, "spatial_weight": 0.25}, TypeError, "clear_attention: spatial_weight must be a tensor, got float"),
        ({"scale": None, "key": X[:, :9]}, ValueError, r"clear_attention: key must have the query's batch and tokens \(2, 29\), got \(2, 9\)"),
        ({"query": X[0]}, ValueError, r"clear_attention: query must have 4 axes \[B, S, H, D\], got shape \(29, 4, 6\)"),
        ({"value": X.double()}, ValueError, "clear_attention: value must have the query's dtype torch.float32, got torch.float64"),
        ({"backend": "flash"}, ValueError, "clear_attention: backend must be one of .* got 'flash'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    arguments = {"query": X, "key": X, "value": X, "grid": (4, 6), "radius": 2, "text_tokens": 5} | change
    with pytest.raises(error, match=message):
        va.clear_attention(**arguments)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"radius": 0}, ValueError, "Clear: radius must be above 0 and finite, got 0"),
        ({"radius": None}, TypeError, "Clear: radius must be a number of tokens, got None"),
        ({"radius": 2, "down_factor": -1}, ValueError, "Clear: down_factor must be at least 1, got -1"),
        ({"radius": 2, "proportional": 1}, TypeError, "Clear: proportional must be True or False, got 1"),
    ],
)
def test_operator_refuses_bad_values(values, error, message):
    with pytest.raises(error, match=message):
        va.Clear(**values)


@pytest.mark.parametrize("arguments", [("a", 3), (64, None), (64, math.inf), (64, 10, True), (64, 10**400)])
def test_proportional_scale_refuses_what_is_no_number(arguments):
    with pytest.raises(TypeError, match=r"proportional_scale: .* must be a finite number, got"):
        va.proportional_scale(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10), "proportional_scale: head_dim must be at least 1, got 0"),
        ((8, 0), "proportional_scale: n_tokens must be at least 1, got 0"),
        ((8, 10, 1), "proportional_scale: trained_tokens must be at least 2, got 1"),
        ((8, 10, 4608, 0.0), "proportional_scale: factor must keep .* got factor=0.0"),
    ],
)
def test_proportional_scale_refuses_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        va.proportional_scale(*arguments)
