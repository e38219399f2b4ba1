"""Grids read from position ids, and ids that are no grid."""

from __future__ import annotations

import pytest
import torch
from zoo_flux import ids

from vision_attn.patching.layouts.position_ids import grid_from_ids, ids_table, leading_run, read_grid, read_target


@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (1, 6), (6, 1), (1, 1)])
def test_grid_of_an_image(grid: tuple[int, int]) -> None:
    assert grid_from_ids(ids(*grid)) == grid


def test_offsets_and_scaled_positions_are_fine() -> None:
    table = ids(4, 9)
    assert grid_from_ids(table + torch.tensor([1.0, 512.0, 512.0])) == (4, 9)
    assert grid_from_ids(table * torch.tensor([1.0, 0.5, 2.0])) == (4, 9)
    assert grid_from_ids(ids(4, 9, axes=4).long()) == (4, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_ids_of_a_large_image(dtype: torch.dtype) -> None:
    """bfloat16 rounds positions above 256: two neighbours may have the same id."""
    assert grid_from_ids(ids(3, 400).to(dtype)) == (3, 400)
    assert grid_from_ids(ids(400, 3).to(dtype)) == (400, 3)


def test_rounding_that_hides_the_grid_gives_none() -> None:
    assert grid_from_ids((ids(6, 5) + torch.tensor([1.0, 512.0, 512.0])).to(torch.bfloat16)) is None


@pytest.mark.parametrize(
    "table",
    [
        ids(5, 7)[:-1],
        ids(5, 7).flip(0),
        torch.cat([ids(5, 7), ids(4, 3)]),
        torch.cat([ids(5, 7), ids(4, 7)]),
        ids(5, 7)[torch.randperm(35, generator=torch.Generator().manual_seed(0))],
        ids(5, 7)[:, [0, 2, 1]],
        ids(5, 7)[:0],
    ],
    ids=["incomplete", "reversed", "two images", "two images of one width", "shuffled", "column-major", "empty"],
)
def test_ids_that_are_no_grid_give_none(table: torch.Tensor) -> None:
    assert grid_from_ids(table) is None


def test_leading_run() -> None:
    assert leading_run(torch.tensor([2, 2, 2, 1, 2])) == 3
    assert leading_run(torch.tensor([4, 4])) == 2
    assert leading_run(torch.tensor([])) == 0


def test_a_batch_of_ids_is_that_of_its_first_sample() -> None:
    batch = torch.stack([ids(2, 3), ids(2, 3) + 1])
    assert torch.equal(ids_table(batch), ids(2, 3))


def test_target_and_references_differ_in_the_first_column() -> None:
    both = torch.cat([ids(5, 7, image=1), ids(4, 3, image=2)])
    assert read_target(both) == (35, (5, 7))
    assert read_target(both[None]) == (35, (5, 7))
    assert read_target(torch.cat([ids(5, 7), ids(4, 3)])) == (47, None)


def test_grid_behind_text() -> None:
    assert read_grid(torch.cat([torch.zeros(4, 3), ids(5, 7)]), start=4) == (5, 7)


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
def test_a_whole_graph_is_refused_with_the_way_out() -> None:
    compiled = torch.compile(lambda table: table + len(read_grid(table) or ()), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"pass grid=\(Y, X\) to va.patch, or compile only the blocks"):
        compiled(ids(5, 7))


def test_a_graph_that_may_break_goes_on() -> None:
    compiled = torch.compile(lambda table: table + len(read_grid(table) or ()), backend="eager")
    assert torch.equal(compiled(ids(5, 7)), ids(5, 7) + 2)
