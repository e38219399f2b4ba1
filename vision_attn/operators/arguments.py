"""Validation that the functional operators share: wrong input is named before any work starts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_attn.errors import UnsupportedError
from vision_attn.layout import TokenLayout

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def autocast(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the dtype of the surrounding autocast region, as `scaled_dot_product_attention` takes them.

    Integers, float64 and None pass as they are; without autocast everything does.
    """
    device = next((x.device.type for x in tensors if isinstance(x, Tensor)), "cpu")
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    casts = (torch.float16, torch.bfloat16, torch.float32)
    return [x.to(dtype) if isinstance(x, Tensor) and x.dtype in casts else x for x in tensors]


def no_autocast(x: Tensor) -> Any:
    """A region in which our own arithmetic keeps the dtypes it chooses."""
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else contextlib.nullcontext()


def joint_inputs(where: str, query: Tensor, key: Tensor, value: Tensor, layout: Any) -> list[Tensor]:
    """The `[B, S, H, D]` tensors as `autocast` gives them, checked against each other and against their layout.

    Raises:
        TypeError: not a layout, or as `check_attention_inputs`.
        ValueError: a sequence of another length than the layout's, or as `check_attention_inputs`.
    """
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"{where}: layout must be a TokenLayout, got {layout!r}: write va.TokenLayout(grid=(Y, X))")
    query, key, value = autocast(query, key, value)
    check_attention_inputs(where, query, key, value)
    layout.check(query.shape[1])
    return [query, key, value]


def check_cross_inputs(where: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """`check_attention_inputs` for `[B, S, H, D]` tensors whose keys may be more or fewer than the queries."""
    _check_kinds(where, query, key, value, 1)
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"{where}: key must have the query's batch {query.shape[0]}, got {key.shape[0]}")
    _check_key_and_value(where, query, key, value)


def check_attention_inputs(where: str, query: Tensor, key: Tensor, value: Tensor, *, grid_axes: int = 1) -> None:
    """Check `[B, *grid, H, D]` query, key and value against each other.

    Args:
        where: Name of the public function.
        query: Reference for batch, grid, head dim, dtype and device.
        key: As the query, with `Hkv` heads that divide `H`.
        value: As the key, with any head dim.
        grid_axes: Axes between batch and heads.

    Raises:
        TypeError: not a tensor, not floating point.
        ValueError: rank, shape, dtype or device do not fit.
        NotImplementedError: a sparse or nested tensor.
    """
    _check_kinds(where, query, key, value, grid_axes)
    if key.shape[:-2] != query.shape[:-2]:
        expected, given = tuple(query.shape[:-2]), tuple(key.shape[:-2])
        raise ValueError(f"{where}: key must have the query's batch and tokens {expected}, got {given}")
    _check_key_and_value(where, query, key, value)


def _check_kinds(where: str, query: Tensor, key: Tensor, value: Tensor, grid_axes: int) -> None:
    rank = grid_axes + 3
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided:
            kind = "a nested tensor" if x.is_nested else f"{x.layout}"
            raise NotImplementedError(f"{where}: {name} must be a dense strided tensor, got {kind}: use .to_dense()")
        if x.ndim != rank:
            axes = (
                ", ".join(["B", *("X", "Y X", "T Y X")[grid_axes - 1].split(), "H", "D"]) if rank > 4 else "B, S, H, D"
            )
            raise ValueError(f"{where}: {name} must have {rank} axes [{axes}], got shape {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{where}: {name} must be floating point of 16 to 64 bits, got {x.dtype}")
        if x.dtype != query.dtype:
            raise ValueError(f"{where}: {name} must have the query's dtype {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{where}: {name} must be on the query's device {query.device}, got {x.device}")
    if query.shape[-1] == 0:
        raise ValueError(f"{where}: query must have a head dim of at least 1, got shape {tuple(query.shape)}")


def _check_key_and_value(where: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    _check_heads(where, "key", query, key)
    if value.shape[:-1] != key.shape[:-1]:
        expected, given = tuple(key.shape[:-1]), tuple(value.shape[:-1])
        raise ValueError(f"{where}: value must have the key's batch, tokens and heads {expected}, got {given}")


def check_extra(
    where: str, query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor | None, extra_value: Tensor | None
) -> None:
    """Check `[B, E, Hkv, D]` additional keys and values; both or neither."""
    if (extra_key is None) != (extra_value is None):
        given, absent = ("additional_keys", "additional_values")[:: 1 if extra_value is None else -1]
        raise ValueError(f"{where}: {absent} must be given together with {given}, got None")
    if extra_key is None or extra_value is None:
        return
    for name, x, like in (("additional_keys", extra_key, key), ("additional_values", extra_value, value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(x).__name__}")
        expected = (query.shape[0], extra_key.shape[1] if extra_key.ndim == 4 else "E", *like.shape[-2:])
        if x.ndim != 4 or tuple(x.shape) != expected:
            raise ValueError(f"{where}: {name} must have shape [B, E, Hkv, D] = {list(expected)}, got {list(x.shape)}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{where}: {name} must be {query.dtype} on {query.device} as the query, got {x.dtype} on {x.device}"
            )


def checked_mask(where: str, attn_mask: Any, query: Tensor) -> Tensor:
    """A mask for `[B, S, H, D]` self-attention with four axes, bool or in the query's dtype.

    A float mask of a wider range keeps its finite values finite: `torch.finfo(torch.float32).min` hides a key from a
    half-precision query without hiding it more than others.

    Raises:
        TypeError: not a tensor.
        ValueError: it does not broadcast to `[B, H, S, S]`, or is on another device.
        UnsupportedError: neither bool nor floating point.
    """
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"{where}: attn_mask must be a tensor or None, got {attn_mask!r}")
    full_shape = (query.shape[0], query.shape[2], query.shape[1], query.shape[1])
    shape = attn_mask.shape
    if attn_mask.ndim > 4 or not all(n in (1, m) for n, m in zip(shape[::-1], full_shape[::-1], strict=False)):
        raise ValueError(f"{where}: attn_mask must broadcast to {full_shape}, got shape {tuple(shape)}")
    if attn_mask.device != query.device:
        raise ValueError(f"{where}: attn_mask must be on the query's device {query.device}, got {attn_mask.device}")
    mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise UnsupportedError(f"{where}: attn_mask must be bool or floating point, got {attn_mask.dtype}")
    if torch.finfo(query.dtype).max < torch.finfo(mask.dtype).max:
        lowest = torch.finfo(query.dtype).min
        mask = torch.where(mask == float("-inf"), mask, mask.clamp(min=lowest))
    return mask.to(query.dtype)


def resolve_scale(where: str, scale: Any, head_dim: int, name: str = "scale") -> float:
    """The factor on the logits: `head_dim ** -0.5` for None (and only for None: 0 is a legal scale).

    Raises:
        TypeError: not a real number.
        ValueError: not finite.
    """
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{where}: {name} must be a number or None, got {scale!r}")
    if not -math.inf < scale < math.inf:  # math.isfinite would end a compiled graph at a symbolic float
        raise ValueError(f"{where}: {name} must be finite, got {scale!r}")
    return float(scale)


def per_axis(where: str, name: str, value: Any, axes: int, kind: type = int) -> tuple[Any, ...]:
    """One value per grid axis from a single value or a sequence of that length.

    Raises:
        TypeError: not an integer where integers are due (a bool is none).
        ValueError: wrong number of axes; not a bool where bools are due (as in NATTEN, an integer is none).
    """
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{where}: {name} must be one value or {axes} of them (one per grid axis), got {value!r}")
    for item in values:
        if kind is bool and not isinstance(item, bool):
            raise ValueError(f"{where}: {name} must be True or False per axis, got {value!r}")
        if kind is int and (isinstance(item, bool) or not isinstance(item, (int, torch.SymInt))):
            raise TypeError(f"{where}: {name} must be an integer per axis, got {value!r}")
    return values


def _check_heads(where: str, name: str, query: Tensor, key: Tensor) -> None:
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{where}: {name} must have the query's head dim {query.shape[-1]}, got {key.shape[-1]}")
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{where}: {name} must have heads that divide the query's {query.shape[-2]}, got {key.shape[-2]}"
        )
