"""Inputs of the tiny text-to-video transformers of `zoo_video.py`.

Grids are (T, Y, X) with more than one frame; latents have 1 x 2 x 2 pixels per token unless a model has no patches.
"""

from __future__ import annotations

from typing import Any

import torch
from zoo_case import Inputs, change, randn, touch_latent, touch_row

TEXT = 6  # rows of text
GRID = (3, 5, 7)
PATCH = (1, 2, 2)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}


def noise_levels() -> torch.Tensor:
    return torch.tensor([500.0, 300.0])


def latent(channels: int, frames: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Latent `[2, C, T, Y, X]` of a token grid, 2 x 2 pixels per token."""
    return randn(2, channels, frames, 2 * rows, 2 * columns, seed=seed)


def touch_axes(frame: int, row: int, column: int, patch: tuple[int, int, int] = PATCH) -> Any:
    """Touch a latent whose frames, rows and columns are the given axes, not the last three."""

    def touch(inputs: Inputs, token: tuple[int, ...]) -> None:
        channels = inputs["hidden_states"].movedim((frame, row, column), (-3, -2, -1)).shape[1]
        index: list[Any] = [slice(None)] * inputs["hidden_states"].ndim
        for axis, position, step in zip((frame, row, column), token, patch, strict=True):
            index[axis] = position * step
        inputs["hidden_states"][tuple(index)] += change(channels)

    return touch


TOUCH_LATENT = touch_latent("hidden_states", PATCH)
TOUCH_FRAMES_SECOND = touch_axes(1, 3, 4)  # [B, T, C, Y, X]
TOUCH_CHANNELS_LAST = touch_axes(1, 2, 3)  # [B, T, Y, X, C]
TOUCH_TEXT = touch_row("encoder_hidden_states")

WAN = dict(patch_size=PATCH, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, **HEADS)


def wan_inputs(frames: int, rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(4, frames, rows, columns),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
    }


def wan_image_inputs(*grid: int) -> Inputs:
    return wan_inputs(*grid) | {"encoder_hidden_states_image": randn(2, 4, 16, seed=2)}


def wan_vace_inputs(*grid: int) -> Inputs:
    return wan_inputs(*grid) | {"control_hidden_states": latent(4, *grid, seed=2)}


def wan_animate_inputs(frames: int, rows: int, columns: int) -> Inputs:
    """The face video has four pictures per latent frame but the first, which has none."""
    return {
        "hidden_states": latent(12, frames, rows, columns),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "encoder_hidden_states_image": randn(2, 4, 16, seed=2),
        "pose_hidden_states": latent(4, frames - 1, rows, columns, seed=3),
        "face_pixel_values": randn(2, 3, 4 * frames - 7, 16, 16, seed=4),
    }


def anyflow_inputs(*grid: int) -> Inputs:
    inputs = wan_inputs(*grid)
    levels = noise_levels()[:, None].expand(2, grid[0])
    hidden_states = inputs["hidden_states"].transpose(1, 2).contiguous()
    return inputs | {"hidden_states": hidden_states, "timestep": levels, "r_timestep": levels}


def helios_inputs(frames: int, rows: int, columns: int) -> Inputs:
    """History of 1, 2 and 4 frames in patches of 1, 2 and 4 times the size: sides that need padding."""
    inputs = wan_inputs(frames, rows, columns) | {
        "indices_hidden_states": torch.arange(7.0, 7.0 + frames).expand(2, -1)
    }
    start = 0
    for seed, (term, length) in enumerate((("long", 4), ("mid", 2), ("short", 1))):
        inputs[f"latents_history_{term}"] = latent(4, length, rows, columns, seed=seed)
        inputs[f"indices_latents_history_{term}"] = torch.arange(float(start), float(start + length)).expand(2, -1)
        start += length
    return inputs


LTX = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "num_layers": 1, "caption_channels": 16} | {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}


def ltx_inputs(frames: int, rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": randn(2, frames * rows * columns, 4),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "timestep": noise_levels(),
        "encoder_attention_mask": torch.ones(2, TEXT),
        "num_frames": frames,
        "height": rows,
        "width": columns,
    }


def coordinates(frames: int, rows: int, columns: int, time: float = 0.0) -> torch.Tensor:
    """Pixel coordinates `[3, T * Y * X]` of the tokens of a video: 8 frames and 32 x 32 pixels per token."""
    axes = [time + 8.0 * torch.arange(frames), 32.0 * torch.arange(rows), 32.0 * torch.arange(columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


CONDITION = (1, 2, 3)  # tokens of a condition frame that comes before the video


def ltx_condition_inputs(frames: int, rows: int, columns: int) -> Inputs:
    """The grid is not given: condition tokens come first and every token has coordinates."""
    inputs = ltx_inputs(frames, rows, columns)
    for name in ("num_frames", "height", "width"):
        del inputs[name]
    video = coordinates(frames, rows, columns)
    places = torch.cat([coordinates(*CONDITION, time=16.0), video], dim=1)
    return inputs | {"hidden_states": randn(2, places.shape[1], 4), "video_coords": places.expand(2, -1, -1)}


LTX2 = LTX | {
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "rope_double_precision": False,
}


def ltx2_inputs(*grid: int) -> Inputs:
    return ltx_inputs(*grid) | {
        "audio_hidden_states": randn(2, 9, 4, seed=2),
        "audio_encoder_hidden_states": randn(2, TEXT, 16, seed=3),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 4, 4),
}


def valid_text(*lengths: int) -> torch.Tensor:
    """Mask of valid text rows, one length per sample."""
    return (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).float()


def hunyuan_inputs(frames: int, rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(4, frames, rows, columns),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "encoder_attention_mask": valid_text(TEXT, TEXT),
        "pooled_projections": randn(2, 8, seed=2),
        "guidance": torch.tensor([6.0, 6.0]),
    }


def framepack_inputs(frames: int, rows: int, columns: int) -> Inputs:
    inputs = hunyuan_inputs(frames, rows, columns) | {
        "image_embeds": randn(2, 4, 12, seed=3),
        "indices_latents": torch.arange(8, 8 + frames),
    }
    start = 0
    for seed, (name, length) in enumerate((("history_4x", 4), ("history_2x", 2), ("clean", 1))):
        inputs[f"latents_{name}"] = latent(4, length, rows, columns, seed=seed + 4)
        inputs[f"indices_latents_{name}"] = torch.arange(start, start + length)
        start += length
    return inputs


def hunyuan15_inputs(frames: int, rows: int, columns: int) -> Inputs:
    """Image and glyph embeddings come before the text; all rows are valid."""
    return {
        "hidden_states": randn(2, 4, frames, rows, columns),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "encoder_attention_mask": valid_text(TEXT, TEXT),
        "encoder_hidden_states_2": randn(2, 4, 8, seed=2),
        "encoder_attention_mask_2": torch.ones(2, 4),
        "image_embeds": randn(2, 3, 12, seed=3),
    }


def kandinsky5_inputs(frames: int, rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(4, frames, rows, columns).movedim(1, -1).contiguous(),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "pooled_projections": randn(2, 8, seed=2),
        "visual_rope_pos": tuple(torch.arange(size) for size in (frames, rows, columns)),
        "text_rope_pos": torch.arange(TEXT),
    }


def kandinsky6_inputs(frames: int, rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(4, frames, rows, columns).movedim(1, -1).contiguous(),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "pooled_projections": randn(2, 8, seed=2),
        "audio_hidden_states": randn(2, 9, 4, seed=3),
    }


COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": 16,
    "num_layers": 1,
    "max_text_seq_length": TEXT,
    "sample_width": 14,
    "sample_height": 10,
    "sample_frames": 9,
}


def cogvideox_inputs(frames: int, rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(4, frames, rows, columns).transpose(1, 2).contiguous(),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
    }


def rotary(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(float(tokens))[:, None] / (1.0 + torch.arange(dim // 2)).repeat_interleave(2)
    return angles.cos(), angles.sin()


def cogvideox15_inputs(frames: int, rows: int, columns: int) -> Inputs:
    """CogVideoX 1.5: two frames per token and rotary embeddings."""
    return cogvideox_inputs(2 * frames, rows, columns) | {"image_rotary_emb": rotary(frames * rows * columns, 8)}


def mochi_inputs(frames: int, rows: int, columns: int) -> Inputs:
    """Prompts of different length: each sample has an attention call of its own."""
    return {
        "hidden_states": latent(4, frames, rows, columns),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "encoder_attention_mask": valid_text(TEXT, TEXT - 2).bool(),
    }


def allegro_inputs(frames: int, rows: int, columns: int) -> Inputs:
    places = [torch.arange(size) for size in (frames, rows, columns)]
    t, y, x = (place.flatten()[None] for place in torch.meshgrid(*places, indexing="ij"))
    angles = [rotary(size, 4) for size in (frames, rows, columns)]
    return {
        "hidden_states": latent(4, frames, rows, columns),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "encoder_attention_mask": torch.ones(2, TEXT),
        "image_rotary_emb": (tuple(angles), (t, y, x)),
    }


def latte_inputs(rows: int, columns: int) -> Inputs:
    """Three frames; the spatial blocks see them as a batch."""
    return {
        "hidden_states": latent(4, 3, rows, columns),
        "timestep": torch.tensor([500, 300]),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
    }


def touch_every_frame(inputs: Inputs, token: tuple[int, ...]) -> None:
    row, column = token
    inputs["hidden_states"][:, :, :, 2 * row, 2 * column] += change(4)[:, None]


def easyanimate_inputs(frames: int, rows: int, columns: int) -> Inputs:
    return {
        "hidden_states": latent(4, frames, rows, columns),
        "timestep": noise_levels(),
        "encoder_hidden_states": randn(2, TEXT, 16, seed=1),
        "encoder_hidden_states_t5": randn(2, 3, 8, seed=2),
    }


def cosmos_inputs(frames: int, rows: int, columns: int) -> Inputs:
    return wan_inputs(frames, rows, columns) | {"padding_mask": torch.zeros(1, 1, 2 * rows, 2 * columns)}


UNDERSTANDING = 4  # rows of the causal text prefix of Cosmos 3


def cosmos3_inputs(frames: int, rows: int, columns: int) -> Inputs:
    """One packed request: a text prefix, then the video; frames are 2 x 2 pixels per token."""
    tokens = frames * rows * columns
    length = UNDERSTANDING + tokens
    video = torch.arange(UNDERSTANDING, length)
    return {
        "input_ids": torch.arange(1, 1 + UNDERSTANDING),
        "text_indexes": torch.arange(UNDERSTANDING),
        "position_ids": torch.arange(length).expand(3, -1),
        "und_len": UNDERSTANDING,
        "sequence_length": length,
        "vision_tokens": [latent(4, frames, rows, columns)[:1]],
        "vision_token_shapes": [(frames, rows, columns)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
    }


def touch_cosmos3_video(inputs: Inputs, token: tuple[int, ...]) -> None:
    t, y, x = token
    inputs["vision_tokens"][0][:, :, t, 2 * y, 2 * x] += change(4)


def touch_cosmos3_text(inputs: Inputs, row: int) -> None:
    inputs["input_ids"][row] = 20


def motif_inputs(frames: int, rows: int, columns: int) -> Inputs:
    return wan_inputs(frames, rows, columns) | {"image_embeds": randn(2, 4, 12, seed=2)}


AUDIO = 5  # rows of sound in the packed sequence of MiniMax-H3


def minimax_inputs(frames: int, rows: int, columns: int) -> Inputs:
    """Text, a reference frame, sound, then the video; positions are (t, y, x) and time starts after the text."""
    tokens, reference = frames * rows * columns, rows * columns
    start = TEXT + reference + AUDIO
    positions = torch.zeros(start + tokens, 3)
    positions[:TEXT, 0] = torch.arange(TEXT)
    positions[TEXT : TEXT + reference] = coordinates(1, rows, columns, time=TEXT).T
    positions[TEXT + reference : start, 0] = TEXT + torch.arange(AUDIO)
    positions[start:] = coordinates(frames, rows, columns, time=TEXT).T
    tags = torch.zeros(start + tokens, dtype=torch.long)
    tags[:TEXT] = 1
    tags[TEXT + reference : start] = 2
    return {
        "hidden_states": randn(2, reference + tokens, 16),
        "audio_hidden_states": randn(2, AUDIO, 6, seed=1),
        "encoder_hidden_states": randn(2, TEXT, 8, seed=2),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": torch.zeros(start + tokens, dtype=torch.long),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": torch.cat([torch.arange(TEXT, TEXT + reference), torch.arange(start, start + tokens)]),
        "audio_indices": torch.arange(TEXT + reference, start),
        "text_indices": torch.arange(TEXT),
    }
