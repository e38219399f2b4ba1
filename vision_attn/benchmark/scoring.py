"""Scoring a picture against its prompt, where the prompt says exactly what must be seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def scorer(prompt: str) -> Callable[[NDArray[np.float32]], float] | None:
    """A function that scores images of the prompt; None for a prompt that no detector understands.

    Args:
        prompt: Text.

    Returns:
        Image `[Y, X, C]` in `[0, 1]` to a score from 0 (nothing right) to 1 (all right), or None.
    """
    return None
