"""The Triton kernels of windowed attention, interpreted on the CPU, against float64 attention over the full mask."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_attn.kernels import tile_walk
from vision_attn.kernels.geometry import geometry_of
from vision_attn.kernels.launch import LaunchConfig, tile_shape
from vision_attn.kernels.reach import Ball, Box, to_arguments
from vision_attn.kernels.windowed import Call, backward, forward
from vision_attn.simulator import simulate_reach

SMALL = LaunchConfig(16, 16, 4, 1)
WIDE = LaunchConfig(32, 16, 4, 1)


class Problem:
    """One call of the kernels and the float64 truth of it."""

    def __init__(
        self, reach, *, before=0, after=0, batch=1, heads=2, heads_kv=1, width=16, width_v=None, extra=0, bias=False,
        grid_queries=False, dtype=torch.float32, scale=None,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        tokens, width_v = math.prod(reach.grid), width_v or width
        sequence = before + tokens + after
        queries = tokens if grid_queries else sequence
        query, key = draw(batch, queries, heads, width), draw(batch, sequence, heads_kv, width)
        value = draw(batch, sequence, heads_kv, width_v)
        extra_key, extra_value = (draw(batch, extra, heads_kv, d) if extra else None for d in (width, width_v))
        bias, extra_bias = draw(batch, sequence) if bias else None, draw(batch, extra) if bias and extra else None
        if bias is not None:
            bias[:, 1::5] = float("-inf")
        geometry = geometry_of(*to_arguments(reach))
        self.scale = width**-0.5 if scale is None else scale
        self.call = Call(query, key, value, bias, extra_key, extra_value, extra_bias, geometry, before, self.scale)
        self.visible = self._visible(reach, before, after, extra, grid_queries)
        self.grad_output = draw(batch, queries, heads, width_v)
        self.grad_lse = torch.randn(batch, queries, heads, generator=generator)

    @staticmethod
    def _visible(reach, before, after, extra, grid_queries):
        if isinstance(reach, Box):
            window = oracle.box_mask(reach.grid, reach.kernel_size, reach.stride, reach.dilation, reach.is_causal)
        else:
            window = reach.mask()
        visible = oracle.joint_mask(window, before, after)
        visible = torch.nn.functional.pad(visible, (0, extra), value=True)
        visible[:before, len(visible) :] = False
        visible[before + len(window) :, len(visible) :] = False
        return visible[before : before + len(window)] if grid_queries else visible

    @property
    def tensors(self):
        call = self.call
        return [x for x in (call.query, call.key, call.value, call.extra_key, call.extra_value) if x is not None]

    def truth(self):
        """Output, log-sum-exp and gradients in float64."""
        leaves = [x.double().requires_grad_() for x in self.tensors]
        query, key, value, *extra = leaves
        if extra:
            key, value = torch.cat([key, extra[0]], 1), torch.cat([value, extra[1]], 1)
        group = query.shape[2] // key.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (query, *(x.repeat_interleave(group, 2) for x in (key, value))))
        logits = q @ k.transpose(-1, -2) * self.scale
        bias = [x for x in (self.call.bias, self.call.extra_bias) if x is not None]
        if bias:
            logits = logits + torch.cat(bias, 1).double()[:, None, None]
        logits = logits.masked_fill(~self.visible, float("-inf"))
        output, lse = (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)
        total = (output * self.grad_output.double()).sum() + (lse * self.grad_lse.double()).sum()
        return [x.detach() for x in (output, lse)] + list(torch.autograd.grad(total, leaves))

    def kernels(self, config=SMALL, **options):
        """The same from the kernels."""
        output, lse = forward(self.call, config, **options)
        return [output, lse, *backward(self.call, output, lse, self.grad_output, self.grad_lse, config, config)]


def assert_right(problem, config=SMALL, **options):
    names = ("output", "lse", "query", "key", "value", "extra_key", "extra_value")
    for name, ours, truth in zip(names, problem.kernels(config, **options), problem.truth(), strict=False):
        assert ours.isfinite().all(), name
        bound = 4e-6 * max(1.0, truth.abs().max().item())
        assert (ours.double() - truth).abs().max() <= bound, (name, (ours.double() - truth).abs().max().item())


CASES = {
    "1-D, dilation that does not divide": Problem(Box((23,), (5,), (2,), (3,), (False,))),
    "1-D, causal with stride": Problem(Box((21,), (6,), (4,), (1,), (True,)), heads_kv=2),
    "2-D, even kernel, stride and border": Problem(Box((5, 9), (4, 3), (2, 3), (1, 1), (False, False)), batch=2),
    "2-D, groups of unequal length": Problem(Box((5, 7), (2, 3), (1, 2), (2, 2), (False, True)), width=24),
    "2-D, text on both sides, extra keys, biases": Problem(
        Box((4, 7), (3, 3), (1, 1), (1, 1), (False, False)), before=3, after=2, extra=5, bias=True, width_v=20
    ),
    "3-D, causal in time": Problem(Box((3, 4, 5), (2, 3, 3), (1, 2, 1), (1, 1, 1), (True, False, False)), width=8),
    "one frame": Problem(Box((1, 4, 6), (1, 3, 3), (1, 1, 1), (1, 1, 1), (False, False, False)), before=2),
    "window of the whole grid": Problem(Box((4, 5), (4, 5), (1, 1), (1, 1), (False, False)), after=3),
    "circle": Problem(Ball.of_radius((6, 7), 2.5), before=4),
    "circle, the grid's queries alone": Problem(Ball.of_radius((5, 6), 2), before=3, grid_queries=True, extra=3),
    "ball": Problem(Ball.of_radius((3, 4, 5), 2), after=2, heads_kv=2),
    "ellipse": Problem(Ball.of_radius((3, 4, 6), (1.5, 2, 3)), before=1),
    "circle around a token alone": Problem(Ball.of_radius((4, 5), 0.5)),
    "scale of zero": Problem(Box((3, 5), (3, 3), (1, 1), (1, 1), (False, False)), scale=0.0),
    "heads read in parts": Problem(
        Box((4, 6), (3, 3), (1, 1), (1, 1), (False, False)), before=2, extra=3, width=132, width_v=70
    ),
    "one channel": Problem(Box((3, 5), (3, 3), (1, 1), (1, 1), (False, False)), width=1, width_v=3),
    "large logits": Problem(Box((3, 5), (3, 3), (1, 1), (1, 1), (False, False)), scale=-90.0),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_against_float64(name):
    problem = CASES[name]
    if name == "large logits":  # their own rounding, times 90, is what float32 can know of them
        for ours, truth in zip(problem.kernels()[:2], problem.truth(), strict=False):
            torch.testing.assert_close(ours.double(), truth, atol=2e-4, rtol=2e-5)
    else:
        assert_right(problem)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("name", ["2-D, even kernel, stride and border", "ball"])
def test_key_boxes_on_a_raster_give_the_same(name, aligned):
    assert_right(CASES[name], WIDE, aligned=aligned)


@st.composite
def problems(draw):
    axes = draw(st.integers(1, 3))
    grid = [draw(st.integers(1, (17, 6, 4)[axes - 1])) for _ in range(axes)]
    shape = {
        "before": draw(st.sampled_from([0, 0, 3])),
        "after": draw(st.sampled_from([0, 0, 2])),
        "heads": 2,
        "heads_kv": draw(st.sampled_from([1, 2])),
        "width": draw(st.sampled_from([3, 16, 20])),
        "extra": draw(st.sampled_from([0, 0, 4])),
        "bias": draw(st.booleans()),
        "grid_queries": draw(st.booleans()),
    }
    if axes > 1 and draw(st.integers(0, 2)) == 0:
        return Ball.of_radius(tuple(grid), draw(st.sampled_from([1.0, 1.5, 2.0, 3.3]))), shape
    dilation = [draw(st.integers(1, min(n, 3))) for n in grid]
    kernel = [draw(st.integers(1, n // d)) for n, d in zip(grid, dilation, strict=True)]
    stride = [draw(st.integers(1, k)) for k in kernel]
    causal = [draw(st.booleans()) for _ in grid]
    return Box(*map(tuple, (grid, kernel, stride, dilation, causal))), shape


@pytest.mark.slow
@settings(max_examples=25, derandomize=True)
@given(problems())
def test_any_window(problem):
    reach, shape = problem
    hidden = shape["bias"] and not isinstance(reach, Ball) and min(reach.kernel_size) < 3
    if hidden or (shape["bias"] and isinstance(reach, Ball)):  # a bias may hide all keys of a query, a case of its own
        shape = shape | {"bias": False}
    assert_right(Problem(reach, **shape))


def test_a_query_whose_keys_are_all_hidden_gives_zeros_and_no_gradient():
    problem = Problem(Box((3, 6), (1, 3), (1, 1), (1, 1), (False, False)), heads_kv=2)
    bias = torch.zeros(1, 18)
    bias[:, :6] = float("-inf")
    call = problem.call
    hidden = Call(call.query, call.key, call.value, bias, None, None, None, call.geometry, 0, call.scale)
    output, lse = forward(hidden, SMALL)
    assert (output[:, :6] == 0).all()
    assert (lse[:, :6] == float("-inf")).all()
    grads = backward(hidden, output, lse, problem.grad_output, problem.grad_lse, SMALL, SMALL)
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[:, :6] == 0).all() for grad in grads)


@pytest.fixture
def bfloat16(monkeypatch):
    """Triton's interpreter keeps bfloat16 as 16-bit whole numbers: it multiplies those, and rounds towards zero."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(self, x):
        return cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self, a, b, d, *options):
        return dot(self, wide(self, a), wide(self, b), d, *options)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(rounded, tl.bfloat16)
        return cast(self, src, dst_type)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, cast_impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["box", "circle"])
def test_half_precision_errs_at_most_twice_as_much_as_eager_attention(dtype, name, bfloat16):
    reach = {"box": Box((4, 6), (3, 5), (1, 1), (1, 1), (False, False)), "circle": Ball.of_radius((4, 6), 2.5)}[name]
    problem = Problem(reach, before=3, heads_kv=2, width=32, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in problem.tensors]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    logits = (q @ k.transpose(-1, -2) * problem.scale).masked_fill(~problem.visible, float("-inf"))
    output, lse = (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)
    total = (output * problem.grad_output).sum() + (lse * problem.grad_lse).sum()
    eager = [output.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]
    for ours, theirs, truth in zip(problem.kernels(), eager, problem.truth(), strict=True):
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + rounding


def test_strided_and_expanded_inputs_are_read_in_place():
    """Heads first in memory, a slice of a fused projection, one value for all batch items."""
    reach = Box((4, 5), (3, 3), (1, 1), (1, 1), (False, False))
    problem = Problem(reach, batch=2, heads_kv=2)
    call = problem.call
    query = call.query.transpose(1, 2).contiguous().transpose(1, 2)
    key = torch.stack([call.key, call.value], 3)[:, :, :, 0]
    value = call.value[:1].expand(2, -1, -1, -1)
    strided = Call(query, key, value, None, None, None, None, call.geometry, 0, call.scale)
    packed = Call(call.query, call.key, value.contiguous(), None, None, None, None, call.geometry, 0, call.scale)
    for a, b in zip(forward(strided, SMALL), forward(packed, SMALL), strict=True):
        assert torch.equal(a, b)


def test_the_backward_pass_repeats_to_the_bit():
    problem = CASES["2-D, text on both sides, extra keys, biases"]
    for a, b in zip(problem.kernels(), problem.kernels(), strict=True):
        assert torch.equal(a, b)


# ---- visits: what the kernels count themselves, against the simulator ----


def visits(reach, config, aligned):
    """Key boxes visited and masked by every query box that holds a token."""
    problem = Problem(reach, heads=1)
    tile = tile_shape(config.q_tokens, problem.call.geometry.group_lengths)
    counters = torch.full((problem.call.geometry.tiles(tile), 2), -1, dtype=torch.int32)
    forward(problem.call, config, counters=counters, aligned=aligned)
    assert (counters >= 0).all()
    return counters[counters[:, 0] > 0].long(), tile


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    "reach",
    [
        Box((40,), (12,), (4,), (1,), (False,)),
        Box((12, 16), (5, 8), (1, 4), (1, 1), (False, False)),
        Box((11, 13), (3, 4), (2, 1), (2, 3), (True, False)),
        Box((4, 6, 7), (2, 3, 5), (2, 1, 1), (1, 2, 1), (False, False, True)),
        Ball.of_radius((13, 14), 4.5),
        Ball.of_radius((3, 8, 9), (1.5, 3, 4)),
    ],
    ids=str,
)
def test_the_kernel_visits_and_masks_what_the_simulator_counts(reach, aligned):
    counted, tile = visits(reach, WIDE, aligned)
    axes = len(reach.grid)
    kv_tile = tile_walk_shape(WIDE.kv_tokens, reach)
    result = simulate_reach(reach, tile[-axes:], kv_tile, dynamic_kv=not aligned)
    assert int(counted[:, 0].max()) == result.visited_worst
    assert counted[:, 0].double().mean().item() == pytest.approx(result.visited_mean)
    assert 1 - (counted[:, 1].sum() / counted[:, 0].sum()).item() == pytest.approx(result.dense_share)


def tile_walk_shape(tokens, reach):
    return tile_shape(tokens, geometry_of(*to_arguments(reach)).group_lengths)[-len(reach.grid) :]


# ---- planted faults: the comparisons above must see them ----


def is_seen(problem):
    try:
        assert_right(problem, WIDE)
    except AssertionError:
        return True
    return False


def test_a_window_off_by_one_is_seen(monkeypatch):
    problem = Problem(Box((6, 9), (3, 5), (1, 1), (1, 1), (False, False)))
    assert not is_seen(problem)
    plain = tile_walk.visible_pairs

    def shifted(intervals, walked, *arguments):
        return plain(intervals, (walked[0], walked[1], walked[2] + 1), *arguments)

    monkeypatch.setattr(tile_walk, "visible_pairs", shifted)
    assert is_seen(problem)


@pytest.mark.parametrize("reach", [Box((6, 9), (3, 5), (1, 1), (1, 1), (False, False)), Ball.of_radius((6, 9), 3)])
def test_an_unmasked_boundary_box_is_seen(monkeypatch, reach):
    monkeypatch.setattr(tile_walk, "is_interior", lambda *arguments: True)
    assert is_seen(Problem(reach))


def test_a_box_that_is_not_visited_is_seen(monkeypatch):
    plain = tile_walk.tile_range

    def short(start, stop, TILE, ALIGNED):
        first, count = plain(start, stop, TILE, ALIGNED)
        return first, count - (count > 1)

    monkeypatch.setattr(tile_walk, "tile_range", short)
    assert is_seen(Problem(Box((4, 12), (3, 9), (1, 1), (1, 1), (False, False))))
