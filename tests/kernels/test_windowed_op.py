"""The custom ops over the windowed kernels: what PyTorch asks of them, large indices, and a tree of their own."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import vision_attn as va
from vision_attn.kernels.geometry import geometry_of
from vision_attn.kernels.launch import LaunchConfig
from vision_attn.kernels.windowed import Call, backward, forward, windowed

BOX = ([3, 4], [3, 3], [2, 1], [1, 1], [False, True], 0)
BALL = ([3, 4], [1, 1], [1, 1], [1, 1], [False, False], 5)
SMALL = LaunchConfig(16, 16, 4, 1)

# opcheck itself reads `.grad` of tensors that are not leaves.
opcheck_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def tensors(before=2, after=1, heads=2, heads_kv=1, width=4):
    tokens = 12 + before + after
    return [torch.randn(1, tokens, h, width, requires_grad=True) for h in (heads, heads_kv, heads_kv)]


@opcheck_warns
@pytest.mark.parametrize("window", [BOX, BALL], ids=["box", "ball"])
@pytest.mark.parametrize("extra", [False, True])
def test_opcheck(window, extra):
    q, k, v = tensors()
    more = [torch.randn(1, 5, 1, 4, requires_grad=True) for _ in range(2)] if extra else [None, None]
    bias = torch.randn(1, 15) if extra else None
    extra_bias = torch.randn(1, 5) if extra else None
    torch.library.opcheck(windowed, (q, k, v, bias, *more, extra_bias, *window, 2, 0.5))


def operator_call(q, k, v):
    return va.Clear(2)(q, k, v, va.TokenLayout((3, 4), 2, 1), backend="triton")


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_full_graph_compile_forward_and_backward(compiler):
    torch._dynamo.reset()
    inputs = tensors()
    compiled = torch.compile(operator_call, fullgraph=True, backend=compiler)
    ours = compiled(*inputs)
    torch.testing.assert_close(ours, operator_call(*inputs))
    grads = [torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, operator_call)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_activation_checkpointing_recomputes_the_same_gradients():
    inputs = tensors()
    plain = torch.autograd.grad(operator_call(*inputs).square().sum(), inputs)
    again = torch.utils.checkpoint.checkpoint(operator_call, *inputs, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), inputs), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
def test_forward_mode_is_refused_and_not_taken_for_zero():
    q, k, v = (x.detach() for x in tensors())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="backend='triton' has no forward-mode derivative"):
            operator_call(dual, k, v)


def test_a_patched_model_runs_on_the_kernels(monkeypatch, tiny_flux_folder):
    """`auto` takes them wherever tensors are on a GPU; here they are told to take the CPU's as well."""
    from diffusers import FluxPipeline

    from vision_attn.backends import triton as backend
    from vision_attn.operators import joint

    model = FluxPipeline.from_pretrained(tiny_flux_folder).transformer.eval()
    inputs = {
        "hidden_states": torch.randn(1, 30, 12),
        "encoder_hidden_states": torch.randn(1, 7, 128),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(5.0), torch.arange(6.0)),
        "txt_ids": torch.zeros(7, 3),
    }
    calls = []
    kernels = backend.triton_windowed
    monkeypatch.setattr(joint, "triton_windowed", lambda *args, **kw: calls.append(1) or kernels(*args, **kw))
    with torch.no_grad(), va.patch(model, va.Clear(2.5)) as patch:
        tiled = model(**inputs).sample
        assert not calls
        monkeypatch.setattr(joint, "resolve", lambda *args: "triton")
        ours = model(**inputs).sample
        assert len(calls) == len(patch.routed)
    torch.testing.assert_close(ours, tiled)


def sparse_file(folder, name, tokens, stride, width):
    """`[1, tokens, 1, width]` in a file whose tokens are `stride` elements apart: only the pages in use take room."""
    flat = np.memmap(folder / name, dtype=np.float32, mode="w+", shape=(stride * (tokens - 1) + width,))
    return torch.from_numpy(flat).as_strided((1, tokens, 1, width), (stride * tokens, stride, width, 1))


def test_elements_beyond_32_bit_offsets(tmp_path):
    tokens, width = 24, 16
    stride = 2**31 // (tokens - 2) + 7
    assert stride * (tokens - 1) > 2**31
    far = [sparse_file(tmp_path, name, tokens, stride, width) for name in "qkv"]
    near = [torch.randn(1, tokens, 1, width) for _ in far]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    geometry = geometry_of([4, 6], [3, 3], [1, 1], [1, 1], [False, False], 0)
    calls = [Call(*qkv, None, None, None, None, geometry, 0, 0.25) for qkv in (far, near)]
    outputs = [forward(call, SMALL) for call in calls]
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
    grads = [backward(call, *out, torch.ones_like(out[0]), torch.ones_like(out[1]), SMALL, SMALL)
             for call, out in zip(calls, outputs, strict=True)]  # fmt: skip
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_more_heads_than_a_grid_axis_of_cuda_takes(monkeypatch):
    """65,535 is the limit of the second and third axis of a launch: everything is on the first."""
    from vision_attn.kernels import windowed as module

    launches = []

    class Recorder:
        def __getitem__(self, grid):
            launches.append(grid)
            return lambda *args, **constants: None

    monkeypatch.setattr(module, "_windowed_forward_kernel", Recorder())
    x = torch.zeros(1, 1, 1).expand(70_000, 12, 16).unsqueeze(2)
    geometry = geometry_of(*BOX)
    forward(Call(x, x, x, None, None, None, None, geometry, 0, 0.25), SMALL)
    assert launches == [(70_000,)]
    assert math.prod(launches[0]) < 2**31
