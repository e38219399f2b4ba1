"""Tiny random ControlNets of image models (those of video models and UNets are with their models)."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from torch import nn
from zoo_case import Case, Inputs, randn, seeded
from zoo_image import (
    TEXT,
    WIDTH,
    case,
    hunyuan_dit_inputs,
    z_image,
    z_image_inputs,
    z_image_touch_image,
    z_image_touch_text,
)


def hunyuan_dit_controlnet() -> nn.Module:
    return diffusers.HunyuanDiT2DControlNetModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=16,
        transformer_num_layers=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
        text_len=TEXT,
        text_len_t5=TEXT,
        use_style_cond_and_image_meta_size=False,
    )


def hunyuan_dit_controlnet_inputs(rows: int, columns: int) -> Inputs:
    return hunyuan_dit_inputs(rows, columns) | {"controlnet_cond": randn(2, 4, 2 * rows, 2 * columns, seed=5)}


def z_image_controlnet() -> nn.Module:
    model = ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=4,
        add_control_noise_refiner="control_noise_refiner",
        dim=24,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    model.gradient_checkpointing = False  # upstream reads it without having set it
    return ZImageControlNetModel.from_transformer(model, z_image())


def z_image_controlnet_inputs(rows: int, columns: int) -> Inputs:
    return z_image_inputs(rows, columns) | {"control_context": list(randn(2, 4, 1, 2 * rows, 2 * columns, seed=5))}


def controlnet_union() -> nn.Module:
    return diffusers.ControlNetUnionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24,
        num_trans_channel=8,
        num_trans_head=2,
        num_proj_channel=8,
    )


def controlnet_union_inputs(rows: int, columns: int) -> Inputs:
    return {
        "sample": randn(2, 4, rows, columns),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "controlnet_cond": [randn(2, 3, 2 * rows, 2 * columns, seed=2)],
        "control_type": torch.tensor([[0, 1, 0, 0, 0, 0]] * 2),
        "control_type_idx": [1],
    }


ZOO_CONTROLNET: tuple[Case, ...] = (
    case("hunyuan_dit_controlnet", hunyuan_dit_controlnet, hunyuan_dit_controlnet_inputs, text_key=None),
    case(
        "z_image_controlnet",
        z_image_controlnet,
        z_image_controlnet_inputs,
        touch_image=z_image_touch_image,
        touch_text=z_image_touch_text,
    ),
    # Its convolutions and group norms mix pixels.
    Case("controlnet_union", seeded(controlnet_union), controlnet_union_inputs),
)
