"""The table of launches: that every architecture has one for whatever is asked."""

import pytest
import torch

from vision_attn.kernels import aot, launch
from vision_attn.kernels.chips import CHIPS
from vision_attn.kernels.launch import LaunchConfig, cut, rows_for

TABLE = launch.tables()[-1]


def test_the_table_names_the_kernels_that_are_compiled():
    assert set(TABLE) == set(aot.KERNELS)


@pytest.mark.parametrize("chip", [*CHIPS, "cpu", "sm75", "gfx90a"])
@pytest.mark.parametrize("kernel", TABLE)
def test_every_architecture_serves_all_head_dims(kernel, chip):
    for dtype, bits in ((torch.float16, 16), (torch.bfloat16, 16), (torch.float32, 32)):
        widths = [row["head_dim"] for row in rows_for(TABLE[kernel], chip) if row["bits"] == bits]
        assert widths == [64, 128, 256]  # the first that is wide enough is taken
        for head_dim in (1, 40, 64, 80, 160, 256):
            assert isinstance(launch.choose(kernel, head_dim, dtype, chip), LaunchConfig)


def test_rows_of_an_architecture_of_a_relative_and_the_default():
    rows = {"default": ["default"], "sm90": ["hopper"], "gfx942": ["cdna 3"]}
    chosen = [rows_for(rows, name) for name in ("sm90", "sm86", "cpu", "gfx942", "gfx1100")]
    assert chosen == [["hopper"], ["default"], ["default"], ["cdna 3"], ["cdna 3"]]
    assert rows_for({"sm90": ["hopper"]}, "sm80") == []
    assert rows_for({"default": ["default"]}, "gfx942") == ["default"]


@pytest.mark.parametrize(
    ("kernel", "tokens", "expected"),
    [
        ("biased_forward", (32, 4096), (32, 64, 2)),
        ("biased_forward", (4096, 32), (128, 32, 8)),
        ("biased_backward_dkv", (4096, 16), (128, 16, 2)),
        ("biased_backward_dkv", (16, 4096), (16, 64, 8)),
        ("biased_forward", (4096, 4096), (128, 64, 8)),
    ],
)
def test_fewer_tokens_take_fewer_warps(kernel, tokens, expected):
    """A warp keeps its 16 (of queries) or 8 (of keys) rows of the tile that a program holds."""
    found = cut(LaunchConfig(128, 64, 8, 2, 255), kernel, *tokens)
    assert (found.q_tokens, found.kv_tokens, found.warps, found.stages, found.registers) == (*expected, 2, 255)
