"""Triton kernels of block-index sparse attention: forward, dQ, and dK with dV, the last over inverted lists.

A list names blocks of `block_k` keys for a block of `block_q` queries; a program takes `BLOCK_Q` (for dK and dV
`BLOCK_K`) rows of one block and steps through `BLOCK_K` (`BLOCK_Q`) rows of the listed ones at a time. Entries that
list nothing are sorted behind the first `count` of a list: none of them is visited.
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
from .token_rows import head_offset, load_rows, place_program, row_offset, rows_product, store_rows


@triton.jit
def _rows_of_block(block, part, block_size, rows, BLOCK: tl.constexpr):
    """Rows of the `part`-th piece of a block, and which of them exist."""
    first = block * block_size + part * BLOCK
    stop = min((block + 1) * block_size, rows)
    row = first + tl.arange(0, BLOCK)
    return row, row < stop


@triton.jit
def _list_of(index_ptr, count_ptr, strides, batch, block, head):
    """Where a block's list begins, and how many of its entries are to be visited."""
    row = batch * strides[0] + block * strides[1] + head * strides[2]
    return index_ptr + row * strides[3], tl.load(count_ptr + row)


@triton.jit
def _listed_keys(
    q, k_block, part, k_ptr, v_ptr, k_stride, v_stride, block_k, keys, factor, BLOCK_K: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits, keys and values of a piece of a listed block; what is beyond the block is masked."""
    row, valid = _rows_of_block(k_block, part, block_k, keys, BLOCK_K)
    k = load_rows(k_ptr, row_offset(row, k_stride), valid, D, BLOCK_D)
    v = load_rows(v_ptr, row_offset(row, v_stride), valid, DV, BLOCK_DV)
    logits = key_logits(q, k, row_penalty(valid), k_ptr, factor, False, D, BLOCK_D, PRECISION)
    return logits, k, v


@triton.jit
def _block_sparse_forward_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, count_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, out_strides, lse_strides, index_strides,  # batch, token (or block row), head
    heads, heads_per_kv, scale, queries, keys, q_blocks, block_q, block_k,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q_parts, k_parts = tl.cdiv(block_q, BLOCK_Q), tl.cdiv(block_k, BLOCK_K)
    batch, head, tile = place_program(tl.program_id(0), q_blocks * q_parts, heads)
    q_ptr += head_offset(batch, head, q_strides)
    k_ptr += head_offset(batch, head // heads_per_kv, k_strides)
    v_ptr += head_offset(batch, head // heads_per_kv, v_strides)
    index_ptr, count = _list_of(index_ptr, count_ptr, index_strides, batch, tile // q_parts, head)

    q_row, q_valid = _rows_of_block(tile // q_parts, tile % q_parts, block_q, queries, BLOCK_Q)
    q = load_rows(q_ptr, row_offset(q_row, q_strides[1]), q_valid, D, BLOCK_D)  # [BLOCK_Q, D]
    m_i = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    for step in range(count * k_parts):
        k_block = tl.load(index_ptr + step // k_parts)
        logits, _k, v = _listed_keys(
            q, k_block, step % k_parts, k_ptr, v_ptr, k_strides[1], v_strides[1], block_k, keys, scale * LOG2E, BLOCK_K,
            D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, logits, v, DV, BLOCK_DV, PRECISION)

    store_softmax(
        out_ptr + head_offset(batch, head, out_strides), lse_ptr + head_offset(batch, head, lse_strides),
        row_offset(q_row, out_strides[1]), row_offset(q_row, lse_strides[1]), q_valid, acc, l_i, m_i, DV, BLOCK_DV,
    )  # fmt: skip


@triton.jit
def _block_sparse_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, count_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    q_strides, k_strides, v_strides, grad_out_strides, lse_strides, grad_q_strides, index_strides,
    heads, heads_per_kv, scale, queries, keys, q_blocks, block_q, block_k,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q_parts, k_parts = tl.cdiv(block_q, BLOCK_Q), tl.cdiv(block_k, BLOCK_K)
    batch, head, tile = place_program(tl.program_id(0), q_blocks * q_parts, heads)
    q_ptr += head_offset(batch, head, q_strides)
    k_ptr += head_offset(batch, head // heads_per_kv, k_strides)
    v_ptr += head_offset(batch, head // heads_per_kv, v_strides)
    index_ptr, count = _list_of(index_ptr, count_ptr, index_strides, batch, tile // q_parts, head)

    q_row, q_valid = _rows_of_block(tile // q_parts, tile % q_parts, block_q, queries, BLOCK_Q)
    q = load_rows(q_ptr, row_offset(q_row, q_strides[1]), q_valid, D, BLOCK_D)
    grad_out_ptr += head_offset(batch, head, grad_out_strides)
    grad_out = load_rows(grad_out_ptr, row_offset(q_row, grad_out_strides[1]), q_valid, DV, BLOCK_DV)
    places = head_offset(batch, head, lse_strides) + row_offset(q_row, lse_strides[1])
    lse, delta = load_statistics(lse_ptr, delta_ptr, places, q_valid)
    grad_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for step in range(count * k_parts):
        k_block = tl.load(index_ptr + step // k_parts)
        logits, k, v = _listed_keys(
            q, k_block, step % k_parts, k_ptr, v_ptr, k_strides[1], v_strides[1], block_k, keys, scale * LOG2E, BLOCK_K,
            D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
        grad_q, _grad = grad_q_step(grad_q, grad_out, lse, delta, logits, k, v, D, DV, BLOCK_D, BLOCK_DV, PRECISION)
    grad_q_ptr += head_offset(batch, head, grad_q_strides)
    store_rows(grad_q_ptr, row_offset(q_row, grad_q_strides[1]), q_valid, grad_q * scale, D, BLOCK_D)


@triton.jit
def _block_sparse_backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, order_ptr, begin_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    q_strides, k_strides, v_strides, grad_out_strides, lse_strides, grad_k_strides, grad_v_strides,
    order_strides, begin_strides,  # batch, head
    heads, heads_per_kv, scale, queries, keys, k_blocks, block_q, block_k, listed,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q_parts, k_parts = tl.cdiv(block_q, BLOCK_Q), tl.cdiv(block_k, BLOCK_K)
    batch, head, tile = place_program(tl.program_id(0), k_blocks * k_parts, heads)
    kv_head = head // heads_per_kv
    block, part = tile // k_parts, tile % k_parts
    k_ptr += head_offset(batch, kv_head, k_strides)
    v_ptr += head_offset(batch, kv_head, v_strides)
    grad_k_ptr += head_offset(batch, head, grad_k_strides)
    grad_v_ptr += head_offset(batch, head, grad_v_strides)

    k_row, k_valid = _rows_of_block(block, part, block_k, keys, BLOCK_K)
    k = load_rows(k_ptr, row_offset(k_row, k_strides[1]), k_valid, D, BLOCK_D)  # [BLOCK_K, D]
    v = load_rows(v_ptr, row_offset(k_row, v_strides[1]), k_valid, DV, BLOCK_DV)  # [BLOCK_K, DV]
    grad_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    q_ptr += head_offset(batch, head, q_strides)
    grad_out_ptr += head_offset(batch, head, grad_out_strides)
    statistics = head_offset(batch, head, lse_strides)
    order = order_ptr + batch * order_strides[0] + head * order_strides[1]
    begins = begin_ptr + batch * begin_strides[0] + head * begin_strides[1] + block
    begin, end = tl.load(begins), tl.load(begins + 1)
    for step in range((end - begin) * q_parts):
        # Pairs of query block and list entry, sorted by the key block that the entry names.
        q_block = tl.load(order + begin + step // q_parts) // listed
        q_row, q_valid = _rows_of_block(q_block, step % q_parts, block_q, queries, BLOCK_Q)
        q = load_rows(q_ptr, row_offset(q_row, q_strides[1]), q_valid, D, BLOCK_D)
        grad_out = load_rows(grad_out_ptr, row_offset(q_row, grad_out_strides[1]), q_valid, DV, BLOCK_DV)
        lse, delta = load_statistics(
            lse_ptr + statistics, delta_ptr + statistics, row_offset(q_row, lse_strides[1]), q_valid
        )
        logits = rows_product(k, q, D, BLOCK_D, PRECISION) * (scale * LOG2E)  # [BLOCK_K, BLOCK_Q]
        grad_k, grad_v = grad_kv_step(
            grad_k, grad_v, v, q, grad_out, lse, delta, logits, D, DV, BLOCK_D, BLOCK_DV, PRECISION
        )
    store_rows(grad_k_ptr, row_offset(k_row, grad_k_strides[1]), k_valid, grad_k * scale, D, BLOCK_D)
    store_rows(grad_v_ptr, row_offset(k_row, grad_v_strides[1]), k_valid, grad_v, DV, BLOCK_DV)
