"""In what order an SDPA call has its tokens, and the way to row-major tokens with heads last and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


class Rows:
    """Row by row, `[B, H, S, D]`.

    Attributes:
        ranks: How many dimensions a call's tensors may have.
        takes_mask: Whether a call's mask has this order as operators expect it.
    """

    ranks: tuple[int, ...] = (4,)
    takes_mask = True

    def heads_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """Row-major `[B, S, H, D]` of one of a call's tensors."""
        return tensor.transpose(1, 2)

    def heads_first(self, tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Inverse of `heads_last`, for a call with this query."""
        return tensor.transpose(1, 2)


ROWS = Rows()


@dataclass(frozen=True)
class Unrolled(Rows):
    """Hiera's order: the place of a token is told by the strides of the poolings to come, the first one slowest.

    A row is `((last * s_n + ...) * s_2 + ...) * s_1 + first`: the digits of rows and columns alternate in the sequence,
    least significant digits first. No indices are needed: both ways are a view and a permutation. Mask units are a
    dimension of their own, `[B, H, units, S, D]`, and go to the batch.

    Args:
        strides: `(rows, columns)` of each pooling to come, then, for a whole map, the size that is left after all.

    Source: `Unroll` in the code of Hiera (arXiv 2306.00989), as in timm.
    """

    strides: tuple[tuple[int, ...], ...]
    ranks = (4, 5)
    takes_mask = False

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of the map."""
        return tuple(math.prod(sizes) for sizes in zip(*self.strides, strict=True))

    def heads_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """Row-major `[B, S, H, D]` or `[B * units, S, H, D]` of one of a call's tensors."""
        if tensor.ndim == 5:
            tensor = tensor.transpose(1, 2).flatten(0, 1)
        return self._permuted(tensor.transpose(1, 2), self._digits, self._axes)

    def heads_first(self, tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Inverse of `heads_last`, for a call with this query."""
        digits = [self._digits[axis] for axis in self._axes]
        back = [self._axes.index(place) for place in range(len(self._axes))]
        tensor = self._permuted(tensor, digits, back).transpose(1, 2)
        return tensor.unflatten(0, (-1, query.shape[2])).transpose(1, 2) if query.ndim == 5 else tensor

    @property
    def _digits(self) -> list[int]:
        return [size for sizes in self.strides for size in sizes]

    @property
    def _axes(self) -> list[int]:
        """The digits in row-major order: those of the row, the most significant first, then those of the column."""
        axes = len(self.grid)
        return [place * axes + axis for axis in range(axes) for place in reversed(range(len(self.strides)))]

    def _permuted(self, tensor: torch.Tensor, digits: Sequence[int], order: Sequence[int]) -> torch.Tensor:
        if tensor.shape[1] != math.prod(digits):  # some tokens were dropped: no map, and no layout will match
            return tensor
        last = 1 + len(order)
        return tensor.unflatten(1, digits).permute(0, *(1 + axis for axis in order), last, last + 1).flatten(1, -3)
