"""Small random inputs for a model, made up from its configuration, for dry runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vision_attn.patching.timm import is_timm

Inputs = dict[str, Any]

GRID = (5, 7)
FRAMES = 3
TEXT = 6


class _Maker:
    """Draws tensors on the model's device and in its dtype, always the same ones."""

    def __init__(self, model: nn.Module) -> None:
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.model: Any = model
        self.config: Any = getattr(model, "config", None)
        self.generator = torch.Generator().manual_seed(0)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def full(self, value: float) -> torch.Tensor:
        return torch.full((1,), value, device=self.device)

    def ids(self, tokens: int, width: int) -> torch.Tensor:
        return torch.zeros(tokens, width, device=self.device)

    def latent(self, channels: int, *patch: int) -> torch.Tensor:
        grid = GRID if len(patch) == 2 else (FRAMES, *GRID)
        return self.randn(1, channels, *(n * p for n, p in zip(grid, patch, strict=True)))


def _grid_ids(make: _Maker, width: int) -> torch.Tensor:
    """Position ids `[Y * X, width]`: rows in column 1, columns in column 2."""
    ids = torch.zeros(*GRID, width, device=make.device)
    ids[..., 1] = torch.arange(GRID[0], device=make.device)[:, None]
    ids[..., 2] = torch.arange(GRID[1], device=make.device)[None, :]
    return ids.reshape(-1, width)


def _flux(make: _Maker) -> Inputs:
    config = make.config
    inputs = {
        "hidden_states": make.randn(1, math.prod(GRID), config.in_channels),
        "encoder_hidden_states": make.randn(1, TEXT, config.joint_attention_dim),
        "timestep": make.full(0.5).to(make.dtype),
        "img_ids": _grid_ids(make, 3),
        "txt_ids": make.ids(TEXT, 3),
    }
    if "pooled_projection_dim" in config:
        inputs["pooled_projections"] = make.randn(1, config.pooled_projection_dim)
    if getattr(config, "guidance_embeds", False):
        inputs["guidance"] = make.full(3.5)
    return inputs


def _flux2(make: _Maker) -> Inputs:
    inputs = _flux(make)
    inputs["img_ids"], inputs["txt_ids"] = _grid_ids(make, 4), make.ids(TEXT, 4)
    inputs["guidance"] = make.full(3.5)
    inputs.pop("pooled_projections", None)
    return inputs


def _sd3(make: _Maker) -> Inputs:
    config = make.config
    return {
        "hidden_states": make.latent(config.in_channels, config.patch_size, config.patch_size),
        "encoder_hidden_states": make.randn(1, TEXT, config.joint_attention_dim),
        "pooled_projections": make.randn(1, config.pooled_projection_dim),
        "timestep": make.full(500.0),
    }


def _auraflow(make: _Maker) -> Inputs:
    inputs = _sd3_like(make, make.config.joint_attention_dim)
    return {**inputs, "timestep": make.full(0.5).to(make.dtype)}


def _sd3_like(make: _Maker, text_width: int) -> Inputs:
    config = make.config
    return {
        "hidden_states": make.latent(config.in_channels, config.patch_size, config.patch_size),
        "encoder_hidden_states": make.randn(1, TEXT, text_width),
        "timestep": make.full(500.0),
    }


def _pixart(make: _Maker) -> Inputs:
    conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if make.config.use_additional_conditions or (
        make.config.use_additional_conditions is None and make.config.sample_size == 128
    ):
        conditions = {"resolution": make.randn(1, 2), "aspect_ratio": make.randn(1, 1)}
    return {**_sd3_like(make, make.config.caption_channels), "added_cond_kwargs": conditions}


def _dit(make: _Maker) -> Inputs:
    config = make.config
    side = GRID[0] * config.patch_size  # the stock model draws squares only
    return {
        "hidden_states": make.randn(1, config.in_channels, side, side),
        "timestep": make.full(10).long(),
        "class_labels": make.full(1).long(),
    }


def _qwen_image(make: _Maker) -> Inputs:
    return {
        "hidden_states": make.randn(1, math.prod(GRID), make.config.in_channels),
        "encoder_hidden_states": make.randn(1, TEXT, make.config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool, device=make.device),
        "timestep": make.full(0.5).to(make.dtype),
        "img_shapes": [[(1, *GRID)]],
    }


def _wan(make: _Maker) -> Inputs:
    return {
        "hidden_states": make.latent(make.config.in_channels, *make.config.patch_size),
        "timestep": make.full(500).long(),
        "encoder_hidden_states": make.randn(1, TEXT, make.config.text_dim),
    }


def _cogvideox(make: _Maker) -> Inputs:
    patch, frames = make.config.patch_size, FRAMES * (make.config.patch_size_t or 1)
    return {
        "hidden_states": make.randn(1, frames, make.config.in_channels, GRID[0] * patch, GRID[1] * patch),
        "encoder_hidden_states": make.randn(1, make.config.max_text_seq_length, make.config.text_embed_dim),
        "timestep": make.full(500).long(),
    }


def _ltx(make: _Maker) -> Inputs:
    return {
        "hidden_states": make.randn(1, FRAMES * math.prod(GRID), make.config.in_channels),
        "encoder_hidden_states": make.randn(1, TEXT, make.config.caption_channels),
        "timestep": make.full(500).long(),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.long, device=make.device),
        "num_frames": FRAMES,
        "height": GRID[0],
        "width": GRID[1],
    }


def _unet(make: _Maker) -> Inputs:
    config = make.config
    levels = len(config.block_out_channels)
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    inputs: Inputs = {
        "sample": make.randn(1, config.in_channels, 3 * 2**levels, 5 * 2**levels),
        "timestep": make.full(10).long(),
        "encoder_hidden_states": make.randn(1, TEXT, width),
    }
    if config.addition_embed_type == "text_time":
        text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": make.randn(1, text), "time_ids": make.randn(1, 6)}
    return inputs


def _unet_unconditional(make: _Maker) -> Inputs:
    levels = len(make.config.block_out_channels)
    return {
        "sample": make.randn(1, make.config.in_channels, 3 * 2**levels, 5 * 2**levels),
        "timestep": make.full(10).long(),
    }


RECIPES: dict[str, Callable[[_Maker], Inputs]] = {
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _flux,
    "LongCatImageTransformer2DModel": _flux,
    "OvisImageTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "SD3Transformer2DModel": _sd3,
    "AuraFlowTransformer2DModel": _auraflow,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
    "QwenImageTransformer2DModel": _qwen_image,
    "WanTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _unet_unconditional,
}


def _timm(make: _Maker) -> Inputs:
    """An image of the size that the model is made for."""
    model = make.model
    if hasattr(model, "tokens_spatial_shape"):  # Hiera
        size = [tokens * stride for tokens, stride in zip(model.tokens_spatial_shape, model.patch_stride, strict=True)]
    else:
        told = (getattr(part, "img_size", None) for part in (model, getattr(model, "patch_embed", None)))
        size = next(filter(None, told), model.default_cfg["input_size"][1:])
    return {"x": make.randn(1, model.in_chans, *size)}


def dry_inputs(model: nn.Module) -> Inputs:
    """Forward arguments for a model: batch 1, a 5 x 7 token grid (3 frames for video), 6 text tokens, always the same.

    A timm model gets an image of its own size.

    Args:
        model: A diffusers transformer or UNet, or a timm model.

    Returns:
        Keyword arguments of its forward.

    Raises:
        ValueError: Nothing is known about what the class takes.
    """
    for cls in type(model).__mro__:
        recipe = RECIPES.get(cls.__name__, _timm if is_timm(model) and hasattr(model, "in_chans") else None)
        if recipe is not None:
            made = recipe(_Maker(model))
            accepted = inspect.signature(type(model).forward).parameters
            return {name: value for name, value in made.items() if name in accepted}
    raise ValueError(
        f"verify: inputs must be given for {type(model).__name__}, got None: pass inputs= with the arguments of its "
        "forward, or verify the pipeline it belongs to"
    )
