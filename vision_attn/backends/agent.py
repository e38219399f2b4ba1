"""Agent attention in plain PyTorch: a few agent tokens collect from all keys, and every query reads the agents."""

from __future__ import annotations

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
    collect = (scale * a @ k.transpose(-1, -2) + _or_zero(agent_bias)).softmax(-1)
    read = (query_scale * q @ a.transpose(-1, -2) + _or_zero(query_bias)).softmax(-1)
    return (read @ (collect @ v)).transpose(1, 2).to(query.dtype)


def tiled_agent(
    query: Tensor, key: Tensor, value: Tensor, agents: Tensor, agent_bias: Tensor | None, query_bias: Tensor | None,
    scale: float, query_scale: float,
) -> Tensor:  # fmt: skip
    """`dense_agent` by two fused attentions; memory is linear in the tokens."""
    q, k, v, a = (x.transpose(1, 2) for x in (query, key, value, agents))
    collected = scaled_dot_product_attention(
        a, k, v, attn_mask=_like(agent_bias, query), scale=scale, enable_gqa=a.shape[1] != k.shape[1]
    )
    output = scaled_dot_product_attention(q, a, collected, attn_mask=_like(query_bias, query), scale=query_scale)
    return output.transpose(1, 2)


def _or_zero(bias: Tensor | None) -> Tensor | float:
    return 0.0 if bias is None else bias


def _like(bias: Tensor | None, query: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(query.dtype)
