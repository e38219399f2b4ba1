"""Which keys a query can reach: the one definition of a window, shared by every backend and kernel.

A window is separable over the axes of the token grid (a `Box`, Generalized Neighborhood Attention) or a distance
condition inside such a box (a `Ball`, CLEAR's circle). Everything that needs to know a window (masks, tile plans,
costs) asks `axis_windows` of these two classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from .bounds import box_start, box_stop, group_length


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
        window = self.kernel_size[axis], self.stride[axis], self.is_causal[axis]
        windows = _box_windows.__wrapped__ if torch.compiler.is_compiling() else _box_windows  # graphs warn of caches
        first, count = windows(self.grid[axis], self.dilation[axis], *window)
        return torch.tensor(first, device="cpu"), torch.tensor(count, device="cpu")

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
    """CLEAR's window, keys at a Euclidean distance strictly below a radius, or the ellipse of a radius per axis.

    In whole numbers: a key is seen where the weighted squared steps of all axes sum to less than `limit`. The window is
    clipped at the grid's border.

    Args:
        grid: Tokens per axis.
        weights: Per axis, of the squared steps; all 1 for a circle.
        limit: Above 0.

    Source: CLEAR (arXiv 2412.16112), equation 4; the `<` is strict, as in the paper's FLOP counts.
    """

    grid: tuple[int, ...]
    weights: tuple[int, ...]
    limit: int

    @classmethod
    def of_radius(cls, grid: tuple[int, ...], radius: float | tuple[float, ...]) -> Ball:
        """The ball of a radius in tokens, or of one per axis, each above 0.

        Raises:
            ValueError: an ellipse whose radii have no common measure in 36 bits.
        """
        if not isinstance(radius, tuple):
            # Radii up to 1 see the token itself, a million sees all: squares neither vanish nor overflow.
            bounded = min(max(radius, 1.0), 2.0**20)
            return cls(grid, (1,) * len(grid), math.ceil(bounded * bounded))
        # The decimal digits are what was typed: 3.3 is 33/10, not the binary fraction nearest to it.
        shares = [1 / Fraction(str(max(r, 1))) ** 2 for r in radius]
        whole = math.lcm(*(share.denominator for share in shares))
        weights = [int(share * whole) for share in shares]
        common = math.gcd(*weights)
        if whole // common >= 2**36:
            raise ValueError(f"radius must be whole numbers or simple fractions where it differs by axis, got {radius}")
        return cls(grid, tuple(weight // common for weight in weights), -(-whole // common))

    @property
    def dilation(self) -> tuple[int, ...]:
        """A ball has no gaps."""
        return (1,) * len(self.grid)

    @property
    def stride(self) -> tuple[int, ...]:
        """Every query has its own window."""
        return (1,) * len(self.grid)

    def extent(self, axis: int) -> int:
        """Largest distance along one axis, in tokens."""
        return min(math.isqrt((self.limit - 1) // self.weights[axis]), self.grid[axis] - 1)

    def axis_windows(self, axis: int) -> tuple[Tensor, Tensor]:
        """First key and number of keys of the box around the ball, for each query on `axis`."""
        query, extent = torch.arange(self.grid[axis], device="cpu"), self.extent(axis)
        first = (query - extent).clamp(min=0)
        last = (query + extent).clamp(max=self.grid[axis] - 1)
        return first, last - first + 1

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        return sum(w * (n - 1) ** 2 for w, n in zip(self.weights, self.grid, strict=True)) < self.limit

    def mask(self, device: torch.device | None = None) -> Tensor:
        """Bool `[N, N]` over the flattened grid, True where the row's query sees the column's key. For oracles."""
        position = torch.cartesian_prod(*(torch.arange(n, device=device) for n in self.grid)).view(-1, len(self.grid))
        offset = position.unsqueeze(1) - position.unsqueeze(0)
        return (offset.square() * torch.tensor(self.weights, device=device)).sum(-1) < self.limit

    def count(self) -> int:
        """Number of True entries of `mask`, without building it."""
        squares, pairs = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
        for axis, (n, weight) in enumerate(zip(self.grid, self.weights, strict=True)):
            offset = torch.arange(-self.extent(axis), self.extent(axis) + 1)
            squares = (squares[:, None] + weight * offset.square()).flatten()
            pairs = (pairs[:, None] * (n - offset.abs())).flatten()
        return int(pairs[squares < self.limit].sum())


Reach = Box | Ball
# Grid, kernel size or weights, stride, dilation, causality, limit (0 for a box): what a custom op can take.
Arguments = tuple[list[int], list[int], list[int], list[int], list[bool], int]


def to_arguments(reach: Reach) -> Arguments:
    """A window as lists of numbers; `from_arguments` undoes it."""
    window = reach.weights if isinstance(reach, Ball) else reach.kernel_size
    causal = [False] * len(reach.grid) if isinstance(reach, Ball) else list(reach.is_causal)
    return (
        list(reach.grid),
        list(window),
        list(reach.stride),
        list(reach.dilation),
        causal,
        reach.limit if isinstance(reach, Ball) else 0,
    )


def from_arguments(
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    limit: int,
) -> Reach:
    """The window of `to_arguments`."""
    if limit:
        return Ball(tuple(grid), tuple(window), limit)
    return Box(tuple(grid), tuple(window), tuple(stride), tuple(dilation), tuple(is_causal))


@lru_cache(maxsize=256)
def _box_windows(n: int, dilation: int, kernel: int, stride: int, causal: bool) -> tuple[list[int], list[int]]:
    """`Box.axis_windows` of one axis."""
    first, count = [], []
    for query in range(n):
        residue, place = query % dilation, query // dilation
        start = box_start(place, group_length(n, dilation, residue), kernel, stride, causal)
        first.append(residue + dilation * start)
        count.append(box_stop(place, start, kernel, causal) - start)
    return first, count


def _outer_and(outer: Tensor, inner: Tensor) -> Tensor:
    """The mask of a product grid: `[Qo, Ko]` and `[Qi, Ki]` give `[Qo*Qi, Ko*Ki]`."""
    both = outer[:, None, :, None] & inner[None, :, None, :]
    return both.reshape(outer.shape[0] * inner.shape[0], outer.shape[1] * inner.shape[1])
