"""How far an image is from another one: PSNR and SSIM, on images `[Y, X, C]` with values in `[0, 1]`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.floating]

SSIM_WINDOW = 11  # pixels; with _SIGMA the window of the SSIM paper
_SIGMA = 1.5


def psnr(image: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio in decibels, `10 log10(1 / mean squared error)`.

    Args:
        image: `[..., Y, X, C]` in `[0, 1]`; leading axes (frames) are averaged over.
        reference: Same shape.

    Returns:
        Decibels; `inf` for identical images.

    Raises:
        ValueError: different shapes.

    Example:
        >>> import numpy as np
        >>> round(psnr(np.full((4, 6, 3), 0.5), np.full((4, 6, 3), 0.6)), 6)
        20.0
    """
    _require_same_shape("psnr", image, reference)
    error = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(image: Image, reference: Image) -> float:
    """Mean structural similarity: Gaussian 11x11 window of sigma 1.5, where it fits, averaged over channels.

    Args:
        image: `[Y, X, C]` in `[0, 1]`, or `[T, Y, X, C]` (frames are averaged over); at least 11 pixels a side.
        reference: Same shape.

    Returns:
        At most 1, and 1 for identical images.

    Raises:
        ValueError: different shapes, an image smaller than the window, a rank other than 3 or 4.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, equation 13, with K1 = 0.01, K2 = 0.03 and dynamic range 1.
    """
    _require_same_shape("ssim", image, reference)
    if image.ndim == 4:
        return float(np.mean([ssim(frame, other) for frame, other in zip(image, reference, strict=True)]))
    if image.ndim != 3:
        raise ValueError(
            f"ssim: image must be [Y, X, C] or [T, Y, X, C], got shape {image.shape}: add the missing axis"
        )
    if min(image.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"ssim: image must be at least {SSIM_WINDOW} pixels a side, got {image.shape[:2]}: use psnr")
    x, y = image.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float(np.mean(luminance * structure))


def _blur(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean over every window that lies inside the image; rows, then columns."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        image = np.lib.stride_tricks.sliding_window_view(image, SSIM_WINDOW, axis=axis) @ weights
    return image


def _require_same_shape(function: str, image: Image, reference: Image) -> None:
    if image.shape != reference.shape:
        raise ValueError(
            f"{function}: image must have the reference's shape {reference.shape}, got {image.shape}: "
            "compare images of one size"
        )
