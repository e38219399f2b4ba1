"""Agent attention as modules of backbones: agents pooled from queries, position biases, a convolution of the values.

    out = softmax(s Q A^T + B2) · softmax(s A K^T + B1) V + DWConv(V),   A = adaptive mean pooling of Q

Source: Agent Attention (arXiv 2312.08874), section 4.2; parameter names are those of its released code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from vision_attn.operators import agent_attention

Grid = tuple[int, int]
_COARSE = 7  # side of the biases that are interpolated to every grid


class AgentModule(nn.Module):
    """What the agent attentions share: biases, convolution and the two softmaxes; subclasses project.

    Args:
        dim: Channels.
        num_heads: Heads, which divide `dim`.
        agents: Agents, a square number of at most as many rows and columns as the queries' map has.
        grid: Rows and columns of the queries' map for which the biases are made; another one interpolates them.
        key_grid: The same of the keys' map; None for the queries'.
        num_prefix_tokens: Tokens before the map: queries and keys, but no part of agents and convolution.
        attn_drop: Dropout of both attention maps.

    Raises:
        ValueError: a number that does not fit the others.
    """

    dwc: nn.Module
    an_bias: nn.Parameter
    na_bias: nn.Parameter
    ah_bias: nn.Parameter
    aw_bias: nn.Parameter
    ha_bias: nn.Parameter
    wa_bias: nn.Parameter
    ac_bias: nn.Parameter
    ca_bias: nn.Parameter

    def __init__(
        self, dim: int, num_heads: int, agents: int, grid: Grid, key_grid: Grid | None = None,
        num_prefix_tokens: int = 0, attn_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        where = type(self).__name__
        if dim % num_heads:
            raise ValueError(f"{where}: num_heads must divide dim={dim}, got {num_heads}")
        self.num_heads, self.num_prefix_tokens, self.side = num_heads, num_prefix_tokens, math.isqrt(max(agents, 0))
        if agents < 1 or self.side**2 != agents:
            raise ValueError(f"{where}: agents must be a square number of at least 1, got {agents}")
        self._check_agents(grid)
        self.attn_drop = nn.Dropout(attn_drop)
        self._make_biases(num_heads, agents, grid, key_grid or grid)

    def _check_agents(self, grid: Grid) -> None:
        if self.side > min(grid):
            raise ValueError(
                f"{type(self).__name__}: agents must be at most {min(grid) ** 2} for a map of {grid} tokens, got "
                f"{self.side**2}: use fewer agents or larger images"
            )

    def _make_biases(self, heads: int, agents: int, grid: Grid, key_grid: Grid) -> None:
        shapes = {
            "an_bias": (heads, agents, _COARSE, _COARSE),
            "na_bias": (heads, agents, _COARSE, _COARSE),
            "ah_bias": (1, heads, agents, key_grid[0], 1),
            "aw_bias": (1, heads, agents, 1, key_grid[1]),
            "ha_bias": (1, heads, grid[0], 1, agents),
            "wa_bias": (1, heads, 1, grid[1], agents),
        }
        if self.num_prefix_tokens:
            shapes["ac_bias"] = (1, heads, agents, self.num_prefix_tokens)
            shapes["ca_bias"] = (1, heads, self.num_prefix_tokens, agents)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02)))

    def agent_bias(self, grid: Grid) -> Tensor:
        """`B1`, `[1, H, agents, prefix + keys]`, for a keys' map of this grid."""
        rows = _resized(self.ah_bias[0, ..., 0], grid[0])[..., None]
        columns = _resized(self.aw_bias[0, ..., 0, :], grid[1])[..., None, :]
        bias = (_resized_map(self.an_bias, grid) + rows + columns).flatten(2)[None]
        return torch.cat([self.ac_bias, bias], -1) if self.num_prefix_tokens else bias

    def query_bias(self, grid: Grid) -> Tensor:
        """`B2`, `[1, H, prefix + queries, agents]`, for a queries' map of this grid."""
        rows = _resized(self.ha_bias[0, :, :, 0].transpose(1, 2), grid[0])[..., None]
        columns = _resized(self.wa_bias[0, :, 0].transpose(1, 2), grid[1])[..., None, :]
        bias = (_resized_map(self.na_bias, grid) + rows + columns).flatten(2).transpose(1, 2)[None]
        return torch.cat([self.ca_bias, bias], 2) if self.num_prefix_tokens else bias

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, key_grid: Grid | None = None) -> Tensor:
        """Attention of projected tokens `[B, prefix + Y * X, C]`, before the output's projection.

        Args:
            query: Its map has the shape `grid`.
            key: Its map has the shape `key_grid`; None is `grid`.
            value: As the key.
            grid: Rows and columns.
            key_grid: Rows and columns.
        """
        key_grid, prefix = key_grid or grid, self.num_prefix_tokens
        self._check_tokens(query, grid)
        agents = adaptive_avg_pool2d(to_map(query[:, prefix:], grid), self.side).flatten(2).transpose(1, 2)
        q, k, v, a = (x.unflatten(-1, (self.num_heads, -1)) for x in (query, key, value, agents))
        biases = self.agent_bias(key_grid), self.query_bias(grid)
        if self.training and self.attn_drop.p > 0:
            output = self._with_dropout(q, k, v, a, *biases)
        else:
            output = agent_attention(q, k, v, a, agent_bias=biases[0], query_bias=biases[1])
        values = to_map(value[:, prefix:], key_grid)
        if key_grid != grid:
            values = interpolate(values, size=grid, mode="bilinear", align_corners=False)
        local = self.dwc(values).flatten(2).transpose(1, 2)
        output = output.flatten(2)
        return torch.cat([output[:, :prefix], output[:, prefix:] + local], 1)

    def _check_tokens(self, query: Tensor, grid: Grid) -> None:
        expected = self.num_prefix_tokens + grid[0] * grid[1]
        if query.shape[1] != expected:
            raise ValueError(
                f"{type(self).__name__}: x must have {self.num_prefix_tokens} + {grid[0]} * {grid[1]} = {expected} "
                f"tokens, got {query.shape[1]}: call set_input_size(img_size=...) on the model, or create it with "
                "dynamic_img_size=True"
            )

    def _with_dropout(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, agent_bias: Tensor, query_bias: Tensor
    ) -> Tensor:
        q, k, v, a = (x.transpose(1, 2) for x in (q, k, v, a))
        scale = q.shape[-1] ** -0.5
        collect = self.attn_drop((scale * a @ k.transpose(-1, -2) + agent_bias).softmax(-1))
        read = self.attn_drop((scale * q @ a.transpose(-1, -2) + query_bias).softmax(-1))
        return (read @ (collect @ v)).transpose(1, 2)


class AgentAttention(AgentModule):
    """Agent attention in the place of timm's `Attention` of a vision transformer.

    Args:
        dim: Channels.
        num_heads: Heads, which divide `dim`.
        agents: Agents, a square number.
        grid: Rows and columns of the token map.
        num_prefix_tokens: Class and register tokens.
        qkv_bias: Whether the projection to query, key and value has a bias.
        attn_drop: Dropout of both attention maps.
        proj_drop: Dropout of the output.

    Attributes:
        grid: The map of the calls to come; whoever changes the image's size sets it.

    Raises:
        ValueError: a number that does not fit the others.

    Source: arXiv 2312.08874, the DeiT models.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, agents: int = 49, grid: Grid = (14, 14), num_prefix_tokens: int = 1,
        qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(dim, num_heads, agents, grid, None, num_prefix_tokens, attn_drop)
        self.grid = grid
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = depthwise(dim)

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        """`[B, prefix + Y * X, C]` to the same.

        Raises:
            ValueError: another number of tokens.
            NotImplementedError: a mask or causality, which agents cannot honour.
        """
        if attn_mask is not None or is_causal:
            given = "is_causal=True" if is_causal else "a mask"
            raise NotImplementedError(f"AgentAttention: attn_mask must be None and not causal, got {given}")
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.proj_drop(self.proj(self.attend(query, key, value, self.grid)))


class WindowAgentAttention(AgentModule):
    """Agent attention within the windows of a Swin transformer, without its relative position table.

    Args:
        dim: Channels.
        window_size: Rows and columns of a window.
        num_heads: Heads, which divide `dim`.
        agents: Agents of a window, a square number.
        qkv_bias: Whether the projection to query, key and value has a bias.
        attn_drop: Dropout of both attention maps.
        proj_drop: Dropout of the output.

    Raises:
        ValueError: a number that does not fit the others.

    Source: arXiv 2312.08874, the Swin models.
    """

    def __init__(
        self, dim: int, window_size: Grid, num_heads: int, *, agents: int = 49, qkv_bias: bool = True,
        attn_drop: float = 0.0, proj_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(dim, num_heads, agents, window_size, attn_drop=attn_drop)
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = depthwise(dim)

    def set_window_size(self, window_size: Grid) -> None:
        """Use windows of another size: the biases are interpolated."""
        self.window_size = window_size

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[windows * B, Y * X, C]` to the same.

        Raises:
            NotImplementedError: a mask, as shifted windows have: agents would carry what it hides across.
        """
        if mask is not None:
            raise NotImplementedError(
                f"WindowAgentAttention: mask must be None, got shape {tuple(mask.shape)}: use shift_size=0"
            )
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.proj_drop(self.proj(self.attend(query, key, value, self.window_size)))


class ReducedAgentAttention(AgentModule):
    """Agent attention of a pyramid vision transformer: keys and values may be of a smaller map.

    Args:
        dim: Channels.
        grid: Rows and columns of the token map, multiples of `sr_ratio`.
        num_heads: Heads, which divide `dim`.
        agents: Agents, a square number.
        sr_ratio: Side of the patches that a convolution makes one key of; 1 for none.
        qkv_bias: Whether the projections to query, key and value have a bias.
        attn_drop: Dropout of both attention maps.
        proj_drop: Dropout of the output.

    Raises:
        ValueError: a number that does not fit the others.

    Source: arXiv 2312.08874, the PVT models.
    """

    def __init__(
        self, dim: int, grid: Grid, num_heads: int, *, agents: int = 49, sr_ratio: int = 1, qkv_bias: bool = True,
        attn_drop: float = 0.0, proj_drop: float = 0.0,
    ) -> None:  # fmt: skip
        reduced = grid[0] // sr_ratio, grid[1] // sr_ratio
        super().__init__(dim, num_heads, agents, grid, reduced, attn_drop=attn_drop)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = depthwise(dim)
        if sr_ratio > 1:
            self.sr: nn.Conv2d | None = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
        else:
            self.sr = None

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`[B, Y * X, C]` of a map of this grid to the same."""
        source, key_grid = x, grid
        if self.sr is not None:
            reduced = self.sr(to_map(x, grid))
            key_grid = reduced.shape[2], reduced.shape[3]
            source = self.norm(reduced.flatten(2).transpose(1, 2))
        key, value = self.kv(source).chunk(2, -1)
        return self.proj_drop(self.proj(self.attend(self.q(x), key, value, grid, key_grid)))


class StripeAgentAttention(AgentModule):
    """Agent attention within the stripes of a CSWin transformer: it gets projected tokens and projects nothing.

    Args:
        dim: Channels.
        grid: Rows and columns of the token map, which the stripes divide.
        stripe: Rows and columns of a stripe.
        num_heads: Heads, which divide `dim`.
        agents: Agents of a stripe, a square number.
        attn_drop: Dropout of both attention maps.

    Raises:
        ValueError: a number that does not fit the others.

    Source: arXiv 2312.08874, the CSWin models.
    """

    def __init__(
        self, dim: int, grid: Grid, stripe: Grid, num_heads: int, *, agents: int = 49, attn_drop: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads, agents, stripe, attn_drop=attn_drop)
        self.set_grid(grid, stripe)
        self.get_v = depthwise(dim)

    @property
    def dwc(self) -> nn.Module:  # type: ignore[override]
        """The convolution, by the name it has in the other models."""
        return self.get_v

    def set_grid(self, grid: Grid, stripe: Grid) -> None:
        """Use a map and stripes of other sizes: the biases are interpolated.

        Raises:
            ValueError: stripes that do not divide the map, or have fewer rows or columns than the agents.
        """
        check_stripe("StripeAgentAttention", grid, stripe)
        self._check_agents(stripe)
        self.grid, self.stripe = grid, stripe

    def forward(self, qkv: Tensor) -> Tensor:
        """`[3, B, Y * X, C]` to `[B, Y * X, C]`."""
        query, key, value = to_stripes(qkv, self.grid, self.stripe)
        return from_stripes(self.attend(query, key, value, self.stripe), self.grid, self.stripe)


def check_stripe(where: str, grid: Grid, stripe: Grid) -> None:
    """Raise ValueError for stripes that do not divide a map."""
    if grid[0] % stripe[0] or grid[1] % stripe[1]:
        raise ValueError(f"{where}: stripe must divide grid={grid}, got {stripe}")


def to_stripes(tokens: Tensor, grid: Grid, stripe: Grid) -> Tensor:
    """`[n, B, Y * X, C]` of a map to `[n, B * stripes, y * x, C]`."""
    (rows, columns), (y, x) = grid, stripe
    tiles = tokens.unflatten(2, (rows // y, y, columns // x, x)).transpose(3, 4)
    return tiles.flatten(4, 5).flatten(1, 3)


def from_stripes(tokens: Tensor, grid: Grid, stripe: Grid) -> Tensor:
    """`[B * stripes, y * x, C]` to `[B, Y * X, C]` of a map."""
    (rows, columns), (y, x) = grid, stripe
    tiles = tokens.view(-1, rows // y, columns // x, y, x, tokens.shape[-1])
    return tiles.transpose(2, 3).flatten(1, 4)


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """`[B, Y * X, C]` to `[B, C, Y, X]`."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def depthwise(dim: int) -> nn.Conv2d:
    """The convolution of the values."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


def _resized_map(bias: Tensor, grid: Grid) -> Tensor:
    """`[H, agents, 7, 7]` to `[H, agents, *grid]`."""
    return interpolate(bias, size=grid, mode="bilinear", align_corners=False)


def _resized(bias: Tensor, size: int) -> Tensor:
    """`[H, agents, n]` to `[H, agents, size]`."""
    return bias if bias.shape[-1] == size else interpolate(bias, size=size, mode="linear", align_corners=False)
