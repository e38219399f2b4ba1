"""Losses of attention maps: concepts that overlap, fade or stay weak cost.

Maps are `[n, Y, X]` or `[B, n, Y, X]`, one per concept, at least 0. Every loss sums over concepts or pairs and keeps
the batch, so that samples do not mix.

Sources: A-STAR (arXiv 2306.14544), equations 2 to 4; Attend-and-Excite (arXiv 2301.13826), equation 1; SynGen
(arXiv 2306.08877); JEDI (arXiv 2505.19166).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# In denominators only: maps of zeros give zero, not NaN, and the values of the papers are not moved.
_EPS = {torch.float64: 1e-30, torch.float32: 1e-12}


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """`sum min(one, other) / sum (one + other)` over the last two axes: 0.5 for equal maps, 0 for disjoint ones.

    With o this ratio, the soft intersection over union is `o / (1 - o)` and the Dice coefficient `2 o`.

    Args:
        one: Maps `[..., Y, X]`.
        other: As `one`.

    Source: arXiv 2306.14544, the ratio of equations 2 and 3.
    """
    shared = torch.minimum(one, other).sum((-2, -1))
    return shared / (one + other).sum((-2, -1)).clamp_min(_EPS.get(one.dtype, 1e-12))


def segregation_loss(maps: Tensor) -> Tensor:
    """How much the maps of different concepts overlap, summed over pairs: 0 to 0.5 each.

    Args:
        maps: `[n, Y, X]` or `[B, n, Y, X]`, at least one concept.

    Returns:
        A scalar, or `[B]`, in float32 or above.

    Raises:
        ValueError, TypeError: no such maps.

    Source: arXiv 2306.14544, equation 2.

    Example:
        >>> segregation_loss(torch.ones(2, 4, 4)).item()
        0.5
    """
    maps = _checked("segregation_loss", "maps", maps)
    pairs = torch.triu_indices(maps.shape[-3], maps.shape[-3], 1, device=maps.device)
    return overlap(maps[..., pairs[0], :, :], maps[..., pairs[1], :, :]).sum(-1)


def retention_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """How far the maps have left where they were, summed over concepts: 0.5 to 1 each.

    Args:
        maps: `[n, Y, X]` or `[B, n, Y, X]`.
        masks: As the maps, 0 or 1, such as `binarize` makes of the maps one step before; without gradient.

    Returns:
        A scalar, or `[B]`, in float32 or above.

    Raises:
        ValueError, TypeError: no such maps, or masks of another shape.

    Source: arXiv 2306.14544, equation 3.

    Example:
        >>> mask = torch.eye(4)[None]
        >>> retention_loss(mask, mask).item()
        0.5
    """
    maps, masks = _checked("retention_loss", "maps", maps), _checked("retention_loss", "masks", masks)
    if maps.shape != masks.shape:
        raise ValueError(
            f"retention_loss: masks must have the maps' shape {tuple(maps.shape)}, got {tuple(masks.shape)}"
        )
    return (1 - overlap(maps, masks.detach().to(maps.dtype))).sum(-1)


def attend_and_excite_loss(maps: Tensor) -> Tensor:
    """How weak the weakest concept is at its peak: `max over concepts of max(0, 1 - max map)`.

    Args:
        maps: `[n, Y, X]` or `[B, n, Y, X]`, at least one concept, smoothed as `concept_maps` does.

    Returns:
        A scalar, or `[B]`, in float32 or above.

    Raises:
        ValueError, TypeError: no such maps.

    Source: arXiv 2301.13826, equation 1; released code.
    """
    return (1 - _checked("attend_and_excite_loss", "maps", maps).amax((-2, -1))).clamp_min(0).amax(-1)


def symmetric_kl_loss(maps: Tensor, pairs: Any) -> Tensor:
    """Symmetric KL divergence of the maps as distributions over pixels, summed over pairs that belong together.

    Args:
        maps: `[n, Y, X]` or `[B, n, Y, X]`.
        pairs: Numbers of two concepts each, such as a noun and its modifier.

    Returns:
        A scalar, or `[B]`, in float32 or above.

    Raises:
        ValueError, TypeError: no such maps, or a pair that names none.

    Source: arXiv 2306.08877, the positive part of its loss.
    """
    logs = _log_distributions("symmetric_kl_loss", maps)
    return _over_pairs("symmetric_kl_loss", logs, pairs, _symmetric_kl)


def jensen_shannon_loss(maps: Tensor, pairs: Any) -> Tensor:
    """Jensen-Shannon divergence of the maps as distributions over pixels, 0 to log 2, summed over such pairs.

    Args:
        maps: `[n, Y, X]` or `[B, n, Y, X]`.
        pairs: Numbers of two concepts each that belong together.

    Returns:
        A scalar, or `[B]`, in float32 or above.

    Raises:
        ValueError, TypeError: no such maps, or a pair that names none.

    Source: arXiv 2505.19166, its divergence within a group.
    """
    logs = _log_distributions("jensen_shannon_loss", maps)
    return _over_pairs("jensen_shannon_loss", logs, pairs, _jensen_shannon)


def _symmetric_kl(one: Tensor, other: Tensor) -> Tensor:
    return ((one.exp() - other.exp()) * (one - other)).sum(-1) / 2


def _jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    middle = torch.logaddexp(one, other) - torch.log(torch.tensor(2.0, dtype=one.dtype))
    return (one.exp() * (one - middle) + other.exp() * (other - middle)).sum(-1) / 2


def _over_pairs(where: str, logs: Tensor, pairs: Any, divergence: Any) -> Tensor:
    numbers = [tuple(pair) for pair in pairs]
    count = logs.shape[-2]
    for pair in numbers:
        if len(pair) != 2 or not all(isinstance(i, int) and 0 <= i < count for i in pair):
            raise ValueError(f"{where}: pairs must be of two concepts from 0 to {count - 1}, got {pair}")
    if not numbers:
        return logs.sum((-2, -1)) * 0
    return torch.stack([divergence(logs[..., i, :], logs[..., j, :]) for i, j in numbers], -1).sum(-1)


def _log_distributions(where: str, maps: Tensor) -> Tensor:
    """Logarithms of the maps divided by their sums, `[..., n, Y * X]`."""
    flat = _checked(where, "maps", maps).flatten(-2)
    smallest = torch.finfo(flat.dtype).tiny
    flat = flat.clamp_min(smallest)
    return (flat / flat.sum(-1, keepdim=True)).clamp_min(smallest).log()


def _checked(where: str, name: str, maps: Any) -> Tensor:
    """Maps in float32 or above."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(maps).__name__}")
    if maps.ndim not in (3, 4) or 0 in maps.shape[-3:]:
        raise ValueError(f"{where}: {name} must have shape [n, Y, X] or [B, n, Y, X], got {tuple(maps.shape)}")
    if not maps.is_floating_point():
        raise TypeError(f"{where}: {name} must be floating point, got {maps.dtype}")
    return maps.to(torch.promote_types(maps.dtype, torch.float32))
