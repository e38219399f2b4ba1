"""Agent attention: a few agent tokens collect from all keys, and every query reads the agents.

    out = softmax(query_scale * Q A^T + query_bias) · softmax(scale * A K^T + agent_bias) · V

Two softmaxes of `n` agents by `S` tokens stand for one of `S` by `S`: linear in the tokens.

Source: Agent Attention (arXiv 2312.08874), equation 5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vision_attn.backends import agent, resolve
from vision_attn.operators.arguments import FLOATS, autocast, check_cross_inputs, no_autocast, resolve_scale


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    *,
    scale: float | None = None,
    query_scale: float | None = None,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Agent attention with given agents.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, S, Hkv, D]`, at least one token; `Hkv` divides `H`.
        value: `[B, S, Hkv, Dv]`.
        agents: `[B, n, H, D]`, at least one.
        scale: Factor on the agents' logits; None is `D ** -0.5`.
        query_scale: Factor on the queries' logits; None means `scale`.
        agent_bias: Broadcastable to `[B, H, n, S]`, added to the agents' logits; `-inf` hides a pair, and an agent from
            which all is hidden collects zeros.
        query_bias: Broadcastable to `[B, H, Sq, n]`, added to the queries' logits; as before.
        backend: `"auto"`, `"dense"`, `"tiled"` or `"triton"`.

    Returns:
        `[B, Sq, H, Dv]` in the query's dtype. Differentiable in all tensors.

    Raises:
        ValueError, TypeError: arguments that do not fit, before any work.
        ImportError, RuntimeError: an unavailable backend asked for by name.
        NotImplementedError: a backend without agent attention.

    Cost:
        `2 * B * H * n * (S + Sq) * (D + Dv)` FLOPs; memory linear in `S`.

    Source: arXiv 2312.08874, equation 5; its released code calls the agents' bias `position_bias`, the queries'
        `agent_bias`.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 64, 2, 8)
        >>> agent_attention(x, x, x, agents=x[:, ::8]).shape
        torch.Size([1, 64, 2, 8])
    """
    where = "agent_attention"
    query, key, value, agents = autocast(query, key, value, agents)
    check_cross_inputs(where, query, key, value)
    _check_agents(where, agents, query, key)
    batch, queries, heads, width = query.shape
    collect, read = (batch, heads, agents.shape[1], key.shape[1]), (batch, heads, queries, agents.shape[1])
    agent_bias = _checked_bias(where, "agent_bias", agent_bias, query, collect)
    query_bias = _checked_bias(where, "query_bias", query_bias, query, read)
    factor = resolve_scale(where, scale, width)
    query_factor = factor if query_scale is None else resolve_scale(where, query_scale, width, "query_scale")
    chosen = resolve(backend, where, query, value)
    with no_autocast(query):
        return agent(query, key, value, agents, agent_bias, query_bias, factor, query_factor, backend=chosen)


def _check_agents(where: str, agents: Any, query: Tensor, key: Tensor) -> None:
    if not isinstance(agents, Tensor):
        raise TypeError(f"{where}: agents must be a tensor, got {type(agents).__name__}")
    expected = [query.shape[0], "n", *query.shape[2:]]
    if agents.ndim != 4 or [agents.shape[0], "n", *agents.shape[2:]] != expected or agents.shape[1] == 0:
        shape = ", ".join(map(str, expected))
        raise ValueError(f"{where}: agents must have shape [{shape}] with n of at least 1, got {list(agents.shape)}")
    if agents.dtype != query.dtype or agents.device != query.device:
        raise ValueError(
            f"{where}: agents must be {query.dtype} on {query.device} as the query, got {agents.dtype} on "
            f"{agents.device}"
        )
    if key.shape[1] == 0:
        raise ValueError(f"{where}: key must have at least 1 token, got shape {list(key.shape)}")


def _checked_bias(where: str, name: str, bias: Any, query: Tensor, full: tuple[int, ...]) -> Tensor | None:
    """With four axes."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(f"{where}: {name} must be a tensor or None, got {bias!r}")
    if bias.dtype not in FLOATS:
        raise TypeError(f"{where}: {name} must be floating point of 16 to 64 bits, got {bias.dtype}")
    if bias.device != query.device:
        raise ValueError(f"{where}: {name} must be on the query's device {query.device}, got {bias.device}")
    sizes = zip(bias.shape[::-1], full[::-1], strict=False)
    if bias.ndim > 4 or not all(size in (1, whole) for size, whole in sizes):
        raise ValueError(f"{where}: {name} must broadcast to {list(full)}, got shape {list(bias.shape)}")
    return bias[(None,) * (4 - bias.ndim)]
