"""Triton kernel of windowed attention, forward: one program per head and box of queries, online softmax over its keys.

The keys of a box of queries are, in turn: the boxes of grid tokens that its windows reach (`tile_walk`), rows of the
sequence that every query sees (text), and tokens of further tensors (pooled or additional keys).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import LOG2E, LOWEST, softmax_step, store_softmax
from .tile_walk import fixed_intervals, flat_offset, hold_tile, next_box, open_slab, open_walk, tile_steps
from .token_rows import head_offset, load_rows, place_program, row_offset
from .windowed_keys import keys_of_box, keys_of_rows


@triton.jit
def _windowed_forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, extra_k_ptr, extra_v_ptr, extra_bias_ptr, out_ptr, lse_ptr, counter_ptr,
    q_strides, k_strides, v_strides, extra_k_strides, extra_v_strides, out_strides, lse_strides,  # batch, token, head
    bias_stride, extra_bias_stride,  # batch
    heads, heads_per_kv, tiles, scale,
    grid, window, stride, dilation, limit,  # see tile_walk
    q_split, q_jump, k_split, k_jump,  # of the grid's tokens among the queries and in the keys' sequence
    row_count, row_split, row_jump,  # keys of the sequence that every query sees
    extra_count,
    WINDOWED: tl.constexpr, BALL: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXTRA: tl.constexpr, HAS_EXTRA_BIAS: tl.constexpr, COUNT: tl.constexpr, ALIGNED: tl.constexpr,
    Q_TILE: tl.constexpr, KV_TILE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2]
    BLOCK_K: tl.constexpr = KV_TILE[0] * KV_TILE[1] * KV_TILE[2]
    batch, head, index = place_program(tl.program_id(0), tiles, heads)
    kv_head = head // heads_per_kv
    k_ptr += head_offset(batch, kv_head, k_strides)
    v_ptr += head_offset(batch, kv_head, v_strides)
    bias_ptr += batch * bias_stride
    geometry = (grid, window, stride, dilation, limit)
    tile, exists, position, q_valid, q_row = hold_tile(index, geometry, q_split, q_jump, Q_TILE)
    q_ptr += head_offset(batch, head, q_strides)
    q = load_rows(q_ptr, row_offset(q_row, q_strides[1]), q_valid, D, BLOCK_D)  # [BLOCK_Q, D]
    factor = scale * LOG2E

    m_i = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    visited, masked = 0, 0

    if WINDOWED:
        intervals = fixed_intervals(position, tile, geometry, BALL, CAUSAL, False)
        k_steps = tile_steps(KV_TILE)
        k_offset = flat_offset(k_steps, geometry).to(OFFSET)
        t, slabs = open_walk(tile, exists, geometry, BALL, CAUSAL, False, KV_TILE, ALIGNED)
        for _slab in range(slabs):
            y, x, x_left, boxes, budget = open_slab(t, tile, geometry, BALL, CAUSAL, False, KV_TILE, ALIGNED)
            for _box in range(boxes):
                logits, _k, v, interior = keys_of_box(
                    q, (t, y, x), k_ptr, v_ptr, bias_ptr, k_strides[1], v_strides[1], k_steps, k_offset, k_split,
                    k_jump, tile, geometry, intervals, factor, BALL, CAUSAL, AXES, HAS_BIAS, KV_TILE, D, DV, BLOCK_D,
                    BLOCK_DV, PRECISION,
                )  # fmt: skip
                acc, l_i, m_i = softmax_step(acc, l_i, m_i, logits, v, DV, BLOCK_DV, PRECISION)
                if COUNT:
                    visited += 1
                    masked += tl.where(interior, 0, 1)
                y, x, x_left = next_box(y, x, x_left, budget, tile, geometry, BALL, CAUSAL, False, KV_TILE, ALIGNED)
            t += KV_TILE[0]

    for begin in range(0, tl.where(exists, row_count, 0), BLOCK_K):
        logits, _k, v = keys_of_rows(
            q, begin, k_ptr, v_ptr, bias_ptr, k_strides[1], v_strides[1], row_count, row_split, row_jump, factor,
            HAS_BIAS, BLOCK_K, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, logits, v, DV, BLOCK_DV, PRECISION)

    if HAS_EXTRA:
        extra_k_ptr += head_offset(batch, kv_head, extra_k_strides)
        extra_v_ptr += head_offset(batch, kv_head, extra_v_strides)
        extra_bias_ptr += batch * extra_bias_stride
        for begin in range(0, tl.where(exists, extra_count, 0), BLOCK_K):
            logits, _k, v = keys_of_rows(
                q, begin, extra_k_ptr, extra_v_ptr, extra_bias_ptr, extra_k_strides[1], extra_v_strides[1], extra_count,
                extra_count, 0, factor, HAS_EXTRA_BIAS, BLOCK_K, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
            acc, l_i, m_i = softmax_step(acc, l_i, m_i, logits, v, DV, BLOCK_DV, PRECISION)

    store_softmax(
        out_ptr + head_offset(batch, head, out_strides), lse_ptr + head_offset(batch, head, lse_strides),
        row_offset(q_row, out_strides[1]), row_offset(q_row, lse_strides[1]), q_valid, acc, l_i, m_i, DV, BLOCK_DV,
    )  # fmt: skip
    if COUNT:
        tl.store(counter_ptr + 2 * tl.program_id(0), visited)
        tl.store(counter_ptr + 2 * tl.program_id(0) + 1, masked)
