"""Triton kernels of windowed attention, backward: one for dQ, one for dK and dV, neither with atomics.

dQ walks over keys as the forward pass does. dK and dV hold a box of keys and walk over the queries that reach it, so
every gradient has one writer and sums in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import LOG2E, grad_kv_step, grad_q_step, load_statistics
from .tile_walk import (
    fixed_intervals,
    flat_offset,
    flat_token,
    hold_tile,
    inside,
    moved,
    next_box,
    open_slab,
    open_walk,
    penalties,
    tile_steps,
)
from .token_rows import head_offset, load_rows, place_program, row_offset, rows_product, sequence_row, store_rows
from .windowed_keys import keys_of_box, keys_of_rows


@triton.jit
def _windowed_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, extra_k_ptr, extra_v_ptr, extra_bias_ptr, grad_out_ptr, lse_ptr, delta_ptr,
    grad_q_ptr,
    q_strides, k_strides, v_strides, extra_k_strides, extra_v_strides, grad_out_strides, lse_strides, grad_q_strides,
    bias_stride, extra_bias_stride,
    heads, heads_per_kv, tiles, scale,
    grid, window, stride, dilation, limit,
    q_split, q_jump, k_split, k_jump,
    row_count, row_split, row_jump,
    extra_count,
    WINDOWED: tl.constexpr, BALL: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXTRA: tl.constexpr, HAS_EXTRA_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
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
    grad_out_ptr += head_offset(batch, head, grad_out_strides)
    grad_out = load_rows(grad_out_ptr, row_offset(q_row, grad_out_strides[1]), q_valid, DV, BLOCK_DV)  # [BLOCK_Q, DV]
    statistics = head_offset(batch, head, lse_strides) + row_offset(q_row, lse_strides[1])
    lse, delta = load_statistics(lse_ptr, delta_ptr, statistics, q_valid)
    grad_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    factor = scale * LOG2E

    if WINDOWED:
        intervals = fixed_intervals(position, tile, geometry, BALL, CAUSAL, False)
        k_steps = tile_steps(KV_TILE)
        k_offset = flat_offset(k_steps, geometry).to(OFFSET)
        t, slabs = open_walk(tile, exists, geometry, BALL, CAUSAL, False, KV_TILE, ALIGNED)
        for _slab in range(slabs):
            y, x, x_left, boxes, budget = open_slab(t, tile, geometry, BALL, CAUSAL, False, KV_TILE, ALIGNED)
            for _box in range(boxes):
                logits, k, v, _interior = keys_of_box(
                    q, (t, y, x), k_ptr, v_ptr, bias_ptr, k_strides[1], v_strides[1], k_steps, k_offset, k_split,
                    k_jump, tile, geometry, intervals, factor, BALL, CAUSAL, AXES, HAS_BIAS, KV_TILE, D, DV, BLOCK_D,
                    BLOCK_DV, PRECISION,
                )  # fmt: skip
                grad_q, _grad = grad_q_step(
                    grad_q, grad_out, lse, delta, logits, k, v, D, DV, BLOCK_D, BLOCK_DV, PRECISION
                )
                y, x, x_left = next_box(y, x, x_left, budget, tile, geometry, BALL, CAUSAL, False, KV_TILE, ALIGNED)
            t += KV_TILE[0]

    for begin in range(0, tl.where(exists, row_count, 0), BLOCK_K):
        logits, k, v = keys_of_rows(
            q, begin, k_ptr, v_ptr, bias_ptr, k_strides[1], v_strides[1], row_count, row_split, row_jump, factor,
            HAS_BIAS, BLOCK_K, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
        grad_q, _grad = grad_q_step(grad_q, grad_out, lse, delta, logits, k, v, D, DV, BLOCK_D, BLOCK_DV, PRECISION)

    if HAS_EXTRA:
        extra_k_ptr += head_offset(batch, kv_head, extra_k_strides)
        extra_v_ptr += head_offset(batch, kv_head, extra_v_strides)
        extra_bias_ptr += batch * extra_bias_stride
        for begin in range(0, tl.where(exists, extra_count, 0), BLOCK_K):
            logits, k, v = keys_of_rows(
                q, begin, extra_k_ptr, extra_v_ptr, extra_bias_ptr, extra_k_strides[1], extra_v_strides[1], extra_count,
                extra_count, 0, factor, HAS_EXTRA_BIAS, BLOCK_K, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
            grad_q, _grad = grad_q_step(grad_q, grad_out, lse, delta, logits, k, v, D, DV, BLOCK_D, BLOCK_DV, PRECISION)

    grad_q_ptr += head_offset(batch, head, grad_q_strides)
    store_rows(grad_q_ptr, row_offset(q_row, grad_q_strides[1]), q_valid, grad_q * scale, D, BLOCK_D)


@triton.jit
def _windowed_backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    q_strides, k_strides, v_strides, grad_out_strides, lse_strides, grad_k_strides, grad_v_strides,
    bias_stride,
    heads, heads_per_kv, tiles, scale,
    grid, window, stride, dilation, limit,
    q_split, q_jump, k_split, k_jump,  # of the grid's tokens among the queries and among the keys
    row_count, row_split, row_jump,  # queries that see every key of the grid
    WINDOWED: tl.constexpr, BALL: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    Q_TILE: tl.constexpr, KV_TILE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2]
    BLOCK_K: tl.constexpr = KV_TILE[0] * KV_TILE[1] * KV_TILE[2]
    batch, head, index = place_program(tl.program_id(0), tiles, heads)
    kv_head = head // heads_per_kv
    k_ptr += head_offset(batch, kv_head, k_strides)
    v_ptr += head_offset(batch, kv_head, v_strides)
    geometry = (grid, window, stride, dilation, limit)
    tile, exists, position, k_valid, k_row = hold_tile(index, geometry, k_split, k_jump, KV_TILE)
    k = load_rows(k_ptr, row_offset(k_row, k_strides[1]), k_valid, D, BLOCK_D)  # [BLOCK_K, D]
    v = load_rows(v_ptr, row_offset(k_row, v_strides[1]), k_valid, DV, BLOCK_DV)  # [BLOCK_K, DV]
    bias = tl.zeros([BLOCK_K], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + batch * bias_stride + k_row, mask=k_valid, other=0.0).to(tl.float32) * LOG2E
    grad_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    factor = scale * LOG2E
    intervals = fixed_intervals(position, tile, geometry, BALL, CAUSAL, True)
    q_steps = tile_steps(Q_TILE)
    q_offset = flat_offset(q_steps, geometry).to(OFFSET)

    q_ptr += head_offset(batch, head, q_strides)
    grad_out_ptr += head_offset(batch, head, grad_out_strides)
    lse_ptr += head_offset(batch, head, lse_strides)
    delta_ptr += head_offset(batch, head, lse_strides)
    if WINDOWED:
        t, slabs = open_walk(tile, exists, geometry, BALL, CAUSAL, True, Q_TILE, ALIGNED)
        for _slab in range(slabs):
            y, x, x_left, boxes, budget = open_slab(t, tile, geometry, BALL, CAUSAL, True, Q_TILE, ALIGNED)
            for _box in range(boxes):
                start = (t, y, x)
                walked = moved(start, q_steps)
                q_valid = inside(walked, tile)
                row = sequence_row(flat_token(start, tile, geometry), q_split, q_jump).to(tl.int64)
                q = load_rows(q_ptr + row * q_strides[1], q_offset * q_strides[1], q_valid, D, BLOCK_D)
                grad_out = load_rows(
                    grad_out_ptr + row * grad_out_strides[1], q_offset * grad_out_strides[1], q_valid, DV, BLOCK_DV
                )
                lse, delta = load_statistics(
                    lse_ptr + row * lse_strides[1],
                    delta_ptr + row * lse_strides[1],
                    q_offset * lse_strides[1],
                    q_valid,
                )
                penalty, _interior = penalties(
                    start, walked, intervals, tile, geometry, BALL, CAUSAL, True, AXES, Q_TILE
                )
                logits = rows_product(k, q, D, BLOCK_D, PRECISION) * factor + penalty  # [BLOCK_K, BLOCK_Q]
                if HAS_BIAS:
                    logits += bias[:, None]
                grad_k, grad_v = grad_kv_step(
                    grad_k, grad_v, v, q, grad_out, lse, delta, logits, D, DV, BLOCK_D, BLOCK_DV, PRECISION
                )
                y, x, x_left = next_box(y, x, x_left, budget, tile, geometry, BALL, CAUSAL, True, Q_TILE, ALIGNED)
            t += Q_TILE[0]

    for begin in range(0, tl.where(exists, row_count, 0), BLOCK_Q):
        token = begin + tl.arange(0, BLOCK_Q)
        q_valid = token < row_count
        rows = sequence_row(token, row_split, row_jump)
        q = load_rows(q_ptr, row_offset(rows, q_strides[1]), q_valid, D, BLOCK_D)
        grad_out = load_rows(grad_out_ptr, row_offset(rows, grad_out_strides[1]), q_valid, DV, BLOCK_DV)
        lse, delta = load_statistics(lse_ptr, delta_ptr, row_offset(rows, lse_strides[1]), q_valid)
        logits = rows_product(k, q, D, BLOCK_D, PRECISION) * factor
        if HAS_BIAS:
            logits += bias[:, None]
        grad_k, grad_v = grad_kv_step(
            grad_k, grad_v, v, q, grad_out, lse, delta, logits, D, DV, BLOCK_D, BLOCK_DV, PRECISION
        )

    grad_k_ptr += head_offset(batch, head, grad_k_strides)
    grad_v_ptr += head_offset(batch, head, grad_v_strides)
    store_rows(grad_k_ptr, row_offset(k_row, grad_k_strides[1]), k_valid, grad_k * scale, D, BLOCK_D)
    store_rows(grad_v_ptr, row_offset(k_row, grad_v_strides[1]), k_valid, grad_v, DV, BLOCK_DV)
