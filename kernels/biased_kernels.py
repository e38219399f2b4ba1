"""Triton kernels of dense attention with a bias per query and key: forward, dQ with the bias' gradient, dK with dV.

Made for agent attention, where one side of a softmax is a few dozen tokens: `splits` programs share the other side,
each writes a part of its own, and the parts are merged in a fixed order afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import (
    LOG2E,
    LOWEST,
    grad_kv_step,
    grad_q_step,
    key_logits,
    load_statistics,
    row_penalty,
    softmax_step,
    store_softmax,
)
from .token_rows import head_offset, load_rows, row_offset, rows_product, store_rows


@triton.jit
def _place(program, tiles, splits, heads):
    """Batch item, head, split and tile of a program."""
    batch, head = program // (tiles * splits * heads), program // (tiles * splits) % heads
    return batch.to(tl.int64), head.to(tl.int64), (program // tiles % splits).to(tl.int64), program % tiles


@triton.jit
def _share(split, splits, tokens, BLOCK: tl.constexpr):
    """Range of tokens of one split: whole tiles, as many for each."""
    share = tl.cdiv(tl.cdiv(tokens, BLOCK), splits) * BLOCK
    begin = split.to(tl.int32) * share
    return begin, min(begin + share, tokens)


@triton.jit
def _load_bias(base, rows, columns, row_valid, column_valid, row_stride, column_stride):
    """Bias of the rows' and columns' tokens in units of log 2; `-inf` hides a pair."""
    offsets = row_offset(rows, row_stride)[:, None] + row_offset(columns, column_stride)[None, :]
    bias = tl.load(base + offsets, mask=row_valid[:, None] & column_valid[None, :], other=0.0)
    return bias.to(tl.float32) * LOG2E


@triton.jit
def _biased_forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, bias_strides, out_strides, lse_strides,
    heads, heads_per_kv, scale, queries, keys, splits,
    HAS_BIAS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, split, tile = _place(tl.program_id(0), tl.cdiv(queries, BLOCK_Q), splits, heads)
    q_ptr += head_offset(batch, head, q_strides)
    k_ptr += head_offset(batch, head // heads_per_kv, k_strides)
    v_ptr += head_offset(batch, head // heads_per_kv, v_strides)
    bias_ptr += batch * bias_strides[0] + head * bias_strides[1]
    out_ptr += head_offset(batch, head, out_strides) + split * out_strides[3]
    lse_ptr += head_offset(batch, head, lse_strides) + split * lse_strides[3]

    q_row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_valid = q_row < queries
    q = load_rows(q_ptr, row_offset(q_row, q_strides[1]), q_valid, D, BLOCK_D)  # [BLOCK_Q, D]
    m_i = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    begin, end = _share(split, splits, keys, BLOCK_K)
    for start in range(begin, end, BLOCK_K):
        k_row = start + tl.arange(0, BLOCK_K)
        k_valid = k_row < keys
        k = load_rows(k_ptr, row_offset(k_row, k_strides[1]), k_valid, D, BLOCK_D)
        logits = key_logits(q, k, row_penalty(k_valid), k_ptr, scale * LOG2E, False, D, BLOCK_D, PRECISION)
        if HAS_BIAS:
            logits += _load_bias(bias_ptr, q_row, k_row, q_valid, k_valid, bias_strides[2], bias_strides[3])
        v = load_rows(v_ptr, row_offset(k_row, v_strides[1]), k_valid, DV, BLOCK_DV)
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, logits, v, DV, BLOCK_DV, PRECISION)

    store_softmax(
        out_ptr, lse_ptr, row_offset(q_row, out_strides[1]), row_offset(q_row, lse_strides[1]), q_valid, acc, l_i, m_i,
        DV, BLOCK_DV,
    )  # fmt: skip


@triton.jit
def _biased_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, grad_bias_ptr,
    q_strides, k_strides, v_strides, bias_strides, grad_out_strides, lse_strides, grad_q_strides, grad_bias_strides,
    heads, heads_per_kv, scale, queries, keys, splits,
    HAS_BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, split, tile = _place(tl.program_id(0), tl.cdiv(queries, BLOCK_Q), splits, heads)
    q_ptr += head_offset(batch, head, q_strides)
    k_ptr += head_offset(batch, head // heads_per_kv, k_strides)
    v_ptr += head_offset(batch, head // heads_per_kv, v_strides)
    bias_ptr += batch * bias_strides[0] + head * bias_strides[1]
    grad_out_ptr += head_offset(batch, head, grad_out_strides)
    grad_q_ptr += head_offset(batch, head, grad_q_strides) + split * grad_q_strides[3]
    grad_bias_ptr += batch * grad_bias_strides[0] + head * grad_bias_strides[1]
    statistics = head_offset(batch, head, lse_strides)

    q_row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_valid = q_row < queries
    q = load_rows(q_ptr, row_offset(q_row, q_strides[1]), q_valid, D, BLOCK_D)
    grad_out = load_rows(grad_out_ptr, row_offset(q_row, grad_out_strides[1]), q_valid, DV, BLOCK_DV)
    lse, delta = load_statistics(
        lse_ptr + statistics, delta_ptr + statistics, row_offset(q_row, lse_strides[1]), q_valid
    )
    grad_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    begin, end = _share(split, splits, keys, BLOCK_K)
    for start in range(begin, end, BLOCK_K):
        k_row = start + tl.arange(0, BLOCK_K)
        k_valid = k_row < keys
        k = load_rows(k_ptr, row_offset(k_row, k_strides[1]), k_valid, D, BLOCK_D)
        v = load_rows(v_ptr, row_offset(k_row, v_strides[1]), k_valid, DV, BLOCK_DV)
        logits = key_logits(q, k, row_penalty(k_valid), k_ptr, scale * LOG2E, False, D, BLOCK_D, PRECISION)
        if HAS_BIAS:
            logits += _load_bias(bias_ptr, q_row, k_row, q_valid, k_valid, bias_strides[2], bias_strides[3])
        grad_q, grad_logits = grad_q_step(
            grad_q, grad_out, lse, delta, logits, k, v, D, DV, BLOCK_D, BLOCK_DV, PRECISION
        )
        if BIAS_GRAD:
            offsets = row_offset(q_row, grad_bias_strides[2])[:, None] + k_row[None, :]
            grad_bias = grad_logits.to(grad_bias_ptr.dtype.element_ty)
            tl.store(grad_bias_ptr + offsets, grad_bias, mask=q_valid[:, None] & k_valid[None, :])
    store_rows(grad_q_ptr, row_offset(q_row, grad_q_strides[1]), q_valid, grad_q * scale, D, BLOCK_D)


@triton.jit
def _biased_backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    q_strides, k_strides, v_strides, bias_strides, grad_out_strides, lse_strides, grad_k_strides, grad_v_strides,
    heads, heads_per_kv, scale, queries, keys, splits,
    HAS_BIAS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, split, tile = _place(tl.program_id(0), tl.cdiv(keys, BLOCK_K), splits, heads)
    kv_head = head // heads_per_kv
    k_ptr += head_offset(batch, kv_head, k_strides)
    v_ptr += head_offset(batch, kv_head, v_strides)
    grad_k_ptr += head_offset(batch, head, grad_k_strides) + split * grad_k_strides[3]
    grad_v_ptr += head_offset(batch, head, grad_v_strides) + split * grad_v_strides[3]

    k_row = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_valid = k_row < keys
    k = load_rows(k_ptr, row_offset(k_row, k_strides[1]), k_valid, D, BLOCK_D)  # [BLOCK_K, D]
    v = load_rows(v_ptr, row_offset(k_row, v_strides[1]), k_valid, DV, BLOCK_DV)  # [BLOCK_K, DV]
    grad_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    begin, end = _share(split, splits, queries, BLOCK_Q)
    q_ptr += head_offset(batch, head, q_strides)
    bias_ptr += batch * bias_strides[0] + head * bias_strides[1]
    grad_out_ptr += head_offset(batch, head, grad_out_strides)
    statistics = head_offset(batch, head, lse_strides)
    for start in range(begin, end, BLOCK_Q):
        q_row = start + tl.arange(0, BLOCK_Q)
        q_valid = q_row < queries
        q = load_rows(q_ptr, row_offset(q_row, q_strides[1]), q_valid, D, BLOCK_D)
        grad_out = load_rows(grad_out_ptr, row_offset(q_row, grad_out_strides[1]), q_valid, DV, BLOCK_DV)
        lse, delta = load_statistics(
            lse_ptr + statistics, delta_ptr + statistics, row_offset(q_row, lse_strides[1]), q_valid
        )
        logits = rows_product(k, q, D, BLOCK_D, PRECISION) * (scale * LOG2E)  # [BLOCK_K, BLOCK_Q]
        if HAS_BIAS:
            logits += _load_bias(bias_ptr, k_row, q_row, k_valid, q_valid, bias_strides[3], bias_strides[2])
        grad_k, grad_v = grad_kv_step(
            grad_k, grad_v, v, q, grad_out, lse, delta, logits, D, DV, BLOCK_D, BLOCK_DV, PRECISION
        )
    store_rows(grad_k_ptr, row_offset(k_row, grad_k_strides[1]), k_valid, grad_k * scale, D, BLOCK_D)
    store_rows(grad_v_ptr, row_offset(k_row, grad_v_strides[1]), k_valid, grad_v, DV, BLOCK_DV)
