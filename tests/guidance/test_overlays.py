"""Heat over images: colours by formula, sizes, order, and wrong input."""

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.guidance import concept_overlays, concept_sheet

CREAM = np.array([252, 255, 204])  # the lightest colour of the heat
GREY = Image.new("RGB", (60, 40), (100, 100, 100))


def corner_map(rows, columns, peak):
    """High in the upper left quarter, 0 elsewhere."""
    values = torch.zeros(rows, columns)
    values[: rows // 2, : columns // 2] = peak
    return values


def test_heat_lies_where_the_map_is_high_over_a_dimmed_image():
    for peak in (0.01, 1.0):
        (picture,) = concept_overlays(GREY, {"a circle": corner_map(8, 12, peak)})
        assert picture.size == (300, 236)  # enlarged five times, and a line of text
        pixels = np.asarray(picture)
        assert pixels[190, 290].tolist() == [55] * 3
        expected = 0.55 * 100 + (CREAM - 0.55 * 100) * 0.85
        np.testing.assert_allclose(pixels[10, 10], expected, atol=0.5001)


def test_maps_without_anything_only_dim():
    pixels = np.asarray(concept_overlays(GREY, {"a circle": torch.zeros(3, 5)})[0])
    assert (pixels[:200] == 55).all()


def test_a_sheet_begins_with_the_image_and_has_four_to_a_row():
    image = Image.new("RGB", (320, 256), (10, 200, 30))
    maps = {str(number): corner_map(4, 6, 1.0) for number in range(4)}
    sheet = concept_sheet(image, maps)
    assert sheet.size == (4 * 340 + 20, 2 * (292 + 20) + 20)
    pixels = np.asarray(sheet)
    assert (pixels[20:276, 20:340] == (10, 200, 30)).all()
    overlays = concept_overlays(image, maps)
    for number, (y, x) in enumerate([(20, 360), (20, 700), (20, 1040), (332, 20)]):
        assert (pixels[y : y + 292, x : x + 320] == np.asarray(overlays[number])).all()
    assert concept_sheet(image, {"a": maps["0"]}).size == (2 * 340 + 20, 332)


def test_the_word_and_the_peak_are_below():
    one, other = (
        np.asarray(concept_overlays(GREY, {word: corner_map(8, 12, peak)})[0])[200:].astype(int)
        for word, peak in (("a circle", 0.5), ("a square", 0.25))
    )
    changed = np.abs(one - other).max((0, 2)) > 0
    assert changed[:150].any() and changed[150:].any()
    assert (one[:2] == 255).all()


@pytest.mark.parametrize(
    ("image", "maps", "error", "message"),
    [
        (np.zeros((4, 4, 3)), {"a": torch.ones(2, 2)}, TypeError, "image must be a PIL image, got ndarray"),
        (GREY, torch.ones(1, 2, 2), TypeError, "maps must be a mapping of words to tensors, got Tensor"),
        (GREY, {"a": [[1.0]]}, TypeError, "maps must be a mapping of words to tensors, got dict"),
        (GREY, {}, ValueError, "maps must hold at least one concept, got none"),
        (GREY, {"a": torch.ones(1, 2, 2)}, ValueError, r"maps must have shape \[Y, X\], got \(1, 2, 2\) of 'a'"),
        (
            GREY,
            {"a": torch.full((2, 3), -0.5)},
            ValueError,
            "maps must be finite and at least 0, got -0.5 to -0.5 of 'a'",
        ),
        (
            GREY,
            {"a": torch.full((2, 3), torch.nan)},
            ValueError,
            "maps must be finite and at least 0, got nan to nan of 'a'",
        ),
    ],
)
def test_mistakes(image, maps, error, message):
    with pytest.raises(error, match=f"concept_overlays: {message}"):
        concept_overlays(image, maps)
