"""Triton pieces of every attention kernel: rows of tokens in and out."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_program(program, tiles, heads):
    """Batch item, head (64 bits each) and tile of a program: tiles of one head follow each other."""
    return (program // tiles // heads).to(tl.int64), (program // tiles % heads).to(tl.int64), program % tiles


@triton.jit
def head_offset(batch, head, strides):
    """Elements before a batch item's head; strides are those of batch, token and head."""
    return batch * strides[0] + head * strides[2]


@triton.jit
def sequence_row(token, split, jump):
    """Row in the sequence of the `token`-th member of a set that leaves out `jump` rows at `split`."""
    return tl.where(token >= split, token + jump, token)


@triton.jit
def row_offset(row, stride):
    """Elements before a row, in 64 bits: the product alone leaves 32, so that rows take half the registers."""
    return row.to(tl.int64) * stride


@triton.jit
def load_channels(base, offsets, valid, begin, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels `[tokens, CHANNELS]` from `begin` on of rows at `base + offsets`; zero where not valid and beyond."""
    channel = begin + tl.arange(0, CHANNELS)
    mask = valid[:, None] & (channel < D)[None, :]
    return tl.load(base + offsets[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_rows(base, offsets, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows: where they are, which are valid, and their channels `[tokens, BLOCK_D]`: (base, offsets, valid, value)."""
    return base, offsets, valid, load_channels(base, offsets, valid, 0, D, BLOCK_D)


# Single precision on tensor cores splits operands in two, and each warp holds all of one operand of `a @ b.T`: wide
# rows do not fit its registers. They are read again wherever they are used, for that product a few channels at a time.


@triton.jit
def rows_value(rows, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Channels `[tokens, BLOCK_D]` of rows."""
    if PRECISION == "tf32x3" and BLOCK_D > 64:
        value = load_channels(rows[0], rows[1], rows[2], 0, D, BLOCK_D)
    else:
        value = rows[3]
    return value


@triton.jit
def rows_product(a, b, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """`a @ b.T` of rows, float32 `[rows of a, rows of b]`."""
    if PRECISION == "tf32x3" and BLOCK_D > 64:
        product = tl.zeros([a[3].shape[0], b[3].shape[0]], tl.float32)
        for begin in range(0, BLOCK_D, 16):
            a_part = load_channels(a[0], a[1], a[2], begin, D, 16)
            b_part = load_channels(b[0], b[1], b[2], begin, D, 16)
            product = tl.dot(a_part, tl.trans(b_part), product, input_precision=PRECISION)
    else:
        product = tl.dot(a[3], tl.trans(b[3]), input_precision=PRECISION)
    return product


@triton.jit
def store_rows(base, offsets, valid, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inverse of `load_rows`."""
    channel = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (channel < D)[None, :]
    tl.store(base + offsets[:, None] + channel[None, :], value.to(base.dtype.element_ty), mask=mask)
