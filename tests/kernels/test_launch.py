"""The table of launches: that every architecture has one for whatever is asked."""

import pytest
import torch

from vision_attn.kernels import aot, launch
from vision_attn.kernels.chips import CHIPS
from vision_attn.kernels.geometry import geometry_of
from vision_attn.kernels.launch import LaunchConfig, cut, rows_for
from vision_attn.kernels.reach import Ball, Box, to_arguments

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


def test_a_row_for_small_windows(monkeypatch):
    small = {"bits": 16, "head_dim": 64, "q_tokens": 32, "kv_tokens": 32, "warps": 2, "stages": 1, "window": 49}
    any_window = small | {"q_tokens": 128}
    del any_window["window"]
    monkeypatch.setattr(launch, "tables", lambda: ({"windowed_forward": {"default": [small, any_window]}},))
    chosen = [launch.choose("windowed_forward", 64, torch.float16, "sm90", window).q_tokens for window in (0, 49, 50)]
    assert chosen == [32, 32, 128]


@pytest.mark.parametrize(
    ("reach", "keys"),
    [
        (Box((9, 9), (3, 5), (1, 1), (1, 1), (False, False)), 15),
        (Ball.of_radius((9, 9), 3.0), 25),  # steps below 3 on each axis
        (Ball.of_radius((2, 9, 9), (1.0, 4.5, 2.0)), 27),
    ],
)
def test_the_box_around_a_window(reach, keys):
    assert geometry_of(*to_arguments(reach)).window_keys == keys
