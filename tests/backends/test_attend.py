"""The custom ops: softmax attention with log-sum-exp, and the windowed op, as torch wants custom ops to behave."""

import oracle
import pytest
import torch

from vision_attn.backends.attend import _attend_chunks, attend, attend_heads, fold_mask, heads_first, heads_last
from vision_attn.backends.tiled import windowed

DEVICELESS = [(torch.float32, 1e-5), (torch.float64, 1e-11)]


def tensors(heads=4, heads_kv=2, width_v=3, dtype=torch.float64):
    q = torch.randn(2, 5, heads, 7, dtype=dtype, requires_grad=True)
    k = torch.randn(2, 9, heads_kv, 7, dtype=dtype, requires_grad=True)
    return q, k, torch.randn(2, 9, heads_kv, width_v, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("dtype", "tolerance"), DEVICELESS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_attend_matches_the_oracle(heads, dtype, tolerance):
    q, k, v = tensors(*heads, dtype=dtype)
    out, lse = attend(q, k, v, None, 0.3)
    truth, true_lse = oracle.attention(q, k, v, scale=0.3)
    torch.testing.assert_close(out.double(), truth, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), true_lse, atol=tolerance, rtol=tolerance)
    assert lse.dtype == dtype


@pytest.mark.parametrize("mask_shape", [(9,), (5, 9), (2, 1, 1, 9), (1, 4, 5, 9), (2, 4, 1, 9)])
def test_gradcheck_with_masks(mask_shape):
    mask = torch.randn(mask_shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, mask, 0.3), tensors())


def test_a_query_without_keys_gives_zeros_and_minus_infinity():
    q, k, v = tensors()
    mask = torch.zeros(2, 1, 5, 9, dtype=torch.float64)
    mask[0, :, 1] = float("-inf")
    out, lse = attend(q, k, v, mask, 0.3)
    assert torch.equal(out[0, 1], torch.zeros_like(out[0, 1]))
    assert torch.isneginf(lse[0, 1]).all()
    gradients = torch.autograd.grad(out.sum() + lse[1].sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in gradients)
    assert torch.equal(gradients[0][0, 1], torch.zeros_like(q[0, 1]))


@pytest.mark.parametrize("masked", [False, True])
def test_the_portable_path_equals_the_fused_one(masked):
    q, k, v = (x.detach() for x in tensors())
    mask = torch.randn(2, 4, 5, 9, dtype=torch.float64) if masked else None
    parts = [heads_first(x, 2) for x in (q, k, v)], fold_mask(mask, q, k)
    fused, portable = attend_heads(*parts[0], parts[1], 0.3), _attend_chunks(*parts[0], parts[1], 0.3)
    for a, b in zip(fused, portable, strict=True):
        torch.testing.assert_close(a, b)


def test_chunks_do_not_change_the_result(monkeypatch):
    q, k, v = tensors()
    whole = oracle.gradients(lambda: attend(q, k, v, None, 0.3), (q, k, v))
    monkeypatch.setitem(attend_heads.__globals__, "CHUNK_ELEMENTS", 40)
    chunked = oracle.gradients(lambda: attend(q, k, v, None, 0.3), (q, k, v))
    portable = _attend_chunks(*(heads_first(x.detach(), 2) for x in (q, k, v)), None, 0.3)[0]
    torch.testing.assert_close(heads_last(portable, 4), whole[0][0])
    for a, b in zip(chunked[1], whole[1], strict=True):
        torch.testing.assert_close(a, b)


WINDOWS = {
    "box": ([3, 4], [3, 3], [2, 1], [1, 1], [False, True], 0),
    "ball": ([3, 4], [1, 1], [1, 1], [1, 1], [False, False], 4),
}


# opcheck itself reads `.grad` of tensors that are not leaves.
opcheck_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@opcheck_warns
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_of_the_windowed_op(window, biased):
    q, k, v = (torch.randn(2, 12, heads, 5, requires_grad=True) for heads in (4, 2, 2))
    bias = torch.randn(2, 12) if biased else None
    torch.library.opcheck(windowed, (q, k, v, bias, *WINDOWS[window], 0.4))


@opcheck_warns
def test_opcheck_of_attend():
    q, k, v = tensors(dtype=torch.float32)
    torch.library.opcheck(attend, (q, k, v, torch.randn(2, 1, 5, 9), 0.3))


def test_activation_checkpointing_recomputes_the_same_gradients():
    q, k, v = (torch.randn(2, 12, 2, 5, requires_grad=True) for _ in range(3))

    def call(q, k, v):
        return windowed(q, k, v, None, *WINDOWS["box"], 0.4)[0]

    plain = torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v))
    again = torch.utils.checkpoint.checkpoint(call, q, k, v, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), (q, k, v)), plain, strict=True):
        assert torch.equal(a, b)
