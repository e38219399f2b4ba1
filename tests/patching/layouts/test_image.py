"""Calls of text-to-image models that have no layout, and layouts that the zoo does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from zoo import ZOO
from zoo_case import UPSTREAM_WARNINGS
from zoo_flux import flux_inputs, ids, qwen_inputs, with_reference
from zoo_measure import bound_arguments

import vision_attn as va
from vision_attn import TokenLayout
from vision_attn.patching.layouts import FAMILIES, family_of

pytestmark = UPSTREAM_WARNINGS

CASES = {case.name: case for case in ZOO}


def layout_of(name: str, changes: Mapping[str, Any]) -> TokenLayout | None:
    """The layout of a zoo case after changing some of its inputs."""
    case = CASES[name]
    model = case.build()
    return family_of(model).layout(model, bound_arguments(model, (), case.inputs(*case.grid) | dict(changes)))


def test_references_without_an_index_of_their_own_have_no_layout() -> None:
    inputs = with_reference(flux_inputs(5, 7))
    inputs["img_ids"][:, 0] = 0
    assert layout_of("flux", inputs) is None


def test_flux2_with_cached_references_has_no_layout() -> None:
    assert layout_of("flux2", {"kv_cache_mode": "cached"}) is None


def test_flux3_ids_that_are_no_grid_have_no_layout() -> None:
    assert layout_of("flux3", {"img_ids": ids(5, 7, 4).flip(0)}) is None


@pytest.mark.parametrize(
    "shapes", [(1, 5, 7), [(1, 5, 7)], [(1, 5, 7), (1, 5, 7)], [[(1, 5, 7)]]], ids=["tuple", "list", "batch", "nested"]
)
def test_spellings_of_img_shapes(shapes: Any) -> None:
    family = next(family for family in FAMILIES if family.name == "nucleus_image")
    call = qwen_inputs(5, 7) | {"img_shapes": shapes}
    assert family.layout(SimpleNamespace(), call) == TokenLayout((5, 7), text_after=5)


def test_samples_of_different_shapes_have_no_layout() -> None:
    shapes = [[(1, 5, 7)], [(1, 7, 5)]]
    assert layout_of("qwen_image", {"img_shapes": shapes}) is None
    assert layout_of("nucleus_image", {"img_shapes": shapes}) is None


def test_several_frames_are_a_three_dimensional_grid() -> None:
    layout = layout_of("qwen_image", {"img_shapes": [[(2, 5, 7)]] * 2, "hidden_states": torch.zeros(2, 72, 4)})
    assert layout == TokenLayout((2, 5, 7), text_before=5, text_after=2)


def test_prompts_of_different_length_have_no_layout_in_lumina2() -> None:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    assert layout_of("lumina2", {"encoder_attention_mask": mask}) is None


def test_z_image_with_several_images_or_sizes_has_no_layout() -> None:
    images = CASES["z_image"].inputs(5, 7)["x"]
    assert layout_of("z_image", {"x": [images, images]}) is None
    assert layout_of("z_image", {"x": [images[0], images[1][..., :-2]]}) is None


def test_packed_hidream_images_have_the_sizes_they_are_given() -> None:
    packed = {"hidden_states": torch.zeros(2, 64, 16), "img_sizes": torch.tensor([[5, 7], [5, 7]])}
    assert layout_of("hidream", packed) == TokenLayout((5, 7), text_after=64 - 35 + 15)
    assert layout_of("hidream", packed | {"img_sizes": [(5, 7), (7, 5)]}) is None


def test_ideogram4_images_that_are_not_in_one_place_have_no_layout() -> None:
    indicator = CASES["ideogram4"].inputs(5, 7)["indicator"]
    torn, shifted = indicator.clone(), indicator.clone()
    torn[:, 20] = 3
    shifted[1] = shifted[1].roll(1)
    for other in (torn, shifted, torch.full_like(indicator, 3)):
        assert layout_of("ideogram4", {"indicator": other}) is None


def test_ideogram4_without_text_starts_with_the_image() -> None:
    inputs = CASES["ideogram4"].inputs(5, 7)
    cut = {name: inputs[name][:, 7:] for name in ("indicator", "position_ids")}
    assert layout_of("ideogram4", cut) == TokenLayout((5, 7))


def test_joy_edit_plus_samples_of_different_shapes_have_no_layout() -> None:
    assert layout_of("joy_image_edit_plus", {"shape_list": [[(1, 5, 7)], [(1, 7, 5)]]}) is None


def test_legacy_transformer_of_patches_and_of_codebook_indices() -> None:
    family = next(family for family in FAMILIES if family.name == "transformer_2d")
    codes = SimpleNamespace(is_input_vectorized=True, height=3, width=4)
    assert family.layout(codes, {"hidden_states": torch.zeros(2, 12)}) == TokenLayout((3, 4))
    patches = SimpleNamespace(is_input_vectorized=False, is_input_patches=True, patch_size=2)
    assert family.layout(patches, {"hidden_states": torch.zeros(2, 4, 10, 14)}) == TokenLayout((5, 7))


@pytest.mark.parametrize(
    "name", ["flux", "flux3", "flux3_reference", "chroma", "krea2", "flux_controlnet", "flux_controlnet_union"]
)
def test_a_given_grid_makes_the_layout_that_is_read_otherwise(name: str) -> None:
    case = CASES[name]
    model = case.build()
    family, call = family_of(model), bound_arguments(model, (), case.inputs(*case.grid))
    assert family.layout_of_grid is not None
    assert family.layout_of_grid(model, call, case.grid) == family.layout(model, call)


def in_one_graph(name: str, grid: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a patched model gives inside a compiled function with a given grid, and without compiling."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs(*case.grid)
    torch._dynamo.reset()
    with torch.no_grad():
        with va.patch(model, va.Clear(radius=2)):
            expected = model(**inputs).sample
        with va.patch(model, va.Clear(radius=2), grid=grid):
            step = torch.compile(lambda: model(**inputs).sample, backend="eager", fullgraph=True)
            return step(), expected


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("flux", (5, 7)),
        ("krea2", (5, 7)),
        ("flux_kontext", TokenLayout((5, 7), text_before=5, text_after=12)),
    ],
)
def test_a_given_grid_compiles_whole(name: str, grid: Any) -> None:
    actual, expected = in_one_graph(name, grid)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("name", "grid"), [("flux", (5, 5)), ("flux", (6, 7)), ("flux_kontext", (5, 7))])
def test_a_wrong_grid_in_one_graph_is_an_error(name: str, grid: Any) -> None:
    with pytest.raises(Exception, match=r"must be called with the tokens of its layout, got .* check grid="):
        in_one_graph(name, grid)


def test_position_ids_in_one_graph_are_an_error_with_the_way_out() -> None:
    with pytest.raises(Exception, match=r"pass grid=\(Y, X\) to va.patch"):
        in_one_graph("flux", None)
