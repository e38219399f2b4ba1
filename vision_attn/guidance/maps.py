"""Concept maps from attention probabilities, and the masks that A-STAR makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

MODES = ("relative", "otsu", "mean", "minmax")
_BINS = 256
_SHARPNESS = 100.0


def concept_maps(
    probabilities: Tensor,
    groups: Sequence[Sequence[int]],
    *,
    text: Sequence[int] | None = None,
    smooth: bool = True,
) -> Tensor:
    """Maps of concepts from attention probabilities, as Attend-and-Excite makes them.

    The first and the last token are left out, a sharpened softmax over the others makes tokens compete for each pixel,
    a concept is the mean of its tokens, and a 3x3 Gaussian smooths it.

    The factor 100 is that of cross-attention, of which BOS has the most. It serves the joint attention of the embedded
    FLUX too, shared among the words alone: against a factor of 10, gradients of the losses were 3 to 28 times as large
    at three steps of one run, and maps at half of it nearer to what was drawn (correlation .89 and .90, not .80 and
    .83).

    Args:
        probabilities: `[Y, X, T]` or `[B, Y, X, T]` over the tokens of the prompt, the first one BOS.
        groups: Token positions of each concept, among those of `text`.
        text: Positions of the tokens that compete; None for those from 1 to `T - 2`.
        smooth: Whether to smooth.

    Returns:
        `[n, Y, X]` or `[B, n, Y, X]` in float32 or above.

    Raises:
        ValueError: a shape or a token that does not fit.

    Source: arXiv 2301.13826, section 4, and its released code (softmax of 100 times the probabilities).
    """
    if probabilities.ndim not in (3, 4) or probabilities.shape[-1] < 3:
        raise ValueError(
            f"concept_maps: probabilities must have shape [Y, X, T] or [B, Y, X, T] of at least 3 tokens, got "
            f"{tuple(probabilities.shape)}"
        )
    last = probabilities.shape[-1] - 2
    columns = list(range(1, last + 1) if text is None else text)
    for group in groups:
        if not group or not set(group) <= set(columns):
            allowed = f"from 1 to {last}" if text is None else f"of text, {columns}"
            raise ValueError(f"concept_maps: groups must hold tokens {allowed}, got {list(group)}")
    wide = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    sharp = (_SHARPNESS * wide[..., columns]).softmax(-1)
    maps = torch.stack([sharp[..., [columns.index(token) for token in group]].mean(-1) for group in groups], -3)
    return smoothed(maps) if smooth else maps


def smoothed(maps: Tensor) -> Tensor:
    """Maps `[..., Y, X]` convolved with the 3x3 kernel `exp(-(x / (2 * 0.5)) ** 2)`, borders reflected.

    Source: released code of arXiv 2301.13826, whose 0.5 is no standard deviation: that is 0.71 pixels.
    """
    line = torch.exp(-(torch.arange(-1, 2, dtype=maps.dtype, device=maps.device) ** 2))
    kernel = line[:, None] * line
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    return conv2d(pad(flat, (1, 1, 1, 1), mode=mode), (kernel / kernel.sum())[None, None]).reshape(maps.shape)


@torch.no_grad()
def binarize(maps: Tensor, threshold: float = 0.5, mode: str = "relative") -> Tensor:
    """Where a map is high: 1 there and 0 elsewhere.

    Args:
        maps: `[..., Y, X]`, each map by itself.
        threshold: Of `"relative"`, as a share of the largest value; of `"minmax"`, of the range.
        mode: `"relative"`: at least `threshold * max`. `"minmax"`: at least `threshold` of the way from the smallest to
            the largest value. `"mean"`: at least the mean. `"otsu"`: above the threshold of least variance within both
            sides, from 256 bins.

    Returns:
        0 and 1 in the maps' dtype, without gradient.

    Raises:
        ValueError, TypeError: an unknown mode, a threshold outside 0 to 1, no maps.

    Source: the masks of arXiv 2306.14544, which leaves the threshold open; Otsu (1979).

    Example:
        >>> binarize(torch.tensor([[[0.1, 0.6], [1.0, 0.4]]])).tolist()
        [[[0.0, 1.0], [1.0, 0.0]]]
    """
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        given: Any = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise TypeError(f"binarize: maps must be a floating-point tensor, got {given}")
    if maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise ValueError(f"binarize: maps must have shape [..., Y, X], got {tuple(maps.shape)}")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"binarize: threshold must be a number, got {threshold!r}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"binarize: threshold must be from 0 to 1, got {threshold}")
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    if mode == "relative":
        chosen = maps >= threshold * high
    elif mode == "minmax":
        chosen = maps - low >= threshold * (high - low)
    elif mode == "mean":
        chosen = maps >= maps.mean((-2, -1), keepdim=True)
    elif mode == "otsu":
        chosen = maps > _otsu(maps, low, high)
    else:
        raise ValueError(f"binarize: mode must be one of {', '.join(MODES)}, got {mode!r}")
    return chosen.to(maps.dtype)


def _otsu(maps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`[..., 1, 1]`: centre of the bin after which the variance between both sides is largest, the first one."""
    width = (high - low).clamp_min(torch.finfo(maps.dtype).tiny) / _BINS
    place = ((maps - low) / width).long().clamp(max=_BINS - 1).flatten(-2)
    counts = torch.zeros(*place.shape[:-1], _BINS, dtype=maps.dtype, device=maps.device)
    counts = counts.scatter_add(-1, place, torch.ones_like(place, dtype=maps.dtype))
    centres = low[..., 0] + (torch.arange(_BINS, dtype=maps.dtype, device=maps.device) + 0.5) * width[..., 0]
    below, total = counts.cumsum(-1), counts.sum(-1, keepdim=True)
    moments = (counts * centres).cumsum(-1)
    above = total - below
    means = moments / below.clamp_min(1), (moments[..., -1:] - moments) / above.clamp_min(1)
    between = below * above * (means[0] - means[1]) ** 2
    return centres.gather(-1, between.argmax(-1, keepdim=True))[..., None]
