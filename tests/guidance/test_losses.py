"""Losses of attention maps against the reference values of A-STAR's equations, closed forms and finite differences."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch

import vision_attn as va
from vision_attn.guidance import (
    attend_and_excite_loss,
    binarize,
    concept_maps,
    jensen_shannon_loss,
    overlap,
    retention_loss,
    segregation_loss,
    symmetric_kl_loss,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ARRAYS = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "astar.npz").items()}
FACTS = json.loads((GOLDEN / "astar.json").read_text())


def prepared(case, step, dtype):
    probabilities = ARRAYS[step].to(dtype)
    if case["maps"] == "ae":
        return concept_maps(probabilities, case["concepts"])
    maps = torch.stack([probabilities[..., group].mean(-1) for group in case["concepts"]])
    if case["maps"] == "max":
        # The reference stays a hair below 1: at 1 the peak ties with its mask, which halves the gradient there.
        below = 1 - (1e-11 if dtype == torch.float64 else 1e-6)
        return maps / maps.amax((1, 2), keepdim=True) * below
    return maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", FACTS["cases"], ids=lambda case: case["name"])
def test_reference_values(case, dtype):
    exact = dtype == torch.float64
    maps = prepared(case, "P_tm1", dtype).requires_grad_()
    masks = binarize(prepared(case, "P_t", dtype), mode=case["binarize"])
    if exact:
        assert torch.equal(masks, ARRAYS[f"{case['name']}/B_t"].to(dtype))
    masks = ARRAYS[f"{case['name']}/B_t"].to(dtype)
    segregation, retention = segregation_loss(maps), retention_loss(maps, masks)
    tolerance = 1e-10 if exact else 1e-5
    assert segregation.item() == pytest.approx(case["L_seg"], abs=tolerance)
    assert retention.item() == pytest.approx(case["L_ret"], abs=tolerance)
    gradient = torch.autograd.grad(segregation + retention, maps)[0]
    expected = ARRAYS[f"{case['name']}/dL_dA"]
    largest = expected.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected, atol=1e-10 if exact else 1e-4 * largest, rtol=0)


def test_gradient_reaches_the_probabilities():
    name = next(name for name in ARRAYS if name.endswith("dL_dP")).removesuffix("/dL_dP")
    case = next(case for case in FACTS["cases"] if case["name"] == name)
    probabilities = ARRAYS["P_tm1"].clone().requires_grad_()
    maps = concept_maps(probabilities, case["concepts"])
    loss = segregation_loss(maps) + retention_loss(maps, ARRAYS[f"{name}/B_t"].double())
    gradient = torch.autograd.grad(loss, probabilities)[0]
    torch.testing.assert_close(gradient, ARRAYS[f"{name}/dL_dP"], atol=1e-10, rtol=0)


def test_attend_and_excite_is_that_of_diffusers():
    maps = concept_maps(ARRAYS["P_tm1"].float(), [[3], [7]])
    assert attend_and_excite_loss(maps).item() == pytest.approx(FACTS["attend_and_excite"]["loss"], abs=1e-5)
    torch.testing.assert_close(maps.amax((1, 2)), ARRAYS["AE_max_per_token"].float(), atol=1e-5, rtol=0)


def test_ratio_of_known_maps():
    maps = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = (maps > 0.5).double()
    torch.testing.assert_close(overlap(maps, maps), torch.full((2, 3), 0.5, dtype=torch.float64))
    assert (overlap(mask, 1 - mask) == 0).all()
    torch.testing.assert_close(overlap(maps, 2 * maps), torch.full((2, 3), 1 / 3, dtype=torch.float64))
    ratio = overlap(maps[:, 0], maps[:, 1])
    union = torch.maximum(maps[:, 0], maps[:, 1]).sum((1, 2))
    torch.testing.assert_close(ratio / (1 - ratio), torch.minimum(maps[:, 0], maps[:, 1]).sum((1, 2)) / union)


PAIRS = [(0, 1), (1, 2)]
LOSSES = {
    "segregation": segregation_loss,
    "retention": lambda maps: retention_loss(maps, (maps.detach() > 0.5).to(maps.dtype)),
    "attend_and_excite": attend_and_excite_loss,
    "symmetric_kl": lambda maps: symmetric_kl_loss(maps, PAIRS),
    "jensen_shannon": lambda maps: jensen_shannon_loss(maps, PAIRS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_finite_differences(name):
    maps = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], maps)


@pytest.mark.parametrize("name", LOSSES)
def test_samples_do_not_mix(name):
    maps = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    batch = LOSSES[name](maps)
    assert batch.shape == (3,)
    for sample in range(3):
        torch.testing.assert_close(LOSSES[name](maps[sample]), batch[sample])
    halves = LOSSES[name](maps.half())
    assert halves.dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_maps_of_zeros_give_numbers(name):
    maps = torch.zeros(3, 4, 5, requires_grad=True)
    loss = LOSSES[name](maps)
    loss.backward()
    assert loss.isfinite()
    assert maps.grad.isfinite().all()


def test_divergences_against_their_definitions():
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = (maps / maps.sum((1, 2), keepdim=True)).flatten(1)

    def kl(a, b):
        return (a * (a / b).log()).sum()

    symmetric = sum((kl(p[i], p[j]) + kl(p[j], p[i])) / 2 for i, j in PAIRS)
    middle = [(p[i] + p[j]) / 2 for i, j in PAIRS]
    shannon = sum((kl(p[i], m) + kl(p[j], m)) / 2 for (i, j), m in zip(PAIRS, middle, strict=True))
    torch.testing.assert_close(symmetric_kl_loss(maps, PAIRS), symmetric)
    torch.testing.assert_close(jensen_shannon_loss(maps, PAIRS), shannon)
    apart = torch.eye(4, dtype=torch.float64)[:2].view(2, 2, 2)
    assert jensen_shannon_loss(apart, [(0, 1)]).item() == pytest.approx(math.log(2))
    assert jensen_shannon_loss(maps, []).item() == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: segregation_loss([1.0]), TypeError, "segregation_loss: maps must be a tensor, got list"),
        (
            lambda: segregation_loss(torch.ones(4, 4)),
            ValueError,
            r"maps must have shape \[n, Y, X\] or .* got \(4, 4\)",
        ),
        (lambda: segregation_loss(torch.ones(0, 4, 4)), ValueError, r"maps must have shape .* got \(0, 4, 4\)"),
        (lambda: attend_and_excite_loss(torch.ones(1, 4, 4).int()), TypeError, "floating point, got torch.int32"),
        (
            lambda: retention_loss(torch.ones(2, 4, 4), torch.ones(1, 4, 4)),
            ValueError,
            r"masks must have the maps' shape \(2, 4, 4\), got \(1, 4, 4\)",
        ),
        (
            lambda: symmetric_kl_loss(torch.ones(2, 4, 4), [(0, 2)]),
            ValueError,
            r"two concepts from 0 to 1, got \(0, 2\)",
        ),
        (lambda: jensen_shannon_loss(torch.ones(2, 4, 4), [(0,)]), ValueError, r"two concepts from 0 to 1, got \(0,\)"),
    ],
)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_package_has_them():
    assert va.guidance.segregation_loss is segregation_loss
