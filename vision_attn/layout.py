"""Where the image tokens sit in an attention sequence."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of `text_before` tokens, a row-major token grid, and `text_after` tokens.

    "Text" stands for every token that is not on the grid: text, registers, class tokens, pads and the tokens of
    reference images. Such tokens are seen by every query and see every token.

    Args:
        grid: Token grid, `(Y, X)` or `(T, Y, X)`: frames, rows, columns, in tokens, each at least 1. A 1-D grid `(X,)`
            is legal for sequences.
        text_before: Tokens before the grid, at least 0.
        text_after: Tokens after the grid, at least 0.

    Raises:
        ValueError: a grid axis below 1, a rank outside 1 to 3, a negative token count.
        TypeError: a size that is not an integer.

    Example:
        >>> layout = TokenLayout(grid=(4, 6), text_before=7)
        >>> layout.image_tokens, layout.tokens, layout.image_slice
        (24, 31, slice(7, 31, None))
    """

    grid: tuple[int, ...]
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Sequence):
            raise TypeError(f"TokenLayout: grid must be a tuple (Y, X), got {self.grid!r}")
        object.__setattr__(self, "grid", tuple(_integer("grid", self.grid, size) for size in self.grid))
        if not 1 <= len(self.grid) <= 3:
            raise ValueError(f"TokenLayout: grid must have 1 to 3 axes, got {self.grid}: use (Y, X) or (T, Y, X)")
        for size in self.grid:
            if size < 1:
                raise ValueError(f"TokenLayout: grid must have axes of at least 1 token, got {self.grid}")
        for name in ("text_before", "text_after"):
            count = _integer(name, getattr(self, name), getattr(self, name))
            object.__setattr__(self, name, count)
            if count < 0:
                raise ValueError(f"TokenLayout: {name} must be at least 0, got {count}")

    @property
    def image_tokens(self) -> int:
        """Tokens on the grid."""
        return math.prod(self.grid)

    @property
    def text_tokens(self) -> int:
        """Tokens off the grid, on either side."""
        return self.text_before + self.text_after

    @property
    def tokens(self) -> int:
        """Length `S` of the whole sequence."""
        return self.text_before + self.image_tokens + self.text_after

    @property
    def image_slice(self) -> slice:
        """Where the grid's tokens stand in the sequence."""
        return slice(self.text_before, self.text_before + self.image_tokens)

    def check(self, sequence_length: int, name: str = "query") -> None:
        """Raise ValueError unless a sequence of `sequence_length` tokens has this layout."""
        if sequence_length != self.tokens:
            raise ValueError(
                f"TokenLayout: {name} must have {self.tokens} tokens ({self.text_before} before, grid "
                f"{self.grid}, {self.text_after} after), got {sequence_length}: give the grid of this input"
            )


def _integer(name: str, given: object, size: Any) -> Any:
    """A plain int of numpy's and others; symbolic sizes under torch.compile stay what they are."""
    try:
        if not isinstance(size, bool):
            return size if isinstance(size, (int, torch.SymInt)) else operator.index(size)
    except TypeError:
        pass
    raise TypeError(f"TokenLayout: {name} must be made of integers, got {given!r}")
