"""Tiny random FLUX-like transformers: latents packed into tokens, positions given by ids or shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn
from zoo_case import Case, Inputs, randn, seeded, touch_packed, touch_row

TEXT = 5  # text tokens
WIDTH = 32  # channels of the text embeddings
CHANNELS = 4
GRID = (5, 7)
REFERENCE = (4, 3)  # token grid of the reference image
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
TIME = torch.tensor([0.5, 0.5])


def ids(rows: int, columns: int, axes: int = 3, image: float = 0) -> torch.Tensor:
    """Position ids `[Y * X, axes]` of one image, as FLUX pipelines make them: (image, y, x, 0...)."""
    table = torch.zeros(rows, columns, axes)
    table[..., 0] = image
    table[..., 1] = torch.arange(rows)[:, None]
    table[..., 2] = torch.arange(columns)[None, :]
    return table.reshape(rows * columns, axes)


def text_mask() -> torch.Tensor:
    """The prompt of the second sample is shorter."""
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 3:] = False
    return mask


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        **HEADS,
    )


def packed(rows: int, columns: int, axes: int = 3) -> Inputs:
    return {
        "hidden_states": randn(2, rows * columns, CHANNELS),
        "encoder_hidden_states": randn(2, TEXT, WIDTH, seed=1),
        "timestep": TIME.clone(),
        "img_ids": ids(rows, columns, axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }


def flux_inputs(rows: int, columns: int) -> Inputs:
    return {**packed(rows, columns), "pooled_projections": randn(2, WIDTH, seed=2)}


def with_reference(inputs: Inputs, axes: int = 3) -> Inputs:
    """Append one reference image to the packed latents, as Kontext does."""
    rows, columns = REFERENCE
    reference = randn(2, rows * columns, CHANNELS, seed=3)
    return {
        **inputs,
        "hidden_states": torch.cat([inputs["hidden_states"], reference], dim=1),
        "img_ids": torch.cat([inputs["img_ids"], ids(rows, columns, axes, image=1)]),
    }


def flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        **HEADS,
    )


def flux3() -> nn.Module:
    return diffusers.Flux3Transformer2DModel(
        in_channels=CHANNELS,
        cond_in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **HEADS,
    )


def flux3_inputs(rows: int, columns: int) -> Inputs:
    reference_rows, reference_columns = REFERENCE
    return {
        **packed(rows, columns, 4),
        "image_cond_hidden_states": randn(2, reference_rows * reference_columns, CHANNELS, seed=3),
        "image_cond_ids": ids(reference_rows, reference_columns, 4, image=1),
    }


def chroma() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **HEADS,
    )


def chroma_masked_inputs(rows: int, columns: int) -> Inputs:
    mask = torch.cat([text_mask(), torch.ones(2, rows * columns, dtype=torch.bool)], dim=1)
    return packed(rows, columns) | {"attention_mask": mask}


def bria() -> nn.Module:
    return diffusers.BriaTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=[0, 8, 8],
        **HEADS,
    )


def fibo() -> nn.Module:
    return diffusers.BriaFiboTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=[0, 8, 8],
        text_encoder_dim=WIDTH,
        **HEADS,
    )


def fibo_inputs(rows: int, columns: int) -> Inputs:
    layers = [randn(2, TEXT, WIDTH, seed=2), randn(2, TEXT, WIDTH, seed=3)]
    return {**packed(rows, columns), "text_encoder_layers": layers}


def longcat() -> nn.Module:
    return diffusers.LongCatImageTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
        **HEADS,
    )


def longcat_inputs(rows: int, columns: int) -> Inputs:
    inputs = packed(rows, columns)
    return {**inputs, "img_ids": inputs["img_ids"] + torch.tensor([1.0, 512.0, 512.0])}


def ovis() -> nn.Module:
    return diffusers.OvisImageTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        **HEADS,
    )


def qwen(**options: Any) -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        **HEADS,
        **options,
    )


def qwen_layered() -> nn.Module:
    return qwen(use_layer3d_rope=True)


def qwen_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": randn(2, rows * columns, CHANNELS),
        "encoder_hidden_states": randn(2, TEXT, WIDTH, seed=1),
        "timestep": TIME.clone(),
        "img_shapes": [[(1, rows, columns)]] * 2,
    }


def qwen_masked_inputs(rows: int, columns: int) -> Inputs:
    return qwen_inputs(rows, columns) | {"encoder_hidden_states_mask": text_mask()}


def qwen_edit_inputs(rows: int, columns: int) -> Inputs:
    inputs = qwen_inputs(rows, columns)
    reference = randn(2, REFERENCE[0] * REFERENCE[1], CHANNELS, seed=3)
    return {
        **inputs,
        "hidden_states": torch.cat([inputs["hidden_states"], reference], dim=1),
        "img_shapes": [[(1, rows, columns), (1, *REFERENCE)]] * 2,
    }


def qwen_layered_inputs(layers: int, rows: int, columns: int) -> Inputs:
    reference = REFERENCE[0] * REFERENCE[1]
    return {
        **qwen_inputs(rows, columns),
        "hidden_states": randn(2, layers * rows * columns + reference, CHANNELS),
        "img_shapes": [[(1, rows, columns)] * layers + [(1, *REFERENCE)]] * 2,
    }


def qwen21() -> nn.Module:
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        **HEADS,
    )


def qwen21_inputs(rows: int, columns: int) -> Inputs:
    """Text, one reference image of 2 x 4 tokens (two slots of the text), text, then the target."""
    target = rows * columns
    is_image = torch.zeros(2, TEXT + 2 + target // 4, dtype=torch.bool)
    is_image[:, 2:4] = True
    is_image[:, TEXT + 2 :] = True
    return {
        "hidden_states": randn(2, 8 + target, CHANNELS),
        "encoder_hidden_states": randn(2, TEXT + 2, WIDTH, seed=1),
        "timestep": TIME.clone(),
        "img_shapes": [[(1, 2, 4), (1, rows, columns)]] * 2,
        "img_mask": is_image,
    }


def qwen21_touch_text(inputs: Inputs, row: int) -> None:
    touch_row("encoder_hidden_states")(inputs, 4 + row)


def nucleus() -> nn.Module:
    return diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        num_key_value_heads=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        mlp_ratio=6.0,
        moe_enabled=False,
        **HEADS,
    )


def ideogram4() -> nn.Module:
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=WIDTH,
        mrope_section=(4, 2, 2),
        **HEADS,
    )


def ideogram4_inputs(rows: int, columns: int) -> Inputs:
    """Two pads, text, image; pads are a segment of their own."""
    image, before = rows * columns, 2 + TEXT
    positions = torch.cat([torch.arange(before)[:, None].expand(-1, 3), ids(rows, columns).long() + 65536])
    indicator = torch.tensor([[0] * 2 + [3] * TEXT + [2] * image] * 2)
    return {
        "hidden_states": randn(2, before + image, CHANNELS),
        "timestep": TIME.clone(),
        "encoder_hidden_states": randn(2, before + image, WIDTH, seed=1),
        "position_ids": positions[None].expand(2, -1, -1),
        "segment_ids": torch.where(indicator == 0, -1, 1),
        "indicator": indicator,
    }


def ideogram4_touch_text(inputs: Inputs, row: int) -> None:
    touch_row("encoder_hidden_states")(inputs, 2 + row)


def krea2() -> nn.Module:
    return diffusers.Krea2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
        **HEADS,
    )


def krea2_inputs(rows: int, columns: int) -> Inputs:
    return {
        "encoder_attention_mask": text_mask(),
        "hidden_states": randn(2, rows * columns, CHANNELS),
        "encoder_hidden_states": randn(2, TEXT, 3, WIDTH, seed=1),
        "timestep": TIME.clone(),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), ids(rows, columns)]),
    }


def case(name: str, build: Callable[[], nn.Module], inputs: Callable[..., Inputs], **others: Any) -> Case:
    """A case whose image tokens start the packed `hidden_states`."""
    others.setdefault("touch_image", touch_packed("hidden_states", others.get("grid", GRID)))
    others.setdefault("touch_text", touch_row("encoder_hidden_states"))
    others.setdefault("text_tokens", TEXT)
    return Case(name, seeded(build), inputs, **others)


ZOO_FLUX: tuple[Case, ...] = (
    case("flux", flux, flux_inputs),
    case("flux_kontext", flux, lambda *grid: with_reference(flux_inputs(*grid))),
    case("flux2", flux2, lambda *grid: packed(*grid, axes=4)),
    case("flux2_reference", flux2, lambda *grid: with_reference(packed(*grid, axes=4), axes=4)),
    case("flux3", flux3, lambda *grid: packed(*grid, axes=4)),
    case("flux3_reference", flux3, flux3_inputs),
    case("chroma", chroma, packed),
    case("chroma_masked", chroma, chroma_masked_inputs),
    case("bria", bria, packed),
    case("fibo", fibo, fibo_inputs),
    case("longcat_image", longcat, longcat_inputs),
    case("ovis_image", ovis, packed),
    case("qwen_image", qwen, qwen_inputs),
    case("qwen_image_masked", qwen, qwen_masked_inputs),
    case("nucleus_image_masked", nucleus, qwen_masked_inputs),
    case("qwen_image_edit", qwen, qwen_edit_inputs),
    case("qwen_image_layered", qwen_layered, qwen_layered_inputs, grid=(2, 5, 7)),
    case(
        "qwen_image_21",
        qwen21,
        qwen21_inputs,
        grid=(4, 9),
        touch_image=touch_packed("hidden_states", (4, 9), 8),
        touch_text=qwen21_touch_text,
        text_tokens=3,
    ),
    case("nucleus_image", nucleus, qwen_inputs),
    case(
        "ideogram4",
        ideogram4,
        ideogram4_inputs,
        touch_image=touch_packed("hidden_states", GRID, 2 + TEXT),
        touch_text=ideogram4_touch_text,
    ),
    case("krea2", krea2, krea2_inputs),
)
