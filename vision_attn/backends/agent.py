"""Agent attention in plain PyTorch: a few agent tokens collect from all keys, and every query reads the agents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vision_attn.backends.attend import accumulator


def dense_agent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    agent_bias: Tensor | None,
    query_bias: Tensor | None,
    scale: float,
    query_scale: float,
) -> Tensor:
    """`softmax(query_scale * Q A^T + query_bias) · softmax(scale * A K^T + agent_bias) · V` as it is written.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, S, Hkv, D]`.
        value: `[B, S, Hkv, Dv]`.
        agents: `[B, n, H, D]`.
        agent_bias: Broadcastable to `[B, H, n, S]`, or None.
        query_bias: Broadcastable to `[B, H, Sq, n]`, or None.
        scale: Factor on the agents' logits.
        query_scale: Factor on the queries' logits.
    """
    wide, group = accumulator(query.dtype), query.shape[2] // key.shape[2]
    q, a = (x.to(wide).transpose(1, 2) for x in (query, agents))
    k, v = (x.to(wide).repeat_interleave(group, dim=2).transpose(1, 2) for x in (key, value))
    collect = _softmax(scale * a @ k.transpose(-1, -2), agent_bias)
    read = _softmax(query_scale * q @ a.transpose(-1, -2), query_bias)
    return (read @ (collect @ v)).transpose(1, 2).to(query.dtype)


def tiled_agent(
    query: Tensor, key: Tensor, value: Tensor, agents: Tensor, agent_bias: Tensor | None, query_bias: Tensor | None,
    scale: float, query_scale: float,
) -> Tensor:  # fmt: skip
    """`dense_agent` by two fused attentions; memory is linear in the tokens."""
    # A mask must have the query's dtype, and a bias rounded to half precision is another one.
    exact = all(bias is None or bias.dtype == query.dtype for bias in (agent_bias, query_bias))
    dtype = query.dtype if exact else accumulator(query.dtype)
    q, k, v, a = (x.to(dtype).transpose(1, 2) for x in (query, key, value, agents))
    collected = scaled_dot_product_attention(
        a, k, v, attn_mask=_as(agent_bias, dtype), scale=scale, enable_gqa=a.shape[1] != k.shape[1]
    )
    output = scaled_dot_product_attention(q, a, collected, attn_mask=_as(query_bias, dtype), scale=query_scale)
    return output.transpose(1, 2).to(query.dtype)


def _softmax(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Weights of the last axis; zeros where everything is hidden."""
    if bias is None:
        return logits.softmax(-1)
    logits = logits + bias.to(logits.dtype)
    hidden = (logits == float("-inf")).all(-1, keepdim=True)
    return logits.masked_fill(hidden, 0.0).softmax(-1).masked_fill(hidden, 0.0)


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
