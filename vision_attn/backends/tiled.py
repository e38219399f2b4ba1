"""Windowed attention in plain PyTorch: only reachable keys are touched, memory is linear in the number of tokens.

Each query tile gathers the keys its window reaches (see `tiles`) and runs the softmax kernel of `attend` on them; tiles
with one common mask run as a batch, a few megabytes at a time so that gathered keys are still in cache when they are
used. Grids, windows and head dims are arbitrary; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_attn.backends.attend import (
    accumulator,
    attend_heads,
    attend_heads_backward,
    clear_empty,
    fold_mask,
    heads_first,
    heads_last,
    lse_delta,
)
from vision_attn.backends.tiles import plan, query_order
from vision_attn.kernels.reach import Reach, from_arguments, to_arguments

# Gathered keys and values of one batch of tiles, in bytes: large enough that few batches start threads, small enough to
# stay in a last-level cache and one buffer (gathering 58 MB at once took 45 ms, page faults included; in parts 10 ms).
CHUNK_BYTES = 2**24


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, reach: Reach, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each grid token over its window.

    Args:
        query: `[B, N, H, D]`, `N` the tokens of `reach.grid`, row-major.
        key: `[B, N, Hkv, D]`.
        value: `[B, N, Hkv, Dv]`.
        key_bias: `[B, N]` added to every query's logits for a key; `-inf` hides it. No gradient.
        reach: The window.
        scale: Factor on the logits.

    Returns:
        Output `[B, N, H, Dv]` and log-sum-exp `[B, N, H]`.
    """
    return windowed(query, key, value, key_bias, *to_arguments(reach), scale)


@torch.library.custom_op("vision_attn::windowed", mutates_args=())
def windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    limit: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`window_attention` with the window spelled out as `to_arguments` does."""
    reach = from_arguments(grid, window, stride, dilation, is_causal, limit)
    heads, heads_kv = query.shape[2], key.shape[2]
    order, inverse = (x.to(query.device) for x in query_order(reach))
    output = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=accumulator(query.dtype))
    gather_k, gather_v = _RowGather(key), _RowGather(value)
    for b in range(query.shape[0]):
        ordered = query[b].index_select(0, order)
        outputs, lses = [], []
        for batch in _batches(reach, key, value):
            keys = batch.keys + b * key.shape[1]
            tile_q, tile_k, tile_v = batch.split(ordered), gather_k(keys), gather_v(keys)
            mask = fold_mask(_with_bias(batch.mask, key_bias, b, batch.keys), tile_q, tile_k)
            q, k, v = (heads_first(x, heads_kv) for x in (tile_q, tile_k, tile_v))
            out, row_lse = attend_heads(q, k, v, mask, scale)
            if key_bias is not None and mask is not None:  # a window itself is never empty
                out, row_lse = clear_empty(out, row_lse, mask)
            outputs.append(heads_last(out, heads).flatten(0, 1))
            lses.append(heads_last(row_lse.unsqueeze(-1), heads).flatten(0, 1).squeeze(-1))
        torch.index_select(torch.cat(outputs), 0, inverse, out=output[b])
        torch.index_select(torch.cat(lses), 0, inverse, out=lse[b])
    return output, lse


@windowed.register_fake
def _(query, key, value, key_bias, *args):  # type: ignore[no-untyped-def]
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=accumulator(query.dtype))


@torch.library.custom_op("vision_attn::windowed_backward", mutates_args=())
def windowed_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    limit: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `windowed` for query, key and value.

    Keys that several tiles share collect their gradients in the order of the tiles: deterministic on the CPU.
    """
    reach = from_arguments(grid, window, stride, dilation, is_causal, limit)
    wide, heads, heads_kv = accumulator(query.dtype), query.shape[2], key.shape[2]
    order, inverse = (x.to(query.device) for x in query_order(reach))
    grad_q = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (key, value))
    delta = lse_delta(grad_output, grad_lse, output)
    for b in range(query.shape[0]):
        rows = [x[b].index_select(0, order) for x in (grad_output, query, delta.unsqueeze(-1), lse.unsqueeze(-1))]
        parts = []
        for batch in _batches(reach, key, value):
            tiles = [batch.split(x) for x in rows]
            tile_k, tile_v = key[b][batch.keys], value[b][batch.keys]
            mask = fold_mask(_with_bias(batch.mask, key_bias, b, batch.keys), tiles[1], tile_k)
            grad_out, q, row_delta, row_lse, k, v = (heads_first(x, heads_kv) for x in (*tiles, tile_k, tile_v))
            tile_grads = attend_heads_backward(
                grad_out, row_delta.squeeze(-1), q, k, v, mask, row_lse.squeeze(-1), scale
            )
            parts.append(heads_last(tile_grads[0], heads).flatten(0, 1).to(query.dtype))
            for total, part in zip((grad_k, grad_v), tile_grads[1:], strict=True):
                total[b].index_add_(0, batch.keys.flatten(), part.transpose(1, 2).flatten(0, 1))
        torch.index_select(torch.cat(parts), 0, inverse, out=grad_q[b])
    return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype)


@windowed_backward.register_fake
def _(grad_output, grad_lse, query, key, value, *args):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, key_bias, *ctx.window = inputs
    ctx.save_for_backward(query, key, value, key_bias, *output)


def _backward(ctx, grad_output, grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, key_bias, output, lse = ctx.saved_tensors
    grads = windowed_backward(grad_output, grad_lse, query, key, value, key_bias, output, lse, *ctx.window)
    return *grads, *(None,) * 8


windowed.register_autograd(_backward, setup_context=_save)


class _RowGather:
    """Rows of a `[B, N, H, D]` tensor by flat token index, into one buffer that every call reuses."""

    def __init__(self, x: Tensor) -> None:
        self.rows = x.contiguous().flatten(2).flatten(0, 1)
        self.heads = x.shape[2]
        self.buffer = x.new_empty(0)

    def __call__(self, index: Tensor) -> Tensor:
        """`[tiles, keys]` to `[tiles, keys, H, D]`, valid until the next call."""
        if self.buffer.numel() < index.numel() * self.rows.shape[1]:
            self.buffer = self.rows.new_empty(index.numel() * self.rows.shape[1])
        out = self.buffer[: index.numel() * self.rows.shape[1]].view(index.numel(), -1)
        torch.index_select(self.rows, 0, index.flatten(), out=out)
        return out.view(*index.shape, self.heads, -1)


@dataclass(frozen=True)
class _Batch:
    """Tiles of one group that are computed together.

    Attributes:
        start: First query, in the order of `query_order`.
        queries: Queries per tile.
        keys: Flat token positions `[tiles, keys]`.
        mask: Added to the logits, `[1, 1, queries, keys]`, or None.
    """

    start: int
    queries: int
    keys: Tensor
    mask: Tensor | None

    def split(self, ordered: Tensor) -> Tensor:
        """The batch's part of an ordered `[N, ...]` tensor, as `[tiles, queries, ...]`."""
        tiles = len(self.keys)
        return ordered[self.start : self.start + tiles * self.queries].unflatten(0, (tiles, self.queries))


def _batches(reach: Reach, key: Tensor, value: Tensor) -> Iterator[_Batch]:
    """All tiles of one batch item, a cache-sized batch of them at a time."""
    row_bytes = key.element_size() * key.shape[2] * (key.shape[3] + value.shape[3])
    start = 0
    for group in plan(reach):
        mask = None if group.mask is None else _additive(group.mask, key)
        step = max(1, CHUNK_BYTES // (row_bytes * group.keys))
        for first in range(0, group.tiles, step):
            keys = group.key_rows(first, min(first + step, group.tiles)).to(key.device)
            yield _Batch(start, group.queries, keys, mask)
            start += len(keys) * group.queries


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~mask.to(like.device), float("-inf"))[None, None]


def _with_bias(mask: Tensor | None, key_bias: Tensor | None, b: int, keys: Tensor) -> Tensor | None:
    if key_bias is None:
        return mask
    bias = key_bias[b][keys][:, None, None, :]
    return bias if mask is None else mask + bias.to(mask.dtype)
