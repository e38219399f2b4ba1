"""Six tiny random models on which the behaviour of `patch` is tested: one for each way diffusers calls attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

TEXT = 5


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Tiny:
    """A model and its inputs: `inputs(*grid)` for a token grid, batch 2."""

    name: str
    make: Callable[..., nn.Module]
    inputs: Callable[..., dict[str, Any]]
    grid: tuple[int, ...] = (5, 7)
    other_grid: tuple[int, ...] = (4, 6)

    def model(self, **changes: Any) -> nn.Module:
        """A new model with random values everywhere: parameters that start at zero would hide errors."""
        torch.manual_seed(0)
        model = self.make(**changes).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() > 1 and not parameter.any():
                    parameter.normal_(std=0.2)
        return model

    def run(self, model: nn.Module, *grid: int) -> torch.Tensor:
        """Output of the model without gradient."""
        with torch.no_grad():
            return model(**self.inputs(*(grid or self.grid))).sample


def _flux(**changes: Any) -> nn.Module:
    settings = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    }
    return diffusers.FluxTransformer2DModel(**{**settings, **changes})


def position_ids(rows: int, columns: int) -> torch.Tensor:
    table = torch.zeros(rows, columns, 3)
    table[..., 1] = torch.arange(rows)[:, None]
    table[..., 2] = torch.arange(columns)[None, :]
    return table.reshape(-1, 3)


def _flux_inputs(rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, rows * columns, 4),
        "encoder_hidden_states": randn(2, TEXT, 32, seed=1),
        "pooled_projections": randn(2, 32, seed=2),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": position_ids(rows, columns),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _sd3(**changes: Any) -> nn.Module:
    settings = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 64,
        "out_channels": 4,
        "pos_embed_max_size": 16,
    }
    return diffusers.SD3Transformer2DModel(**{**settings, **changes})


def _sd3_inputs(rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": randn(2, TEXT, 32, seed=1),
        "pooled_projections": randn(2, 64, seed=2),
        "timestep": torch.tensor([500.0, 500.0]),
    }


def _wan(**changes: Any) -> nn.Module:
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return diffusers.WanTransformer3DModel(**{**settings, **changes})


def _wan_inputs(frames: int, rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, frames, 2 * rows, 2 * columns),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
    }


def _qwen(**changes: Any) -> nn.Module:
    settings = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "guidance_embeds": False,
        "axes_dims_rope": (8, 4, 4),
    }
    return diffusers.QwenImageTransformer2DModel(**{**settings, **changes})


def _qwen_inputs(rows: int, columns: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, rows * columns, 16),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "encoder_hidden_states_mask": torch.tensor([[1] * TEXT, [1] * (TEXT - 2) + [0, 0]]).bool(),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [[(1, rows, columns)]] * 2,
    }


def _unet(**changes: Any) -> nn.Module:
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**{**settings, **changes})


def _unet_inputs(rows: int, columns: int) -> dict[str, Any]:
    return {
        "sample": randn(2, 4, rows, columns),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
    }


_sdxl = functools.partial(
    _unet,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 16,
)


def _sdxl_inputs(rows: int, columns: int) -> dict[str, Any]:
    return {
        **_unet_inputs(rows, columns),
        "added_cond_kwargs": {"text_embeds": randn(2, 16, seed=3), "time_ids": randn(2, 6, seed=4)},
    }


FLUX = Tiny("flux", _flux, _flux_inputs)
SD3 = Tiny("sd3", _sd3, _sd3_inputs)
WAN = Tiny("wan", _wan, _wan_inputs, (3, 4, 5), (2, 3, 4))
QWEN = Tiny("qwen_image", _qwen, _qwen_inputs)
UNET = Tiny("unet", _unet, _unet_inputs, (6, 10), (8, 4))
SDXL = Tiny("sdxl", _sdxl, _sdxl_inputs, (6, 10), (8, 4))

TINY = (FLUX, SD3, WAN, QWEN, UNET, SDXL)
