"""Block-index sparse attention in plain PyTorch: each block of queries gathers the blocks of keys listed for it.

`dense` builds the whole mask; `tiled` is a custom op whose memory is linear in the listed blocks, a few megabytes of
gathered keys at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from vision_attn.backends.attend import (
    accumulator,
    attend_heads,
    attend_heads_backward,
    clear_empty,
    lse_delta,
)
from vision_attn.backends.dense import dense_attention
from vision_attn.backends.tiled import CHUNK_BYTES


def block_mask(block_index: Tensor, blocks: tuple[int, int], queries: int, keys: int) -> Tensor:
    """Bool `[B, H or 1, Sq, Sk]`: which query's block lists which key's block."""
    bq, bk = blocks
    count = -(-keys // bk)
    listed = torch.zeros(*block_index.shape[:3], count + 1, dtype=torch.bool, device=block_index.device)
    listed.scatter_(3, block_index.long().where(block_index >= 0, count), True)
    mask = listed[..., :count].repeat_interleave(bq, 2).repeat_interleave(bk, 3)
    return mask[:, :, :queries, :keys]


def dense_block_sparse(
    query: Tensor, key: Tensor, value: Tensor, block_index: Tensor, blocks: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """The readable oracle; arguments as `block_sparse`."""
    mask = block_mask(block_index, blocks, query.shape[1], key.shape[1])
    if key.shape[1] == 0:  # a softmax needs a key, if only a hidden one
        key, value, mask = pad(key, (0, 0, 0, 0, 0, 1)), pad(value, (0, 0, 0, 0, 0, 1)), pad(mask, (0, 1))
    return dense_attention(query, key, value, mask, scale)


@torch.library.custom_op("vision_attn::block_sparse", mutates_args=())
def block_sparse(
    query: Tensor, key: Tensor, value: Tensor, block_index: Tensor, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each block of queries over its listed blocks of keys.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, Hkv, D]`.
        value: `[B, Sk, Hkv, Dv]`.
        block_index: Integers `[B, H or 1, ceil(Sq / block_q), n]` below `ceil(Sk / block_k)`, each at most once in a
            row; -1 lists nothing.
        block_q: Queries per block.
        block_k: Keys per block.
        scale: Factor on the logits.

    Returns:
        Output `[B, Sq, H, Dv]` and log-sum-exp `[B, Sq, H]`; zeros and `-inf` for a query whose list is empty.
    """
    width = value.shape[3]
    output = query.new_zeros(*_block_rows(query, block_q), width)
    lse = output.new_full(output.shape[:2], float("-inf"), dtype=accumulator(query.dtype))
    problem = _Blocks(query, key, value, block_index, block_q, block_k)
    for tiles, q, k, v, mask in problem.batches():
        out, row_lse = clear_empty(*attend_heads(q, k, v, mask, scale), mask)
        output[tiles], lse[tiles] = out.squeeze(1), row_lse.squeeze(1)
    return _to_sequence(output, query), _to_sequence(lse.unsqueeze(-1), query).squeeze(-1)


@block_sparse.register_fake
def _(query, key, value, block_index, block_q, block_k, scale):  # type: ignore[no-untyped-def]
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=accumulator(query.dtype))


@torch.library.custom_op("vision_attn::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_index: Tensor,
    output: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `block_sparse` for query, key and value; deterministic on the CPU."""
    wide = accumulator(query.dtype)
    problem = _Blocks(query, key, value, block_index, block_q, block_k)
    delta = lse_delta(grad_output, grad_lse, output).unsqueeze(-1)
    rows = [_to_blocks(x, block_q) for x in (grad_output, delta, lse.unsqueeze(-1))]
    grad_q = query.new_zeros(*_block_rows(query, block_q), query.shape[3])
    grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (problem.keys, problem.values))
    for tiles, q, k, v, mask in problem.batches():
        grad_out, row_delta, row_lse = (x[tiles].unsqueeze(1) for x in rows)
        tile_grads = attend_heads_backward(grad_out, row_delta.squeeze(-1), q, k, v, mask, row_lse.squeeze(-1), scale)
        grad_q[tiles] = tile_grads[0].squeeze(1).to(query.dtype)
        blocks = problem.key_blocks(tiles).flatten()
        for total, part in zip((grad_k, grad_v), tile_grads[1:], strict=True):
            total.index_add_(0, blocks, part.reshape(len(blocks), block_k, -1))
    return (
        _to_sequence(grad_q, query),
        _to_sequence(grad_k, key).to(key.dtype),
        _to_sequence(grad_v, value).to(value.dtype),
    )


@block_sparse_backward.register_fake
def _(grad_output, grad_lse, query, key, value, *args):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, block_index, *ctx.sizes = inputs
    ctx.save_for_backward(query, key, value, block_index, *output)


def _backward(ctx, grad_output, grad_lse):  # type: ignore[no-untyped-def]
    return *block_sparse_backward(grad_output, grad_lse, *ctx.saved_tensors, *ctx.sizes), *(None,) * 4


block_sparse.register_autograd(_backward, setup_context=_save)


class _Blocks:
    """A call cut into tiles, one per batch item, head and block of queries, in this order.

    Attributes:
        queries: `[tiles, block_q, D]`.
        keys: `[B * Hkv * key blocks, block_k, D]`.
        values: `[B * Hkv * key blocks, block_k, Dv]`.
        index: int64 `[tiles, n]`, key blocks of the tile's own key head.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, block_index: Tensor, block_q: int, block_k: int
    ) -> None:
        self.query, self.key, self.value, self.block_q, self.block_k = query, key, value, block_q, block_k
        self.queries, self.keys, self.values = (
            _to_blocks(x, block) for x, block in ((query, block_q), (key, block_k), (value, block_k))
        )
        self.index = block_index.long().expand(-1, query.shape[2], -1, -1).flatten(0, 2)

    def key_blocks(self, tiles: slice) -> Tensor:
        """Rows of `keys` for tiles, `[tiles, n]`; some block where nothing is listed."""
        heads, heads_kv = self.query.shape[2], self.key.shape[2]
        per_head, per_kv = -(-self.query.shape[1] // self.block_q), -(-self.key.shape[1] // self.block_k)
        tile = torch.arange(tiles.start, tiles.stop, device=self.index.device)
        batch, head = tile // (per_head * heads), tile // per_head % heads
        source = batch * heads_kv + head // (heads // heads_kv)
        return source.unsqueeze(1) * per_kv + self.index[tiles].clamp(min=0)

    def batches(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Tiles with their queries, listed keys and values, and additive mask, each `[tiles, 1, rows, ...]`."""
        listed = self.index.shape[1] * self.block_k
        row_bytes = self.key.element_size() * (self.key.shape[3] + self.value.shape[3])
        step = max(1, CHUNK_BYTES // max(1, row_bytes * listed))
        within = torch.arange(self.block_k, device=self.index.device)
        for start in range(0, len(self.index) if listed and len(self.keys) else 0, step):
            tiles = slice(start, min(start + step, len(self.index)))
            blocks, index = self.key_blocks(tiles), self.index[tiles]
            position = index.unsqueeze(-1) * self.block_k + within
            hidden = ((index < 0).unsqueeze(-1) | (position >= self.key.shape[1])).flatten(1)
            mask = torch.zeros(hidden.shape, dtype=self.query.dtype, device=hidden.device)
            mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
            k, v = (x[blocks].flatten(1, 2).unsqueeze(1) for x in (self.keys, self.values))
            yield tiles, self.queries[tiles].unsqueeze(1), k, v, mask


def _block_rows(x: Tensor, block: int) -> tuple[int, int]:
    """Blocks of all batch items and heads of `[B, S, H, D]`, and rows per block."""
    return x.shape[0] * x.shape[2] * -(-x.shape[1] // block), block


def _to_blocks(x: Tensor, block: int) -> Tensor:
    """`[B, S, H, D]` to `[B * H * blocks, block, D]`, zeros behind the end."""
    padded = pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % block))
    return padded.reshape(*_block_rows(x, block), x.shape[3])


def _to_sequence(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_to_blocks`, with the batch, tokens and heads of `like`."""
    batch, tokens, heads, _ = like.shape
    rows = -(-tokens // blocks.shape[1]) * blocks.shape[1]
    return blocks.reshape(batch, heads, rows, blocks.shape[-1])[:, :, :tokens].transpose(1, 2).contiguous()
