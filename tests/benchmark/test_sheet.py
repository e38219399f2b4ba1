import math
from dataclasses import replace

import numpy as np
import pytest

from vision_attn.benchmark.compare import Comparison, Row
from vision_attn.benchmark.generation import Request
from vision_attn.benchmark.sheet import draw_sheet
from vision_attn.benchmark.summary import comparison_table, decibels, flops, mebibytes
from vision_attn.drawing.palette import ATTENTION, PAGE, REST, heat


def row(operator, **changes):
    values = {
        "operator": operator,
        "seconds": 8.0,
        "seconds_of_each_repeat": (8.0, 8.1, 7.9),
        "attention_seconds": 4.0,
        "attention_share": 0.5,
        "attention_calls": 12,
        "attention_flops": 3_200_000_000_000,
        "peak_memory_bytes": 300 * 2**20,
        "psnr": math.inf,
        "ssim": 1.0,
        "caption": "right",
        "routed_layers": 0,
        "dense_layers": (),
    }
    return Row(**{**values, **changes})


def comparison(images, operator="clear(radius=8)", prompt="a red circle", **changes):
    rows = (
        row("dense"),
        row(operator, seconds=4.0, attention_seconds=1.0, attention_share=0.25, psnr=31.24, **changes),
    )
    environment = {"device": "cpu", "dtype": "float32"}
    return Comparison("a model", Request(prompt, 0, None, None, 4), (6, 9), environment, rows, images, WINDOWS)


WINDOWS = (None, np.pad(np.ones((3, 3), dtype=bool), ((2, 1), (3, 3))))


@pytest.fixture
def images():
    dense = np.full((48, 72, 3), 0.25, dtype=np.float32)
    other = dense.copy()
    other[:24] = 0.75
    return dense, other


def columns_of(sheet, colour):
    found = np.argwhere((np.asarray(sheet) == colour).all(axis=-1))
    return found[:, 1]


def test_sheet_shows_images_and_difference(images):
    pixels = np.asarray(draw_sheet(replace(comparison(images), windows=(None, None))))
    dense_pixels = (pixels == 64).all(axis=-1).sum()
    changed_pixels = (pixels == 191).all(axis=-1).sum()
    picture = 320 * round(320 * 48 / 72)
    # The first picture whole and the lower half of the second; the upper half of the second.
    assert dense_pixels == pytest.approx(1.5 * picture, rel=0.03)
    assert changed_pixels == pytest.approx(0.5 * picture, rel=0.03)
    # Where they differ by half of full scale the map is at its light end, where they agree at its dark end.
    light, dark = heat(np.array([[1.0]]))[0, 0], heat(np.array([[0.0]]))[0, 0]
    assert (pixels == light).all(axis=-1).sum() == pytest.approx(0.5 * picture, rel=0.05)
    assert (pixels == dark).all(axis=-1).sum() == pytest.approx(0.5 * picture, rel=0.05)


def test_bars_are_on_one_scale_and_show_the_share(images):
    sheet = draw_sheet(comparison(images))
    middle = sheet.width // 2
    attention, rest = columns_of(sheet, ATTENTION), columns_of(sheet, REST)
    for side, length, share in ((lambda x: x < middle, 320, 0.5), (lambda x: x >= middle, 160, 0.25)):
        start = attention[side(attention)].min()
        assert rest[side(rest)].max() - start == pytest.approx(length, abs=3)
        assert rest[side(rest)].min() - start == pytest.approx(length * share, abs=8)


def test_the_inset_shows_what_the_middle_token_sees(images):
    found = comparison(images)
    pixels = np.asarray(draw_sheet(found)).astype(int)
    bare = np.asarray(draw_sheet(replace(found, windows=(None, None)))).astype(int)
    changed = (pixels != bare).any(axis=-1)
    rows, columns = np.nonzero(changed)
    # 6 x 9 tokens, 76 pixels wide, in a frame of 2: 9 tokens are lit, and one of them is the token itself.
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (51 + 4, 76 + 4)
    inside = pixels[rows.min() + 2 : rows.max() - 1, columns.min() + 2 : columns.max() - 1]
    assert ((inside == 255).all(axis=-1).mean(), (inside == ATTENTION).all(axis=-1).mean()) == pytest.approx(
        (8 / 54, 1 / 54), rel=0.1
    )


def test_a_video_shows_its_middle_frame(images):
    videos = tuple(np.stack([np.zeros_like(image), image, np.zeros_like(image)]) for image in images)
    assert np.array_equal(np.asarray(draw_sheet(comparison(videos))), np.asarray(draw_sheet(comparison(images))))


def test_long_texts_stay_inside_the_margins(images):
    sheet = draw_sheet(comparison(images, operator="x" * 300, prompt="a very long prompt " * 30))
    assert sheet.size == draw_sheet(comparison(images)).size
    margin = 40
    assert (np.asarray(sheet)[:, -margin:] == PAGE).all()
    assert (np.asarray(sheet)[:, :margin] == PAGE).all()


def test_heat_is_monotonous_in_lightness():
    colours = heat(np.linspace(0, 1, 50)[None]).astype(float)[0]
    lightness = colours @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > 0).all()
    assert np.array_equal(heat(np.array([[-1.0, 2.0]])), heat(np.array([[0.0, 1.0]])))


def test_table_says_what_was_computed_densely(images):
    text = comparison_table(comparison(images, dense_layers=("blocks.0.attn: attn_mask",), caption="wrong shapes"))
    lines = text.splitlines()
    assert lines[2].split() == [
        "dense",
        "8.00",
        "4.00",
        "50%",
        "3.2",
        "TFLOP",
        "300",
        "MiB",
        "identical",
        "1.000",
        "right",
    ]
    assert lines[3].split()[:4] == ["clear(radius=8)", "4.00", "1.00", "25%"]
    assert "31.2 dB" in lines[3]
    assert lines[3].endswith("wrong shapes")
    assert lines[4] == "clear(radius=8): computed densely in blocks.0.attn: attn_mask"


def test_table_leaves_out_the_judgement_of_other_prompts(images):
    found = comparison(images)
    rows = tuple(row(name, caption=None) for name in ("dense", "clear(radius=8)"))
    text = comparison_table(Comparison(found.model, found.request, None, found.environment, rows, images, WINDOWS))
    assert "picture is" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (decibels(math.inf), "identical"),
        (decibels(31.25), "31.2 dB"),
        (mebibytes(None), "not measured"),
        (mebibytes(3 * 2**20), "3 MiB"),
        (flops(None), "unknown"),
        (flops(1_234_000), "1.23 MFLOP"),
        (flops(56_700_000_000), "56.7 GFLOP"),
        (flops(2 * 10**15), "2 PFLOP"),
        (flops(12), "1.2e-05 MFLOP"),
    ],
)
def test_numbers_in_words(text, expected):
    assert text == expected
