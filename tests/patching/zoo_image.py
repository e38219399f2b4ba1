"""Tiny random text-to-image transformers, one for each token layout (see `zoo_case.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn
from zoo_case import Case, Inputs, change, randn, seeded, touch_latent, touch_row
from zoo_flux import ZOO_FLUX, text_mask

TEXT = 5  # text tokens
WIDTH = 32  # channels of the text embeddings
GRID = (5, 7)
TIME = torch.tensor([0.5, 0.5])


def text(tokens: int = TEXT, width: int = WIDTH, seed: int = 1) -> torch.Tensor:
    return randn(2, tokens, width, seed=seed)


def latent(rows: int, columns: int, patch: int = 2, channels: int = 4) -> torch.Tensor:
    return randn(2, channels, patch * rows, patch * columns)


def case(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[..., Inputs],
    patch: int | tuple[int, ...] = 2,
    text_key: str | None = "encoder_hidden_states",
    **others: Any,
) -> Case:
    """A case whose image is the latent `hidden_states` and whose text is the rows of `text_key`."""
    others.setdefault("touch_image", touch_latent("hidden_states", patch))
    if text_key is not None:
        others.setdefault("touch_text", touch_row(text_key))
        others.setdefault("text_tokens", TEXT)
    return Case(name, seeded(build), inputs, **others)


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    )


def sd3_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(rows, columns),
        "encoder_hidden_states": text(),
        "pooled_projections": randn(2, 64, seed=2),
        "timestep": 1000 * TIME,
    }


def auraflow() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=256,
    )


def latent_and_text(rows: int, columns: int) -> Inputs:
    return {"hidden_states": latent(rows, columns), "encoder_hidden_states": text(), "timestep": TIME.clone()}


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        patch_size=2,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )


def pixart_inputs(rows: int, columns: int) -> Inputs:
    nothing = {"resolution": None, "aspect_ratio": None}
    return {**latent_and_text(rows, columns), "timestep": torch.tensor([3, 3]), "added_cond_kwargs": nothing}


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=12, patch_size=2
    )


def dit_inputs(rows: int, columns: int) -> Inputs:
    labels = torch.tensor([1, 2])
    return {"hidden_states": latent(rows, columns), "timestep": torch.tensor([3, 3]), "class_labels": labels}


def legacy() -> nn.Module:
    return diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=32, num_layers=1, cross_attention_dim=WIDTH
    )


def legacy_inputs(rows: int, columns: int) -> Inputs:
    return {"hidden_states": latent(rows, columns, 1, 32), "encoder_hidden_states": text()}


def hunyuan_dit() -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
        text_len=TEXT,
        text_len_t5=TEXT,
        use_style_cond_and_image_meta_size=False,
    )


def hunyuan_dit_inputs(rows: int, columns: int) -> Inputs:
    return {
        **latent_and_text(rows, columns),
        "encoder_hidden_states_t5": text(seed=2),
        "text_embedding_mask": torch.ones(2, TEXT),
        "text_embedding_mask_t5": torch.ones(2, TEXT),
        "image_rotary_emb": (randn(rows * columns, 8, seed=3), randn(rows * columns, 8, seed=4)),
    }


def lumina_next() -> nn.Module:
    return diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )


def lumina_next_inputs(rows: int, columns: int) -> Inputs:
    angles = randn(16, 16, 4, seed=3)
    return {
        **latent_and_text(rows, columns),
        "encoder_mask": torch.ones(2, TEXT),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 64, 64),
        cap_feat_dim=WIDTH,
    )


def lumina2_inputs(rows: int, columns: int) -> Inputs:
    mask = torch.ones(2, TEXT + 2, dtype=torch.bool)
    mask[:, TEXT:] = False  # padded text is cut before the main layers
    inputs = latent_and_text(rows, columns)
    return {**inputs, "encoder_hidden_states": text(TEXT + 2), "encoder_attention_mask": mask}


def cogview3() -> nn.Module:
    return diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=16,
        sample_size=16,
    )


def cogview4() -> nn.Module:
    return diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )


def cogview_inputs(rows: int, columns: int) -> Inputs:
    size = torch.tensor([[256.0, 256.0], [256.0, 256.0]])
    return {
        **latent_and_text(rows, columns),
        "timestep": torch.tensor([3, 3]),
        "original_size": size,
        "target_size": size.clone(),
        "crop_coords": torch.zeros(2, 2),
    }


def glm_image() -> nn.Module:
    return diffusers.GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )


def glm_image_inputs(rows: int, columns: int) -> Inputs:
    inputs = cogview_inputs(rows, columns)
    del inputs["original_size"]
    tokens = rows * columns
    return {
        **inputs,
        "prior_token_id": torch.arange(2 * tokens).reshape(2, tokens) % 16,
        "prior_token_drop": torch.zeros(2, tokens, dtype=torch.bool),
    }


def prx_masked_inputs(rows: int, columns: int) -> Inputs:
    return latent_and_text(rows, columns) | {"attention_mask": text_mask()}


def cogview4_masked_inputs(rows: int, columns: int) -> Inputs:
    return cogview_inputs(rows, columns) | {"attention_mask": text_mask()}


def glm_image_masked_inputs(rows: int, columns: int) -> Inputs:
    return glm_image_inputs(rows, columns) | {"attention_mask": text_mask()}


def prx() -> nn.Module:
    return diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=WIDTH, hidden_size=16, num_heads=2, depth=2, axes_dim=[4, 4]
    )


def hidream() -> nn.Module:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
        force_inference_output=True,
    )


def hidream_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(rows, columns),
        "timesteps": 1000 * TIME,
        "encoder_hidden_states_t5": text(),
        "encoder_hidden_states_llama3": randn(2, 2, TEXT, WIDTH, seed=2),
        "pooled_embeds": randn(2, 16, seed=3),
    }


def omnigen() -> nn.Module:
    return diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=1,
        pad_token_id=0,
        vocab_size=100,
        max_position_embeddings=1000,
        time_step_dim=4,
        rope_scaling={"long_factor": list(range(1, 5)), "short_factor": list(range(1, 5))},
        pos_embed_max_size=16,
    )


def omnigen_inputs(rows: int, columns: int) -> Inputs:
    """Text is causal and padded on the left, the image sees all text and itself."""
    tokens = TEXT + 1 + rows * columns
    mask = torch.ones(2, tokens, tokens).tril()
    mask[:, TEXT + 1 :] = 1
    mask[1, 2:, :2] = 0
    return {
        "hidden_states": latent(rows, columns),
        "timestep": TIME.clone(),
        "input_ids": torch.arange(1, 1 + 2 * TEXT).reshape(2, TEXT),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(tokens).expand(2, -1),
    }


def omnigen_touch_text(inputs: Inputs, row: int) -> None:
    inputs["input_ids"][:, row] += 50


def z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[128, 32, 32],
    )


def z_image_inputs(rows: int, columns: int) -> Inputs:
    return {
        "x": list(randn(2, 4, 1, 2 * rows, 2 * columns)),
        "t": TIME.clone(),
        "cap_feats": list(text()),
    }


def z_image_ragged_inputs(rows: int, columns: int) -> Inputs:
    """Prompts that are padded to different lengths, as with classifier-free guidance."""
    return z_image_inputs(rows, columns) | {"cap_feats": [randn(TEXT, WIDTH, seed=1), randn(40, WIDTH, seed=2)]}


def z_image_touch_image(inputs: Inputs, token: tuple[int, ...]) -> None:
    for image in inputs["x"]:
        image[:, 0, 2 * token[0], 2 * token[1]] += change(4)


def z_image_touch_text(inputs: Inputs, row: int) -> None:
    for prompt in inputs["cap_feats"]:
        prompt[row] += change(WIDTH)


def hunyuan_image() -> nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )


def hunyuan_image_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(rows, columns, 1),
        "timestep": TIME.clone(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "encoder_hidden_states_2": text(3, seed=2),
        "encoder_attention_mask_2": torch.ones(2, 3),
    }


def ernie() -> nn.Module:
    return diffusers.ErnieImageTransformer2DModel(
        hidden_size=24,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 4, 4),
    )


def ernie_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(rows, columns, 1),
        "timestep": TIME.clone(),
        "text_bth": text(),
        "text_lens": torch.tensor([TEXT, 3]),
    }


def joy() -> nn.Module:
    return diffusers.JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=24,
        num_attention_heads=2,
        text_dim=WIDTH,
        num_layers=2,
        rope_dim_list=[4, 4, 4],
    )


def joy_inputs(rows: int, columns: int) -> Inputs:
    items = randn(2, 3, 4, 1, 2 * rows, 2 * columns)  # two references, then the target
    return {"hidden_states": items, "timestep": TIME.clone(), "encoder_hidden_states": text()}


def joy_touch_image(inputs: Inputs, token: tuple[int, ...]) -> None:
    inputs["hidden_states"][:, -1, :, 0, 2 * token[0], 2 * token[1]] += change(4)


def joy_plus() -> nn.Module:
    return diffusers.JoyImageEditPlusTransformer3DModel(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=24,
        num_attention_heads=2,
        text_dim=WIDTH,
        num_layers=2,
        rope_dim_list=[4, 4, 4],
    )


def joy_plus_inputs(rows: int, columns: int) -> Inputs:
    shapes = [(1, rows, columns), (1, 2, 3)]  # target, then one reference; three pads
    return {
        "hidden_states": randn(2, rows * columns + 6 + 3, 4, 1, 2, 2),
        "timestep": TIME.clone(),
        "encoder_hidden_states": text(),
        "shape_list": [shapes, shapes],
    }


def joy_plus_touch_image(inputs: Inputs, token: tuple[int, ...]) -> None:
    inputs["hidden_states"][:, token[0] * GRID[1] + token[1], :, 0, 0, 0] += change(4)


def fibo2() -> nn.Module:
    return diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=WIDTH,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 4, 4),
        axes_lens=(64, 32, 32),
    )


def fibo2_inputs(rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(rows, columns),
        "timestep": TIME.clone(),
        "encoder_hidden_states": randn(2, 2, 10, WIDTH, seed=1),
    }


def fibo2_reference_inputs(rows: int, columns: int) -> Inputs:
    return {**fibo2_inputs(rows, columns), "context_latents": [randn(2, 4, 4, 6, seed=5)]}


def fibo2_ragged_inputs(rows: int, columns: int) -> Inputs:
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 4:] = False
    return {**fibo2_inputs(rows, columns), "encoder_attention_mask": mask}


ZOO_IMAGE: tuple[Case, ...] = (
    *ZOO_FLUX,
    case("sd3", sd3, sd3_inputs),
    case("auraflow", auraflow, latent_and_text),
    case("pixart", pixart, pixart_inputs, text_key=None),
    # Its forward only takes square images.
    case("dit", dit, dit_inputs, text_key=None, grid=(6, 6)),
    # Its group norm mixes pixels.
    case("transformer_2d", legacy, legacy_inputs, text_key=None, touch_image=None),
    case("hunyuan_dit", hunyuan_dit, hunyuan_dit_inputs, text_key=None),
    case("lumina_next", lumina_next, lumina_next_inputs, text_key=None),
    case("lumina2", lumina2, lumina2_inputs),
    case("cogview3_plus", cogview3, cogview_inputs),
    case("cogview4", cogview4, cogview_inputs),
    case("glm_image", glm_image, glm_image_inputs),
    case("cogview4_masked", cogview4, cogview4_masked_inputs),
    case("glm_image_masked", glm_image, glm_image_masked_inputs),
    case("prx", prx, latent_and_text),
    case("prx_masked", prx, prx_masked_inputs),
    case("hidream", hidream, hidream_inputs, text_key="encoder_hidden_states_t5"),
    case("hidream_square", hidream, hidream_inputs, text_key="encoder_hidden_states_t5", grid=(6, 6)),
    case("omnigen", omnigen, omnigen_inputs, touch_text=omnigen_touch_text),
    case("z_image", z_image, z_image_inputs, touch_image=z_image_touch_image, touch_text=z_image_touch_text),
    case(
        "z_image_ragged",
        z_image,
        z_image_ragged_inputs,
        touch_image=z_image_touch_image,
        touch_text=z_image_touch_text,
    ),
    case("hunyuan_image", hunyuan_image, hunyuan_image_inputs, 1, text_mixes=True),
    case("ernie_image", ernie, ernie_inputs, 1, text_key="text_bth"),
    case("joy_image_edit", joy, joy_inputs, touch_image=joy_touch_image),
    case("joy_image_edit_plus", joy_plus, joy_plus_inputs, touch_image=joy_plus_touch_image),
    case("fibo2", fibo2, fibo2_inputs, text_key=None),
    case("fibo2_reference", fibo2, fibo2_reference_inputs, text_key=None),
    case("fibo2_ragged", fibo2, fibo2_ragged_inputs, text_key=None),
)
