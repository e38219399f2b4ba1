"""Concept maps and masks: their parts against definitions, and wrong input."""

import math

import pytest
import torch

from vision_attn.guidance import binarize, concept_maps, smoothed


def test_concepts_compete_for_pixels():
    probabilities = torch.rand(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = concept_maps(probabilities, [[1], [2, 4]], smooth=False)
    for y in range(3):
        for x in range(4):
            sharp = [math.exp(100 * p) for p in probabilities[1, y, x, 1:5].tolist()]
            assert maps[1, 0, y, x].item() == pytest.approx(sharp[0] / sum(sharp))
            assert maps[1, 1, y, x].item() == pytest.approx((sharp[1] + sharp[3]) / 2 / sum(sharp))
    assert torch.equal(concept_maps(probabilities[1], [[1], [2, 4]], smooth=False), maps[1])


def test_tokens_that_compete():
    probabilities = torch.rand(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = concept_maps(probabilities, [[0, 5]], text=[0, 3, 5], smooth=False)
    sharp = [math.exp(100 * p) for p in probabilities[2, 1, [0, 3, 5]].tolist()]
    assert maps[0, 2, 1].item() == pytest.approx((sharp[0] + sharp[2]) / 2 / sum(sharp))
    with pytest.raises(ValueError, match=r"groups must hold tokens of text, \[0, 3, 5\], got \[3, 4\]"):
        concept_maps(probabilities, [[3, 4]], text=[0, 3, 5])


def test_smoothing():
    maps = torch.zeros(5, 6, dtype=torch.float64)
    maps[2, 3] = 1
    line = torch.tensor([math.exp(-1), 1, math.exp(-1)], dtype=torch.float64)
    kernel = line[:, None] * line / line.sum() ** 2
    torch.testing.assert_close(smoothed(maps)[1:4, 2:5], kernel)
    torch.testing.assert_close(smoothed(torch.ones(2, 3, 1, 4)), torch.ones(2, 3, 1, 4))


@pytest.mark.parametrize(
    ("mode", "threshold", "expected"),
    [
        ("relative", 0.5, [0, 0, 1, 1]),  # at least 0.5
        ("minmax", 0.5, [0, 0, 0, 1]),  # at least 0.6
        ("minmax", 0.25, [0, 0, 1, 1]),  # at least 0.4
        ("mean", 0.5, [0, 0, 1, 1]),  # at least 0.50025
        ("otsu", 0.5, [0, 0, 0, 1]),
    ],
)
def test_masks(mode, threshold, expected):
    maps = torch.tensor([0.2, 0.3, 0.501, 1.0], dtype=torch.float64).view(1, 2, 2).requires_grad_()
    masks = binarize(maps, threshold, mode)
    assert masks.flatten().tolist() == expected
    assert (masks.dtype, masks.requires_grad) == (torch.float64, False)


def test_otsu_splits_two_clusters_of_each_map():
    generator = torch.Generator().manual_seed(0)
    low, high = torch.rand(3, 40, generator=generator) * 0.2, 0.7 + torch.rand(3, 24, generator=generator) * 0.2
    maps = torch.cat([low, high], 1).view(3, 8, 8) * torch.tensor([1.0, 10, 0.01])[:, None, None]
    masks = binarize(maps, mode="otsu").flatten(1)
    assert (masks[:, 40:] == 1).all()
    assert (masks[:, :40].sum(1) <= 1).all()  # the largest of the low ones may lie above the centre of its bin
    assert binarize(torch.ones(1, 3, 3), mode="otsu").isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: binarize(torch.ones(1, 2, 2), mode="median"), ValueError, "mode must be one of relative, .*'median'"),
        (lambda: binarize(torch.ones(1, 2, 2), 1.5), ValueError, "threshold must be from 0 to 1, got 1.5"),
        (lambda: binarize(torch.ones(1, 2, 2), "half"), TypeError, "threshold must be a number, got 'half'"),
        (lambda: binarize([[1.0]]), TypeError, "maps must be a floating-point tensor, got list"),
        (lambda: binarize(torch.ones(1, 2, 2).bool()), TypeError, "floating-point tensor, got torch.bool"),
        (lambda: binarize(torch.ones(3)), ValueError, r"maps must have shape \[..., Y, X\], got \(3,\)"),
        (lambda: concept_maps(torch.ones(4, 4), [[1]]), ValueError, r"probabilities must have shape .* got \(4, 4\)"),
        (
            lambda: concept_maps(torch.ones(4, 4, 5), [[0]]),
            ValueError,
            r"groups must hold tokens from 1 to 3, got \[0\]",
        ),
        (lambda: concept_maps(torch.ones(4, 4, 5), [[]]), ValueError, r"groups must hold tokens from 1 to 3, got \[\]"),
    ],
)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()
