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
    program = tl.program_id(0)
    batch, head = (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64)
    kv_head = head // heads_per_kv
    q_ptr += batch * q_strides[0] + head * q_strides[2]
    k_ptr += batch * k_strides[0] + kv_head * k_strides[2]
    v_ptr += batch * v_strides[0] + kv_head * v_strides[2]
    grad_out_ptr += batch * grad_out_strides[0] + head * grad_out_strides[2]
    grad_q_ptr += batch * grad_q_strides[0] + head * grad_q_strides[2]
    lse_ptr += batch * lse_strides[0] + head * lse_strides[2]
    delta_ptr += batch * lse_strides[0] + head * lse_strides[2]

    residue, length, first = place_tile(program % tiles, grid, dilation, Q_TILE)
    last = last_positions(first, length, Q_TILE)
    exists = inside(first, length)
    q_steps = tile_steps(Q_TILE)
    position = (first[0] + q_steps[0], first[1] + q_steps[1], first[2] + q_steps[2])
    q_valid = inside(position, length)
    q_row = sequence_row(flat_token(position, residue, grid, dilation), q_split, q_jump)
    q = load_rows(q_ptr, row_offset(q_row, q_strides[1]), q_valid, D, BLOCK_D)  # [BLOCK_Q, D]
    grad_out = load_rows(grad_out_ptr, row_offset(q_row, grad_out_strides[1]), q_valid, DV, BLOCK_DV)  # [BLOCK_Q, DV]
    lse, delta = load_statistics(lse_ptr, delta_ptr, row_offset(q_row, lse_strides[1]), q_valid)
    grad_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    factor = scale * LOG2E

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
                v = load_rows(v_ptr + row_offset(k_row, v_strides[1]), k_offset * v_strides[1], k_valid, DV, BLOCK_DV)
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor  # [BLOCK_Q, BLOCK_K]
                if HAS_BIAS:
                    bias = tl.load(bias_ptr + batch * bias_stride + k_row + k_offset, mask=k_valid, other=0.0)
                    logits += bias.to(tl.float32)[None, :] * LOG2E
                if not is_interior(start, first, last, length, window, stride, limit, BALL, CAUSAL, False, KV_TILE):
                    pairs = visible_pairs(intervals, walked, length, window, limit, BALL, AXES)
                    logits = tl.where(pairs, logits, float("-inf"))
                grad_q, _grad = grad_q_step(grad_q, grad_out, lse, delta, logits, k, v, PRECISION)
                y, x, x_left = next_box(
                    y, x, x_left, budget, first, last, length, window, stride, BALL, CAUSAL, False, KV_TILE, ALIGNED
                )
            t += KV_TILE[0]

    for begin in range(0, tl.where(exists, row_count, 0), BLOCK_K):
        token = begin + tl.arange(0, BLOCK_K)
        k_valid = token < row_count
        k_row = sequence_row(token, row_split, row_jump)
        k = load_rows(k_ptr, row_offset(k_row, k_strides[1]), k_valid, D, BLOCK_D)
        v = load_rows(v_ptr, row_offset(k_row, v_strides[1]), k_valid, DV, BLOCK_DV)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if HAS_BIAS:
            bias = tl.load(bias_ptr + batch * bias_stride + k_row, mask=k_valid, other=0.0)
            logits += bias.to(tl.float32)[None, :] * LOG2E
        if begin + BLOCK_K > row_count:
            logits = tl.where(k_valid[None, :], logits, float("-inf"))
        grad_q, _grad = grad_q_step(grad_q, grad_out, lse, delta, logits, k, v, PRECISION)

    if HAS_EXTRA:
        extra_k_ptr += batch * extra_k_strides[0] + kv_head * extra_k_strides[2]
        extra_v_ptr += batch * extra_v_strides[0] + kv_head * extra_v_strides[2]
        for begin in range(0, tl.where(exists, extra_count, 0), BLOCK_K):
            token = begin + tl.arange(0, BLOCK_K)
            k_valid = token < extra_count
            k = load_rows(extra_k_ptr, row_offset(token, extra_k_strides[1]), k_valid, D, BLOCK_D)
            v = load_rows(extra_v_ptr, row_offset(token, extra_v_strides[1]), k_valid, DV, BLOCK_DV)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
            if HAS_EXTRA_BIAS:
                bias = tl.load(extra_bias_ptr + batch * extra_bias_stride + token, mask=k_valid, other=0.0)
                logits += bias.to(tl.float32)[None, :] * LOG2E
            if begin + BLOCK_K > extra_count:
                logits = tl.where(k_valid[None, :], logits, float("-inf"))
            grad_q, _grad = grad_q_step(grad_q, grad_out, lse, delta, logits, k, v, PRECISION)

    store_rows(grad_q_ptr, row_offset(q_row, grad_q_strides[1]), q_valid, grad_q * scale, D, BLOCK_D)


@triton.jit
def _windowed_backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    q_strides, k_strides, v_strides, grad_out_strides, lse_strides, grad_k_strides, grad_v_strides,
    bias_stride,
    kv_heads, heads_per_kv, tiles, scale,
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
    program = tl.program_id(0)
    batch, kv_head = (program // tiles // kv_heads).to(tl.int64), (program // tiles % kv_heads).to(tl.int64)
    k_ptr += batch * k_strides[0] + kv_head * k_strides[2]
    v_ptr += batch * v_strides[0] + kv_head * v_strides[2]
    grad_k_ptr += batch * grad_k_strides[0] + kv_head * grad_k_strides[2]
    grad_v_ptr += batch * grad_v_strides[0] + kv_head * grad_v_strides[2]

    residue, length, first = place_tile(program % tiles, grid, dilation, KV_TILE)
    last = last_positions(first, length, KV_TILE)
    exists = inside(first, length)
    k_steps = tile_steps(KV_TILE)
    position = (first[0] + k_steps[0], first[1] + k_steps[1], first[2] + k_steps[2])
    k_valid = inside(position, length)
    k_row = sequence_row(flat_token(position, residue, grid, dilation), k_split, k_jump)
    k = load_rows(k_ptr, row_offset(k_row, k_strides[1]), k_valid, D, BLOCK_D)  # [BLOCK_K, D]
    v = load_rows(v_ptr, row_offset(k_row, v_strides[1]), k_valid, DV, BLOCK_DV)  # [BLOCK_K, DV]
    bias = tl.zeros([BLOCK_K], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + batch * bias_stride + k_row, mask=k_valid, other=0.0).to(tl.float32) * LOG2E
    grad_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    factor = scale * LOG2E
    intervals = fixed_intervals(position, length, window, stride, BALL, CAUSAL, True)
    q_steps = tile_steps(Q_TILE)
    q_offset = flat_offset(q_steps, grid, dilation).to(OFFSET)

    for member in range(heads_per_kv):
        head = kv_head * heads_per_kv + member
        q_base = q_ptr + batch * q_strides[0] + head * q_strides[2]
        grad_out_base = grad_out_ptr + batch * grad_out_strides[0] + head * grad_out_strides[2]
        lse_base = lse_ptr + batch * lse_strides[0] + head * lse_strides[2]
        delta_base = delta_ptr + batch * lse_strides[0] + head * lse_strides[2]
        if WINDOWED:
            start_t, stop_t, _, _ = met_range(0, first, last, length, window, stride, limit, BALL, CAUSAL, True)
            t, tiles_t = tile_range(start_t, stop_t, Q_TILE[0], ALIGNED)
            for _slab in range(tl.where(exists, tiles_t, 0)):
                y, x, x_left, boxes = open_slab(
                    t, first, last, length, window, stride, limit, BALL, CAUSAL, True, Q_TILE, ALIGNED
                )
                budget = slab_budget(t, first, last, length, window, limit, BALL, Q_TILE)
                for _box in range(boxes):
                    start = (t, y, x)
                    walked = (t + q_steps[0], y + q_steps[1], x + q_steps[2])
                    q_valid = inside(walked, length)
                    row = sequence_row(flat_token(start, residue, grid, dilation), q_split, q_jump).to(tl.int64)
                    q = load_rows(q_base + row * q_strides[1], q_offset * q_strides[1], q_valid, D, BLOCK_D)
                    grad_out = load_rows(
                        grad_out_base + row * grad_out_strides[1], q_offset * grad_out_strides[1], q_valid, DV, BLOCK_DV
                    )
                    lse, delta = load_statistics(
                        lse_base + row * lse_strides[1],
                        delta_base + row * lse_strides[1],
                        q_offset * lse_strides[1],
                        q_valid,
                    )
                    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor  # [BLOCK_K, BLOCK_Q]
                    if HAS_BIAS:
                        logits += bias[:, None]
                    if not is_interior(start, first, last, length, window, stride, limit, BALL, CAUSAL, True, Q_TILE):
                        pairs = visible_pairs(intervals, walked, length, window, limit, BALL, AXES)
                        logits = tl.where(pairs, logits, float("-inf"))
                    grad_k, grad_v = grad_kv_step(grad_k, grad_v, k, v, q, grad_out, lse, delta, logits, PRECISION)
                    y, x, x_left = next_box(
                        y, x, x_left, budget, first, last, length, window, stride, BALL, CAUSAL, True, Q_TILE, ALIGNED
                    )
                t += Q_TILE[0]

        for begin in range(0, tl.where(exists, row_count, 0), BLOCK_Q):
            token = begin + tl.arange(0, BLOCK_Q)
            q_valid = token < row_count
            rows = sequence_row(token, row_split, row_jump)
            q = load_rows(q_base, row_offset(rows, q_strides[1]), q_valid, D, BLOCK_D)
            grad_out = load_rows(grad_out_base, row_offset(rows, grad_out_strides[1]), q_valid, DV, BLOCK_DV)
            lse, delta = load_statistics(lse_base, delta_base, row_offset(rows, lse_strides[1]), q_valid)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
            if HAS_BIAS:
                logits += bias[:, None]
            grad_k, grad_v = grad_kv_step(grad_k, grad_v, k, v, q, grad_out, lse, delta, logits, PRECISION)

    store_rows(grad_k_ptr, row_offset(k_row, grad_k_strides[1]), k_valid, grad_k * scale, D, BLOCK_D)
    store_rows(grad_v_ptr, row_offset(k_row, grad_v_strides[1]), k_valid, grad_v, DV, BLOCK_DV)
