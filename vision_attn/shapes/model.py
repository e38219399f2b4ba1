"""The embedded model: a stock diffusers `FluxPipeline`, small enough to ship with the package.

Every component is the class that FLUX.1 uses, with small widths, so that code written for FLUX runs on it unchanged:
`FluxTransformer2DModel` (packed 2x2 latents, rotary position ids, joint then single blocks), `CLIPTextModel` (pooled
vector), `T5EncoderModel` (token sequence), `FlowMatchEulerDiscreteScheduler` and `AutoencoderTiny`.

The autoencoder is not trained. A stock `AutoencoderTiny` that halves the resolution cannot be lossless: a picture whose
columns alternate gives constant latents, and its decoder maps constant latents to a constant picture because it only
resizes and convolves. So its latents are the exact means of 2x2 pixels, standardised, and decoding resizes them
bicubically. Flat shapes lose nothing but half a pixel of sharpness, and one token (2x2 latents) holds 4x4 pixels.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

PIXELS_PER_TOKEN = 4
MAX_SEQUENCE_LENGTH = 24
SETTINGS_FILE = "vision_attn.json"
# Statistics of rendered scenes, per color channel in [0, 1].
_MEAN = (0.85, 0.82, 0.78)
_STD = 0.22
# Latents leave the encoder this much smaller, so that the decoder's `3 * tanh(x / 3)` is the identity to 1e-3.
_SCALING_FACTOR = 32.0


def words() -> list[str]:
    """Every word of the caption grammar, sorted."""
    return sorted(
        {"a", "an", "and", "on", "background", *" ".join([*COLORS, *SHAPES, *SIZES, *BACKGROUNDS, *RELATIONS]).split()}
    )


def build_autoencoder() -> AutoencoderTiny:
    """An `AutoencoderTiny` of stride 2 whose encoder is the 2x2 mean and whose decoder is bicubic resizing."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        latent_channels=3,
        encoder_block_out_channels=(3, 3),
        decoder_block_out_channels=(3, 3),
        num_encoder_blocks=(0, 0),
        num_decoder_blocks=(0, 0),
        upsample_fn="bicubic",
        scaling_factor=_SCALING_FACTOR,
    )
    mean, scale, identity = torch.tensor(_MEAN), _STD * _SCALING_FACTOR, torch.eye(3)
    first, halve, standardise = (layer for layer in vae.encoder.layers if isinstance(layer, nn.Conv2d))
    restore, smooth, last = (layer for layer in vae.decoder.layers if isinstance(layer, nn.Conv2d))
    with torch.no_grad():
        _set_pointwise(first, identity)
        # Stride 2 with padding 1 centres the kernel on the even pixels: taps 1 and 2 are the pixels of one 2x2 block.
        halve.weight[:] = 0
        halve.weight[:, :, 1:, 1:] = identity[:, :, None, None] / 4
        _set_pointwise(standardise, identity / scale, -mean / scale)
        _set_pointwise(restore, identity * scale, mean)
        _set_pointwise(smooth, identity)
        _set_pointwise(last, identity)
    return vae.eval()


def _set_pointwise(layer: nn.Conv2d, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Makes a 3x3 convolution the per-pixel map `matrix @ color + bias`."""
    layer.weight[:] = 0
    layer.weight[:, :, 1, 1] = matrix
    if layer.bias is not None:
        layer.bias[:] = 0 if bias is None else bias


def byte_pair_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word, the commonest pair first and ties in alphabetical order.

    `tokenizers.trainers.BpeTrainer` breaks ties by hash order, so its token ids differ from run to run.
    """
    pieces = {word: [*word[:-1], f"{word[-1]}</w>"] for word in vocabulary}
    merges = []
    while pairs := Counter(pair for parts in pieces.values() for pair in pairwise(parts)):
        left, right = merge = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(merge)
        for word, parts in pieces.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == (left, right):
                    joined[-1] = left + right
                else:
                    joined.append(part)
            pieces[word] = joined
    return merges


def build_clip_tokenizer() -> CLIPTokenizer:
    """A `CLIPTokenizer` whose byte-pair merges make one token of every word of the grammar."""
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz.,"]
    merges = byte_pair_merges(words())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_SEQUENCE_LENGTH)


def build_t5_tokenizer() -> T5Tokenizer:
    """A `T5Tokenizer` with one piece per word of the grammar; any other word is `<unk>`."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (",", -2.0), (".", -2.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in ["A", "An", *words()]]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)


def build_text_encoders(
    clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Randomly initialised text encoders for the given tokenizers."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        use_cache=False,
        is_encoder_decoder=False,
    )
    encoder = T5EncoderModel(t5)
    look_at_neighbours(encoder)
    return CLIPTextModel(clip), encoder


def look_at_neighbours(encoder: T5EncoderModel) -> None:
    """Makes a token's output the sum of its own embedding and those of its neighbours.

    FLUX gives all text tokens the same rotary position, so word order reaches the picture through this encoder alone.
    Its four heads attend by position, to the next, the last, the second next and the second last token, and the first
    block copies what they see: the vocabulary is no larger than a head, so that a head can hold any embedding. The
    output for "circle" then has "red" in it, in the form in which the transformer reads that word anywhere.

    Two weaker starts failed. Heads that may also attend by content: T5 does not scale its logits, and long before the
    transformer had a use for word order the queries had grown until each head saw one fixed token. Random values: what
    a head adds is small beside the token itself and means nothing yet, and training made it smaller. In both the loss
    stayed the same for captions whose colors had changed places (3,277 and 1,213 steps). So the queries are zero, and
    training leaves them so (`trained_parameters`).
    """
    first = encoder.encoder.block[0].layer[0].SelfAttention
    buckets = first._relative_position_bucket(
        torch.tensor([1, -1, 2, -2]),
        bidirectional=True,
        num_buckets=first.relative_attention_num_buckets,
        max_distance=first.relative_attention_max_distance,
    )
    with torch.no_grad():
        first.relative_attention_bias.weight.zero_()
        first.relative_attention_bias.weight[buckets, torch.arange(4)] = 5.0
        basis = torch.linalg.svd(encoder.shared.weight)[2][: first.key_value_proj_dim]
        first.v.weight.copy_(basis.repeat(4, 1))
        gain = torch.tensor([1.0, 1.0, 0.5, 0.5]) * encoder.shared.weight.square().mean().sqrt()
        first.o.weight.copy_((gain[:, None, None] * basis).flatten(0, 1).T)
        for number, block in enumerate(encoder.encoder.block):
            block.layer[0].SelfAttention.q.weight.zero_()
            block.layer[1].DenseReluDense.wo.weight.zero_()
            if number:
                block.layer[0].SelfAttention.o.weight.zero_()


def trained_parameters(modules: nn.Module) -> list[torch.Tensor]:
    """All parameters but the queries of the T5 encoder, which stay zero."""
    return [value for name, value in modules.named_parameters() if not name.endswith("SelfAttention.q.weight")]


def build_transformer() -> FluxTransformer2DModel:
    """A randomly initialised `FluxTransformer2DModel`: 2 joint and 4 single blocks, 4 heads of 64."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=12,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    # adaLN-zero (Peebles & Xie 2023, section 3.2): every block starts as the identity, the output as zero.
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name == "proj_out" or "norm" in name.rpartition(".")[0].rpartition(".")[2]:
                nn.init.zeros_(module.weight)
    return transformer


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """Assembles the untrained pipeline; the same seed gives the same weights.

    Args:
        seed: of the random initialisation.

    Returns:
        A stock `FluxPipeline` in float32 on the CPU, in evaluation mode.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = build_clip_tokenizer(), build_t5_tokenizer()
        text_encoder, text_encoder_2 = build_text_encoders(tokenizer, tokenizer_2)
        transformer, vae = build_transformer(), build_autoencoder()
    # The time shift of training (`train.flow_shift`) at 12x12 and at 48x48 tokens.
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=12 * 12,
        base_shift=math.log(3),
        max_image_seq_len=48 * 48,
        max_shift=math.log(6),
    )
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def default_settings() -> dict[str, Any]:
    """Keyword arguments for a good picture, stored beside the weights in `vision_attn.json`."""
    return {
        "prompt": "a yellow triangle above a blue square",
        "negative_prompt": "",
        "height": 192,
        "width": 192,
        "num_inference_steps": 20,
        "true_cfg_scale": 3.0,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    }


def read_settings(directory: str | Path) -> dict[str, Any]:
    """Reads the generation settings of a model directory.

    Raises:
        FileNotFoundError: the directory holds no `vision_attn.json`.
    """
    path = Path(directory) / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"read_settings: directory must hold {SETTINGS_FILE}, got {directory}: export a model")
    return json.loads(path.read_text(encoding="utf-8"))


def save_pipeline(pipeline: DiffusionPipeline, directory: str | Path, settings: dict[str, Any]) -> None:
    """Writes the pipeline in float16 safetensors with its generation settings; `pipeline` itself keeps its dtype.

    Args:
        pipeline: a stock pipeline.
        directory: to write.
        settings: keyword arguments for a good picture.
    """
    directory = Path(directory)
    half = copy.deepcopy(pipeline).to(torch.float16)
    half.save_pretrained(directory, safe_serialization=True)
    # transformers loads a model in the dtype of its config, diffusers in float32: make both the same by default.
    for path in directory.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
