"""Generalized Neighborhood Attention: each token attends a box of tokens around it.

    out_i = softmax(scale * q_i K_W(i)^T) V_W(i),   W(i) = product over axes of `kernel_size` keys around i's leader

Per axis a query sees `kernel_size` keys of its own dilation group, `kernel_size // 2` of them left of its leader; the
window is shifted inward at borders, never shrunk. `stride` consecutive queries share the window of one leader.

Source: arXiv 2504.16922 (GNA), arXiv 2204.07143 (NA), arXiv 2209.15001 (dilation); semantics of NATTEN 0.21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vision_attn.backends import resolve, windowed
from vision_attn.kernels.reach import Box
from vision_attn.layout import TokenLayout
from vision_attn.operators.arguments import (
    autocast,
    check_attention_inputs,
    check_extra,
    no_autocast,
    per_axis,
    resolve_scale,
)
from vision_attn.operators.registry import register_operator
from vision_attn.operators.window import WindowOperator

PerAxis = int | Sequence[int]


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """1-D Generalized Neighborhood Attention on `[B, X, H, D]`; everything else as `na2d`.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 10, 2, 8)
        >>> na1d(x, x, x, kernel_size=3).shape
        torch.Size([1, 10, 2, 8])
    """
    return _neighborhood(
        "na1d", 1, query, key, value, kernel_size, stride, dilation, is_causal, scale,
        additional_keys, additional_values, return_lse, backend,
    )  # fmt: skip


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """2-D Generalized Neighborhood Attention.

    Args:
        query: `[B, Y, X, H, D]`, any floating dtype.
        key: `[B, Y, X, Hkv, D]`; `Hkv` divides `H`, query head `h` uses key head `h // (H // Hkv)`.
        value: `[B, Y, X, Hkv, Dv]`.
        kernel_size: Window in tokens, one value or one per axis; `kernel_size * dilation` at most the axis length.
        stride: Queries that share one window, 1 to `kernel_size`; `stride == kernel_size` is blocked attention.
        dilation: Step between the keys of a window, in tokens, at least 1.
        is_causal: Per axis, hide keys after the query.
        scale: Factor on the logits; None is `D ** -0.5`.
        additional_keys: `[B, E, Hkv, D]`, seen by every query in the same softmax.
        additional_values: `[B, E, Hkv, Dv]`.
        return_lse: Also return the natural log-sum-exp.
        backend: `"auto"`, `"dense"`, `"tiled"`, `"flex"`, `"triton"` or `"natten"`.

    Returns:
        `[B, Y, X, H, Dv]` in the query's dtype; with `return_lse` also `[B, Y, X, H]` in float32 (float64 for
        float64). Differentiable in all tensors, the log-sum-exp included; deterministic on the CPU.

    Raises:
        ValueError, TypeError: arguments that do not fit, before any work.
        ImportError, RuntimeError: an unavailable backend asked for by name.

    Cost:
        `4 * B * Y * X * H * D * prod(kernel_size)` FLOPs; memory linear in `Y * X` (quadratic with `"dense"`).

    Source: arXiv 2504.16922; `natten.na2d` (which takes `scale=0` for "default"; here only None is).

    Example:
        >>> import torch
        >>> x = torch.randn(1, 6, 9, 2, 8)
        >>> na2d(x, x, x, kernel_size=(3, 5), stride=(1, 2)).shape
        torch.Size([1, 6, 9, 2, 8])
    """
    return _neighborhood(
        "na2d", 2, query, key, value, kernel_size, stride, dilation, is_causal, scale,
        additional_keys, additional_values, return_lse, backend,
    )  # fmt: skip


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """3-D Generalized Neighborhood Attention on `[B, T, Y, X, H, D]`; everything else as `na2d`.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 2, 4, 5, 2, 8)
        >>> na3d(x, x, x, kernel_size=(2, 3, 3), is_causal=(True, False, False)).shape
        torch.Size([1, 2, 4, 5, 2, 8])
    """
    return _neighborhood(
        "na3d", 3, query, key, value, kernel_size, stride, dilation, is_causal, scale,
        additional_keys, additional_values, return_lse, backend,
    )  # fmt: skip


def _neighborhood(
    where: str,
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis,
    dilation: PerAxis,
    is_causal: bool | Sequence[bool],
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    return_lse: bool,
    backend: str,
) -> Any:
    query, key, value, additional_keys, additional_values = autocast(
        query, key, value, additional_keys, additional_values
    )
    check_attention_inputs(where, query, key, value, grid_axes=axes)
    check_extra(where, query, key, value, additional_keys, additional_values)
    grid = tuple(query.shape[1:-2])
    reach = checked_box(where, grid, kernel_size, stride, dilation, is_causal)
    extra = [] if additional_keys is None or additional_values is None else [(additional_keys, additional_values, None)]
    q, k, v = (x.flatten(1, axes) for x in (query, key, value))
    factor = resolve_scale(where, scale, query.shape[-1])
    chosen = resolve(backend, where, query, value, reach)
    with no_autocast(query):
        output, lse = windowed(q, k, v, reach, factor, extra=extra, return_lse=return_lse, backend=chosen)
    output, lse = output.unflatten(1, grid), lse.unflatten(1, grid)
    return (output, lse) if return_lse else output


def checked_box(
    where: str, grid: tuple[int, ...], kernel_size: Any, stride: Any = 1, dilation: Any = 1, is_causal: Any = False
) -> Box:
    """The window of these arguments on a token grid.

    Raises:
        ValueError: a value that does not fit its axis, naming argument, axis and the nearest legal value.
        TypeError: not an integer.
    """
    axes = len(grid)
    kernel, stride, dilation = (
        per_axis(where, name, value, axes)
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    causal = per_axis(where, "is_causal", is_causal, axes, bool)
    if min(grid) < 1:
        raise ValueError(f"{where}: query must have at least 1 token on every axis of its grid, got {grid}")
    for axis, (n, k, s, d) in enumerate(zip(grid, kernel, stride, dilation, strict=True)):
        for name, value in (("kernel_size", k), ("stride", s), ("dilation", d)):
            if value < 1:
                raise ValueError(f"{where}: {name} must be at least 1 on axis {axis}, got {value}")
        if k * d > n:
            raise ValueError(_does_not_fit(where, grid, kernel, dilation, axis))
        if s > k:
            raise ValueError(
                f"{where}: stride must be at most kernel_size={k} on axis {axis}, got {s}: use stride <= {k}"
            )
    return Box(grid, kernel, stride, dilation, causal)


def _does_not_fit(
    where: str, grid: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...], axis: int
) -> str:
    largest, spread = grid[axis] // dilation[axis], f" with dilation={dilation}" if max(dilation) > 1 else ""
    fix = f"use a kernel of at most {largest}" if largest else f"use a dilation of at most {grid[axis]}"
    return (
        f"{where}: kernel_size={kernel}{spread} does not fit the token grid {grid} on axis {axis}: "
        f"{fix} (the Neighborhood operator clips by itself)"
    )


@register_operator("neighborhood")
@dataclass(frozen=True)
class Neighborhood(WindowOperator):
    """Generalized Neighborhood Attention as an operator for whole sequences.

    Grid tokens attend their window and all text tokens; text tokens attend everything. Per axis the kernel is clipped
    to the grid, then the stride to the kernel and the dilation to `grid // kernel`.

    Args:
        kernel_size: Window in tokens, one value or one per grid axis.
        stride: Queries that share one window.
        dilation: Step between keys.

    Raises:
        ValueError: a value below 1; at the call, a number of axes other than the grid's.
        TypeError: not an integer.

    Source: arXiv 2504.16922; extra keys as NATTEN's `additional_keys`.
    """

    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation"):
            object.__setattr__(self, name, checked_size("Neighborhood", name, getattr(self, name)))

    def reach(self, layout: TokenLayout) -> Box:
        """The window on this layout's grid, clipped to it."""
        sizes = ((name, getattr(self, name)) for name in ("kernel_size", "stride", "dilation"))
        return clipped_box("Neighborhood", layout.grid, *sizes)


def checked_size(where: str, name: str, value: Any, least: int = 1) -> PerAxis:
    """A field of an operator: an integer, or a tuple of one per axis.

    Raises:
        ValueError: a value below `least`, or not one to three of them.
        TypeError: not an integer.
    """
    if isinstance(value, (list, tuple)):  # of a tuple's kinds, such as torch.Size, only itself prints as one
        value = tuple(value)
    axes = len(value) if isinstance(value, tuple) else 1
    if not 1 <= axes <= 3:
        raise ValueError(f"{where}: {name} must be one value or 1 to 3 of them, got {value!r}")
    if any(item < least for item in per_axis(where, name, value, axes)):
        raise ValueError(f"{where}: {name} must be at least {least}, got {value!r}")
    return value


def clipped_box(
    where: str, grid: tuple[int, ...], kernel: tuple[str, PerAxis], stride: tuple[str, PerAxis],
    dilation: tuple[str, PerAxis],
) -> Box:  # fmt: skip
    """The window of named sizes, clipped to a grid: kernel to axis, stride to kernel, dilation to `axis // kernel`.

    Raises:
        ValueError: a number of values other than the grid's axes.
    """
    sizes = (per_axis(where, name, value, len(grid)) for name, value in (kernel, stride, dilation))
    clipped = [_clip(n, k, s, d) for n, k, s, d in zip(grid, *sizes, strict=True)]
    kernels, strides, dilations = (tuple(values) for values in zip(*clipped, strict=True))
    return Box(grid, kernels, strides, dilations, (False,) * len(grid))


def _clip(n: int, k: int, s: int, d: int) -> tuple[int, int, int]:
    k = min(k, n)
    return k, min(s, k), min(d, n // k)
