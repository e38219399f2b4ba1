"""Which keys a query can reach: the one definition of a window, shared by every backend and kernel.

A window is separable over the axes of the token grid (a `Box`, Generalized Neighborhood Attention) or a distance
condition inside such a box (a `Ball`, CLEAR's circle). Everything that needs to know a window (masks, tile plans,
costs) asks `axis_windows` of these two classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """The window of Generalized Neighborhood Attention on a row-major token grid.

    Args:
        grid: Tokens per axis.
        kernel_size: Keys per axis, `kernel_size * dilation <= grid`.
        stride: Neighbouring queries per axis that share the window of one leader, at most `kernel_size`.
        dilation: Step between the keys of a window; queries see only keys of their own residue.
        is_causal: Per axis, whether keys after the query are hidden.

    Source: Generalized Neighborhood Attention (arXiv 2504.16922), section 3; NATTEN's `na1d/2d/3d`.
    """

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    def axis_windows(self, axis: int) -> tuple[Tensor, Tensor]:
        """First key and number of keys (spaced by `dilation`) of each query on `axis`: two int64 `[grid[axis]]`."""
        n, k, s, d = self.grid[axis], self.kernel_size[axis], self.stride[axis], self.dilation[axis]
        query = torch.arange(n, device="cpu")
        residue, j = query % d, query // d
        length = n // d + (residue < n % d).long()  # of the query's dilation group
        if self.is_causal[axis]:
            leader = torch.minimum(j // s * s + s - 1, length - 1)
            first = (leader - k + 1).clamp(min=0)
            count = j + 1 - first
        else:
            # The leader of an even stride stands right of the centre: it cancels the left bias of an even kernel.
            leader = torch.minimum(j // s * s + s // 2, length - 1)
            first = torch.minimum((leader - k // 2).clamp(min=0), length - k)
            count = torch.full_like(first, k)
        return residue + d * first, count

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        return self.kernel_size == self.grid and not any(self.is_causal)

    def mask(self, device: torch.device | None = None) -> Tensor:
        """Bool `[N, N]` over the flattened grid, True where the row's query sees the column's key. For oracles."""
        mask = torch.ones(1, 1, dtype=torch.bool)
        for axis in range(len(self.grid)):
            mask = _outer_and(mask, self._axis_mask(axis))
        return mask.to(device)

    def _axis_mask(self, axis: int) -> Tensor:
        first, count = (x.unsqueeze(1) for x in self.axis_windows(axis))
        steps = torch.arange(self.grid[axis]) - first
        d = self.dilation[axis]
        return (steps >= 0) & (steps % d == 0) & (steps // d < count)

    def count(self) -> int:
        """Number of True entries of `mask`, without building it."""
        return math.prod(int(self.axis_windows(axis)[1].sum()) for axis in range(len(self.grid)))


@dataclass(frozen=True)
class Ball:
    """CLEAR's window: keys at a Euclidean distance strictly below `radius`, clipped at the grid's border.

    Args:
        grid: Tokens per axis.
        radius: In tokens, above 0.

    Source: CLEAR (arXiv 2412.16112), equation 4; the `<` is strict, as in the paper's FLOP counts.
    """

    grid: tuple[int, ...]
    radius: float

    @property
    def dilation(self) -> tuple[int, ...]:
        """A ball has no gaps."""
        return (1,) * len(self.grid)

    @property
    def stride(self) -> tuple[int, ...]:
        """Every query has its own window."""
        return (1,) * len(self.grid)

    @property
    def limit(self) -> int:
        """Squared distances below this integer are seen: they are integers, so it is `radius ** 2` rounded up.

        Comparing integer tensors with the float itself would round it to float32.
        """
        return math.ceil(self.radius**2)

    @property
    def extent(self) -> int:
        """Largest distance along one axis, in tokens."""
        return min(math.isqrt(self.limit - 1), max(self.grid))

    def axis_windows(self, axis: int) -> tuple[Tensor, Tensor]:
        """First key and number of keys of the box around the ball, for each query on `axis`."""
        query = torch.arange(self.grid[axis], device="cpu")
        first = (query - self.extent).clamp(min=0)
        last = (query + self.extent).clamp(max=self.grid[axis] - 1)
        return first, last - first + 1

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        return sum((n - 1) ** 2 for n in self.grid) < self.limit

    def mask(self, device: torch.device | None = None) -> Tensor:
        """Bool `[N, N]` over the flattened grid, True where the row's query sees the column's key. For oracles."""
        position = torch.cartesian_prod(*(torch.arange(n, device=device) for n in self.grid)).view(-1, len(self.grid))
        offset = position.unsqueeze(1) - position.unsqueeze(0)
        return offset.square().sum(-1) < self.limit

    def count(self) -> int:
        """Number of True entries of `mask`, without building it."""
        squares, weights = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
        for n in self.grid:
            offset = torch.arange(-min(self.extent, n - 1), min(self.extent, n - 1) + 1)
            squares = (squares[:, None] + offset.square()).flatten()
            weights = (weights[:, None] * (n - offset.abs())).flatten()
        return int(weights[squares < self.limit].sum())


Reach = Box | Ball


def _outer_and(outer: Tensor, inner: Tensor) -> Tensor:
    """The mask of a product grid: `[Qo, Ko]` and `[Qi, Ki]` give `[Qo*Qi, Ko*Ki]`."""
    both = outer[:, None, :, None] & inner[None, :, None, :]
    return both.reshape(outer.shape[0] * inner.shape[0], outer.shape[1] * inner.shape[1])
