"""Attention over a window plus keys that everyone sees, by whichever backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vision_attn.backends.agent import dense_agent, tiled_agent
from vision_attn.backends.attend import accumulator, attend, finite, logsumexp, refuse_forward_mode
from vision_attn.backends.blocks import block_sparse as tiled_block_sparse
from vision_attn.backends.blocks import dense_block_sparse
from vision_attn.backends.dense import dense_attention, dense_windowed
from vision_attn.backends.flex import flex_windowed
from vision_attn.backends.natten import natten_windowed
from vision_attn.backends.tiled import window_attention
from vision_attn.backends.triton import triton_agent, triton_block_sparse, triton_windowed
from vision_attn.kernels.reach import Ball, Reach


def windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Reach,
    scale: float,
    *,
    extra: Sequence[tuple[Tensor, Tensor, Tensor | None]] = (),
    key_bias: Tensor | None = None,
    return_lse: bool = True,
    backend: str = "tiled",
) -> tuple[Tensor, Tensor]:
    """One softmax over each grid token's window and all extra keys.

    Args:
        query: `[B, N, H, D]`, the grid's tokens in row-major order.
        key: `[B, N, Hkv, D]`.
        value: `[B, N, Hkv, Dv]`.
        reach: The window.
        scale: Factor on the logits.
        extra: Further keys and values `[B, E, Hkv, ...]` seen by every query, each with a bias `[B, E]` or None.
        key_bias: `[B, N]`, added to the logits of a grid key.
        return_lse: Whether the log-sum-exp is wanted; where it is not, a backend without one may return NaN.
        backend: A resolved backend name.

    Returns:
        Output `[B, N, H, Dv]` and natural log-sum-exp `[B, N, H]`.

    Raises:
        NotImplementedError: the backend has no such feature.
    """
    refuse_forward_mode(backend, query, key, value)
    if backend == "triton":
        return triton_windowed(query, key, value, reach, scale, key_bias=key_bias, extra=extra)
    if backend not in ("dense", "tiled") and any(bias is not None for bias in (key_bias, *(e[2] for e in extra))):
        raise NotImplementedError(f"backend={backend!r} takes no mask: use backend='tiled'")
    if backend == "natten" and _needs_gradient(query, key, value, extra) and (extra or return_lse):
        # Its fused backward pass drops the gradient of the log-sum-exp, which the merge needs.
        raise NotImplementedError("backend='natten' has no gradient through extra keys or the log-sum-exp: use 'tiled'")
    if backend == "flex":
        return flex_windowed(query, key, value, reach, scale, extra, return_lse)
    parts = [_window_part(query, key, value, reach, scale, key_bias, backend)]
    for extra_key, extra_value, bias in extra:
        if extra_key.shape[1] > 0:
            mask = None if bias is None else bias[:, None, None, :]
            parts.append(full(query, extra_key, extra_value, mask, scale, backend=backend))
    return parts[0] if len(parts) == 1 else merge(*zip(*parts, strict=True))


def _needs_gradient(*tensors: object) -> bool:
    flat = tree_leaves(tensors)
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in flat)


def full(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float, *, backend: str = "tiled"
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, with an additive mask broadcastable to `[B, H, Sq, Sk]`; output and log-sum-exp."""
    if backend == "dense":
        return dense_attention(query, key, value, attn_mask, scale)
    refuse_forward_mode(backend, query, key, value)
    return attend(query, key, value, attn_mask, scale)


def block_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_index: Tensor,
    blocks: tuple[int, int],
    scale: float,
    *,
    backend: str = "tiled",
) -> tuple[Tensor, Tensor]:
    """Attention over listed blocks of keys; arguments as `vision_attn.backends.blocks.block_sparse`.

    Raises:
        NotImplementedError: the backend has no such feature.
    """
    refuse_forward_mode(backend, query, key, value)
    if backend == "dense":
        return dense_block_sparse(query, key, value, block_index, blocks, scale)
    if backend == "tiled":
        return tiled_block_sparse(query, key, value, block_index, *blocks, scale)
    if backend == "triton":
        return triton_block_sparse(query, key, value, block_index, blocks, scale)
    raise NotImplementedError(f"backend={backend!r} takes no lists of blocks: use backend='tiled'")


def agent(
    query: Tensor, key: Tensor, value: Tensor, agents: Tensor, *biases_and_scales: Any, backend: str = "tiled"
) -> Tensor:
    """Agent attention; arguments as `vision_attn.backends.agent.dense_agent`.

    Raises:
        NotImplementedError: the backend has no such feature.
    """
    calls = {"dense": dense_agent, "tiled": tiled_agent, "triton": triton_agent}
    if backend not in calls:
        raise NotImplementedError(f"backend={backend!r} has no agent attention: use backend='tiled'")
    return calls[backend](query, key, value, agents, *biases_and_scales)


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint key sets, from the attention over each.

    A part without visible keys (log-sum-exp `-inf`) has no weight.
    """
    wide = accumulator(outputs[0].dtype)
    stacked = torch.stack(tuple(lses)).to(wide)
    lse = logsumexp(stacked, 0)
    weights = (stacked - finite(lse)).exp().unsqueeze(-1)
    output = sum(w * o.to(wide) for w, o in zip(weights, outputs, strict=True))
    assert isinstance(output, Tensor)
    return output.to(outputs[0].dtype), lse


def _window_part(
    query: Tensor, key: Tensor, value: Tensor, reach: Reach, scale: float, key_bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "dense":
        return dense_windowed(query, key, value, key_bias, reach, scale)
    if reach.is_dense:  # nothing to skip: one plain attention
        return attend(query, key, value, None if key_bias is None else key_bias[:, None, None, :], scale)
    if backend == "tiled":
        return window_attention(query, key, value, key_bias, reach, scale)
    if isinstance(reach, Ball):
        raise NotImplementedError(f"backend={backend!r} has no circular window: use backend='tiled'")
    return natten_windowed(query, key, value, reach, scale)
