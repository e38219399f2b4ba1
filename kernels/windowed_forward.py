"""Triton kernel of windowed attention, forward: one program per head and box of queries, online softmax over its keys.

The keys of a box of queries are, in turn: the boxes of grid tokens that its windows reach (`tile_walk`), rows of the
sequence that every query sees (text), and tokens of further tensors (pooled or additional keys).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import LN2, LOG2E, LOWEST, softmax_step
from .tile_walk import (
    fixed_intervals,
    flat_offset,
    flat_token,
    inside,
    is_interior,
    last_positions,
    met_range,
    next_box,
    open_slab,
    place_tile,
    slab_budget,
    tile_range,
    tile_steps,
    visible_pairs,
)
from .token_rows import load_rows, row_offset, sequence_row, store_rows


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
    program = tl.program_id(0)
    batch, head = (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64)
    kv_head = head // heads_per_kv
    q_ptr += batch * q_strides[0] + head * q_strides[2]
    k_ptr += batch * k_strides[0] + kv_head * k_strides[2]
    v_ptr += batch * v_strides[0] + kv_head * v_strides[2]
    out_ptr += batch * out_strides[0] + head * out_strides[2]
    lse_ptr += batch * lse_strides[0] + head * lse_strides[2]

    residue, length, first = place_tile(program % tiles, grid, dilation, Q_TILE)
    last = last_positions(first, length, Q_TILE)
    exists = inside(first, length)
    q_steps = tile_steps(Q_TILE)
    position = (first[0] + q_steps[0], first[1] + q_steps[1], first[2] + q_steps[2])
    q_valid = inside(position, length)
    q_row = sequence_row(flat_token(position, residue, grid, dilation), q_split, q_jump)
    q = load_rows(q_ptr, row_offset(q_row, q_strides[1]), q_valid, D, BLOCK_D)  # [BLOCK_Q, D]
    factor = scale * LOG2E

    m_i = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    visited, masked = 0, 0

    if WINDOWED:
        intervals = fixed_intervals(position, length, window, stride, BALL, CAUSAL, False)
        k_steps = tile_steps(KV_TILE)
        k_offset = flat_offset(k_steps, grid, dilation).to(OFFSET)
        start_t, stop_t, _, _ = met_range(0, first, last, length, window, stride, limit, BALL, CAUSAL, False)
        t, tiles_t = tile_range(start_t, stop_t, KV_TILE[0], ALIGNED)
        for _slab in range(tl.where(exists, tiles_t, 0)):
            y, x, x_left, boxes = open_slab(
                t, first, last, length, window, stride, limit, BALL, CAUSAL, False, KV_TILE, ALIGNED
            )
            budget = slab_budget(t, first, last, length, window, limit, BALL, KV_TILE)
            for _box in range(boxes):
                start = (t, y, x)
                walked = (t + k_steps[0], y + k_steps[1], x + k_steps[2])
                k_valid = inside(walked, length)
                k_row = sequence_row(flat_token(start, residue, grid, dilation), k_split, k_jump).to(tl.int64)
                k = load_rows(k_ptr + row_offset(k_row, k_strides[1]), k_offset * k_strides[1], k_valid, D, BLOCK_D)
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor  # [BLOCK_Q, BLOCK_K]
                if HAS_BIAS:
                    bias = tl.load(bias_ptr + batch * bias_stride + k_row + k_offset, mask=k_valid, other=0.0)
                    logits += bias.to(tl.float32)[None, :] * LOG2E
                interior = is_interior(start, first, last, length, window, stride, limit, BALL, CAUSAL, False, KV_TILE)
                if not interior:
                    pairs = visible_pairs(intervals, walked, length, window, limit, BALL, AXES)
                    logits = tl.where(pairs, logits, float("-inf"))
                v = load_rows(v_ptr + row_offset(k_row, v_strides[1]), k_offset * v_strides[1], k_valid, DV, BLOCK_DV)
                acc, l_i, m_i = softmax_step(acc, l_i, m_i, logits, v, PRECISION)
                if COUNT:
                    visited += 1
                    masked += tl.where(interior, 0, 1)
                y, x, x_left = next_box(
                    y, x, x_left, budget, first, last, length, window, stride, BALL, CAUSAL, False, KV_TILE, ALIGNED
                )
            t += KV_TILE[0]

    for begin in range(0, tl.where(exists, row_count, 0), BLOCK_K):
        token = begin + tl.arange(0, BLOCK_K)
        k_valid = token < row_count
        k_row = sequence_row(token, row_split, row_jump)
        k = load_rows(k_ptr, row_offset(k_row, k_strides[1]), k_valid, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if HAS_BIAS:
            bias = tl.load(bias_ptr + batch * bias_stride + k_row, mask=k_valid, other=0.0)
            logits += bias.to(tl.float32)[None, :] * LOG2E
        if begin + BLOCK_K > row_count:
            logits = tl.where(k_valid[None, :], logits, float("-inf"))
        v = load_rows(v_ptr, row_offset(k_row, v_strides[1]), k_valid, DV, BLOCK_DV)
        acc, l_i, m_i = softmax_step(acc, l_i, m_i, logits, v, PRECISION)

    if HAS_EXTRA:
        extra_k_ptr += batch * extra_k_strides[0] + kv_head * extra_k_strides[2]
        extra_v_ptr += batch * extra_v_strides[0] + kv_head * extra_v_strides[2]
        for begin in range(0, tl.where(exists, extra_count, 0), BLOCK_K):
            token = begin + tl.arange(0, BLOCK_K)
            k_valid = token < extra_count
            k = load_rows(extra_k_ptr, row_offset(token, extra_k_strides[1]), k_valid, D, BLOCK_D)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
            if HAS_EXTRA_BIAS:
                bias = tl.load(extra_bias_ptr + batch * extra_bias_stride + token, mask=k_valid, other=0.0)
                logits += bias.to(tl.float32)[None, :] * LOG2E
            if begin + BLOCK_K > extra_count:
                logits = tl.where(k_valid[None, :], logits, float("-inf"))
            v = load_rows(extra_v_ptr, row_offset(token, extra_v_strides[1]), k_valid, DV, BLOCK_DV)
            acc, l_i, m_i = softmax_step(acc, l_i, m_i, logits, v, PRECISION)

    empty = l_i == 0.0
    l_safe = tl.where(empty, 1.0, l_i)
    store_rows(out_ptr, row_offset(q_row, out_strides[1]), q_valid, acc / l_safe[:, None], DV, BLOCK_DV)
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_safe)) * LN2)
    tl.store(lse_ptr + row_offset(q_row, lse_strides[1]), lse, mask=q_valid)
    if COUNT:
        tl.store(counter_ptr + 2 * program, visited)
        tl.store(counter_ptr + 2 * program + 1, masked)
