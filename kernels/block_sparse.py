"""Block-index sparse attention as custom ops over its Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .block_sparse_kernels import (
    _block_sparse_backward_dkv_kernel,
    _block_sparse_backward_dq_kernel,
    _block_sparse_forward_kernel,
)
from .launch import LaunchConfig, architecture_of, choose, cut, launch_options
from .tensors import (
    NAMESPACE,
    delta_of,
    empty_like,
    head_constants,
    on_device,
    per_query_head,
    power_of_two,
    strides,
    sum_groups,
    unit_rows,
)


@torch.library.custom_op(f"{NAMESPACE}::block_sparse", mutates_args=())
def block_sparse(
    query: Tensor, key: Tensor, value: Tensor, block_index: Tensor, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each block of queries over its listed blocks of keys.

    Args:
        query: `[B, Sq, H, D]`, float16, bfloat16 or float32, D up to 256.
        key: `[B, Sk, Hkv, D]`.
        value: `[B, Sk, Hkv, Dv]`.
        block_index: Integers `[B, H or 1, ceil(Sq / block_q), n]` below `ceil(Sk / block_k)`, each at most once in a
            row; -1 lists nothing.
        block_q: Queries per block.
        block_k: Keys per block.
        scale: Factor on the logits.

    Returns:
        Output `[B, Sq, H, Dv]` in the query's dtype and natural log-sum-exp `[B, Sq, H]` in float32; zeros and `-inf`
        for a query whose list is empty.

    Source: arXiv 2502.11089 (NSA), section 3.4; arXiv 2205.14135 (online softmax).
    """
    return forward(Call(query, key, value, block_index, block_q, block_k, scale))


@block_sparse.register_fake
def _(query, key, value, *args):  # type: ignore[no-untyped-def]
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_backward", mutates_args=())
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
    """Gradients of `block_sparse` for query, key and value."""
    call = Call(query, key, value, block_index, block_q, block_k, scale)
    return backward(call, output, lse, grad_output, grad_lse)


@block_sparse_backward.register_fake
def _(grad_output, grad_lse, query, key, value, *args):  # type: ignore[no-untyped-def]
    return tuple(empty_like(x) for x in (query, key, value))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, block_index, *ctx.sizes = inputs
    ctx.save_for_backward(query, key, value, block_index, *output)


def _backward(ctx, grad_output, grad_lse):  # type: ignore[no-untyped-def]
    return *block_sparse_backward(grad_output, grad_lse, *ctx.saved_tensors, *ctx.sizes), *(None,) * 4


block_sparse.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class Call:
    """The arguments of `block_sparse`."""

    query: Tensor
    key: Tensor
    value: Tensor
    block_index: Tensor
    block_q: int
    block_k: int
    scale: float

    @property
    def q_blocks(self) -> int:
        """Blocks of queries, the last one perhaps cut short."""
        return -(-self.query.shape[1] // self.block_q)

    @property
    def k_blocks(self) -> int:
        """Blocks of keys, the last one perhaps cut short."""
        return -(-self.key.shape[1] // self.block_k)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens and blocks, in the kernels' order."""
        return self.query.shape[1], self.key.shape[1], self.q_blocks, self.block_q, self.block_k

    @property
    def is_empty(self) -> bool:
        """Whether there is no query, or no key."""
        return self.query.shape[0] * self.query.shape[1] * self.key.shape[1] == 0

    def config(self, kernel: str) -> LaunchConfig:
        """The launch of a kernel on this device."""
        head_dim = max(self.query.shape[3], self.value.shape[3])
        config = choose(kernel, head_dim, self.query.dtype, architecture_of(self.query.device))
        # A piece of a block need not be larger than the block.
        return cut(config, kernel, power_of_two(self.block_q), power_of_two(self.block_k))

    def lists(self) -> tuple[Tensor, Tensor]:
        """The listed blocks before those that list nothing, int32, and their number per row."""
        listed = self.block_index.to(torch.int32)
        count = (listed >= 0).sum(-1, dtype=torch.int32)
        return listed.where(listed >= 0, self.k_blocks).sort(-1).values.contiguous(), count.contiguous()

    def inverted(self) -> tuple[Tensor, Tensor]:
        """Entries of all rows of a head sorted by the key block they name, and where each key block's begin.

        Returns:
            int32 `[B, H or 1, rows * n]`, an entry being `row * n + its place`; int32 `[B, H or 1, key blocks + 1]`.
        """
        named = self.block_index.long().flatten(2)
        keys, order = named.where(named >= 0, self.k_blocks).sort(stable=True)
        blocks = torch.arange(self.k_blocks + 1, device=named.device).expand(*named.shape[:2], -1).contiguous()
        begins = torch.searchsorted(keys, blocks)
        return order.to(torch.int32).contiguous(), begins.to(torch.int32).contiguous()


def forward(call: Call, config: LaunchConfig | None = None) -> tuple[Tensor, Tensor]:
    """`block_sparse` with a chosen launch; None takes the one of this device."""
    query, key, value = (unit_rows(x) for x in (call.query, call.key, call.value))
    output = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if call.is_empty:
        return output.zero_(), lse.fill_(float("-inf"))
    config = config or call.config("block_sparse_forward")
    index, count = call.lists()
    with on_device(query):
        _block_sparse_forward_kernel[_grid(call, query, call.q_blocks, call.block_q, config.q_tokens)](
            query, key, value, index, count, output, lse,
            strides(query), strides(key), strides(value), strides(output), lse.stride(), _list_strides(count, index),
            query.shape[2], query.shape[2] // key.shape[2], call.scale, *call.sizes,
            **_constants(config, key, value),
        )  # fmt: skip
    return output, lse


def backward(
    call: Call,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    config_dq: LaunchConfig | None = None,
    config_dkv: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_sparse_backward` with chosen launches."""
    query, key, value = (unit_rows(x) for x in (call.query, call.key, call.value))
    if call.is_empty:
        return empty_like(query).zero_(), empty_like(key).zero_(), empty_like(value).zero_()
    grad_q, grad_k, grad_v = empty_like(query), per_query_head(key, query), per_query_head(value, query)
    config_dq = config_dq or call.config("block_sparse_backward_dq")
    config_dkv = config_dkv or call.config("block_sparse_backward_dkv")
    grad_output = unit_rows(grad_output)
    delta = delta_of(output, grad_output, grad_lse, lse)
    index, count = call.lists()
    order, begins = call.inverted()
    groups = query.shape[2] // key.shape[2]
    with on_device(query):
        _block_sparse_backward_dq_kernel[_grid(call, query, call.q_blocks, call.block_q, config_dq.q_tokens)](
            query, key, value, index, count, grad_output, lse, delta, grad_q,
            strides(query), strides(key), strides(value), strides(grad_output), lse.stride(), strides(grad_q),
            _list_strides(count, index), query.shape[2], groups, call.scale, *call.sizes,
            **_constants(config_dq, key, value),
        )  # fmt: skip
        queries, keys, _, block_q, block_k = call.sizes
        _block_sparse_backward_dkv_kernel[_grid(call, query, call.k_blocks, call.block_k, config_dkv.kv_tokens)](
            query, key, value, order, begins, grad_output, lse, delta, grad_k, grad_v,
            strides(query), strides(key), strides(value), strides(grad_output), lse.stride(), strides(grad_k),
            strides(grad_v), _head_strides(order), _head_strides(begins),
            query.shape[2], groups, call.scale, queries, keys, call.k_blocks, block_q, block_k, index.shape[3],
            **_constants(config_dkv, key, value),
        )  # fmt: skip
    return grad_q, sum_groups(grad_k, key), sum_groups(grad_v, value)


def _grid(call: Call, x: Tensor, blocks: int, block: int, tokens: int) -> tuple[int]:
    """Programs: all pieces of `tokens` rows of all blocks, heads and batch items."""
    return (x.shape[0] * x.shape[2] * blocks * -(-block // tokens),)


def _list_strides(count: Tensor, index: Tensor) -> tuple[int, int, int, int]:
    """Strides of batch, block and head in rows of lists (0 where all heads share them), and a row's length."""
    batch, head = _head_strides(count)
    return batch, 1, head, index.shape[3]


def _head_strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1) if x.shape[1] > 1 else 0


def _constants(config: LaunchConfig, key: Tensor, value: Tensor) -> dict[str, Any]:
    tiles = {"BLOCK_Q": config.q_tokens, "BLOCK_K": config.kv_tokens}
    return tiles | launch_options(config) | head_constants(key, value)
