"""Tiny random text-to-image transformers, one for each token layout (see `zoo_case.py`)."""

from __future__ import annotations

import diffusers
import torch
from zoo_case import Case, Inputs, randn, seeded, touch_latent, touch_packed, touch_row

TEXT = 5  # text tokens
GRID = (5, 7)


def ids(rows: int, columns: int, width: int = 3) -> torch.Tensor:
    """Position ids `[Y * X, width]` of one image, as FLUX pipelines make them: (0, y, x, 0...)."""
    table = torch.zeros(rows, columns, width)
    table[..., 1] = torch.arange(rows)[:, None]
    table[..., 2] = torch.arange(columns)[None, :]
    return table.reshape(rows * columns, width)


def flux() -> torch.nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": randn(2, rows * columns, 4),
        "encoder_hidden_states": randn(2, TEXT, 32, seed=1),
        "pooled_projections": randn(2, 32, seed=2),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": ids(rows, columns),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def sd3() -> torch.nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    )


def sd3_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": randn(2, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, TEXT, 32, seed=1),
        "pooled_projections": randn(2, 64, seed=2),
        "timestep": torch.tensor([500.0, 500.0]),
    }


ZOO_IMAGE: tuple[Case, ...] = (
    Case(
        "flux",
        seeded(flux),
        flux_inputs,
        touch_image=touch_packed("hidden_states", GRID),
        touch_text=touch_row("encoder_hidden_states"),
        text_tokens=TEXT,
    ),
    Case(
        "sd3",
        seeded(sd3),
        sd3_inputs,
        touch_image=touch_latent("hidden_states", 2),
        touch_text=touch_row("encoder_hidden_states"),
        text_tokens=TEXT,
    ),
)
