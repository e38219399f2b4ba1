"""Block-index sparse attention: each block of queries attends the blocks of keys that a list names.

    out_i = softmax(scale * q_i K_L^T) V_L,   L = keys of the blocks in block_index[b, h, i // block_q]

The engine of routing operators, which choose the list from the content. Source: arXiv 2502.11089 (NSA), section 3.4;
arXiv 2502.18137 (SpargeAttn), section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vision_attn.backends import block_sparse, resolve
from vision_attn.operators.arguments import autocast, check_cross_inputs, no_autocast, resolve_scale

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_index: Tensor,
    *,
    block_size: int | tuple[int, int],
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention over listed blocks of keys.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, Hkv, D]`; `Hkv` divides `H`.
        value: `[B, Sk, Hkv, Dv]`.
        block_index: Integers `[B, H or 1, ceil(Sq / bq), n]`: the key blocks of each query block, 0 to
            `ceil(Sk / bk) - 1`; -1 lists nothing, and a block listed twice counts once.
        block_size: Tokens per block, one number or `(bq, bk)`. A last block may be cut short.
        scale: Factor on the logits; None is `D ** -0.5`.
        return_lse: Also return the natural log-sum-exp.
        backend: `"auto"`, `"dense"`, `"tiled"` or `"triton"`.

    Returns:
        `[B, Sq, H, Dv]` in the query's dtype, zeros where nothing is listed; with `return_lse` also `[B, Sq, H]`,
        `-inf` there. Differentiable in query, key and value; deterministic.

    Raises:
        ValueError, TypeError: arguments that do not fit, before any work. On a GPU an index out of range is found when
            the device gets to it, and ends the process' use of it, as for any index of torch.
        ImportError, RuntimeError: an unavailable backend asked for by name.
        NotImplementedError: a backend without lists of blocks.

    Cost:
        `4 * D * bq * bk` FLOPs per listed block and head; memory linear in the tokens and the lists.

    Source: arXiv 2502.11089, section 3.4.

    Example:
        >>> x = torch.randn(1, 64, 2, 8)
        >>> diagonal = torch.arange(4).view(1, 1, 4, 1)
        >>> block_sparse_attention(x, x, x, diagonal, block_size=16).shape
        torch.Size([1, 64, 2, 8])
    """
    where = "block_sparse_attention"
    query, key, value = autocast(query, key, value)
    check_cross_inputs(where, query, key, value)
    blocks = _checked_blocks(where, block_size)
    index = _checked_index(where, block_index, query, key, blocks)
    # A block longer than the sequence is one of the sequence's length.
    blocks = min(blocks[0], max(query.shape[1], 1)), min(blocks[1], max(key.shape[1], 1))
    factor = resolve_scale(where, scale, query.shape[-1])
    chosen = resolve(backend, where, query, value)
    with no_autocast(query):
        output, lse = block_sparse(query, key, value, index, blocks, factor, backend=chosen)
    return (output, lse) if return_lse else output


def _checked_blocks(where: str, block_size: Any) -> tuple[int, int]:
    sizes = tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(sizes) != 2 or any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"{where}: block_size must be an integer or two of them (bq, bk), got {block_size!r}")
    if min(sizes) < 1:
        raise ValueError(f"{where}: block_size must be at least 1, got {block_size!r}")
    return sizes[0], sizes[1]


def _checked_index(where: str, index: Any, query: Tensor, key: Tensor, blocks: tuple[int, int]) -> Tensor:
    """int32, sorted along the lists, a block at most once in each."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{where}: block_index must be a tensor, got {type(index).__name__}")
    if index.dtype not in _INTEGERS:
        raise TypeError(f"{where}: block_index must hold integers, got {index.dtype}")
    if index.device != query.device:
        raise ValueError(f"{where}: block_index must be on the query's device {query.device}, got {index.device}")
    batch, queries, heads, _ = query.shape
    rows, count = -(-queries // blocks[0]), -(-key.shape[1] // blocks[1])
    if index.ndim != 4 or index.shape[0] != batch or index.shape[1] not in (1, heads) or index.shape[2] != rows:
        raise ValueError(
            f"{where}: block_index must have shape [B, H or 1, ceil(Sq / bq), n] = [{batch}, {heads} or 1, {rows}, n], "
            f"got {list(index.shape)}"
        )
    index = index.to(torch.int64)  # narrow types hold neither the count of blocks nor, without a sign, -1
    _check_range(where, index, count)
    index = index.to(torch.int32).sort(-1).values
    repeated = torch.zeros_like(index, dtype=torch.bool)
    repeated[..., 1:] = index[..., 1:] == index[..., :-1]
    return index.masked_fill(repeated, -1)


def _check_range(where: str, index: Tensor, count: int) -> None:
    if index.numel() == 0:
        return
    fits = ((index >= -1) & (index < count)).all()
    if index.is_cuda or torch.compiler.is_compiling():  # to look at it here would wait for the device
        torch._assert_async(fits, f"{where}: block_index must be -1 to {count - 1}")
    elif not fits:
        low, high = index.aminmax()
        given = int(low) if low < -1 else int(high)
        raise ValueError(
            f"{where}: block_index must be 0 to {count - 1} for {count} key blocks, or -1 for none, got {given}"
        )
