"""The picture sheet of a comparison: images side by side, their difference to dense, and where the time goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vision_attn.benchmark.compare import Comparison, Row
from vision_attn.benchmark.summary import decibels, flops, mebibytes
from vision_attn.drawing.palette import ATTENTION, CARD, EDGE, GOOD, INK, MUTED, PAGE, REST, Colour, heat
from vision_attn.drawing.text import draw_text, fitted_text, text_width

# All in pixels of the sheet.
_MARGIN = 44
_GAP = 24
_PADDING = 18
_PICTURE = 320
_HEADER = 142
_LINE = 27
_BAR = 20
_INSET = 76
_WIDE = 1000  # what both halves of the legend need side by side

# Differences above this share of full scale are drawn in the lightest colour: small ones stay visible.
_HEAT_RANGE = 0.5


def draw_sheet(comparison: Comparison) -> Image.Image:
    """Draw the sheet.

    Args:
        comparison: What `compare` found. Of a video the middle frame is shown.

    Returns:
        An RGB picture, one card per operator.
    """
    pictures = [_still(image) for image in comparison.images]
    cards = [
        _Card(row, picture, pictures[0], window, comparison.rows)
        for row, picture, window in zip(comparison.rows, pictures, comparison.windows, strict=True)
    ]
    card_width = _PICTURE + 2 * _PADDING
    height = cards[0].height
    width = 2 * _MARGIN + len(cards) * card_width + (len(cards) - 1) * _GAP
    legend_lines = 0 if len(cards) == 1 else 1 if width > _WIDE else 2
    sheet = Image.new("RGB", (width, _HEADER + height + _MARGIN + legend_lines * 32), PAGE)
    draw = ImageDraw.Draw(sheet)
    _draw_header(draw, comparison, width)
    for index, card in enumerate(cards):
        card.draw(sheet, draw, _MARGIN + index * (card_width + _GAP), _HEADER)
    if legend_lines:
        _draw_legend(sheet, draw, _HEADER + height + 26, legend_lines == 1)
    return sheet


@dataclass(frozen=True)
class _Card:
    row: Row
    picture: NDArray[np.float32]
    dense: NDArray[np.float32]
    window: NDArray[np.bool_] | None
    rows: tuple[Row, ...]

    @property
    def picture_height(self) -> int:
        rows, columns = self.picture.shape[:2]
        return round(_PICTURE * rows / columns)

    @property
    def height(self) -> int:
        return _PADDING + 36 + 2 * self.picture_height + 14 + len(self._facts()) * _LINE + 84

    def draw(self, sheet: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
        right = left + _PICTURE + 2 * _PADDING
        draw.rounded_rectangle((left, top, right, top + self.height), radius=14, fill=CARD, outline=EDGE)
        x, y = left + _PADDING, top + _PADDING
        draw_text(draw, (x, y - 4), fitted_text(self.row.operator, 22, _PICTURE), 22, INK)
        y += 36
        sheet.paste(_scaled(self.picture, self.picture_height), (x, y))
        y += self.picture_height + 14
        self._draw_difference(sheet, draw, x, y)
        y += self.picture_height + 12
        for name, value, colour in self._facts():
            draw_text(draw, (x, y), name, 17, MUTED)
            draw_text(draw, (x + _PICTURE, y), value, 17, colour, anchor="ra")
            y += _LINE
        self._draw_bar(draw, x, y + 10)

    def _draw_difference(self, sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        if self.row is self.rows[0]:
            box = (x, y, x + _PICTURE - 1, y + self.picture_height - 1)
            draw.rectangle(box, fill=PAGE)
            centre = (x + _PICTURE // 2, y + self.picture_height // 2)
            draw_text(draw, (centre[0], centre[1] - 14), "the reference", 20, MUTED, anchor="mm")
            draw_text(
                draw, (centre[0], centre[1] + 14), "below the others: their difference to it", 16, MUTED, anchor="mm"
            )
            return
        difference = np.abs(self.picture - self.dense).max(axis=-1) / _HEAT_RANGE
        coloured = heat(difference).astype(np.float32) / 255
        sheet.paste(_scaled(coloured, self.picture_height), (x, y))
        if self.window is not None:
            self._draw_window(sheet, draw, x + _PICTURE - 8, y + 8)

    def _draw_window(self, sheet: Image.Image, draw: ImageDraw.ImageDraw, right: int, top: int) -> None:
        """A small map of the token grid: what the token in its middle sees."""
        assert self.window is not None
        rows, columns = self.window.shape
        scale = _INSET / max(rows, columns)
        width, height = max(8, round(columns * scale)), max(8, round(rows * scale))
        colours = np.where(self.window[..., None], np.uint8(255), np.array(INK, dtype=np.uint8))
        colours[rows // 2, columns // 2] = ATTENTION
        box = (right - width - 2, top, right + 1, top + height + 3)
        draw.rectangle(box, outline=CARD, width=2)
        way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
        sheet.paste(Image.fromarray(colours.astype(np.uint8)).resize((width, height), way), (right - width, top + 2))

    def _facts(self) -> list[tuple[str, str, Colour]]:
        row, dense = self.row, self.rows[0]
        stock = row is dense
        faster = dense.attention_seconds / row.attention_seconds if row.attention_seconds else math.nan
        attention = f"{row.attention_seconds:.2f} s" + ("" if stock else f"   {faster:.2f}x as fast")
        fidelity = "reference" if stock else f"{decibels(row.psnr)}   SSIM {row.ssim:.3f}"
        facts = [
            ("time per image", f"{row.seconds:.2f} s", INK),
            ("in attention", attention, GOOD if not stock and faster > 1 else INK),
            ("attention FLOPs", _share_of(row.attention_flops, dense.attention_flops, stock), INK),
            ("peak memory", mebibytes(row.peak_memory_bytes), INK),
            ("fidelity", fidelity, INK),
        ]
        if row.caption is not None:
            facts.append(("what the prompt asks for", row.caption, GOOD if row.caption == "right" else INK))
        return facts

    def _draw_bar(self, draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        """Length is time, on one scale for all cards; the coloured part is attention."""
        slowest = max(row.seconds for row in self.rows)
        length = _PICTURE * self.row.seconds / slowest
        attention = length * min(1.0, self.row.attention_share)
        draw.rounded_rectangle((x, y, x + _PICTURE, y + _BAR), radius=5, fill=PAGE)
        draw.rounded_rectangle((x, y, x + length, y + _BAR), radius=5, fill=REST)
        if attention >= 10:
            draw.rounded_rectangle((x, y, x + attention, y + _BAR), radius=5, fill=ATTENTION)
        draw_text(draw, (x, y + _BAR + 6), f"attention {self.row.attention_share:.0%}", 16, ATTENTION)
        draw_text(draw, (x + _PICTURE, y + _BAR + 6), "the rest", 16, MUTED, anchor="ra")


def _share_of(count: int | None, dense: int | None, stock: bool) -> str:
    if stock or count is None or not dense:
        return flops(count)
    return f"{flops(count)}   {count / dense:.0%}"


def _draw_header(draw: ImageDraw.ImageDraw, comparison: Comparison, width: int) -> None:
    request = comparison.request
    room = width - 2 * _MARGIN
    rows, columns = comparison.images[0].shape[-3:-1]
    grid = "" if comparison.grid is None else f"{'x'.join(map(str, comparison.grid))} tokens"
    facts = [
        comparison.model,
        f"{rows}x{columns} px",
        grid,
        "" if request.steps is None else f"{request.steps} steps",
        "" if request.guidance is None else f"guidance {request.guidance:g}",
        f"seed {request.seed}",
        f"{comparison.environment['device']}, {comparison.environment['dtype']}",
    ]
    draw_text(draw, (_MARGIN, 30), fitted_text(request.prompt or "", 34, room), 34, INK)
    draw_text(draw, (_MARGIN, 84), fitted_text("   ·   ".join(fact for fact in facts if fact), 18, room), 18, MUTED)


def _draw_legend(sheet: Image.Image, draw: ImageDraw.ImageDraw, y: int, one_line: bool) -> None:
    """What colours and insets mean, below the cards."""
    x = _MARGIN
    ramp = np.tile(np.linspace(0, 1, 150), (14, 1))
    label = "difference to dense"
    draw_text(draw, (x, y - 2), label, 16, MUTED)
    x += text_width(label, 16) + 14
    draw_text(draw, (x, y - 2), "0", 16, MUTED)
    sheet.paste(Image.fromarray(heat(ramp)), (x + 16, y + 2))
    draw_text(draw, (x + 176, y - 2), f"{_HEAT_RANGE:.0%} of full scale or more", 16, MUTED)
    inset = "inset: what the token in the middle of the grid sees"
    if one_line:
        draw_text(draw, (sheet.width - _MARGIN, y - 2), inset, 16, MUTED, anchor="ra")
    else:
        draw_text(draw, (_MARGIN, y + 28), inset, 16, MUTED)


def _still(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """A picture as it is; the middle frame of a video."""
    return image if image.ndim == 3 else image[len(image) // 2]


def _scaled(picture: NDArray[np.floating], height: int) -> Image.Image:
    pixels = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    # Enlarged pixels stay pixels: smoothing would hide what the small models draw.
    way = Image.Resampling.NEAREST if pixels.width * 2 <= _PICTURE else Image.Resampling.LANCZOS
    return pixels.resize((_PICTURE, height), way)
