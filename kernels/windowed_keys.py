"""Triton pieces of the kernels that hold a box of queries: the keys it meets, a tile of them at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import key_logits, row_penalty
from .tile_walk import flat_token, inside, moved, penalties
from .token_rows import load_rows, row_offset, sequence_row


@triton.jit
def keys_of_box(
    q, start, k_ptr, v_ptr, bias_ptr, k_stride, v_stride, k_steps, k_offset, k_split, k_jump, tile, geometry, intervals,
    factor, BALL: tl.constexpr, CAUSAL: tl.constexpr, AXES: tl.constexpr, HAS_BIAS: tl.constexpr, KV_TILE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits, keys and values of the box of grid keys at `start`; and whether it lies inside all windows.

    Only a box that does not is masked.
    """
    walked = moved(start, k_steps)
    valid = inside(walked, tile)
    row = sequence_row(flat_token(start, tile, geometry), k_split, k_jump).to(tl.int64)
    k = load_rows(k_ptr + row * k_stride, k_offset * k_stride, valid, D, BLOCK_D)
    v = load_rows(v_ptr + row * v_stride, k_offset * v_stride, valid, DV, BLOCK_DV)
    penalty, interior = penalties(start, walked, intervals, tile, geometry, BALL, CAUSAL, False, AXES, KV_TILE)
    logits = key_logits(q, k, penalty, bias_ptr + row + k_offset, factor, HAS_BIAS, D, BLOCK_D, PRECISION)
    return logits, k, v, interior


@triton.jit
def keys_of_rows(
    q, begin, k_ptr, v_ptr, bias_ptr, k_stride, v_stride, count, split, jump, factor, HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits, keys and values of `BLOCK_K` of `count` rows that every query sees; what is beyond them is masked."""
    token = begin + tl.arange(0, BLOCK_K)
    valid = token < count
    row = sequence_row(token, split, jump)
    k = load_rows(k_ptr, row_offset(row, k_stride), valid, D, BLOCK_D)
    v = load_rows(v_ptr, row_offset(row, v_stride), valid, DV, BLOCK_DV)
    logits = key_logits(q, k, row_penalty(valid), bias_ptr + row, factor, HAS_BIAS, D, BLOCK_D, PRECISION)
    return logits, k, v
