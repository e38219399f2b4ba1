"""Windowed attention through torch's compiled FlexAttention: a second opinion, and CLEAR's own engine.

Its block masks grow with the square of the number of blocks and every new shape compiles anew; it exists for comparison
and for GPUs without Triton kernels of ours. No backward pass on the CPU (PyTorch's own limit).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vision_attn.kernels.reach import Ball, Reach


def flex_windowed(query: Tensor, key: Tensor, value: Tensor, reach: Reach, scale: float) -> tuple[Tensor, Tensor]:
    """Windowed attention on the row-major sequence; arguments as `window_attention`, without a key bias.

    Raises:
        NotImplementedError: a gradient is asked for on the CPU, or values differ from keys in head dim there.
    """
    if query.device.type == "cpu" and any(x.requires_grad for x in (query, key, value)) and torch.is_grad_enabled():
        raise NotImplementedError("backend='flex' has no backward pass on the CPU: use backend='tiled'")
    heads_first = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    output, lse = _compiled()(
        *heads_first,
        block_mask=block_mask(reach, query.device.type),
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
        return_lse=True,
    )
    return output.transpose(1, 2), lse.transpose(1, 2)


@lru_cache(maxsize=16)
def block_mask(reach: Reach, device: str) -> Any:
    """FlexAttention's block mask of a window on the row-major sequence."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = math.prod(reach.grid)
    return create_block_mask(mask_mod(reach, device), None, None, tokens, tokens, device=device, _compile=False)


def mask_mod(reach: Reach, device: str) -> Any:
    """The window as FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`."""
    coordinates = _coordinates(reach.grid, device)
    if isinstance(reach, Ball):

        def ball(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return sum((x[q_idx] - x[kv_idx]) ** 2 for x in coordinates) < reach.radius**2  # type: ignore[return-value]

        return ball
    windows = [tuple(x.to(device) for x in reach.axis_windows(axis)) for axis in range(len(reach.grid))]

    def box(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible = q_idx >= 0
        for x, (first, count), d in zip(coordinates, windows, reach.dilation, strict=True):
            steps = x[kv_idx] - first[x[q_idx]]
            visible = visible & (steps >= 0) & (steps % d == 0) & (steps // d < count[x[q_idx]])
        return visible

    return box


def _coordinates(grid: tuple[int, ...], device: str) -> list[Tensor]:
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    return [axis.flatten() for axis in axes]


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
