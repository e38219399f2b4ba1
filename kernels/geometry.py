"""A window on a grid, and the parts of a sequence around it, as the windowed kernels read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Axes = tuple[int, int, int]
NO_WINDOW = (1, 1, 1)


@dataclass(frozen=True)
class Geometry:
    """A window on a grid of three axes, as the kernels read it.

    Attributes:
        grid: Tokens per axis (T, Y, X), 1 for an axis that is not there.
        window: Kernel size per axis, or for a ball the integer weight of the axis' squared steps.
        stride: As for `na3d`; 1 for a ball.
        dilation: As for `na3d`; 1 for a ball.
        is_causal: As for `na3d`; False for a ball.
        limit: Weighted squared steps of a ball stay below it; 0 for a box.
        windowed: False where grid tokens see none of each other.
    """

    grid: Axes
    window: Axes = NO_WINDOW
    stride: Axes = (1, 1, 1)
    dilation: Axes = (1, 1, 1)
    is_causal: tuple[bool, bool, bool] = (False, False, False)
    limit: int = 0
    windowed: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    @property
    def axes(self) -> int:
        """Axes from the first longer than one token on: what is before need not be looked at."""
        return next((3 - axis for axis, n in enumerate(self.grid) if n > 1), 1)

    @property
    def group_lengths(self) -> Axes:
        """Tokens per axis of the longest dilation group."""
        t, y, x = (-(-n // d) for n, d in zip(self.grid, self.dilation, strict=True))
        return t, y, x

    @property
    def window_keys(self) -> int:
        """Keys of the box around a window; 0 where there is none."""
        if not self.windowed:
            return 0
        if not self.limit:
            return math.prod(self.window)
        sides = (2 * math.isqrt((self.limit - 1) // weight) + 1 for weight in self.window)
        return math.prod(min(side, n) for side, n in zip(sides, self.grid, strict=True))

    def tiles(self, tile: Axes) -> int:
        """Programs per head for boxes of this shape, those of all dilation groups."""
        boxes = (-(-n // size) for n, size in zip(self.group_lengths, tile, strict=True))
        return math.prod(boxes) * math.prod(self.dilation)

    @classmethod
    def run(cls, tokens: int) -> Geometry:
        """A row of tokens that see none of each other."""
        return cls((1, 1, tokens), windowed=False)


@dataclass(frozen=True)
class Rows:
    """A set of rows of a sequence: `count` of them, leaving out `jump` rows at `split`."""

    count: int
    split: int = 0
    jump: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """Split and jump."""
        return self.split, self.jump


NO_ROWS = Rows(0)


def geometry_of(
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    limit: int,
) -> Geometry:
    """`Geometry` of one to three axes."""
    missing = 3 - len(grid)

    def three(values: Sequence[Any], fill: Any) -> Any:
        return (fill,) * missing + tuple(values)

    return Geometry(
        three(grid, 1), three(window, 1), three(stride, 1), three(dilation, 1), three(is_causal, False), limit
    )


@dataclass(frozen=True)
class QueryPart:
    """Queries of one launch and the keys they see.

    Attributes:
        geometry: Of the queries; where it is windowed, of the keys that their windows hold too.
        queries: Where they stand among all queries.
        grid_keys: Where the grid's keys stand in the sequence.
        rows: Keys of the sequence that every query of the part sees.
        sees_extra: Whether they see the extra keys.
    """

    geometry: Geometry
    queries: Rows
    grid_keys: Rows
    rows: Rows
    sees_extra: bool


@dataclass(frozen=True)
class KeyPart:
    """Keys of one launch and the queries that see them.

    Attributes:
        geometry: Of the keys; where it is windowed, of the queries that reach them too.
        keys: Where they stand in the sequence, or among the extra keys.
        grid_queries: Where the grid's queries stand among all queries.
        rows: Queries that see every key of the part.
        is_extra: Whether these are the extra keys.
    """

    geometry: Geometry
    keys: Rows
    grid_queries: Rows
    rows: Rows
    is_extra: bool


def query_parts(geometry: Geometry, before: int, queries: int, keys: int) -> list[QueryPart]:
    """The grid's queries, and the text's where the queries hold the whole sequence of `keys` tokens."""
    tokens, whole = geometry.tokens, queries == keys
    text, grid = Rows(keys - tokens, before, tokens), Rows(tokens, 0, before)
    parts = [QueryPart(geometry, grid if whole else Rows(tokens), grid, text, True)]
    if whole and text.count:
        parts.append(QueryPart(Geometry.run(text.count), text, NO_ROWS, Rows(keys, keys), False))
    return parts


def key_parts(geometry: Geometry, before: int, queries: int, keys: int, extra: int) -> list[KeyPart]:
    """The grid's keys, the text's, and the extra ones: every key once."""
    tokens, whole = geometry.tokens, queries == keys
    text, grid = Rows(keys - tokens, before, tokens), Rows(tokens, 0, before)
    grid_queries = grid if whole else Rows(tokens)
    parts = [KeyPart(geometry, grid, grid_queries, text if whole else NO_ROWS, False)]
    if text.count:
        parts.append(KeyPart(Geometry.run(text.count), text, NO_ROWS, Rows(queries, queries), False))
    if extra:
        parts.append(KeyPart(Geometry.run(extra), Rows(extra, extra), NO_ROWS, grid_queries, True))
    return parts
