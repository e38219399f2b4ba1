"""`verify`: dry runs that pass on right adapters and fail on wrong ones."""

import pytest
import torch
from tiny_models import FLUX, SD3, TINY, UNET, Tiny
from zoo_case import UPSTREAM_WARNINGS
from zoo_image import ZOO_IMAGE
from zoo_unet import ZOO_UNET
from zoo_video import ZOO_VIDEO

import vision_attn as va
from vision_attn.patching import diffusers as adapters
from vision_attn.patching.dry_inputs import RECIPES
from vision_attn.patching.layouts import Family

pytestmark = UPSTREAM_WARNINGS

ZOO_OF_RECIPES = {
    *("flux", "chroma", "longcat_image", "ovis_image", "flux2", "sd3", "auraflow", "pixart", "dit", "qwen_image"),
    *("wan", "cogvideox", "ltx", "sd15", "sdxl", "ddpm"),
}


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)
def test_models_pass(tiny: Tiny):
    model = tiny.model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    report = va.verify(model)
    assert report.passed
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    names = [check.name for check in report.checks]
    assert names == [
        "finite output",
        "Dense is bit-identical",
        "neighborhood over the whole grid is dense",
        "clear over the whole grid is dense",
        "attention calls",
        "a window of one token is not dense",
        "a pixel moves its token",
        "removal gives the output back",
        "removal gives processors and keys back",
    ]
    applies = {check.name: check.passed for check in report.checks}
    assert applies["a pixel moves its token"] is (None if tiny.name in ("unet", "sdxl") else True)
    assert "ok" in str(report)
    assert "FAILED" not in str(report)


KNOWN = [case for case in (*ZOO_IMAGE, *ZOO_VIDEO, *ZOO_UNET) if case.name in ZOO_OF_RECIPES]


def test_every_recipe_has_its_model():
    assert {type(case.build()).__name__ for case in KNOWN} == set(RECIPES)


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case.name)
def test_models_whose_inputs_are_made_up(case):
    report = va.verify(case.build())
    assert report.passed
    assert len(report.checks) == 9


def test_inputs_of_the_caller_are_used():
    report = va.verify(SD3.model(), inputs=SD3.inputs(4, 6))
    assert "3 tokens of grid (4, 6), 0 before, 5 after" in str(report)


def wrong_family(layout) -> Family:
    return Family("wrong", ("FluxTransformer2DModel",), layout)


@pytest.mark.parametrize(
    ("layout", "failure"),
    [
        (
            va.TokenLayout((5, 7), text_after=6),
            r"a pixel moves its token +FAILED +token \(0, 0\) of \(5, 7\) must be row 0, got \[6\]",
        ),
        (va.TokenLayout((5, 6), text_before=6), r"attention calls +FAILED +0 of 3 layers by the operator"),
    ],
    ids=["wrong side", "wrong size"],
)
def test_wrong_layouts_fail(monkeypatch, layout, failure):
    monkeypatch.setattr(adapters, "family_of", lambda model: wrong_family(lambda module, call: layout))
    with pytest.raises(va.PatchError, match=failure):
        va.verify(FLUX.model())


def test_a_model_without_finite_output_fails():
    model = UNET.model()
    with torch.no_grad():
        model.conv_out.bias.fill_(float("nan"))
    with pytest.raises(va.PatchError, match=r"finite output +FAILED"):
        va.verify(model)


def test_training_modes_of_parts_are_kept():
    model = SD3.model()
    model.train()
    model.norm_out.eval()
    va.verify(model)
    assert [name for name, module in model.named_modules() if not module.training] == [
        name for name, _ in model.named_modules() if name.startswith("norm_out")
    ]
