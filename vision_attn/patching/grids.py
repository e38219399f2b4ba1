"""Token layouts given by the user: the argument `grid` of `patch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vision_attn.errors import PatchError
from vision_attn.layout import TokenLayout
from vision_attn.patching.layouts import Family


def check_grid(grid: Any) -> TokenLayout:
    """Validate `grid` of `patch`.

    Args:
        grid: `(Y, X)`, `(T, Y, X)` or a TokenLayout.

    Raises:
        TypeError: None of these.
        ValueError: An axis below 1, or another number of axes.
    """
    if isinstance(grid, TokenLayout):
        return grid
    if not isinstance(grid, (tuple, list)) or any(isinstance(n, bool) or not isinstance(n, int) for n in grid):
        raise TypeError(f"patch: grid must be (Y, X), (T, Y, X) or a TokenLayout, got {grid!r}")
    if len(grid) not in (2, 3) or min(grid) < 1:
        raise ValueError(f"patch: grid must be (Y, X) or (T, Y, X) with at least 1 token per axis, got {tuple(grid)}")
    return TokenLayout(tuple(grid))


def _spatial(grid: tuple[int, ...]) -> tuple[int, ...]:
    """A single frame is an image."""
    return grid[1:] if len(grid) == 3 and grid[0] == 1 else grid


class GivenLayout:
    """A layout function that answers the user's layout, whatever the call.

    Args:
        layout: The layout.
    """

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout

    def __call__(self, module: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
        """The layout given."""
        return self.layout


class GivenGrid:
    """A layout function that takes the grid from the user and the text from the model's family.

    Args:
        grid: The grid.
        family: The model's family.
    """

    def __init__(self, grid: tuple[int, ...], family: Family) -> None:
        self.grid = grid
        self.family = family

    def __call__(self, module: nn.Module, call: Mapping[str, Any]) -> TokenLayout | None:
        """The family's layout with the user's grid.

        Raises:
            PatchError: The model's own grid in this call is another one. Where it cannot be read, in a compiled graph,
                the user's is taken.
        """
        if torch.compiler.is_compiling() and self.family.layout_of_grid is not None:
            return self.family.layout_of_grid(module, call, self.grid)
        layout = self.family.layout(module, call)
        given = TokenLayout(self.grid)
        if layout is None:
            return None
        if layout.image_tokens != given.image_tokens:
            raise PatchError(
                f"patch: grid must have the {layout.image_tokens} image tokens of this call, got {self.grid}: the "
                f"model's own grid is {layout.grid}"
            )
        if _spatial(layout.grid) != _spatial(self.grid):
            raise PatchError(
                f"patch: grid must be the model's own {layout.grid} in this call, got {self.grid}: leave grid out"
            )
        return dataclasses.replace(layout, grid=self.grid)
