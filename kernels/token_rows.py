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
def load_rows(base, offsets, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `[tokens, BLOCK_D]` at `base + offsets`, zero where not valid and beyond channel `D`."""
    channel = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (channel < D)[None, :]
    return tl.load(base + offsets[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, offsets, valid, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inverse of `load_rows`."""
    channel = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (channel < D)[None, :]
    tl.store(base + offsets[:, None] + channel[None, :], value.to(base.dtype.element_ty), mask=mask)
