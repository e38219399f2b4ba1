"""The picture sheet of the compositional benchmark: a row per caption, a column per method."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vision_attn.benchmark.compose_bench import ComposeReport
from vision_attn.benchmark.composition import Composition
from vision_attn.drawing.palette import ATTENTION, GOOD, INK, MUTED, PAGE
from vision_attn.drawing.text import draw_text, fitted_text

# All in pixels of the sheet.
_MARGIN = 36
_PICTURE = 128
_GAP = 14
_CAPTION = 300
_HEADER = 56
_LABEL = 24


def draw_composition_sheet(report: ComposeReport, rows: int = 12) -> Image.Image:
    """Draw the first captions, whatever the methods made of them.

    Args:
        report: Of `compose_bench`.
        rows: Captions at most.

    Returns:
        An RGB picture; a green frame is right, an orange one is wrong.
    """
    captions = report.captions[:rows]
    methods = list(report.pictures)
    width = 2 * _MARGIN + _CAPTION + len(methods) * (_PICTURE + _GAP) - _GAP
    step = _PICTURE + _LABEL + _GAP
    sheet = Image.new("RGB", (width, _HEADER + len(captions) * step + _MARGIN), PAGE)
    draw = ImageDraw.Draw(sheet)
    for column, method in enumerate(methods):
        left = _MARGIN + _CAPTION + column * (_PICTURE + _GAP)
        draw_text(draw, (left, 24), fitted_text(method, 15, _PICTURE), 15, INK)
        for row in range(len(captions)):
            _draw_cell(
                sheet, draw, report.pictures[method][row], report.verdicts[method][row], left, _HEADER + row * step
            )
    for row, caption in enumerate(captions):
        for line, text in enumerate(_wrapped(caption)):
            draw_text(
                draw, (_MARGIN, _HEADER + row * step + 8 + 24 * line), fitted_text(text, 17, _CAPTION - 16), 17, INK
            )
    return sheet


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: NDArray[np.uint8], verdict: Composition, left: int, top: int
) -> None:
    # Enlarged pixels stay pixels: smoothing would hide what the small models draw.
    sheet.paste(Image.fromarray(picture).resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST), (left, top))
    colour = GOOD if verdict.right else ATTENTION
    draw.rectangle((left - 3, top - 3, left + _PICTURE + 2, top + _PICTURE + 2), outline=colour, width=3)
    draw_text(draw, (left, top + _PICTURE + 6), fitted_text(_verdict(verdict), 13, _PICTURE), 13, MUTED)


def _verdict(verdict: Composition) -> str:
    counts = {"missing": verdict.missing, "wrong": verdict.wrong, "extra": verdict.extra}
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number) or "right"


def _wrapped(caption: str) -> list[str]:
    """A line per object."""
    return caption.replace(" and ", "\nand ").replace(", ", ",\n").split("\n")
