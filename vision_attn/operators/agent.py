"""Agent attention: a few agent tokens collect from all keys, and every query reads the agents.

    out = softmax(query_scale * Q A^T + query_bias) · softmax(scale * A K^T + agent_bias) · V

Two softmaxes of `n` agents by `S` tokens stand for one of `S` by `S`: linear in the tokens.

Source: Agent Attention (arXiv 2312.08874), equation 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vision_attn.backends import agent, resolve
from vision_attn.errors import UnsupportedError
from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import (
    FLOATS,
    autocast,
    check_cross_inputs,
    joint_inputs,
    no_autocast,
    resolve_scale,
)
from vision_attn.operators.cost import Cost, chunks, pairs_cost
from vision_attn.operators.joint import split_mask, with_text_queries
from vision_attn.operators.registry import register_operator


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


@register_operator("agent")
@dataclass(frozen=True)
class Agent:
    """Agent attention as an operator for whole sequences: agents are image queries averaged over a raster of cells.

    Agents collect from image and text keys, image queries read the agents; text queries attend every key as they do
    densely. Without training it approximates softmax attention roughly: diffusion transformers need a window instead.

    Args:
        agents: Their number per frame, a square; or rows and columns of the raster. On a 1-D grid their number.
        k_scale2: Exponent of the queries' scale, `scale ** k_scale2`.
        k_shortcut: Factor on the values that are added to the output of image queries. Stable Diffusion bears agents
            untrained with `Agent(256, k_scale2=0.3, k_shortcut=0.075)`; `AgentSD` finds better ones.

    Raises:
        ValueError, TypeError: not a square, a value below 1; at the call, a negative scale with such an exponent.
        UnsupportedError: at the call, more rows or columns of agents than of tokens, or a mask that differs between
            image queries or heads.

    Source: arXiv 2312.08874, section 4; `AdaptiveAvgPool2d` of the queries before they are scaled, no biases.
    """

    agents: int | tuple[int, int] = 49
    k_scale2: float = 1.0
    k_shortcut: float = 0.0

    def __post_init__(self) -> None:
        sizes = self.agents if isinstance(self.agents, (list, tuple)) else (self.agents,)
        if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
            raise TypeError(f"Agent: agents must be an integer or (rows, columns), got {self.agents!r}")
        if len(sizes) not in (1, 2) or any(size < 1 for size in sizes):
            raise ValueError(f"Agent: agents must be at least 1, or (rows, columns) of at least 1, got {self.agents!r}")
        for name in ("k_scale2", "k_shortcut"):
            resolve_scale("Agent", getattr(self, name), 1, name)
        if isinstance(self.agents, (list, tuple)):
            object.__setattr__(self, "agents", tuple(sizes) if len(sizes) == 2 else sizes[0])

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        scale: float | None = None,
        *,
        attn_mask: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Attention on `[B, S, H, D]` with `S = layout.tokens`."""
        query, key, value = joint_inputs("Agent", query, key, value, layout)
        factor, chosen = resolve_scale("Agent", scale, query.shape[-1]), resolve(backend, "Agent", query, value)
        image, query_factor = layout.image_slice, second_scale("Agent", factor, self.k_scale2)
        with no_autocast(query):
            bias, text_mask = split_mask("Agent", attn_mask, query, layout)
            agent_bias = None if bias is None else bias[:, None, None]
            agents = _pooled(query[:, image], layout.grid, self._raster(layout.grid))
            output = agent(query[:, image], key, value, agents, agent_bias, None, factor, query_factor, backend=chosen)
            output = add_shortcut(output, value[:, image], self.k_shortcut)
            return with_text_queries(output, query, key, value, layout, text_mask, factor, chosen)

    def cost(self, layout: TokenLayout, heads: int, head_dim: int) -> Cost:
        """Counted cost of one call, one batch item: query-agent and agent-key pairs count as pairs."""
        image, text, tokens = layout.image_tokens, layout.text_tokens, layout.tokens
        agents = math.prod(layout.grid[:-2]) * math.prod(self._raster(layout.grid))
        pairs = agents * (image + tokens) + text * tokens
        tiles = chunks(agents) * (chunks(image) + chunks(tokens)) + chunks(text) * chunks(tokens)
        return pairs_cost(pairs, tokens, heads, head_dim, tiles)

    def _raster(self, grid: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of agents of a frame."""
        rows, columns = (1, *grid)[-2:]
        raster = self.agents
        if isinstance(raster, int):
            side = math.isqrt(raster)
            if len(grid) > 1 and side * side != raster:
                near = f"{side * side} or {(side + 1) ** 2}"
                raise ValueError(
                    f"Agent: agents must be a square number on the grid {grid}, got {raster}: use {near}, or "
                    "(rows, columns)"
                )
            raster = (1, raster) if len(grid) == 1 else (side, side)
        if raster[0] > rows or raster[1] > columns:
            raise UnsupportedError(
                f"Agent: agents must be at most {(rows, columns)} for the grid {grid}, got {raster}: use fewer agents"
            )
        return raster


def second_scale(where: str, scale: float, exponent: float) -> float:
    """The queries' factor `scale ** exponent` of agents that are not trained."""
    if exponent == 1:
        return scale
    if scale < 0 or (scale == 0 and exponent < 0):
        raise ValueError(f"{where}: scale must be above 0 with k_scale2={exponent}, got {scale}")
    return float(scale**exponent)


def add_shortcut(output: Tensor, value: Tensor, factor: float) -> Tensor:
    """The output `[B, S, H, Dv]` with so much of the values `[B, S, Hkv, Dv]` of the same tokens."""
    if factor == 0:
        return output
    return output + factor * value.repeat_interleave(output.shape[2] // value.shape[2], 2)


def _pooled(query: Tensor, grid: tuple[int, ...], raster: tuple[int, int]) -> Tensor:
    """`[B, N, H, D]` to `[B, agents, H, D]`, the frames one after another."""
    batch, _tokens, heads, width = query.shape
    rows, columns = (1, *grid)[-2:]
    frames = query.reshape(-1, rows, columns, heads * width).permute(0, 3, 1, 2)
    pooled = adaptive_avg_pool2d(frames, raster).permute(0, 2, 3, 1)
    return pooled.reshape(batch, math.prod(grid[:-2]) * math.prod(raster), heads, width)
