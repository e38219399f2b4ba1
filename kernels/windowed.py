"""Windowed attention as custom ops over the Triton kernels: forward, backward, shapes for `torch.compile`.

One op serves boxes (Generalized Neighborhood Attention) and balls (CLEAR), with text tokens in the sequence and further
keys from elsewhere. Nothing is permuted, padded or masked in memory; the backward pass has no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .geometry import Geometry, KeyPart, QueryPart, geometry_of, key_parts, query_parts
from .launch import LaunchConfig, architecture_of, choose, launch_options, tile_shape
from .tensors import (
    NAMESPACE,
    batch_stride,
    delta_of,
    empty_like,
    head_constants,
    on_device,
    per_query_head,
    pointer,
    strides,
    sum_groups,
    unit_rows,
)
from .windowed_backward import _windowed_backward_dkv_kernel, _windowed_backward_dq_kernel
from .windowed_forward import _windowed_forward_kernel


@torch.library.custom_op(f"{NAMESPACE}::windowed", mutates_args=())
def windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_bias: Tensor | None,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    limit: int,
    before: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of a sequence whose grid tokens see a window, all tokens off the grid and all extra keys.

    Tokens off the grid see the whole sequence and no extra keys.

    Args:
        query: `[B, S, H, D]`, or the grid's tokens alone, `[B, N, H, D]`; float16, bfloat16 or float32, D up to 256.
        key: `[B, S, Hkv, D]`, the grid's `N` tokens in row-major order behind the first `before`.
        value: `[B, S, Hkv, Dv]`.
        bias: `[B, S]`, added to the logits of a key; `-inf` hides it. No gradient.
        extra_key: `[B, P, Hkv, D]`.
        extra_value: `[B, P, Hkv, Dv]`.
        extra_bias: `[B, P]`. No gradient.
        grid: Tokens per axis, one to three of them.
        window: Kernel size per axis; for a ball the weight of the axis' squared steps.
        stride: As for `na3d`.
        dilation: As for `na3d`.
        is_causal: As for `na3d`.
        limit: Weighted squared steps of a ball stay below it; 0 for a box.
        before: Tokens before the grid.
        scale: Factor on the logits.

    Returns:
        Output `[B, Sq, H, Dv]` in the query's dtype and natural log-sum-exp `[B, Sq, H]` in float32; zeros and `-inf`
        for a query without keys.

    Source: arXiv 2504.16922 (boxes), arXiv 2412.16112 (balls), arXiv 2205.14135 (online softmax).
    """
    geometry = geometry_of(grid, window, stride, dilation, is_causal, limit)
    return forward(Call(query, key, value, bias, extra_key, extra_value, extra_bias, geometry, before, scale))


@windowed.register_fake
def _(query, key, value, *args):  # type: ignore[no-untyped-def]
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::windowed_backward", mutates_args=())
def windowed_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_bias: Tensor | None,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    limit: int,
    before: int,
    scale: float,
) -> list[Tensor]:
    """Gradients of `windowed` for query, key, value and, where they exist, extra key and extra value."""
    geometry = geometry_of(grid, window, stride, dilation, is_causal, limit)
    call = Call(query, key, value, bias, extra_key, extra_value, extra_bias, geometry, before, scale)
    return backward(call, output, lse, grad_output, grad_lse)


@windowed_backward.register_fake
def _(grad_output, grad_lse, output, lse, query, key, value, bias, extra_key, extra_value, *args):  # type: ignore[no-untyped-def]
    needed = (query, key, value, extra_key, extra_value)
    return [empty_like(x) for x in needed if x is not None]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.grid, ctx.window, ctx.stride, ctx.dilation, ctx.is_causal, ctx.limit, ctx.before, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad_output, grad_lse):  # type: ignore[no-untyped-def]
    window = (ctx.grid, ctx.window, ctx.stride, ctx.dilation, ctx.is_causal, ctx.limit, ctx.before, ctx.scale)
    grads = windowed_backward(grad_output, grad_lse, *ctx.saved_tensors, *window)
    extra = grads[3:] if len(grads) == 5 else (None, None)
    return *grads[:3], None, *extra, None, *(None,) * len(window)


windowed.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class Call:
    """The arguments of `windowed`, its window as a `Geometry`."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    extra_key: Tensor | None
    extra_value: Tensor | None
    extra_bias: Tensor | None
    geometry: Geometry
    before: int
    scale: float

    @property
    def extra_tokens(self) -> int:
        """Number of extra keys."""
        return 0 if self.extra_key is None else self.extra_key.shape[1]

    def query_parts(self) -> list[QueryPart]:
        """What the launches over queries are."""
        return query_parts(self.geometry, self.before, self.query.shape[1], self.key.shape[1])

    def key_parts(self) -> list[KeyPart]:
        """What the launches over keys are."""
        return key_parts(self.geometry, self.before, self.query.shape[1], self.key.shape[1], self.extra_tokens)

    def config(self, kernel: str) -> LaunchConfig:
        """The launch of a kernel on this device."""
        head_dim = max(self.query.shape[3], self.value.shape[3])
        architecture = architecture_of(self.query.device)
        return choose(kernel, head_dim, self.query.dtype, architecture, self.geometry.window_keys)


def forward(
    call: Call, config: LaunchConfig | None = None, counters: Tensor | None = None, aligned: bool = False
) -> tuple[Tensor, Tensor]:
    """`windowed` with a chosen launch.

    Args:
        call: The arguments.
        config: None for the one of this device.
        counters: int32 `[B * H * tiles, 2]` for the key boxes that each program of the grid visits and masks.
        aligned: Key boxes start at multiples of their size, not where a window does.
    """
    query, key, value = (unit_rows(x) for x in (call.query, call.key, call.value))
    output = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    config = config or call.config("windowed_forward")
    if query.shape[0] == 0:
        return output, lse
    for part in call.query_parts():
        geometry = part.geometry
        tile = tile_shape(config.q_tokens, geometry.group_lengths)
        tiles = geometry.tiles(tile)
        counted = counters is not None and geometry.windowed
        extra = _extra_arguments(call, part.sees_extra)
        with on_device(query):
            _windowed_forward_kernel[(query.shape[0] * query.shape[2] * tiles,)](
                query, key, value, pointer(call.bias, query), *extra.pointers(query), output, lse,
                counters if counted else None,
                strides(query), strides(key), strides(value), *extra.strides, strides(output), lse.stride(),
                batch_stride(call.bias), extra.bias_stride,
                query.shape[2], query.shape[2] // key.shape[2], tiles, call.scale, *_window(geometry),
                *part.queries.place, *part.grid_keys.place, part.rows.count, *part.rows.place, extra.tokens,
                HAS_BIAS=call.bias is not None, HAS_EXTRA=extra.tokens > 0, HAS_EXTRA_BIAS=extra.has_bias,
                COUNT=counted, ALIGNED=aligned, **_constants(geometry, config, tile, key, value, "kv", (key, value)),
            )  # fmt: skip
    return output, lse


def backward(
    call: Call,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    config_dq: LaunchConfig | None = None,
    config_dkv: LaunchConfig | None = None,
) -> list[Tensor]:
    """`windowed_backward` with chosen launches."""
    inputs = [x for x in (call.query, call.key, call.value, call.extra_key, call.extra_value) if x is not None]
    config_dq, config_dkv = (
        config_dq or call.config("windowed_backward_dq"),
        config_dkv or call.config("windowed_backward_dkv"),
    )
    if call.query.shape[0] == 0:
        return [empty_like(x).zero_() for x in inputs]
    grads = [empty_like(call.query), *(per_query_head(x, call.query) for x in inputs[1:])]
    grad_output = unit_rows(grad_output)
    delta = delta_of(output, grad_output, grad_lse, lse)
    for part in call.query_parts():
        _launch_dq(call, part, config_dq, grad_output, lse, delta, grads[0])
    for key_part in call.key_parts():
        _launch_dkv(call, key_part, config_dkv, grad_output, lse, delta, grads[3:] if key_part.is_extra else grads[1:3])
    return [sum_groups(grad, x) for grad, x in zip(grads, inputs, strict=True)]


def _launch_dq(
    call: Call, part: QueryPart, config: LaunchConfig, grad_output: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor
) -> None:
    query, key, value = (unit_rows(x) for x in (call.query, call.key, call.value))
    geometry, extra = part.geometry, _extra_arguments(call, part.sees_extra)
    tile = tile_shape(config.q_tokens, geometry.group_lengths)
    tiles = geometry.tiles(tile)
    with on_device(query):
        _windowed_backward_dq_kernel[(query.shape[0] * query.shape[2] * tiles,)](
            query, key, value, pointer(call.bias, query), *extra.pointers(query), grad_output, lse, delta, grad_q,
            strides(query), strides(key), strides(value), *extra.strides, strides(grad_output), lse.stride(),
            strides(grad_q), batch_stride(call.bias), extra.bias_stride,
            query.shape[2], query.shape[2] // key.shape[2], tiles, call.scale, *_window(geometry),
            *part.queries.place, *part.grid_keys.place, part.rows.count, *part.rows.place, extra.tokens,
            HAS_BIAS=call.bias is not None, HAS_EXTRA=extra.tokens > 0, HAS_EXTRA_BIAS=extra.has_bias,
            ALIGNED=False, **_constants(geometry, config, tile, key, value, "kv", (key, value)),
        )  # fmt: skip


def _launch_dkv(
    call: Call,
    part: KeyPart,
    config: LaunchConfig,
    grad_output: Tensor,
    lse: Tensor,
    delta: Tensor,
    grads: list[Tensor],
) -> None:
    query, geometry = unit_rows(call.query), part.geometry
    key, value, bias = (
        (call.extra_key, call.extra_value, call.extra_bias) if part.is_extra else (call.key, call.value, call.bias)
    )
    assert key is not None
    assert value is not None
    key, value = unit_rows(key), unit_rows(value)
    tile = tile_shape(config.kv_tokens, geometry.group_lengths)
    tiles = geometry.tiles(tile)
    with on_device(query):
        _windowed_backward_dkv_kernel[(key.shape[0] * query.shape[2] * tiles,)](
            query, key, value, pointer(bias, query), grad_output, lse, delta, *grads,
            strides(query), strides(key), strides(value), strides(grad_output), lse.stride(),
            *map(strides, grads), batch_stride(bias),
            query.shape[2], query.shape[2] // key.shape[2], tiles, call.scale, *_window(geometry),
            *part.grid_queries.place, *part.keys.place, part.rows.count, *part.rows.place,
            HAS_BIAS=bias is not None, ALIGNED=False,
            **_constants(geometry, config, tile, key, value, "q", (query, grad_output, lse)),
        )  # fmt: skip


@dataclass(frozen=True)
class _Extra:
    """The extra keys of a launch, if any."""

    tensors: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    strides: tuple[tuple[int, int, int], tuple[int, int, int]] = ((0, 0, 0), (0, 0, 0))

    @property
    def tokens(self) -> int:
        return 0 if self.tensors[0] is None else self.tensors[0].shape[1]

    @property
    def has_bias(self) -> bool:
        return self.tensors[2] is not None

    @property
    def bias_stride(self) -> int:
        return batch_stride(self.tensors[2])

    def pointers(self, query: Tensor) -> list[Tensor]:
        return [pointer(x, query) for x in self.tensors]


def _extra_arguments(call: Call, seen: bool) -> _Extra:
    if call.extra_key is None or call.extra_value is None or call.extra_tokens == 0 or not seen:
        return _Extra()
    key, value = unit_rows(call.extra_key), unit_rows(call.extra_value)
    return _Extra((key, value, call.extra_bias), (strides(key), strides(value)))


def _window(geometry: Geometry) -> tuple[Any, ...]:
    return geometry.grid, geometry.window, geometry.stride, geometry.dilation, geometry.limit


def _constants(
    geometry: Geometry,
    config: LaunchConfig,
    fixed: tuple[int, int, int],
    key: Tensor,
    value: Tensor,
    walked: str,
    read: tuple[Tensor, ...],
) -> dict[str, Any]:
    """What a launch compiles in: the window's kind, tiles, head dims; and its warps and stages.

    Args:
        geometry: The window.
        config: Of this kernel.
        fixed: The tile that a program holds.
        key: For its head dim.
        value: For its head dim.
        walked: Whether programs walk over boxes of `q` or `kv`.
        read: Tensors whose rows of a walked box are read in one piece.
    """
    moving = config.kv_tokens if walked == "kv" else config.q_tokens
    other = tile_shape(moving, geometry.group_lengths)
    return (
        {
            "WINDOWED": geometry.windowed,
            "BALL": geometry.limit > 0,
            "CAUSAL": geometry.is_causal,
            "AXES": geometry.axes,
            "Q_TILE": fixed if walked == "kv" else other,
            "KV_TILE": other if walked == "kv" else fixed,
            "OFFSET": _offset_type(geometry, other, read),
        }
        | launch_options(config)
        | head_constants(key, value)
    )


def _offset_type(geometry: Geometry, tile: tuple[int, int, int], tensors: tuple[Tensor, ...]) -> tl.dtype:
    """Type of offsets within a box of tokens: 32 bits, which take half the registers, wherever they suffice."""
    (t, y, x), (_, rows, columns) = ((n - 1) * d for n, d in zip(tile, geometry.dilation, strict=True)), geometry.grid
    farthest = (t * rows + y) * columns + x
    return tl.int32 if farthest * max(tensor.stride(1) for tensor in tensors) < 2**31 else tl.int64
