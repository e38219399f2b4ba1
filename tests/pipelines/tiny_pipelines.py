"""Tiny random pipelines of SD, SDXL, SD3 and FLUX with the vocabulary of the shapes data set."""

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from vision_attn.shapes.model import build_clip_tokenizer, build_t5_tokenizer


def text_encoder(kind, width, seed):
    torch.manual_seed(seed)
    tokenizer = build_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config).eval()


def unet(width, **options):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=2,
        cross_attention_dim=width, **options,
    ).eval()  # fmt: skip


def autoencoder():
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), latent_channels=4,
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip


def scheduler():
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def make_sd():
    pipe = diffusers.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=text_encoder(CLIPTextModel, 16, 1), tokenizer=build_clip_tokenizer(),
        unet=unet(16), scheduler=scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sdxl():
    addition = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=text_encoder(CLIPTextModel, 16, 1), tokenizer=build_clip_tokenizer(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 16, 2), tokenizer_2=build_clip_tokenizer(),
        unet=unet(32, **addition, projection_class_embeddings_input_dim=6 * 4 + 16), scheduler=scheduler(),
        add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def t5_encoder(width):
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(build_t5_tokenizer()), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        dropout_rate=0.0, is_encoder_decoder=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def filled(model):
    """Random values everywhere: parameters that start at zero would hide errors."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_sd3(**changes):
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=32, qk_norm="rms_norm",
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=filled(transformer), vae=autoencoder(), tokenizer=build_clip_tokenizer(),
        text_encoder=text_encoder(CLIPTextModelWithProjection, 16, 1), tokenizer_2=build_clip_tokenizer(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 16, 2), tokenizer_3=build_t5_tokenizer(),
        text_encoder_3=t5_encoder(32),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **changes}),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_flux(**changes):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        transformer=filled(transformer), vae=autoencoder(), tokenizer=build_clip_tokenizer(),
        text_encoder=text_encoder(CLIPTextModel, 16, 1), tokenizer_2=build_t5_tokenizer(),
        text_encoder_2=t5_encoder(32),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **changes}),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
