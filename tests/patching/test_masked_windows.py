"""Windows in calls whose mask or bias no window honours: dense attention under both, listed as such."""

import sys

import pytest
import torch
from probe_operators import Maskless, disc_mask
from test_calls import LAYOUT, SdpaProcessor, Toy, call, close, oracle, tensors
from tiny_models import randn

import vision_attn as va

WINDOW = torch.zeros(21, 21).masked_fill(~disc_mask(LAYOUT, 2), -torch.inf)
BIASES = {
    "per head": randn(1, 4, 21, 21, seed=3),
    "per head and sample": randn(2, 4, 21, 21, seed=3),
    "per query": randn(21, 21, seed=3),
    "hides other keys of each query": torch.ones(21, 21, dtype=torch.bool).tril_(5),
}


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_window_and_mask_together(kind, scale):
    q, k, v = tensors(key_heads=2)
    mask = BIASES[kind]
    added = torch.zeros(21, 21).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    output, calls = call(Toy(SdpaProcessor()), va.Clear(2), q, k, v, attn_mask=mask, scale=scale)
    close(output, oracle(q, k, v, added + WINDOW, scale))
    assert [(c.kind, c.layout) for c in calls] == [("operator", LAYOUT)]
    assert calls[0].reason.startswith("as a mask on dense attention, exact but no faster: Clear: attn_mask must be the")


def test_image_queries_alone():
    q, k, v = tensors(queries=15)
    bias = randn(1, 4, 15, 21, seed=3)
    output, _ = call(Toy(SdpaProcessor()), va.Clear(2), q, k, v, attn_mask=bias)
    close(output, oracle(q, k, v, bias + WINDOW[LAYOUT.image_slice]))


def plain_softmax(query, key, value, attn_mask, scale=None, enable_gqa=False):
    """Attention that has no care for rows without a key, as not every backend of torch has."""
    return (query @ key.mT * query.shape[-1] ** -0.5 + attn_mask).softmax(-1) @ value


@pytest.mark.parametrize("careful", [True, False])
def test_a_query_that_sees_no_key_gives_zeros_and_no_nan(monkeypatch, careful):
    if not careful:
        monkeypatch.setattr(sys.modules["vision_attn.operators.dense"], "scaled_dot_product_attention", plain_softmax)
    q, k, v = (x.requires_grad_() for x in tensors())
    mask = torch.ones(2, 4, 21, 21, dtype=torch.bool)
    mask[1, 2, 7] = False
    mask[0, 1, 9, disc_mask(LAYOUT, 2)[9]] = False  # window and mask leave nothing together
    with va.patch(Toy(SdpaProcessor()), va.Clear(2), grid=LAYOUT) as patch:
        output = patch._installations[0].model(q, k, v, attn_mask=mask)
    output.sum().backward()
    blind = torch.zeros(2, 21, 4, dtype=torch.bool)
    blind[1, 7, 2] = blind[0, 9, 1] = True
    assert not output[blind].any()
    seen = oracle(q, k, v, mask & disc_mask(LAYOUT, 2))
    close(output[~blind], seen[~blind])
    assert not q.grad[blind].any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_a_learned_bias_gets_the_gradient_of_masked_attention():
    q, k, v = tensors()
    bias, twin = (randn(1, 4, 21, 21, seed=3).requires_grad_() for _ in range(2))
    weight = randn(2, 21, 4, 8, seed=4)
    model = Toy(SdpaProcessor())
    with va.patch(model, va.Clear(2), grid=LAYOUT):
        (model(q, k, v, attn_mask=bias) * weight).sum().backward()
    (oracle(q, k, v, twin + WINDOW) * weight).sum().backward()
    close(bias.grad, twin.grad)


@pytest.mark.parametrize(
    "op", [va.Clear(2, proportional=True), va.Clear(2, down_factor=2), va.HiLo(), va.Agent(9), Maskless()], ids=str
)
def test_what_is_no_masked_softmax_is_refused_or_dense(op):
    q, k, v = tensors()
    bias = BIASES["per head"]
    with pytest.raises(va.PatchError, match=r"cannot honour the call of 'attn': .*attn_mask"):
        call(Toy(SdpaProcessor()), op, q, k, v, attn_mask=bias)
    output, calls = call(Toy(SdpaProcessor()), op, q, k, v, attn_mask=bias, strict=False)
    close(output, oracle(q, k, v, bias))
    assert [c.kind for c in calls] == ["dense"]


def test_no_mask_at_all_is_refused():
    q, k, v = tensors()
    with pytest.raises(va.PatchError, match=r"cannot honour the call of 'attn': .* got torch\.int64"):
        call(Toy(SdpaProcessor()), va.Clear(2), q, k, v, attn_mask=torch.zeros(21, 21, dtype=torch.long))
