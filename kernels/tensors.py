"""Tensors as kernels take them: strides, head dims, the current device, and the backward pass' row sums."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .softmax import delta_kernel

# Of the custom ops: one for each package that these files stand in, so that two copies can be loaded together.
NAMESPACE = (__package__ or "vision_attn.kernels").replace(".", "_")
_DELTA_ROWS = 64


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, token and head of `[B, S, H, D]`."""
    return x.stride(0), x.stride(1), x.stride(2)


def batch_stride(bias: Tensor | None) -> int:
    """Of a `[B, S]` bias whose tokens are neighbours in memory."""
    return 0 if bias is None else bias.stride(0)


def pointer(x: Tensor | None, other: Tensor) -> Tensor:
    """The tensor, or some other: a kernel adds to its pointers before it knows that nothing is there."""
    return other if x is None else x


def unit_rows(x: Tensor) -> Tensor:
    """The tensor itself where channels are neighbours in memory, else a copy in which they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor of the same shape."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def per_query_head(x: Tensor, query: Tensor, *leading: int) -> Tensor:
    """Room for gradients of keys or values: float32 where several query heads, or `leading` parts, are to be summed."""
    batch, tokens, heads, width = x.shape
    single = heads == query.shape[2] and math.prod(leading) == 1
    return x.new_empty(*leading, batch, tokens, query.shape[2], width, dtype=x.dtype if single else torch.float32)


def sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient `[B, S, H, D]` of keys or values that groups of query heads share, in their dtype."""
    if grad.shape != like.shape:
        grad = grad.unflatten(2, (like.shape[2], -1)).sum(3)
    return grad.to(like.dtype)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def head_constants(key: Tensor, value: Tensor) -> dict[str, Any]:
    """Head dims, the powers of two that hold them, and how products of their channels are taken."""
    return {
        "D": key.shape[3],
        "DV": value.shape[3],
        "BLOCK_D": power_of_two(key.shape[3]),
        "BLOCK_DV": power_of_two(value.shape[3]),
        # float32 on tensor cores in three parts, as exact as without them; AMD's take float32 as it is.
        "PRECISION": "ieee" if key.dtype != torch.float32 or torch.version.hip else "tf32x3",
    }


def delta_of(output: Tensor, grad_output: Tensor, grad_lse: Tensor, lse: Tensor) -> Tensor:
    """`rowsum(dO * O) - dLSE`, float32 `[B, S, H]`."""
    delta = torch.empty_like(lse)
    batch, tokens, heads, width = output.shape
    with on_device(output):
        delta_kernel[(batch * heads * -(-tokens // _DELTA_ROWS),)](
            output, grad_output, grad_lse, delta,
            strides(output), strides(grad_output), grad_lse.stride(), delta.stride(),
            heads, tokens, BLOCK=_DELTA_ROWS, DV=width, BLOCK_DV=power_of_two(width),
        )  # fmt: skip
    return delta


def power_of_two(width: int) -> int:
    """Least power of two of at least 16, the smallest side of a product on tensor cores, that holds `width`."""
    return max(16, 1 << max(width - 1, 0).bit_length())
