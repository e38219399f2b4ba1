"""Windowed attention through the Triton kernels of `vision_attn.kernels`, on CUDA and ROCm GPUs.

With `TRITON_INTERPRET=1` set before Triton is first imported, the same kernels run on the CPU, very slowly: for tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_attn.backends.attend import refuse_forward_mode
from vision_attn.kernels.reach import Ball, Reach, to_arguments

# What the kernels' own tables cover.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_TILE = 256  # tokens by which a box of tokens may stand over the grid's edge
# Compute capability of the first CUDA GPUs that multiply bfloat16.
_LEAST_CAPABILITY = (8, 0)


def interprets() -> bool:
    """Whether Triton runs kernels on the CPU, as it decides when they are defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton() -> str | None:
    """What keeps the kernels from running on this machine, None where nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "pip install triton (it comes with torch on Linux)"
    if interprets():
        return None
    if not torch.cuda.is_available():
        return "it needs a CUDA or ROCm GPU and torch sees none"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        return f"it needs a CUDA GPU of compute capability 8.0 or newer, this one has {capability[0]}.{capability[1]}"
    return None


def why_not_served(query: Tensor, value: Tensor, reach: Reach | None = None) -> str | None:
    """What the kernels cannot do with these tensors and this window, None where nothing is in the way."""
    if not query.is_cuda and not interprets():
        return f"takes tensors on a CUDA or ROCm GPU, got {query.device}"
    if query.dtype not in DTYPES:
        return f"has no {query.dtype}"
    if query.dtype == torch.bfloat16 and interprets():
        return "has no torch.bfloat16 under TRITON_INTERPRET=1, whose products take its bits for whole numbers"
    width = max(query.shape[-1], value.shape[-1])
    if width > MAX_HEAD_DIM:
        return f"takes head dims up to {MAX_HEAD_DIM}, got {width}"
    if isinstance(reach, Ball) and not _fits_int32(reach):
        return f"counts squared steps in 32 bits, which radius and grid {reach.grid} exceed"
    return None


def _fits_int32(reach: Ball) -> bool:
    farthest = zip(reach.weights, reach.grid, strict=True)
    return sum(weight * (n + MAX_TILE) ** 2 for weight, n in farthest) < 2**31


def triton_windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: Reach,
    scale: float,
    *,
    before: int = 0,
    key_bias: Tensor | None = None,
    extra: Sequence[tuple[Tensor, Tensor, Tensor | None]] = (),
) -> tuple[Tensor, Tensor]:
    """One softmax over each grid token's window, all tokens off the grid and all extra keys.

    Args:
        query: `[B, S, H, D]`, the whole sequence, or the grid's tokens `[B, N, H, D]`.
        key: `[B, S, Hkv, D]`, the grid's tokens in row-major order behind the first `before`.
        value: `[B, S, Hkv, Dv]`.
        reach: The window.
        scale: Factor on the logits.
        before: Tokens before the grid.
        key_bias: `[B, S]`, added to the logits of a key.
        extra: Further keys and values for the grid's queries, each with a bias or None.

    Returns:
        Output `[B, Sq, H, Dv]` and log-sum-exp `[B, Sq, H]`; tokens off the grid see the whole sequence.

    Raises:
        NotImplementedError: a dtype, head dim or device that the kernels do not take.
    """
    _require_served(query, key, value, reach)
    from vision_attn.kernels.windowed import windowed

    extra_key, extra_value, extra_bias = _joined(query, extra)
    bias = None if key_bias is None else key_bias.contiguous()
    return windowed(query, key, value, bias, extra_key, extra_value, extra_bias, *_arguments(reach), before, scale)


def triton_block_sparse(
    query: Tensor, key: Tensor, value: Tensor, block_index: Tensor, blocks: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over listed blocks of keys; arguments as `vision_attn.backends.blocks.block_sparse`.

    Raises:
        NotImplementedError: a dtype, head dim or device that the kernels do not take.
    """
    _require_served(query, key, value)
    from vision_attn.kernels.block_sparse import block_sparse

    return block_sparse(query, key, value, block_index, *blocks, scale)


def triton_agent(query: Tensor, key: Tensor, value: Tensor, agents: Tensor, *biases_and_scales: Any) -> Tensor:
    """Agent attention; arguments as `vision_attn.backends.agent.dense_agent`.

    Raises:
        NotImplementedError: a dtype, head dim or device that the kernels do not take.
    """
    _require_served(query, key, value)
    from vision_attn.kernels.biased import agent

    return agent(query, key, value, agents, *biases_and_scales)


def _require_served(query: Tensor, key: Tensor, value: Tensor, reach: Reach | None = None) -> None:
    reason = why_not_served(query, value, reach)
    if reason is not None:
        raise NotImplementedError(f"backend='triton' {reason}: use backend='tiled'")
    refuse_forward_mode("triton", query, key, value)


def _arguments(reach: Reach) -> tuple[list[int], list[int], list[int], list[int], list[bool], int]:
    *window, limit = to_arguments(reach)
    if isinstance(reach, Ball):  # all is seen beyond the corner, and what is larger may not fit 32 bits
        limit = min(limit, 1 + sum(w * (n - 1) ** 2 for w, n in zip(reach.weights, reach.grid, strict=True)))
    return *window, limit  # type: ignore[return-value]


def _joined(
    query: Tensor, extra: Sequence[tuple[Tensor, Tensor, Tensor | None]]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """All extra keys as one; none at all as three times None."""
    parts = [part for part in extra if part[0].shape[1] > 0]
    if not parts:
        return None, None, None
    if len(parts) == 1:
        key, value, bias = parts[0]
        return key, value, None if bias is None else bias.contiguous()
    keys, values = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))  # type: ignore[misc]
    if all(bias is None for _, _, bias in parts):
        return keys, values, None
    biases = [query.new_zeros(key.shape[:2]) if bias is None else bias.to(query.dtype) for key, _, bias in parts]
    return keys, values, torch.cat(biases, 1)
