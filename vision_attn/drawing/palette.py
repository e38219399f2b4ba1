"""Colours of pictures, and the colour map of what has a scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]

PAGE: Colour = (250, 249, 246)
CARD: Colour = (255, 255, 255)
EDGE: Colour = (226, 222, 214)
INK: Colour = (34, 34, 40)
MUTED: Colour = (120, 118, 124)
ATTENTION: Colour = (224, 108, 62)
REST: Colour = (203, 208, 218)
GOOD: Colour = (38, 128, 92)

# Black, violet, orange, cream: lightness rises evenly, so that it reads without colour vision and in print.
_STOPS = np.array([(12, 8, 38), (87, 22, 110), (188, 55, 84), (249, 142, 9), (252, 255, 204)], dtype=np.float64)


def heat(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours of values in `[0, 1]`, dark to light; beyond is clipped.

    Args:
        values: `[Y, X]`.

    Returns:
        `[Y, X, 3]`, 8 bit.
    """
    position = np.clip(values, 0, 1).astype(np.float64) * (len(_STOPS) - 1)
    points = np.arange(len(_STOPS))
    channels = [np.interp(position, points, _STOPS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
