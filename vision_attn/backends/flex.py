"""Windowed attention through torch's compiled FlexAttention: a second opinion, and CLEAR's own engine.

Making a block mask takes memory quadratic in the tokens (`create_block_mask` evaluates the whole mask) and every new
shape compiles anew; it exists for comparison and for GPUs without Triton kernels of ours. On the CPU it needs a C++
compiler and has no backward pass (PyTorch's own limits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vision_attn.kernels.reach import Ball, Reach


def flex_windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Reach,
    scale: float,
    extra: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Windowed attention on the row-major sequence, with extra keys behind it in the same call.

    Args as `vision_attn.backends.windowed`, without biases. On the CPU the log-sum-exp is NaN: torch has none there.

    Raises:
        NotImplementedError: on the CPU, a gradient or the log-sum-exp is asked for.
    """
    on_cpu = query.device.type == "cpu"
    key = torch.cat([key, *(extra_key for extra_key, _, _ in extra)], 1)
    value = torch.cat([value, *(extra_value for _, extra_value, _ in extra)], 1)
    _check_torch_can(on_cpu, torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)), return_lse)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    mask = block_mask(reach, k.shape[2] - q.shape[2], str(query.device))
    call = _compiled()
    grouped = q.shape[1] != k.shape[1]
    if on_cpu:
        output = call(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
        lse = torch.full_like(q[..., 0], math.nan)
    else:
        output, lse = call(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, return_lse=True)
    return output.transpose(1, 2), lse.transpose(1, 2)


def _check_torch_can(on_cpu: bool, needs_gradient: bool, return_lse: bool) -> None:
    for asked, what in ((needs_gradient, "backward pass"), (return_lse, "log-sum-exp")):
        if on_cpu and asked:
            raise NotImplementedError(f"backend='flex' has no {what} on the CPU: use backend='tiled'")


@lru_cache(maxsize=16)
def block_mask(reach: Reach, extra: int, device: str) -> Any:
    """FlexAttention's block mask of a window on the row-major sequence, with `extra` keys behind it."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = math.prod(reach.grid)
    window = mask_mod(reach, device)

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx >= tokens) | window(b, h, q_idx, kv_idx.clamp(max=tokens - 1))

    return create_block_mask(visible, None, None, tokens, tokens + extra, device=device)


def mask_mod(reach: Reach, device: str) -> Any:
    """The window as FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`."""
    coordinates = _coordinates(reach.grid, device)
    if isinstance(reach, Ball):

        def ball(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            steps = (w * (x[q_idx] - x[kv_idx]) ** 2 for w, x in zip(reach.weights, coordinates, strict=True))
            return sum(steps) < reach.limit  # type: ignore[return-value]

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
