"""Tiny random Stable Diffusion pipelines with the vocabulary of the shapes data set."""

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from vision_attn.shapes.model import build_clip_tokenizer


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
