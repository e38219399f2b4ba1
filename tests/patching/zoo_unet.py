"""Tiny random UNets and ControlNets (see `zoo_case.py`).

Convolutions mix pixels, so the layouts of UNets are measured at the feature maps that enter their blocks; the grid of a
case is the size of its latent, and two levels have 10 x 14 and 5 x 7 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from zoo_case import Case, Inputs, randn, touch_latent, touch_packed, touch_row
from zoo_flux import ids
from zoo_video import model
from zoo_video_inputs import noise_levels

TEXT = 6
FRAMES = 3
LEVELS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
UNET = LEVELS | {"cross_attention_dim": 16, "attention_head_dim": 2}
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D")


def unet_inputs(rows: int, columns: int) -> Inputs:
    return {
        "sample": randn(2, 4, rows, columns),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
    }


def sdxl_inputs(rows: int, columns: int) -> Inputs:
    added = {"text_embeds": randn(2, 8, seed=2), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return unet_inputs(rows, columns) | {"added_cond_kwargs": added}


def unconditional_inputs(rows: int, columns: int) -> Inputs:
    return {"sample": randn(2, 3, rows, columns), "timestep": noise_levels()}


def latent_upscaler_inputs(rows: int, columns: int) -> Inputs:
    return unet_inputs(rows, columns) | {"timestep_cond": randn(2, 8, seed=2)}


def video_unet_inputs(rows: int, columns: int) -> Inputs:
    """Frames go to the batch of the spatial layers: 2 x 3."""
    return unet_inputs(rows, columns) | {"sample": randn(2, 4, FRAMES, rows, columns)}


def animation_inputs(rows: int, columns: int) -> Inputs:
    """The caller repeats the text for every frame."""
    text = randn(2, TEXT, 16, seed=1).repeat_interleave(FRAMES, dim=0)
    return video_unet_inputs(rows, columns) | {"encoder_hidden_states": text}


def i2vgen_inputs(rows: int, columns: int) -> Inputs:
    return video_unet_inputs(rows, columns) | {
        "fps": torch.tensor([8, 8]),
        "image_latents": randn(2, 4, FRAMES, rows, columns, seed=2),
        "image_embeddings": randn(2, 16, seed=3),
    }


def svd_inputs(rows: int, columns: int) -> Inputs:
    return {
        "sample": randn(2, FRAMES, 4, rows, columns),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": randn(2, 1, 16, seed=1),
        "added_time_ids": torch.tensor([[7.0, 127.0, 0.02]] * 2),
    }


def kandinsky3_inputs(rows: int, columns: int) -> Inputs:
    return unet_inputs(rows, columns) | {"encoder_attention_mask": torch.ones(2, TEXT)}


def stable_cascade_inputs(rows: int, columns: int) -> Inputs:
    return {
        "sample": randn(2, 4, rows, columns),
        "timestep_ratio": torch.tensor([0.5, 0.3]),
        "clip_text_pooled": randn(2, 1, 16, seed=1),
    }


def uvit_inputs(rows: int, columns: int) -> Inputs:
    """Codebook indices, two by two per token."""
    return {
        "input_ids": torch.randint(0, 16, (2, 2 * rows, 2 * columns), generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "pooled_text_emb": randn(2, 8, seed=2),
        "micro_conds": randn(2, 2, seed=3),
    }


def touch_codes(inputs: Inputs, token: tuple[int, ...]) -> None:
    """Other codes for the four pixels of one token."""
    row, column = token
    pixels = inputs["input_ids"][:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    pixels.copy_((pixels + 7) % 16)


def controlnet_inputs(rows: int, columns: int) -> Inputs:
    return unet_inputs(rows, columns) | {"controlnet_cond": randn(2, 3, 2 * rows, 2 * columns, seed=2)}


def sparse_controlnet_inputs(rows: int, columns: int) -> Inputs:
    return animation_inputs(rows, columns) | {
        "controlnet_cond": randn(2, 4, FRAMES, rows, columns, seed=2),
        "conditioning_mask": torch.ones(2, 1, FRAMES, rows, columns),
    }


def flux_controlnet_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": randn(2, rows * columns, 4),
        "controlnet_cond": randn(2, rows * columns, 4, seed=3),
        "encoder_hidden_states": randn(2, TEXT, 32, seed=1),
        "pooled_projections": randn(2, 32, seed=2),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": ids(rows, columns),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def flux_union_inputs(rows: int, columns: int) -> Inputs:
    """The mode's token has an id as well."""
    return flux_controlnet_inputs(rows, columns) | {"controlnet_mode": torch.tensor([[1], [1]])}


def sd3_controlnet_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": randn(2, 4, 2 * rows, 2 * columns),
        "controlnet_cond": randn(2, 4, 2 * rows, 2 * columns, seed=3),
        "encoder_hidden_states": randn(2, TEXT, 32, seed=1),
        "pooled_projections": randn(2, 64, seed=2),
        "timestep": noise_levels(),
    }


def qwen_controlnet_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": randn(2, rows * columns, 16),
        "controlnet_cond": randn(2, rows * columns, 16, seed=2),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "encoder_hidden_states_mask": torch.ones(2, TEXT, dtype=torch.bool),
        "timestep": torch.tensor([0.5, 0.3]),
        "img_shapes": [[(1, rows, columns)]] * 2,
    }


def cosmos_controlnet_inputs(frames: int, rows: int, columns: int) -> Inputs:
    latent = (2, 4, frames, 2 * rows, 2 * columns)
    return {
        "controls_latents": randn(*latent),
        "latents": randn(*latent, seed=1),
        "timestep": noise_levels(),
        "encoder_hidden_states": (randn(2, TEXT, 16, seed=2), None),
        "condition_mask": torch.zeros(2, 1, *latent[2:]),
        "padding_mask": torch.zeros(1, 1, *latent[3:]),
    }


def touch_both(inputs: Inputs, token: tuple[int, ...]) -> None:
    """The control and what it steers are embedded by two layers."""
    for name in ("controls_latents", "latents"):
        touch_latent(name, (1, 2, 2))(inputs, token)


def unet(name: str, build_class: str, inputs: Callable[..., Inputs] = unet_inputs, **config: Any) -> Case:
    """A case that is measured at its feature maps; each level but the last halves the grid."""
    levels = len(config["block_out_channels"])
    return Case(name, model(build_class, **config), inputs, (5 * 2 ** (levels - 1), 7 * 2 ** (levels - 1)))


FLUX_CONTROLNET = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
FRAMES_DOWN = ("CrossAttnDownBlock3D", "DownBlock3D")
FRAMES_UP = ("UpBlock3D", "CrossAttnUpBlock3D")

ZOO_UNET: tuple[Case, ...] = (
    unet("sd15", "UNet2DConditionModel", **UNET, down_block_types=DOWN, up_block_types=UP),
    unet(
        "sdxl",
        "UNet2DConditionModel",
        sdxl_inputs,
        **UNET,
        down_block_types=DOWN[::-1],
        up_block_types=UP[::-1],
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    ),
    unet(
        "kandinsky2",
        "UNet2DConditionModel",
        **UNET,
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        resnet_time_scale_shift="scale_shift",
    ),
    unet(
        "latent_upscaler",
        "UNet2DConditionModel",
        latent_upscaler_inputs,
        **UNET | {"norm_num_groups": None, "block_out_channels": (32, 64, 64), "attention_head_dim": 8},
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        time_cond_proj_dim=8,
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    ),
    unet(
        "ddpm",
        "UNet2DModel",
        unconditional_inputs,
        **LEVELS,
        attention_head_dim=4,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    ),
    unet(
        "score_sde",
        "UNet2DModel",
        unconditional_inputs,
        **LEVELS | {"block_out_channels": (32, 32), "norm_num_groups": 8},
        attention_head_dim=8,
        time_embedding_type="fourier",
        down_block_types=("AttnSkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D"),
    ),
    unet(
        "unet3d",
        "UNet3DConditionModel",
        video_unet_inputs,
        **UNET | {"attention_head_dim": 4},
        down_block_types=FRAMES_DOWN,
        up_block_types=FRAMES_UP,
    ),
    unet(
        "i2vgen",
        "I2VGenXLUNet",
        i2vgen_inputs,
        **UNET,
        down_block_types=FRAMES_DOWN,
        up_block_types=FRAMES_UP,
    ),
    unet(
        "animatediff",
        "UNetMotionModel",
        animation_inputs,
        **LEVELS,
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    ),
    unet(
        "svd",
        "UNetSpatioTemporalConditionModel",
        svd_inputs,
        in_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        num_frames=FRAMES,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    ),
    unet(
        "kandinsky3",
        "Kandinsky3UNet",
        kandinsky3_inputs,
        time_embedding_dim=8,
        groups=4,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 16),
        cross_attention_dim=16,
        encoder_hid_dim=16,
    ),
    unet(
        "stable_cascade",
        "StableCascadeUNet",
        stable_cascade_inputs,
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=16,
        timestep_ratio_embedding_dim=8,
    ),
    unet(
        "dreamlite",
        "DreamLiteUNetModel",
        **UNET | {"attention_head_dim": 4},
        down_block_types=("DreamLiteCrossAttnDownBlock2D", "DreamLiteDownBlock2D"),
        up_block_types=("DreamLiteUpBlock2D", "DreamLiteCrossAttnUpBlock2D"),
        use_linear_projection=True,
    ),
    unet(
        "controlnet",
        "ControlNetModel",
        controlnet_inputs,
        **UNET,
        down_block_types=DOWN,
        conditioning_embedding_out_channels=(4, 8),
    ),
    unet(
        "sparse_controlnet",
        "SparseControlNetModel",
        sparse_controlnet_inputs,
        **UNET,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        motion_num_attention_heads=2,
    ),
    unet(
        "controlnet_xs",
        "UNetControlNetXSModel",
        controlnet_inputs,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        num_attention_heads=2,
        down_block_types=DOWN,
        up_block_types=UP,
        ctrl_block_out_channels=(4, 8),
        ctrl_num_attention_heads=2,
        ctrl_conditioning_embedding_out_channels=(4, 8),
    ),
    Case(
        "uvit",
        model(
            "UVit2DModel",
            hidden_size=16,
            cond_embed_dim=8,
            micro_cond_encode_dim=2,
            micro_cond_embed_dim=4,
            encoder_hidden_size=16,
            vocab_size=24,
            codebook_size=16,
            in_channels=8,
            block_out_channels=8,
            num_res_blocks=0,  # its residual blocks normalise over all pixels
            downsample=True,
            upsample=True,
            block_num_heads=2,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        ),
        uvit_inputs,
        (5, 7),
        touch_codes,
    ),
    Case(
        "flux_controlnet",
        model("FluxControlNetModel", **FLUX_CONTROLNET),
        flux_controlnet_inputs,
        (5, 7),
        touch_packed("hidden_states", (5, 7)),
        touch_row("encoder_hidden_states"),
        TEXT,
    ),
    Case(
        "flux_controlnet_union",
        model("FluxControlNetModel", **FLUX_CONTROLNET, num_mode=3),
        flux_union_inputs,
        (5, 7),
        touch_packed("hidden_states", (5, 7)),
        touch_row("encoder_hidden_states"),
        TEXT,
    ),
    Case(
        "sd3_controlnet",
        model(
            "SD3ControlNetModel",
            sample_size=32,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=64,
            out_channels=4,
            pos_embed_max_size=16,
        ),
        sd3_controlnet_inputs,
        (5, 7),
        touch_latent("hidden_states", 2),
        touch_row("encoder_hidden_states"),
        TEXT,
    ),
    Case(
        "qwen_image_controlnet",
        model(
            "QwenImageControlNetModel",
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        qwen_controlnet_inputs,
        (5, 7),
        touch_packed("hidden_states", (5, 7)),
        touch_row("encoder_hidden_states"),
        TEXT,
    ),
    Case(
        "cosmos_controlnet",
        model(
            "CosmosControlNetModel",
            n_controlnet_blocks=1,
            in_channels=6,
            latent_channels=6,
            model_channels=24,
            num_attention_heads=2,
            attention_head_dim=12,
            mlp_ratio=2,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
        ),
        cosmos_controlnet_inputs,
        (3, 5, 7),
        touch_both,
    ),
)
