"""A tiny FLUX computed by CLEAR's reference code, against a stock diffusers FLUX with swapped attention."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vision_attn as va

diffusers = pytest.importorskip("diffusers")

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(FOLDER / "clear.npz")
ABOUT = json.loads((FOLDER / "clear.json").read_text())["model"]


def golden(name):
    return torch.from_numpy(GOLDEN[name])


@pytest.fixture
def flux():
    config = {**ABOUT["config"], "axes_dims_rope": tuple(ABOUT["config"]["axes_dims_rope"])}
    model = diffusers.FluxTransformer2DModel(**config).eval()
    weights = {n.removeprefix("model.w."): golden(n) for n in GOLDEN if n.startswith("model.w.")}
    model.load_state_dict({name: x for name, x in weights.items() if "spatial_weight" not in name})
    return model


def spatial_weights():
    return {n.removeprefix("model.w."): golden(n) for n in GOLDEN if n.endswith("spatial_weight")}


def run(model):
    y, x = ABOUT["grid"]
    rows, columns = torch.meshgrid(torch.arange(y), torch.arange(x), indexing="ij")
    ids = torch.stack([torch.zeros(y, x), rows, columns], -1).view(-1, 3)
    inputs = {n.removeprefix("model.in."): golden(n) for n in GOLDEN if n.startswith("model.in.")}
    with torch.no_grad():
        return model(**inputs, img_ids=ids, txt_ids=torch.zeros(ABOUT["text_tokens"], 3), return_dict=False)[0]


def operator_of(case):
    if case["operator"] == "dense":
        return va.Dense()
    return va.Clear(case["radius"], down_factor=case["down_factor"], proportional=case["proportional"])


@pytest.mark.parametrize("case", ABOUT["output_cases"], ids=lambda case: case["array"])
def test_swapped_flux_equals_the_reference_code(flux, case):
    flux.pos_embed.theta = 10_000 * case["ntk_factor"]
    with va.patch(flux, operator_of(case)) as patch:
        if case["spatial_weight"]:
            patch.load_state_dict(spatial_weights())
        out = run(flux)
    assert len(patch.routed) == 2
    torch.testing.assert_close(out, golden(case["array"]), atol=2e-5, rtol=1e-4)


def test_learned_weights_matter(flux):
    case = next(case for case in ABOUT["output_cases"] if case["spatial_weight"])
    with va.patch(flux, operator_of(case)):
        mean_pooled = run(flux)
    assert (mean_pooled - golden(case["array"])).abs().max() > 1e-3
