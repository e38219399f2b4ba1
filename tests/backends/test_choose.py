"""Which backend serves a call, and how an unavailable one says why."""

import importlib.machinery
import importlib.util
import shutil
import sys
import types

import pytest
import torch

import vision_attn as va
from vision_attn.backends import resolve

X = torch.randn(1, 6, 7, 2, 8)


def test_the_table_names_every_backend():
    table = va.backends()
    assert list(table) == ["dense", "tiled", "flex", "triton", "natten"]
    assert table["dense"] == table["tiled"] == "yes"
    assert all(f"{name} " in str(table) for name in table)


def test_auto_is_a_backend_that_always_works():
    assert resolve("auto", "f", X, X) == "tiled"
    torch.testing.assert_close(va.na2d(X, X, X, 3), va.na2d(X, X, X, 3, backend="dense"))


def test_triton_without_a_gpu_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="na2d: backend='triton' cannot be used here: it needs a CUDA or ROCm GPU"):
        va.na2d(X, X, X, 3, backend="triton")


def test_triton_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="na2d: backend='triton' cannot be used here: pip install triton"):
        va.na2d(X, X, X, 3, backend="triton")


def test_triton_on_an_old_gpu_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or newer, this one has 7\.5, or use"):
        va.na2d(X, X, X, 3, backend="triton")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (X.double(), "backend='triton' has no torch.float64: use backend='tiled'"),
        (X.bfloat16(), "backend='triton' has no torch.bfloat16 under TRITON_INTERPRET=1, .*: use backend='tiled'"),
        (torch.randn(1, 6, 7, 1, 257), "backend='triton' takes head dims up to 256, got 257: use backend='tiled'"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(tensor, message):
    with pytest.raises(NotImplementedError, match=message):
        va.na2d(tensor, tensor, tensor, 3, backend="triton")


def test_triton_takes_no_tensors_of_the_cpu_without_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    with pytest.raises(NotImplementedError, match="backend='triton' takes tensors on a CUDA or ROCm GPU, got cpu"):
        va.na2d(X, X, X, 3, backend="triton")
    assert resolve("auto", "f", X, X) == "tiled"


def test_natten_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="na2d: backend='natten' cannot be used here: pip install natten"):
        va.na2d(X, X, X, 3, backend="natten")


def fake_natten(monkeypatch, **attributes):
    module = types.ModuleType("natten")
    module.__spec__ = importlib.machinery.ModuleSpec("natten", None)
    for name, value in attributes.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "natten", module)


def test_natten_without_its_kernels_is_refused(monkeypatch):
    fake_natten(monkeypatch, HAS_LIBNATTEN=False)
    with pytest.raises(ImportError, match="natten is installed without its kernels"):
        va.na2d(X, X, X, 3, backend="natten")


def test_natten_is_called_on_the_grid_and_joined_with_extra_keys(monkeypatch):
    def na2d(query, key, value, **window):
        assert query.is_contiguous()
        return va.na2d(query, key, value, **window, backend="dense")

    fake_natten(monkeypatch, HAS_LIBNATTEN=True, na2d=na2d)
    extra = {"additional_keys": X[:, 0], "additional_values": X[:, 1]}
    ours = va.na2d(X, X, X, (3, 5), (1, 2), is_causal=(True, False), **extra, return_lse=True, backend="natten")
    truth = va.na2d(X, X, X, (3, 5), (1, 2), is_causal=(True, False), **extra, return_lse=True, backend="dense")
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(NotImplementedError, match="backend='natten' has no circular window: use backend='tiled'"):
        va.clear_attention(X.flatten(1, 2), X.flatten(1, 2), X.flatten(1, 2), grid=(6, 7), radius=2, backend="natten")


def test_natten_scale_of_zero_and_lost_gradients(monkeypatch):
    def na2d(query, key, value, scale=None, **window):
        return va.na2d(query, key, value, scale=scale or 8**-0.5, **window, backend="dense")  # as natten reads 0

    fake_natten(monkeypatch, HAS_LIBNATTEN=True, na2d=na2d)
    torch.testing.assert_close(va.na2d(X, X, X, 3, scale=0, backend="natten"), va.na2d(X, X, X, 3, scale=0))
    extra = {"additional_keys": X[:, 0], "additional_values": X[:, 1]}
    with pytest.raises(NotImplementedError, match="backend='natten' has no gradient through extra keys or the log-sum"):
        va.na2d(X.clone().requires_grad_(), X, X, 3, **extra, backend="natten")


def test_flex_without_a_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert va.backends()["flex"].startswith("torch compiles it with a C++ compiler and finds none: install g++")
    with pytest.raises(RuntimeError, match="na2d: backend='flex' cannot be used here: torch compiles it with a C"):
        va.na2d(X, X, X, 3, backend="flex")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flex_equals_dense_and_refuses_what_torch_cannot_do():
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 9, 15, heads, 16) for heads in (4, 2, 2))
    extra = {"additional_keys": k[:, 0], "additional_values": v[:, 0]}
    arguments = {"kernel_size": (3, 5), "stride": (2, 1), "dilation": (1, 3), "is_causal": (False, True)}
    torch.testing.assert_close(
        va.na2d(q, k, v, **arguments, **extra, backend="flex"), va.na2d(q, k, v, **arguments, **extra, backend="dense")
    )
    flat = [x.flatten(1, 2) for x in (q, k, v)]
    clear = {"grid": (9, 13), "radius": 3, "text_tokens": 18, "down_factor": 2}
    torch.testing.assert_close(
        va.clear_attention(*flat, **clear, backend="flex"), va.clear_attention(*flat, **clear, backend="dense")
    )
    with pytest.raises(NotImplementedError, match="backend='flex' has no log-sum-exp on the CPU: use backend='tiled'"):
        va.na2d(q, k, v, 3, return_lse=True, backend="flex")
    with pytest.raises(NotImplementedError, match="backend='flex' takes no mask: use backend='tiled'"):
        va.Clear(3)(*flat, va.TokenLayout((9, 13), 18), attn_mask=torch.ones(135, dtype=torch.bool), backend="flex")
    with pytest.raises(
        NotImplementedError, match="backend='flex' has no backward pass on the CPU: use backend='tiled'"
    ):
        va.na2d(q.requires_grad_(), k, v, 3, backend="flex")
    learned = torch.full((2, 2), 0.25, requires_grad=True)  # of pooled keys
    with pytest.raises(
        NotImplementedError, match="backend='flex' has no backward pass on the CPU: use backend='tiled'"
    ):
        va.clear_attention(*flat, **clear, spatial_weight=learned, backend="flex")
