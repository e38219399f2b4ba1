"""Merging attentions over disjoint key sets."""

import oracle
import pytest
import torch

import vision_attn as va


def parts(splits, dtype=torch.float64):
    q = torch.randn(2, 5, 3, 4, dtype=dtype)
    k, v = torch.randn(2, 12, 3, 4, dtype=dtype), torch.randn(2, 12, 3, 6, dtype=dtype)
    pieces = [oracle.attention(q, a, b) for a, b in zip(k.split(splits, 1), v.split(splits, 1), strict=True)]
    return oracle.attention(q, k, v), *zip(*pieces, strict=True)


@pytest.mark.parametrize("splits", [[12], [5, 7], [1, 4, 7], [1] * 12])
def test_merge_of_disjoint_keys_is_the_whole_attention(splits):
    (truth, lse), outputs, lses = parts(splits)
    merged, merged_lse = va.merge_attention(outputs, lses)
    torch.testing.assert_close(merged, truth)
    torch.testing.assert_close(merged_lse, lse)


def test_a_part_without_keys_has_no_weight():
    (_, _), outputs, lses = parts([5, 7])
    nothing, never = torch.full_like(outputs[0], 0.0), torch.full_like(lses[0], float("-inf"))
    merged, lse = va.merge_attention([outputs[0], nothing], [lses[0], never])
    torch.testing.assert_close(merged, outputs[0])
    torch.testing.assert_close(lse, lses[0])
    merged, lse = va.merge_attention([nothing, nothing], [never, never])
    assert torch.equal(merged, nothing)
    assert torch.equal(lse, never)


def test_huge_log_sum_exps_do_not_overflow():
    out = torch.randn(1, 2, 1, 3)
    merged, lse = va.merge_attention([out, out], [torch.full((1, 2, 1), 1e30), torch.full((1, 2, 1), -1e30)])
    assert torch.equal(merged, out)
    assert torch.equal(lse, torch.full((1, 2, 1), 1e30))


def test_gradients_reach_outputs_and_log_sum_exps():
    (_, _), outputs, lses = parts([5, 7])
    tensors = [x.requires_grad_() for x in (*outputs, *lses)]
    assert torch.autograd.gradcheck(lambda a, b, c, d: va.merge_attention([a, b], [c, d]), tensors)


def test_gradients_are_finite_where_no_part_has_keys():
    outputs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [torch.full((1, 2, 3), -torch.inf, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    merged, lse = va.merge_attention(outputs, lses)
    assert torch.equal(merged, torch.zeros_like(merged))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    for grad in torch.autograd.grad(merged.sum(), [*outputs, *lses]):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_output_keeps_its_dtype():
    out, lse = torch.randn(1, 2, 1, 3, dtype=torch.bfloat16), torch.randn(1, 2, 1)
    merged, merged_lse = va.merge_attention([out, out], [lse, lse])
    assert (merged.dtype, merged_lse.dtype) == (torch.bfloat16, torch.float32)


OUT, LSE = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("outputs", "lses", "error", "message"),
    [
        ([], [], ValueError, "merge_attention: outputs and lses must be equally many, at least one, got 0 and 0"),
        ([OUT], [LSE, LSE], ValueError, "merge_attention: outputs and lses must be equally many, .* got 1 and 2"),
        ([OUT, 3], [LSE, LSE], TypeError, "merge_attention: outputs must be tensors, got int"),
        ([OUT, OUT[:, :1]], [LSE, LSE], ValueError, r"outputs must all be \(1, 2, 3, 4\) .* got \(1, 1, 3, 4\)"),
        ([OUT, OUT.to("meta")], [LSE, LSE], ValueError, "merge_attention: outputs must all be on cpu, got meta"),
        ([OUT], [LSE.to("meta")], ValueError, "merge_attention: lses must all be on cpu, got meta"),
        ([OUT, OUT.half()], [LSE, LSE], ValueError, "outputs must all be .*float32, got .*float16"),
        (None, [LSE], TypeError, "merge_attention: outputs must be a list of tensors, got NoneType"),
        (
            [OUT.int()],
            [LSE],
            TypeError,
            "merge_attention: outputs must be floating point of 16 to 64 bits, got torch.int32",
        ),
        ([OUT], [OUT], ValueError, r"merge_attention: lses must have shape \(1, 2, 3\), got \(1, 2, 3, 4\)"),
    ],
)
def test_bad_input_is_named(outputs, lses, error, message):
    with pytest.raises(error, match=message):
        va.merge_attention(outputs, lses)
