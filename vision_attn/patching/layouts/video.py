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

if TYPE_CHECKING:
    import torch
    from torch import nn

CROSS = "cross-attention"


def _patches(latent_size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Whole patches along each axis."""
    return tuple(size // step for size, step in zip(latent_size, patch, strict=True))


def _patches_with_padding(latent_size: Sequence[int], multiple: Sequence[int], patch: Sequence[int]) -> int:
    """Patches of a latent that is padded to multiples of `multiple` first."""
    padded = [-(-size // step) * step for size, step in zip(latent_size, multiple, strict=True)]
    return math.prod(_patches(padded, patch))


def _wan(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Video only; the latent is `[B, C, T, Y, X]` and the patch has three sizes."""
    return TokenLayout(_patches(call["hidden_states"].shape[2:], model.config.patch_size))


def _anyflow(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Video only; the latent is `[B, T, C, Y, X]`."""
    _, frames, _, rows, columns = call["hidden_states"].shape
    return TokenLayout(_patches((frames, rows, columns), model.config.patch_size))


def _helios(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
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


def _ltx(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout | None:
    """Reference frames, then the video, already packed; the grid is given, or else in `video_coords`, which are not read."""
    grid = (call["num_frames"], call["height"], call["width"])
    if None in grid:
        return None
    return TokenLayout(grid, text_before=call["hidden_states"].shape[1] - math.prod(grid))


def _ltx2(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout | None:
    """The video, then key frames and references, already packed; the grid is given."""
    grid = (call["num_frames"], call["height"], call["width"])
    if None in grid:
        return None
    return TokenLayout(grid, text_after=call["hidden_states"].shape[1] - math.prod(grid))


def _hunyuan_patch(model: nn.Module) -> tuple[int, int, int]:
    return model.config.patch_size_t, model.config.patch_size, model.config.patch_size


def _hunyuan_video(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Video, then text."""
    grid = _patches(call["hidden_states"].shape[2:], _hunyuan_patch(model))
    return TokenLayout(grid, text_after=call["encoder_hidden_states"].shape[1])


def _framepack(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """History 4x, history 2x, clean frames, video, image embedding, text; at batch 1 the text is cut to its valid length."""
    history = 0
    for name, factor in (("clean", 1), ("history_2x", 2), ("history_4x", 4)):
        latent = call[f"latents_{name}"]
        if latent is not None and call[f"indices_latents_{name}"] is not None:
            # The history embedding's patches are fixed upstream; the finest one does not pad.
            patch = (factor, 2 * factor, 2 * factor)
            history += _patches_with_padding(latent.shape[2:], patch if factor > 1 else (1, 1, 1), patch)
    grid = _patches(call["hidden_states"].shape[2:], _hunyuan_patch(model))
    return TokenLayout(grid, text_before=history)


def _hunyuan_video15(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Video, then image, glyph and prompt embeddings, valid rows first."""
    grid = _patches(call["hidden_states"].shape[2:], _hunyuan_patch(model))
    parts = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return TokenLayout(grid, text_after=sum(call[part].shape[1] for part in parts if call[part] is not None))


def _kandinsky5(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout | None:
    """Video only, `[B, T, Y, X, C]`; sparse calls order tokens in 8x8 tiles and bring their own block mask."""
    if call["sparse_params"] is not None:
        return None
    return TokenLayout(_patches(call["hidden_states"].shape[1:4], model.config.patch_size))


def _kandinsky6(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Video only, `[B, T, Y, X, C]`."""
    return TokenLayout(_patches(call["hidden_states"].shape[1:4], model.config.patch_size))


def _cogvideox(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Text, then video; the latent is `[B, T, C, Y, X]` and only CogVideoX 1.5 has a temporal patch."""
    _, frames, _, rows, columns = call["hidden_states"].shape
    patch = model.config.patch_size
    patch_t = getattr(model.config, "patch_size_t", None)
    grid = _patches((frames, rows, columns), (1 if patch_t is None else patch_t, patch, patch))
    return TokenLayout(grid, text_before=call["encoder_hidden_states"].shape[1])


def _mochi(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Video, then the valid text of one sample: attention is called once per sample."""
    patch = model.config.patch_size
    return TokenLayout(_patches(call["hidden_states"].shape[2:], (1, patch, patch)))


def _allegro(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Video only. Frames are embedded one by one: a temporal patch size would only shrink the attention mask."""
    _, _, frames, rows, columns = call["hidden_states"].shape
    patch = model.config.patch_size
    return TokenLayout((frames, rows // patch, columns // patch))


def _latte(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """One frame: the spatial blocks have frames in the batch."""
    patch = model.config.patch_size
    return TokenLayout(_patches(call["hidden_states"].shape[3:], (patch, patch)))


def _easyanimate(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Text of one or two encoders, then video."""
    patch = model.config.patch_size
    parts = ("encoder_hidden_states", "encoder_hidden_states_t5")
    text = sum(call[part].shape[1] for part in parts if call[part] is not None)
    return TokenLayout(_patches(call["hidden_states"].shape[2:], (1, patch, patch)), text_before=text)


def _cosmos_controlnet(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Video only; the grid is that of the control latent."""
    return TokenLayout(_patches(call["controls_latents"].shape[2:], model.config.patch_size))


def _cosmos3(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout | None:
    """A causal text prefix, then the video, then sound and actions; the prefix attends in a call of its own."""
    if len(call["vision_token_shapes"]) != 1:
        return None
    grid = tuple(call["vision_token_shapes"][0])
    prefix = call["und_len"]
    return TokenLayout(grid, text_before=prefix, text_after=call["sequence_length"] - prefix - math.prod(grid))


def _motif(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout:
    """Video, then first-frame embedding and text."""
    parts = ("image_embeds", "encoder_hidden_states")
    grid = _patches(call["hidden_states"].shape[2:], _hunyuan_patch(model))
    return TokenLayout(grid, text_after=sum(call[part].shape[1] for part in parts if call[part] is not None))


def _minimax_h3(model: nn.Module, call: Mapping[str, Any]) -> TokenLayout | None:
    """Text, references and audio, then the video, which ends the packed sequence; read from the position ids (t, y, x)."""
    positions: torch.Tensor = call["position_ids"]
    tokens = positions.shape[0]
    video = call["video_indices"]
    if int(video[-1]) != tokens - 1:
        return None
    last = positions[-1]
    rows_per_frame = _trailing(positions[:, 0] == last[0])
    columns = _trailing((positions[:, :2] == last[:2]).all(dim=-1))
    if rows_per_frame % columns:
        return None
    frames = _trailing_frames(positions, video, rows_per_frame)
    grid = (frames, rows_per_frame // columns, columns)
    return TokenLayout(grid, text_before=tokens - math.prod(grid))


def _trailing(flags: torch.Tensor) -> int:
    """How many flags at the end are true."""
    return int(flags.flip(0).cumprod(0, dtype=flags.new_tensor(0).long().dtype).sum())


def _trailing_frames(positions: torch.Tensor, video: torch.Tensor, rows_per_frame: int) -> int:
    """Frames at the end of the sequence that are video rows, equal in space, and ordered in time."""
    last = positions[-rows_per_frame:]
    contiguous = _trailing(video == video[-1] - (video.shape[0] - 1 - _arange_like(video)))
    frames = 1
    while (frames + 1) * rows_per_frame <= contiguous:
        stop = positions.shape[0] - frames * rows_per_frame
        frame = positions[stop - rows_per_frame : stop]
        earlier = bool((frame[:, 0] == frame[0, 0]).all()) and bool(frame[0, 0] < positions[stop, 0])
        if not earlier or not bool((frame[:, 1:] == last[:, 1:]).all()):
            break
        frames += 1
    return frames
