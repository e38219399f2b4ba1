"""The best that PyTorch and NATTEN offer for a 2-D attention window, as rivals for `vision-attn bench`.

Each rival is as fast as its users can have it: tensors come in the layout it wants, block masks are built beforehand,
and token permutation, which it can share between layers, is timed apart.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import vision_attn as va

# (query row, query column, key row, key column) -> may the query see the key; all broadcastable integers.
Window = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# A tile of this many rows and columns is one block of 64 tokens.
TILE = (8, 8)
_BLOCK = TILE[0] * TILE[1]


def window_of(operator: Any, grid: tuple[int, int]) -> Window:
    """The operator's window, written from its definition and not from its code.

    Args:
        operator: `Clear` without pooled keys or `Neighborhood` without stride and dilation.
        grid: Rows and columns of tokens.

    Raises:
        ValueError: another operator, or one for a grid of another number of axes.
    """
    plain = isinstance(operator, va.Clear) and operator.down_factor == 1 and not operator.proportional
    if plain and not isinstance(operator.radius, tuple):
        limit = operator.radius**2
        return lambda qy, qx, ky, kx: (qy - ky) ** 2 + (qx - kx) ** 2 < limit
    if isinstance(operator, va.Neighborhood) and _all_ones(operator.stride) and _all_ones(operator.dilation):
        kernel = kernel_of(operator, grid)

        def inside(query: Tensor, key: Tensor, axis: int) -> Tensor:
            start = (query - kernel[axis] // 2).clamp(0, grid[axis] - kernel[axis])
            return (key >= start) & (key < start + kernel[axis])

        return lambda qy, qx, ky, kx: inside(qy, ky, 0) & inside(qx, kx, 1)
    raise ValueError(
        "bench: ops must be clear(radius=...) or neighborhood(kernel_size=...) without further fields, "
        f"got {operator}: only these have a stock rival here"
    )


def kernel_of(operator: va.Neighborhood, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the operator's window on this grid.

    Raises:
        ValueError: an operator for a grid of another number of axes.
    """
    _require_two_axes(operator)
    size = operator.kernel_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return min(rows, grid[0]), min(columns, grid[1])


def _require_two_axes(operator: va.Neighborhood) -> None:
    for name in ("kernel_size", "stride", "dilation"):
        value = getattr(operator, name)
        if not isinstance(value, int) and len(value) != 2:
            raise ValueError(
                f"bench: {name} must be one number or two, for rows and columns, got {value}: bench has 2-D grids"
            )


def _all_ones(value: int | tuple[int, ...]) -> bool:
    return value == 1 if isinstance(value, int) else all(part == 1 for part in value)


class DenseAttention:
    """`scaled_dot_product_attention` over all tokens: no window at all, so its result differs.

    Args:
        kernel: The one of PyTorch's implementations to use; None leaves the choice to PyTorch.
    """

    def __init__(self, kernel: SDPBackend | None = None) -> None:
        self.kernel = kernel

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[B, H, S, D]` to `[B, H, S, D]`."""
        with contextlib.nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            return F.scaled_dot_product_attention(query, key, value)


class NattenAttention:
    """NATTEN's `na2d`.

    Args:
        kernel_size: Of the window, rows and columns.
        grid: Rows and columns of tokens.

    Raises:
        ImportError: NATTEN is not installed.
    """

    def __init__(self, kernel_size: tuple[int, int], grid: tuple[int, int]) -> None:
        self.kernel_size, self.grid = kernel_size, grid
        self.attend = importlib.import_module("natten").na2d

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[B, S, H, D]` to `[B, S, H, D]`."""
        rows = (tensor.unflatten(1, self.grid) for tensor in (query, key, value))
        return self.attend(*rows, kernel_size=self.kernel_size).flatten(1, 2)


class FlexRows:
    """Compiled FlexAttention over row-major tokens: what CLEAR's own code uses.

    Args:
        window: What a query may see.
        grid: Rows and columns of tokens.
        device: Where it runs.
    """

    def __init__(self, window: Window, grid: tuple[int, int], device: torch.device) -> None:
        self.block_mask = _block_mask(window, *token_places(grid, device))
        self.attend = torch.compile(flex_attention, dynamic=False)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[B, H, S, D]` to `[B, H, S, D]`."""
        return self.attend(query, key, value, block_mask=self.block_mask)


class FlexTiles:
    """Compiled FlexAttention over tokens permuted so that an 8x8 tile of the grid is one block.

    Args:
        window: What a query may see.
        grid: Rows and columns of tokens, multiples of 8.
        device: Where it runs.

    Raises:
        ValueError: a grid that tiles do not divide.
    """

    def __init__(self, window: Window, grid: tuple[int, int], device: torch.device) -> None:
        check_tiles("FlexTiles", grid)
        self.grid = grid
        rows, columns = (self.permute(axis[None, None, :, None]).flatten() for axis in token_places(grid, device))
        self.block_mask = _block_mask(window, rows, columns)
        self.attend = torch.compile(flex_attention, dynamic=False)

    def permute(self, tokens: Tensor) -> Tensor:
        """Row-major `[B, H, S, D]` to tile-major."""
        batch, heads, _, dim = tokens.shape
        rows, columns = self.grid[0] // TILE[0], self.grid[1] // TILE[1]
        tiles = tokens.view(batch, heads, rows, TILE[0], columns, TILE[1], dim)
        return tiles.transpose(3, 4).reshape(batch, heads, -1, dim)

    def restore(self, tokens: Tensor) -> Tensor:
        """Tile-major `[B, H, S, D]` to row-major."""
        batch, heads, _, dim = tokens.shape
        rows, columns = self.grid[0] // TILE[0], self.grid[1] // TILE[1]
        tiles = tokens.view(batch, heads, rows, columns, TILE[0], TILE[1], dim)
        return tiles.transpose(3, 4).reshape(batch, heads, -1, dim)

    def attend_tiles(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of tile-major tokens, the permutations left out."""
        return self.attend(query, key, value, block_mask=self.block_mask)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[B, H, S, D]` to `[B, H, S, D]`, row-major."""
        return self.restore(self.attend_tiles(self.permute(query), self.permute(key), self.permute(value)))


def check_tiles(function: str, grid: tuple[int, int]) -> None:
    """Raise ValueError unless whole tiles cover the grid."""
    if grid[0] % TILE[0] or grid[1] % TILE[1]:
        raise ValueError(
            f"{function}: grid must be made of multiples of {TILE}, got {grid}: stock tiles need whole ones"
        )


def token_places(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each token of a row-major grid, two `[S]` tensors."""
    rows, columns = (torch.arange(size, device=device) for size in grid)
    return rows.repeat_interleave(grid[1]), columns.repeat(grid[0])


def _block_mask(window: Window, rows: Tensor, columns: Tensor) -> BlockMask:
    # Looked-up coordinates: computing them by division in the mask costs the CPU four times the whole attention
    # (64x64 tokens, radius 8, 8 heads of 64, one thread: 0.365 s against 0.095 s).
    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return window(rows[query], columns[query], rows[key], columns[key])

    return create_block_mask(mask, None, None, len(rows), len(rows), device=str(rows.device), BLOCK_SIZE=_BLOCK)
