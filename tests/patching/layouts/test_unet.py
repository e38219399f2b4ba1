"""Layouts of UNet blocks that the zoo does not reach."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from zoo_case import UPSTREAM_WARNINGS, randn

import vision_attn as va
from vision_attn import TokenLayout
from vision_attn.patching.layouts.unet import UNET_FAMILIES

pytestmark = UPSTREAM_WARNINGS


def layout(name: str, block: Any, **call: Any) -> TokenLayout | None:
    """What the family says about a call of a block."""
    return next(family for family in UNET_FAMILIES if family.name == name).layout(block, call)


def block_of_class(name: str, **attributes: Any) -> Any:
    return type(name, (), attributes)()


FEATURES = torch.zeros(6, 8, 5, 7)


def test_a_feature_map_is_its_grid() -> None:
    block = block_of_class("Transformer2DModel", config=SimpleNamespace(only_cross_attention=False))
    assert layout("unet", block, hidden_states=FEATURES) == TokenLayout((5, 7))


def test_text_keys_come_first_in_blocks_with_added_keys() -> None:
    block = block_of_class("SimpleCrossAttnUpBlock2D")
    text = torch.zeros(6, 9, 16)
    assert layout("unet", block, hidden_states=FEATURES, encoder_hidden_states=text) == TokenLayout((5, 7), 9)
    assert layout("unet", block, hidden_states=FEATURES, encoder_hidden_states=None) is None


def test_kandinsky3_and_stable_cascade_attention_to_text_alone_has_no_layout() -> None:
    assert layout("kandinsky3", None, x=FEATURES, context=None) == TokenLayout((5, 7))
    assert layout("kandinsky3", None, x=FEATURES, context=torch.zeros(6, 9, 16)) is None
    call = {"x": FEATURES, "kv": torch.zeros(6, 9, 16)}
    assert layout("stable_cascade", SimpleNamespace(self_attn=True), **call) == TokenLayout((5, 7), text_after=9)
    assert layout("stable_cascade", SimpleNamespace(self_attn=False), **call) is None


@pytest.mark.parametrize(("downsample", "grid"), [(False, (11, 15)), (True, (5, 7))])
def test_uvit_halves_its_codes_when_it_has_a_down_block(downsample: bool, grid: tuple[int, int]) -> None:
    model = SimpleNamespace(config=SimpleNamespace(downsample=downsample))
    assert layout("uvit", model, input_ids=torch.zeros(2, 11, 15)) == TokenLayout(grid)


def upscaler() -> nn.Module:
    """Like the 4x upscaler of Stable Diffusion: only the last level has self-attention."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        only_cross_attention=(True, False),
    ).eval()


def test_attention_to_as_many_text_tokens_as_pixels_is_never_taken_for_self_attention() -> None:
    model = upscaler()
    inputs = {"sample": randn(2, 4, 6, 10), "timestep": 5, "encoder_hidden_states": randn(2, 60, 16, seed=1)}
    with torch.no_grad():
        expected = model(**inputs).sample
        with (
            va.patch(model, va.Neighborhood(kernel_size=99)),
            pytest.raises(va.PatchError, match="layout of this call"),
        ):
            model(**inputs)
        with va.patch(model, va.Neighborhood(kernel_size=99), strict=False) as patch:
            torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-5)
            kinds = {name: {call.kind for call in calls} for name, calls in patch.calls.items()}
    assert {kind for name, kind in kinds.items() for kind in kind if name.startswith("down_blocks.0.")} == {"dense"}
    assert {kind for name, kind in kinds.items() for kind in kind if name.startswith("mid_block.")} == {"operator"}


def test_grids_of_levels_come_from_their_feature_maps() -> None:
    model = upscaler()
    with torch.no_grad(), va.patch(model, va.Neighborhood(kernel_size=3)) as patch:
        model(randn(2, 4, 6, 10), 5, randn(2, 9, 16, seed=1))
        found = {name: calls[0].layout for name, calls in patch.calls.items() if calls[0].layout is not None}
    assert set(found.values()) == {TokenLayout((3, 5))}
    assert len(found) == 4
