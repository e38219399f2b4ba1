"""Token layouts of text-to-video transformers.

Grids are (T, Y, X) in tokens, frames first. History frames, reference frames, soundtracks and text are the "text" of a
`TokenLayout`: tokens off the grid that see everything and are seen by everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vision_attn.layout import TokenLayout
from vision_attn.patching.layouts.family import Family
from vision_attn.patching.layouts.image import CROSS_ATTENTION, TEXT_ONLY

if TYPE_CHECKING:
    import torch


def _patches(latent_size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Whole patches along each axis."""
    return tuple(size // step for size, step in zip(latent_size, patch, strict=True))


def _patches_with_padding(latent_size: Sequence[int], multiple: Sequence[int], patch: Sequence[int]) -> int:
    """Patches of a latent that is padded to multiples of `multiple` first."""
    padded = [-(-size // step) * step for size, step in zip(latent_size, multiple, strict=True)]
    return math.prod(_patches(padded, patch))


def _wan(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Video only; the latent is `[B, C, T, Y, X]` and the patch has three sizes."""
    return TokenLayout(_patches(call["hidden_states"].shape[2:], model.config.patch_size))


def _anyflow(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Video only; the latent is `[B, T, C, Y, X]`."""
    _, frames, _, rows, columns = call["hidden_states"].shape
    return TokenLayout(_patches((frames, rows, columns), model.config.patch_size))


def _helios(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Long, middle and short history in patches of 4, 2 and 1 times the size, then the video."""
    patch = model.config.patch_size
    history = 0
    for term, factor in (("short", 1), ("mid", 2), ("long", 4)):
        latent = call[f"latents_history_{term}"]
        if latent is not None and call[f"indices_latents_history_{term}"] is not None:
            # Upstream pads to its own patch, (1, 2, 2), whatever the configuration says.
            multiple = (factor, 2 * factor, 2 * factor) if factor > 1 else (1, 1, 1)
            history += _patches_with_padding(latent.shape[2:], multiple, [factor * size for size in patch])
    return TokenLayout(_patches(call["hidden_states"].shape[2:], patch), text_before=history)


def _ltx(model: Any, call: Mapping[str, Any]) -> TokenLayout | None:
    """Condition frames, then the video, already packed; without its grid, the video is found by its coordinates."""
    grid = (call["num_frames"], call["height"], call["width"])
    if None in grid:
        coordinates = call["video_coords"]
        return None if coordinates is None else _layout_at_end(coordinates[0].mT, coordinates.shape[-1])
    return _ltx_of_grid(model, call, grid)


def _ltx_of_grid(model: Any, call: Mapping[str, Any], grid: tuple[int, ...]) -> TokenLayout:
    """The video ends the sequence."""
    return TokenLayout(grid, text_before=call["hidden_states"].shape[1] - math.prod(grid))


def _ltx2(model: Any, call: Mapping[str, Any]) -> TokenLayout | None:
    """The video, then key frames and references, already packed; the grid is given."""
    grid = (call["num_frames"], call["height"], call["width"])
    if None in grid:
        return None
    return TokenLayout(grid, text_after=call["hidden_states"].shape[1] - math.prod(grid))


def _hunyuan_patch(model: Any) -> tuple[int, int, int]:
    return model.config.patch_size_t, model.config.patch_size, model.config.patch_size


def _hunyuan_video(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Video, then text."""
    grid = _patches(call["hidden_states"].shape[2:], _hunyuan_patch(model))
    return TokenLayout(grid, text_after=call["encoder_hidden_states"].shape[1])


def _framepack(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """History 4x, history 2x, clean frames, video, image embedding, text (its valid part alone at batch 1)."""
    history = 0
    for name, factor in (("clean", 1), ("history_2x", 2), ("history_4x", 4)):
        latent = call[f"latents_{name}"]
        if latent is not None and call[f"indices_latents_{name}"] is not None:
            # The history embedding's patches are fixed upstream; the finest one does not pad.
            patch = (factor, 2 * factor, 2 * factor)
            history += _patches_with_padding(latent.shape[2:], patch if factor > 1 else (1, 1, 1), patch)
    grid = _patches(call["hidden_states"].shape[2:], _hunyuan_patch(model))
    return TokenLayout(grid, text_before=history)


def _hunyuan_video15(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Video, then image, glyph and prompt embeddings, valid rows first."""
    grid = _patches(call["hidden_states"].shape[2:], _hunyuan_patch(model))
    parts = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return TokenLayout(grid, text_after=sum(call[part].shape[1] for part in parts if call[part] is not None))


def _kandinsky5(model: Any, call: Mapping[str, Any]) -> TokenLayout | None:
    """Video only, `[B, T, Y, X, C]`; sparse calls order tokens in 8x8 tiles and bring their own block mask."""
    if call["sparse_params"] is not None:
        return None
    return TokenLayout(_patches(call["hidden_states"].shape[1:4], model.config.patch_size))


def _kandinsky6(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Video only, `[B, T, Y, X, C]`."""
    return TokenLayout(_patches(call["hidden_states"].shape[1:4], model.config.patch_size))


def _cogvideox(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Text, then video; the latent is `[B, T, C, Y, X]` and only CogVideoX 1.5 has a temporal patch."""
    _, frames, _, rows, columns = call["hidden_states"].shape
    patch = model.config.patch_size
    patch_t = getattr(model.config, "patch_size_t", None)
    grid = _patches((frames, rows, columns), (1 if patch_t is None else patch_t, patch, patch))
    return TokenLayout(grid, text_before=call["encoder_hidden_states"].shape[1])


def _mochi(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Video, then the valid text of one sample: attention is called once per sample."""
    patch = model.config.patch_size
    return TokenLayout(_patches(call["hidden_states"].shape[2:], (1, patch, patch)))


def _allegro(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Video only. Frames are embedded one by one: a temporal patch size would only shrink the attention mask."""
    _, _, frames, rows, columns = call["hidden_states"].shape
    patch = model.config.patch_size
    return TokenLayout((frames, rows // patch, columns // patch))


def _latte(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """One frame: the spatial blocks have frames in the batch."""
    patch = model.config.patch_size
    return TokenLayout(_patches(call["hidden_states"].shape[3:], (patch, patch)))


def _easyanimate(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Text of one or two encoders, then video."""
    patch = model.config.patch_size
    parts = ("encoder_hidden_states", "encoder_hidden_states_t5")
    text = sum(call[part].shape[1] for part in parts if call[part] is not None)
    return TokenLayout(_patches(call["hidden_states"].shape[2:], (1, patch, patch)), text_before=text)


def _cosmos_controlnet(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Video only; the grid is that of the control latent."""
    return TokenLayout(_patches(call["controls_latents"].shape[2:], model.config.patch_size))


def _cosmos3(model: Any, call: Mapping[str, Any]) -> TokenLayout | None:
    """A causal text prefix, then the video, then sound and actions; the prefix attends in a call of its own."""
    if len(call["vision_token_shapes"]) != 1:
        return None
    grid = tuple(call["vision_token_shapes"][0])
    prefix = call["und_len"]
    return TokenLayout(grid, text_before=prefix, text_after=call["sequence_length"] - prefix - math.prod(grid))


def _motif(model: Any, call: Mapping[str, Any]) -> TokenLayout:
    """Video, then first-frame embedding and text."""
    parts = ("image_embeds", "encoder_hidden_states")
    grid = _patches(call["hidden_states"].shape[2:], _hunyuan_patch(model))
    return TokenLayout(grid, text_after=sum(call[part].shape[1] for part in parts if call[part] is not None))


def _minimax_h3(model: Any, call: Mapping[str, Any]) -> TokenLayout | None:
    """Text, references and audio, then the video, which ends the packed sequence; read from the position ids."""
    positions, video, noise = call["position_ids"], call["video_indices"], call["timestep_indices"]
    if int(video[-1]) != positions.shape[0] - 1:
        return None
    contiguous = 1 + _trailing(video[1:] == video[:-1] + 1)
    # References are clean, the video is noisy.
    return _layout_at_end(positions, min(contiguous, _trailing(noise == noise[-1])))


def _minimax_h3_of_grid(model: Any, call: Mapping[str, Any], grid: tuple[int, ...]) -> TokenLayout:
    """The video ends the sequence."""
    return TokenLayout(grid, text_before=call["position_ids"].shape[0] - math.prod(grid))


def _layout_at_end(positions: torch.Tensor, video_tokens: int) -> TokenLayout | None:
    """Find the grid of the row-major video that ends a sequence from the positions `[S, 3]` (t, y, x) of its tokens.

    Only the last `video_tokens` tokens can belong to it. Reads tensor values, so it does not trace under torch.compile.
    """
    t, y, x = positions[-video_tokens:].unbind(-1)
    same_frame = t[:-1] == t[-1]
    columns = 1 + _trailing(same_frame & (y[:-1] == y[-1]) & (x[:-1] < x[1:]))
    frame_tokens = 1 + _trailing(same_frame & (y[:-1] <= y[1:]))
    if frame_tokens % columns:
        return None
    blocks = positions[-(video_tokens // frame_tokens * frame_tokens) :].unflatten(0, (-1, frame_tokens))
    same_place = (blocks[:-1, :, 1:] == blocks[-1, :, 1:]).all(dim=-1).all(dim=-1)
    earlier = (blocks[:-1, :, 0] < blocks[1:, :, 0]).all(dim=-1) & (blocks[:-1, :, 0] == blocks[:-1, :1, 0]).all(dim=-1)
    grid = (1 + _trailing(same_place & earlier), frame_tokens // columns, columns)
    return TokenLayout(grid, text_before=positions.shape[0] - math.prod(grid))


def _trailing(flags: torch.Tensor) -> int:
    """How many flags at the end are true."""
    return int(flags.flip(0).long().cumprod(0).sum())


_TEXT_CROSS = ("*.attn2", CROSS_ATTENTION)
AUDIO_ONLY = "audio only: it never sees the video"
AUDIO_CROSS = "cross-attention between audio and video"
_AUDIO = (
    ("*.audio_attn1", AUDIO_ONLY),
    ("*.audio_attn2", AUDIO_ONLY),
    ("*.audio_to_video_attn", AUDIO_CROSS),
    ("*.video_to_audio_attn", AUDIO_CROSS),
)
_TEXT_REFINER = ("context_embedder*", TEXT_ONLY)

VIDEO_FAMILIES: tuple[Family, ...] = (
    Family(
        "wan",
        (
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "ChronoEditTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "WanAnimateTransformer3DModel",
        ),
        _wan,
        skip=(_TEXT_CROSS, ("face_adapter.*", "cross-attention to face motion, frame by frame")),
        timesteps=-1,
    ),
    Family("anyflow", ("AnyFlowTransformer3DModel",), _anyflow, skip=(_TEXT_CROSS,)),
    Family("helios", ("HeliosTransformer3DModel",), _helios, skip=(_TEXT_CROSS,)),
    Family(
        "ltx", ("LTXVideoTransformer3DModel",), _ltx, skip=(_TEXT_CROSS,), layout_of_grid=_ltx_of_grid, timesteps=-1
    ),
    Family(
        "ltx2",
        ("LTX2VideoTransformer3DModel",),
        _ltx2,
        skip=(_TEXT_CROSS, *_AUDIO),
        timesteps=-1,
    ),
    Family("hunyuan_video", ("HunyuanVideoTransformer3DModel",), _hunyuan_video, skip=(_TEXT_REFINER,), timesteps=-1),
    Family(
        "framepack",
        ("HunyuanVideoFramepackTransformer3DModel",),
        _framepack,
        skip=(_TEXT_REFINER,),
        open_end=True,
        timesteps=-1,
    ),
    Family(
        "hunyuan_video15", ("HunyuanVideo15Transformer3DModel",), _hunyuan_video15, skip=(_TEXT_REFINER,), timesteps=-1
    ),
    Family(
        "kandinsky5",
        ("Kandinsky5Transformer3DModel",),
        _kandinsky5,
        skip=(("text_transformer_blocks.*", TEXT_ONLY), ("*.cross_attention", CROSS_ATTENTION)),
        timesteps=-1,
    ),
    Family(
        "kandinsky6",
        ("Kandinsky6Transformer3DModel",),
        _kandinsky6,
        skip=(
            ("*text_transformer_blocks.*", TEXT_ONLY),
            ("*.audio_dec_block.*", AUDIO_ONLY),
            ("*.va_cross_attention", AUDIO_CROSS),
            ("*.av_cross_attention", AUDIO_CROSS),
            ("*.cross_attention", CROSS_ATTENTION),
        ),
    ),
    Family("cogvideox", ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"), _cogvideox, timesteps=-1),
    Family("mochi", ("MochiTransformer3DModel",), _mochi, open_end=True, timesteps=1),
    Family("allegro", ("AllegroTransformer3DModel",), _allegro, skip=(_TEXT_CROSS,), timesteps=-1),
    Family(
        "latte",
        ("LatteTransformer3DModel",),
        _latte,
        skip=(("temporal_transformer_blocks.*", "temporal attention: one token per frame"), _TEXT_CROSS),
        timesteps=-1,
    ),
    Family("easyanimate", ("EasyAnimateTransformer3DModel",), _easyanimate, timesteps=-1),
    Family("cosmos", ("CosmosTransformer3DModel",), _wan, skip=(_TEXT_CROSS,)),
    Family("cosmos_controlnet", ("CosmosControlNetModel",), _cosmos_controlnet, skip=(_TEXT_CROSS,)),
    Family("cosmos3", ("Cosmos3OmniTransformer",), _cosmos3, in_parts=True),
    # The decoder blocks attend to the video twice, noisy and encoded: no grid describes that, they stay dense.
    Family(
        "motif_video",
        ("MotifVideoTransformer3DModel",),
        _motif,
        skip=(("*.cross_attn", CROSS_ATTENTION),),
        in_parts=True,
    ),
    Family(
        "minimax_h3",
        ("MiniMaxH3Transformer3DModel",),
        _minimax_h3,
        skip=(("token_refiner.*", TEXT_ONLY),),
        layout_of_grid=_minimax_h3_of_grid,
    ),
)

_BLOCK_MASK = "its attention is a FlexAttention block mask over {}, which a window operator cannot replace"
_SOUND = "it makes sound, not images"
_LINEAR = "its self-attention is linear attention, which has no softmax call to replace"

REFUSED_VIDEO: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": _BLOCK_MASK.format("causal chunks of frames"),
    "WanAnimate2Transformer3DModel": _BLOCK_MASK.format("the padded frames of the video and of its reference"),
    "Kandinsky6SRTransformer3DModel": _BLOCK_MASK.format("tokens ordered in 8x8 tiles"),
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": _LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": "its queries are a part of a video whose other frames are cached keys, and "
    "its arguments hold no grid",
    "TransformerTemporalModel": "its attention runs over time for each pixel and has no spatial grid",
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "RFD4ProteinaTransformer": "it designs proteins: its sequences have no token grid",
}
