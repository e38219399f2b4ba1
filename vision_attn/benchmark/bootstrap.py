"""Intervals of means by resampling."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]


def mean_interval(values: NDArray[np.floating], *, level: float = 0.95, resamples: int = 10_000) -> Interval:
    """Percentile bootstrap of a mean whose rows are the independent units.

    Args:
        values: `[units, repeats]`: prompts with their seeds. Whole rows are drawn, so that repeats of a prompt, which
            are alike, do not count as if they were prompts of their own.
        level: Coverage.
        resamples: Drawn means, from a fixed seed.

    Returns:
        Lower and upper end.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, sections 8.3 and 13.3.
    """
    rows = np.asarray(values, dtype=np.float64).mean(axis=1)
    drawn = np.random.default_rng(0).integers(len(rows), size=(resamples, len(rows)))
    low, high = np.quantile(rows[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
