"""Token grids read from position ids, for models that are told positions instead of a latent's shape.

Reading values costs one device synchronisation per forward and ends a compiled graph. Every grid is checked against all
ids it was read from: a wrong grid would put windows in the wrong place in silence.
"""

from __future__ import annotations

import torch

# With fullgraph=True torch raises an error that quotes the reason; without, it ends the graph here and goes on after.
outside_of_graphs = torch.compiler.disable(
    reason="the token grid is read from the values of position ids: pass grid=(Y, X) to va.patch, or compile only the "
    "blocks with model.compile_repeated_blocks()"
)


@outside_of_graphs
def read_target(ids: torch.Tensor) -> tuple[int, tuple[int, int] | None]:
    """Read the target image from ids in which each image has an index of its own, in axis 0; the target comes first.

    Args:
        ids: Position ids `[tokens, axes]` or `[B, tokens, axes]` of all images.

    Returns:
        How many tokens the target has, and its grid `(Y, X)`, or `None` when its ids are no grid.
    """
    table = ids_table(ids)
    target = leading_run(table[:, 0])
    return target, grid_from_ids(table[:target])


@outside_of_graphs
def read_grid(ids: torch.Tensor, start: int = 0) -> tuple[int, int] | None:
    """Read the grid of the one image whose position ids begin at row `start`; `None` when they are no grid."""
    return grid_from_ids(ids_table(ids)[start:])


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
