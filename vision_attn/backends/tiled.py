"""Windowed attention in plain PyTorch: only reachable keys are touched, memory is linear in the number of tokens.

Each query tile gathers the keys its window reaches (see `tiles`) and runs the softmax kernel of `attend` on them; tiles
with one common mask run as a batch, a few megabytes at a time so that gathered keys are still in cache when they are
used. Grids, windows and head dims are arbitrary; nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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
from vision_attn.backends.tiles import TileGroup, plan
from vision_attn.kernels.reach import Ball, Box, Reach

# Gathered keys of one batch of tiles, in bytes: fits a last-level cache share and spares page faults
# (one gather of 58 MB took 45 ms, in chunks of 4 MB 10 ms, on a 2-core server).
CHUNK_BYTES = 2**22


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
    return windowed(query, key, value, key_bias, *_geometry(reach), scale)


def _geometry(reach: Reach) -> tuple[list[int], list[int], list[int], list[int], list[bool], float]:
    if isinstance(reach, Ball):
        return list(reach.grid), [], [], [], [], float(reach.radius)
    return (
        list(reach.grid),
        list(reach.kernel_size),
        list(reach.stride),
        list(reach.dilation),
        list(reach.is_causal),
        0.0,
    )


def _reach(
    grid: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    radius: float,
) -> Reach:
    if not kernel:
        return Ball(tuple(grid), radius)
    return Box(tuple(grid), tuple(kernel), tuple(stride), tuple(dilation), tuple(causal))


@torch.library.custom_op("vision_attn::windowed", mutates_args=())
def windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    grid: list[int],
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    radius: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`window_attention` with the window spelled out: a ball of `radius` where `kernel_size` is empty, else a box."""
    reach = _reach(grid, kernel_size, stride, dilation, is_causal, radius)
    (batch, tokens, heads, _), heads_kv, width = query.shape, key.shape[2], value.shape[3]
    output = query.new_empty(batch * tokens, heads, width)
    lse = query.new_empty(batch * tokens, heads, dtype=accumulator(query.dtype))
    gather_k, gather_v = _RowGather(key), _RowGather(value)
    flat_query = _flat(query)
    for rows, keys, mask in _batches(reach, query, key, value, key_bias):
        tile_q, tile_k, tile_v = flat_query[rows], gather_k(keys), gather_v(keys)
        q, k, v = (heads_first(x, heads_kv) for x in (tile_q, tile_k, tile_v))
        folded = fold_mask(mask, tile_q, tile_k)
        out, row_lse = attend_heads(q, k, v, folded, scale)
        if key_bias is not None and folded is not None:  # a window itself is never empty
            out, row_lse = clear_empty(out, row_lse, folded)
        output[rows] = heads_last(out, heads)
        lse[rows] = heads_last(row_lse.unsqueeze(-1), heads).squeeze(-1)
    return output.view(batch, tokens, heads, width), lse.view(batch, tokens, heads)


@windowed.register_fake
def _(query, key, value, key_bias, grid, kernel_size, stride, dilation, is_causal, radius, scale):  # type: ignore[no-untyped-def]
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
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    radius: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `windowed` for query, key and value.

    Keys that several tiles share collect their gradients in the order of the tiles: deterministic on the CPU.
    """
    reach = _reach(grid, kernel_size, stride, dilation, is_causal, radius)
    wide, heads, heads_kv = accumulator(query.dtype), query.shape[2], key.shape[2]
    grad_q, grad_k, grad_v = (torch.zeros_like(_flat(x), dtype=wide) for x in (query, key, value))
    delta, flat_lse = _flat(lse_delta(grad_output, grad_lse, output).unsqueeze(-1)), _flat(lse.unsqueeze(-1))
    flat = [_flat(x) for x in (grad_output, query, key, value)]
    for rows, keys, mask in _batches(reach, query, key, value, key_bias):
        parts = flat[0][rows], flat[1][rows], flat[2][keys], flat[3][keys]
        grad_out, q, k, v = (heads_first(x, heads_kv) for x in parts)
        row_delta, row_lse = (heads_first(x[rows], heads_kv).squeeze(-1) for x in (delta, flat_lse))
        folded = fold_mask(mask, parts[1], parts[2])
        tile_q, tile_k, tile_v = attend_heads_backward(grad_out, row_delta, q, k, v, folded, row_lse, scale)
        grad_q[rows] = heads_last(tile_q, heads)
        for total, part in ((grad_k, tile_k), (grad_v, tile_v)):
            total.index_add_(0, keys.flatten(), part.transpose(1, 2).flatten(0, 1))
    return tuple(
        g.view(x.shape).to(x.dtype) for g, x in zip((grad_q, grad_k, grad_v), (query, key, value), strict=True)
    )  # type: ignore[return-value]


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


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().flatten(0, 1)


def _batches(
    reach: Reach, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Batches of tiles: flat query rows `[tiles, queries]`, flat key rows `[tiles, keys]`, additive mask or None."""
    tokens, device = math.prod(reach.grid), query.device
    row_bytes = key.element_size() * key.shape[2] * (key.shape[3] + value.shape[3])
    for group in plan(reach):
        mask = None if group.mask is None else _additive(group.mask, query)
        step = max(1, CHUNK_BYTES // (row_bytes * group.keys))
        for start in range(0, group.tiles, step):
            rows, keys = (x.to(device) for x in group.rows(start, min(start + step, group.tiles)))
            for b in range(query.shape[0]):
                yield rows + b * tokens, keys + b * tokens, _with_bias(mask, key_bias, b, keys)


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill_(~mask.to(query.device), float("-inf"))[None, None]


def _with_bias(mask: Tensor | None, key_bias: Tensor | None, b: int, keys: Tensor) -> Tensor | None:
    if key_bias is None:
        return mask
    bias = key_bias[b][keys][:, None, None, :]
    return bias if mask is None else mask + bias.to(mask.dtype)


__all__ = ["TileGroup", "window_attention", "windowed", "windowed_backward"]
