"""Triton pieces of every attention kernel: a softmax in base 2, one tile of logits at a time, and its gradients.

`delta` is `rowsum(dO * O) - dLSE` (arXiv 2307.08691, with the gradient of the log-sum-exp).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .token_rows import head_offset, load_rows, place_program, row_offset, rows_product, rows_value, store_rows

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: exp2(-inf - LOWEST) is 0, exp2(-inf + inf) would be NaN


@triton.jit
def row_penalty(valid):
    """What to add to the logits `[queries, keys]`: `-inf` for keys that do not exist."""
    return tl.where(valid, 0.0, float("-inf"))[None, :]


@triton.jit
def key_logits(q, k, penalty, bias_ptrs, factor, HAS_BIAS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Logits `[queries, keys]` of rows in units of log 2, with a penalty and a bias per key."""
    logits = rows_product(q, k, D, BLOCK_D, PRECISION) * factor + penalty
    if HAS_BIAS:
        bias = tl.load(bias_ptrs, mask=k[2], other=0.0)
        logits += bias.to(tl.float32)[None, :] * LOG2E
    return logits


@triton.jit
def store_softmax(out_ptr, lse_ptr, out_offset, lse_offset, valid, acc, l_i, m_i, DV: tl.constexpr,
                  BLOCK_DV: tl.constexpr):  # fmt: skip
    """Ends an online softmax: output and natural log-sum-exp, zeros and `-inf` where no key was seen."""
    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    store_rows(out_ptr, out_offset, valid, acc / l_safe[:, None], DV, BLOCK_DV)
    tl.store(lse_ptr + lse_offset, tl.where(empty, float("-inf"), (m_i + tl.log2(l_safe)) * LN2), mask=valid)


@triton.jit
def softmax_step(acc, l_i, m_i, logits, v, DV: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax with logits `[queries, keys]` in units of log 2 (arXiv 2205.14135)."""
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    weights = tl.exp2(logits - m_new[:, None])
    rescale = tl.exp2(m_i - m_new)
    l_i = l_i * rescale + tl.sum(weights, 1)
    value = rows_value(v, DV, BLOCK_DV, PRECISION)
    acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
    return acc, l_i, m_new


@triton.jit
def load_statistics(lse_ptr, delta_ptr, offsets, valid):
    """Log-sum-exp in units of log 2, `+inf` where a query has no keys or does not exist (no weight then), and delta."""
    lse = tl.load(lse_ptr + offsets, mask=valid, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + offsets, mask=valid, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), delta


@triton.jit
def grad_q_step(
    grad_q, grad_out, lse, delta, logits, k, v, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the part of some keys to dQ; logits `[queries, keys]` in units of log 2. Also the logits' gradient."""
    weights = tl.exp2(logits - lse[:, None])
    grad_weights = rows_product(grad_out, v, DV, BLOCK_DV, PRECISION)
    grad_logits = weights * (grad_weights - delta[:, None])
    key = rows_value(k, D, BLOCK_D, PRECISION)
    return tl.dot(grad_logits.to(key.dtype), key, grad_q, input_precision=PRECISION), grad_logits


@triton.jit
def grad_kv_step(
    grad_k, grad_v, v, q, grad_out, lse, delta, logits, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the part of some queries to dK and dV; logits `[keys, queries]` in units of log 2."""
    weights = tl.exp2(logits - lse[None, :])
    value = rows_value(grad_out, DV, BLOCK_DV, PRECISION)
    grad_v = tl.dot(weights.to(value.dtype), value, grad_v, input_precision=PRECISION)
    grad_weights = rows_product(v, grad_out, DV, BLOCK_DV, PRECISION)
    grad_logits = weights * (grad_weights - delta[None, :])
    query = rows_value(q, D, BLOCK_D, PRECISION)
    return tl.dot(grad_logits.to(query.dtype), query, grad_k, input_precision=PRECISION), grad_v


@triton.jit
def delta_kernel(
    out_ptr, grad_out_ptr, grad_lse_ptr, delta_ptr, out_strides, grad_out_strides, grad_lse_strides, delta_strides,
    heads, tokens, BLOCK: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """`rowsum(dO * O) - dLSE`, float32 `[B, S, H]`."""
    batch, head, block = place_program(tl.program_id(0), tl.cdiv(tokens, BLOCK), heads)
    row = block * BLOCK + tl.arange(0, BLOCK)
    valid = row < tokens
    out_ptr += head_offset(batch, head, out_strides)
    grad_out_ptr += head_offset(batch, head, grad_out_strides)
    grad_lse_ptr += head_offset(batch, head, grad_lse_strides)
    delta_ptr += head_offset(batch, head, delta_strides)
    out = load_rows(out_ptr, row_offset(row, out_strides[1]), valid, DV, BLOCK_DV)[3].to(tl.float32)
    grad_out = load_rows(grad_out_ptr, row_offset(row, grad_out_strides[1]), valid, DV, BLOCK_DV)[3].to(tl.float32)
    grad_lse = tl.load(grad_lse_ptr + row_offset(row, grad_lse_strides[1]), mask=valid, other=0.0).to(tl.float32)
    tl.store(delta_ptr + row_offset(row, delta_strides[1]), tl.sum(out * grad_out, 1) - grad_lse, mask=valid)
