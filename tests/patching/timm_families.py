"""Tiny models of timm's families whose attention modules tell their own grid, and which tokens their calls hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import timm
import torch
from timm.layers import set_fused_attn


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what patching it must find.

    Attributes:
        name: Of the timm model.
        size: Of the image.
        options: Of `create_model`.
        grids: Layer to grid.
        skipped: Layer to the reason for which it stays as it is.
        places: `places(model, query, key)`: row-major number of each token of an SDPA call, `[S]` or `[units, S]`, and
            the grid they are numbered on; `None` for a call that stays as it is.
        biased: Whether calls have a bias per head.
    """

    name: str
    size: tuple[int, int]
    options: dict
    grids: dict[str, tuple[int, int]]
    places: Callable
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    biased: bool = False

    def build(self, **changes):
        torch.manual_seed(0)
        set_fused_attn(True, experimental=True)
        try:
            model = timm.create_model(self.name, num_classes=5, **self.options, **changes).eval()
        finally:
            set_fused_attn(True)
        for name, parameter in model.named_parameters():  # as far from uniform attention as in a trained model
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.data += torch.randn_like(parameter) * (2 * scale if ".attn" in name else scale)
        return model

    def image(self, batch=2):
        return torch.randn(batch, 3, *self.size, generator=torch.Generator().manual_seed(1))


def rows(*grids):
    """Calls whose tokens are row-major on the one grid that has as many."""
    by_length = {rows * columns: (rows, columns) for rows, columns in grids}
    assert len(by_length) == len(grids)

    def places(model, query, key):
        grid = by_length[query.shape[2]]
        return torch.arange(query.shape[2]), grid

    return places


def self_attention_on(grid):
    """Row-major calls on one grid, next to calls with fewer keys."""

    def places(model, query, key):
        return (torch.arange(query.shape[2]), grid) if query.shape == key.shape else None

    return places


def hiera_places(model, query, key):
    """By timm's own `Unroll` of a picture that holds the number of each token."""
    if query.shape != key.shape:
        return None
    size = model.tokens_spatial_shape
    number = model.unroll(torch.arange(size[0] * size[1])[None, :, None]).flatten()
    tokens, side = query.shape[2:-1].numel(), (1, 1)  # side: what poolings have made one token
    while size[0] * size[1] > tokens * side[0] * side[1]:
        side = side[0] * model.q_stride[0], side[1] * model.q_stride[1]
    y, x = number[:tokens] // size[1] // side[0], number[:tokens] % size[1] // side[1]
    if query.ndim == 4:
        grid = size[0] // side[0], size[1] // side[1]
        return y * grid[1] + x, grid
    unit = tuple(n // s for n, s in zip(model.mask_unit_size, side, strict=True))
    inside = (y % unit[0]) * unit[1] + x % unit[1]
    return inside.view(query.shape[3], query.shape[2]).T, unit


MAXVIT = {f"stages.{i}.blocks.0.attn_{kind}.attn": (5, 3) for i in range(4) for kind in ("block", "grid")}
POOLED = "its queries are pooled: no self-attention, stays dense"
SMALLER = "its keys are those of a smaller map: no self-attention, stays dense"
CHANNELS = "it attends channels, not tokens: no map"

CASES = {
    "swin": Case(
        "swin_tiny_patch4_window7_224", (64, 96),
        {"img_size": (64, 96), "window_size": (4, 6), "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 3)},
        {f"layers.{i}.blocks.{j}.attn": (4, 6) for i in range(2) for j in range(2)},
        rows((4, 6)), biased=True,
    ),
    "swin, small map": Case(
        "swin_tiny_patch4_window7_224", (48, 64),
        {"img_size": (48, 64), "window_size": (5, 9), "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 3)},
        {"layers.0.blocks.0.attn": (5, 9), "layers.1.blocks.0.attn": (5, 8), "layers.1.blocks.1.attn": (5, 8)},
        rows((5, 9), (5, 8)), biased=True,
    ),
    "maxvit": Case(
        "test_maxvit", (160, 96), {"img_size": (160, 96)}, MAXVIT, rows((5, 3)), biased=True,
    ),
    "maxvit, channels first": Case(
        "test_maxvit", (160, 96), {"img_size": (160, 96), "transformer_use_nchw_attn": True}, MAXVIT, rows((5, 3)),
        biased=True,
    ),
    "maxvit without bias": Case(
        "test_maxvit", (160, 96), {"img_size": (160, 96), "transformer_rel_pos_type": ""}, MAXVIT, rows((5, 3)),
    ),
    "coatnet": Case(
        "test_coatnet", (160, 96), {"img_size": (160, 96)},
        {"stages.2.blocks.0.attn": (10, 6), "stages.2.blocks.1.attn": (10, 6), "stages.3.blocks.0.attn": (5, 3)},
        rows((10, 6), (5, 3)), biased=True,
    ),
    "davit": Case(
        "davit_tiny", (40, 72), {"embed_dims": (24, 48), "depths": (1, 1), "num_heads": (2, 3), "window_size": (3, 5)},
        {"stages.0.blocks.0.0.attn": (3, 5), "stages.1.blocks.0.0.attn": (3, 5)},
        rows((3, 5)), {"stages.0.blocks.0.1.attn": CHANNELS, "stages.1.blocks.0.1.attn": CHANNELS},
    ),
    "pvt": Case(
        "pvt_v2_b0", (96, 160), {"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 4)},
        {"stages.3.blocks.0.attn": (3, 5), "stages.3.blocks.1.attn": (3, 5)},
        self_attention_on((3, 5)), {f"stages.{i}.blocks.0.attn": SMALLER for i in range(3)},
    ),
    "hiera": Case(
        "hiera_tiny_224", (96, 64), {"img_size": (96, 64), "embed_dim": 16, "num_heads": 2, "stages": (2, 2, 2, 2)},
        {"blocks.0.attn": (8, 8), "blocks.1.attn": (8, 8), "blocks.3.attn": (4, 4), "blocks.5.attn": (6, 4),
         "blocks.7.attn": (3, 2)},
        hiera_places, {f"blocks.{i}.attn": POOLED for i in (2, 4, 6)},
    ),
    "hiera, oblong strides": Case(
        "hiera_tiny_224", (144, 32),
        {"img_size": (144, 32), "embed_dim": 16, "num_heads": 2, "stages": (1, 2, 2), "q_pool": 2, "q_stride": (3, 2),
         "mask_unit_size": (9, 4), "mask_unit_attn": (True, True, False)},
        {"blocks.0.attn": (9, 4), "blocks.2.attn": (3, 2), "blocks.4.attn": (4, 2)},
        hiera_places, {f"blocks.{i}.attn": POOLED for i in (1, 3)},
    ),
    "hiera, poolings left": Case(
        "hiera_tiny_224", (72, 48),
        {"img_size": (72, 48), "embed_dim": 16, "num_heads": 2, "stages": (1, 2, 2), "q_pool": 1, "q_stride": (3, 2),
         "mask_unit_size": (9, 4), "mask_unit_attn": (False, True, False)},
        {"blocks.0.attn": (18, 12), "blocks.2.attn": (3, 2), "blocks.3.attn": (3, 2), "blocks.4.attn": (6, 6)},
        hiera_places, {"blocks.1.attn": POOLED},
    ),
}  # fmt: skip
