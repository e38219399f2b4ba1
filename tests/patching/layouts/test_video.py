"""Layouts of video models that the zoo does not reach: calls without grid, odd sizes, grids read from positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from zoo_video import ZOO_VIDEO

import vision_attn as va
from vision_attn import PatchError, TokenLayout
from vision_attn.patching.layouts import REFUSED, family_of
from vision_attn.patching.layouts.video import VIDEO_FAMILIES


def layout(name: str, config: dict[str, Any], **call: Any) -> TokenLayout | None:
    """What the family says about a call of a model with this configuration."""
    family = next(family for family in VIDEO_FAMILIES if family.name == name)
    return family.layout(SimpleNamespace(config=SimpleNamespace(**config)), call)


def places(frames: int, rows: int, columns: int, time: float = 0.0) -> torch.Tensor:
    """Positions `[T * Y * X, 3]` of a video."""
    axes = [time + 2.5 * torch.arange(frames), torch.arange(rows) - 1.5, torch.arange(columns) * 0.5]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def test_pixels_that_fill_no_patch_are_left_out() -> None:
    hidden_states = torch.zeros(2, 4, 3, 11, 15)
    assert layout("wan", {"patch_size": (1, 2, 2)}, hidden_states=hidden_states) == TokenLayout((3, 5, 7))


def test_one_frame_stays_a_video() -> None:
    hidden_states = torch.zeros(2, 4, 1, 10, 14)
    assert layout("wan", {"patch_size": (1, 2, 2)}, hidden_states=hidden_states) == TokenLayout((1, 5, 7))


@pytest.mark.parametrize(
    ("history", "text_before"),
    [
        ({}, 0),
        ({"short": (1, 10, 14)}, 35),
        ({"mid": (2, 10, 14)}, 1 * 3 * 4),
        ({"mid": (3, 12, 16)}, 2 * 3 * 4),
        ({"long": (16, 10, 14)}, 4 * 2 * 2),
        ({"short": (1, 10, 14), "mid": (2, 10, 14), "long": (16, 10, 14)}, 35 + 12 + 16),
    ],
)
def test_helios_history_is_padded_to_whole_patches(history: dict[str, tuple[int, ...]], text_before: int) -> None:
    call: dict[str, Any] = {"hidden_states": torch.zeros(2, 4, 3, 10, 14)}
    for term in ("short", "mid", "long"):
        given = term in history
        call[f"latents_history_{term}"] = torch.zeros(2, 4, *history[term]) if given else None
        call[f"indices_latents_history_{term}"] = torch.zeros(2, 1) if given else None
    assert layout("helios", {"patch_size": (1, 2, 2)}, **call) == TokenLayout((3, 5, 7), text_before=text_before)


def ltx(hidden_tokens: int, video_coords: torch.Tensor | None = None) -> TokenLayout | None:
    sizes = {"num_frames": None, "height": None, "width": None}
    return layout("ltx", {}, hidden_states=torch.zeros(2, hidden_tokens, 4), video_coords=video_coords, **sizes)


def test_ltx_without_grid_and_coordinates_has_no_layout() -> None:
    assert ltx(105) is None


@pytest.mark.parametrize("grid", [(3, 5, 7), (1, 5, 7), (3, 1, 7), (3, 5, 1), (2, 2, 2)])
@pytest.mark.parametrize("conditions", [(), ((1, 4, 6),), ((1, 5, 7), (2, 5, 7)), ((2, 3, 3),)])
def test_ltx_finds_the_video_behind_its_conditions(
    grid: tuple[int, int, int], conditions: tuple[tuple[int, int, int], ...]
) -> None:
    positions = torch.cat([*(places(*condition, time=5.0) for condition in conditions), places(*grid)])
    before = positions.shape[0] - grid[0] * grid[1] * grid[2]
    assert ltx(positions.shape[0], positions.T.expand(2, -1, -1)) == TokenLayout(grid, text_before=before)


def test_ltx2_has_its_references_behind_the_video() -> None:
    call = {"num_frames": 3, "height": 5, "width": 7, "hidden_states": torch.zeros(2, 140, 4)}
    assert layout("ltx2", {}, **call) == TokenLayout((3, 5, 7), text_after=35)
    assert layout("ltx2", {}, **call | {"height": None}) is None


def test_kandinsky5_with_sparse_attention_has_no_layout() -> None:
    call = {"hidden_states": torch.zeros(2, 3, 10, 14, 4), "sparse_params": None}
    assert layout("kandinsky5", {"patch_size": (1, 2, 2)}, **call) == TokenLayout((3, 5, 7))
    assert layout("kandinsky5", {"patch_size": (1, 2, 2)}, **call | {"sparse_params": {"to_fractal": True}}) is None


def test_cosmos3_with_sound_has_it_behind_the_video() -> None:
    call = {"vision_token_shapes": [(3, 5, 7)], "und_len": 4, "sequence_length": 4 + 105 + 9}
    assert layout("cosmos3", {}, **call) == TokenLayout((3, 5, 7), text_before=4, text_after=9)
    assert layout("cosmos3", {}, **call | {"vision_token_shapes": [(1, 5, 7), (3, 5, 7)]}) is None


def minimax(positions: torch.Tensor, video: torch.Tensor, noisy: int = 105) -> TokenLayout | None:
    """The last `noisy` tokens have another noise level than the rest."""
    levels = (torch.arange(positions.shape[0]) >= positions.shape[0] - noisy).long()
    return layout("minimax_h3", {}, position_ids=positions, video_indices=video, timestep_indices=levels)


@pytest.mark.parametrize("noisy", [105, 1000])
@pytest.mark.parametrize("reference", [(1, 5, 7), (2, 4, 6)])
def test_minimax_finds_the_video_behind_a_reference_that_touches_it(
    reference: tuple[int, int, int], noisy: int
) -> None:
    positions = torch.cat([torch.zeros(6, 3), places(*reference, time=6.0), places(3, 5, 7, time=6.0)])
    before = positions.shape[0] - 105
    video = torch.arange(6, positions.shape[0])
    assert minimax(positions, video, noisy) == TokenLayout((3, 5, 7), text_before=before)


def test_minimax_tells_an_earlier_reference_of_the_same_size_by_its_noise_level() -> None:
    positions = torch.cat([torch.zeros(6, 3), places(1, 5, 7, time=1.0), places(3, 5, 7, time=6.0)])
    assert minimax(positions, torch.arange(6, positions.shape[0])) == TokenLayout((3, 5, 7), text_before=41)


def test_minimax_has_no_layout_when_something_follows_the_video() -> None:
    positions = torch.cat([places(3, 5, 7), torch.zeros(4, 3)])
    assert minimax(positions, torch.arange(105)) is None


@pytest.mark.parametrize("name", ["ltx_condition", "minimax_h3"])
def test_a_given_grid_needs_no_values_of_tensors(name: str) -> None:
    """Positions are read to find the grid; a grid from the user traces into one graph instead."""
    case = next(case for case in ZOO_VIDEO if case.name == name)
    model = case.build()
    with torch.no_grad():
        with va.patch(model, va.Neighborhood(kernel_size=3)):
            expected = model(**case.inputs(*case.grid))
        with va.patch(model, va.Neighborhood(kernel_size=3), grid=case.grid) as patch:
            given = model(**case.inputs(*case.grid))
            layouts = {call.layout for calls in patch.calls.values() for call in calls}
            compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")(**case.inputs(*case.grid))
    assert {layout.grid for layout in layouts} == {case.grid}
    torch.testing.assert_close(given.sample, expected.sample, rtol=0, atol=0)
    torch.testing.assert_close(compiled.sample, expected.sample)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("AnyFlowFARTransformer3DModel", "block mask over causal chunks of frames"),
        ("WanAnimate2Transformer3DModel", "block mask over the padded frames"),
        ("Kandinsky6SRTransformer3DModel", "block mask over tokens ordered in 8x8 tiles"),
        ("SanaVideoTransformer3DModel", "linear attention"),
        ("SanaWMTransformer3DModel", "linear attention"),
        ("SanaWMLTX2RefinerTransformer3DModel", "its arguments hold no grid"),
        ("TransformerTemporalModel", "no spatial grid"),
        ("StableAudioDiTModel", "sound, not images"),
        ("UNet1DModel", "one-dimensional signals"),
        ("MotionAdapter", "patch the UNetMotionModel"),
        ("ControlNetXSAdapter", "patch the UNetControlNetXSModel"),
        ("MultiControlNetModel", "patch each of its `nets`"),
    ],
)
def test_a_refused_model_is_named_with_the_reason(name: str, reason: str) -> None:
    assert name in REFUSED
    with pytest.raises(PatchError, match=rf"got {name}: .*{reason}"):
        family_of(type(name, (nn.Module,), {})())
