"""shapes-sd: a stock diffusers `StableDiffusionPipeline`, small enough to ship with the package.

Every component is the class that Stable Diffusion 2 uses, with small widths: `UNet2DConditionModel` with
cross-attention at 16x16 and 8x8 for pictures of 64x64 pixels, `CLIPTextModel` whose tokens see the ones before them,
and a scheduler configuration that DDIM, Euler, DPM++ and UniPC read alike. The autoencoder is that of
`model.build_autoencoder`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .model import build_autoencoder, build_clip_tokenizer, words

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

PIXELS = 64
_WIDTH = 128
_HEADS = 4
_TRAIN_TIMESTEPS = 1000


def build_unet() -> UNet2DConditionModel:
    """A randomly initialised UNet: convolutions at full resolution, cross-attention at the half and the quarter."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=PIXELS // 2,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=_HEADS,
        cross_attention_dim=_WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of two layers whose first layer starts with two heads that copy the words before a token."""
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            projection_dim=_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=_HEADS,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    look_back(encoder, [tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in words()])
    return encoder


def look_back(encoder: CLIPTextModel, vocabulary: list[int]) -> None:
    """Starts two heads of the first layer as copies of the last and of the second last token.

    A picture can only bind "red" to "circle" if the token of "circle" says "red", and from random heads that takes
    longer to appear than all the rest. Positions are one-hot in the last dimensions of the embedding, words live in the
    others, the first two heads compare positions, and what they copy is written in the form of the word itself. The
    other two heads and the second layer start at random; nothing is held fixed in training, so any token may come to
    see any earlier one.
    """
    text = getattr(encoder, "text_model", encoder)
    positions = text.embeddings.position_embedding.weight
    count, width = positions.shape
    tokens = text.embeddings.token_embedding.weight
    attention = text.encoder.layers[0].self_attn
    size = width // attention.num_heads
    offset, gain = width - count, 5.0
    with torch.no_grad():
        positions.zero_()
        positions[:, offset:] = gain * torch.eye(count)
        nn.init.normal_(tokens)
        tokens[:, offset:] = 0
        basis = torch.linalg.svd(tokens[vocabulary, :offset])[2][:size]
        for head, distance in enumerate((1, 2)):
            rows = slice(head * size, (head + 1) * size)
            for projection, shift in ((attention.q_proj, distance), (attention.k_proj, 0)):
                projection.weight[rows] = 0
                for position in range(shift, count):
                    projection.weight[rows.start + position - shift, offset + position] = 1.5
            attention.v_proj.weight[rows] = 0
            attention.v_proj.weight[rows, :offset] = basis
            attention.out_proj.weight[:, rows] = 0
            attention.out_proj.weight[:offset, rows] = basis.T / distance


def build_scheduler() -> Any:
    """DDIM with Stable Diffusion 2's schedule and velocity target."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def build_sd_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Assembles the untrained pipeline; the same seed gives the same weights.

    Args:
        seed: of the random initialisation.

    Returns:
        A stock `StableDiffusionPipeline` in float32 on the CPU, in evaluation mode.
    """
    from diffusers import StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_clip_tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=build_autoencoder(),
            text_encoder=build_text_encoder(tokenizer).eval(),
            tokenizer=tokenizer,
            unet=build_unet().eval(),
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def default_sd_settings() -> dict[str, Any]:
    """Keyword arguments for a good picture, and for `AStarPipeline` by loss; stored in `vision_attn.json`."""
    return {
        "prompt": "a red circle and a blue square",
        "height": PIXELS,
        "width": PIXELS,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        # Chosen on the captions for tuning of `splits`; step sizes of 10 to 160 for A-STAR, 5 to 80 for the other.
        "guidance": {
            "a-star": {"step_size": 40.0, "resolution": [16, 16]},
            "attend-and-excite": {"step_size": 20.0, "resolution": [16, 16]},
        },
    }
