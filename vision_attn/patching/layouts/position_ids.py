"""Token grids read from position ids, for models that are told positions instead of a latent's shape.

Reading values costs one device synchronisation per forward and ends a compiled graph. Every grid is checked against all
ids it was read from: a wrong grid would put windows in the wrong place in silence.
"""

from __future__ import annotations

import torch


def grid_from_ids(ids: torch.Tensor) -> tuple[int, int] | None:
    """Read the grid of one image from its position ids.

    Offsets, scaled positions and ids rounded to half precision are fine as long as the ids are row-major.

    Args:
        ids: Position ids `[tokens, axes]` or `[1 or B, tokens, axes]` on the CPU; axes 1 and 2 are row and column.

    Returns:
        `(Y, X)`, or `None` when the ids are not those of one image in row-major order.
    """
    rows, columns = ids[:, 1], ids[:, 2]
    width = leading_run(rows)
    if width == 0 or len(rows) % width:
        return None
    rows, columns = rows.reshape(-1, width), columns.reshape(-1, width)
    row_major = (
        (rows == rows[:, :1]).all()
        and (columns == columns[:1]).all()
        and (rows[1:, 0] >= rows[:-1, 0]).all()
        and (columns[0, 1:] >= columns[0, :-1]).all()
    )
    return (len(rows), width) if row_major else None


def leading_run(values: torch.Tensor) -> int:
    """Count how many values at the start equal the first one."""
    changes = (values != values[:1]).nonzero()
    return int(changes[0]) if len(changes) else len(values)


def ids_table(ids: torch.Tensor) -> torch.Tensor:
    """Bring position ids to the CPU as `[tokens, axes]`; a batch shares those of its first sample, as upstream."""
    return (ids[0] if ids.ndim == 3 else ids).detach().cpu()
