"""Text on pictures, in the font that comes with Pillow."""

from __future__ import annotations

from PIL import ImageDraw, ImageFont

from vision_attn.drawing.palette import Colour


def draw_text(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: Colour, anchor: str = "la"
) -> None:
    """Write a line; `size` in pixels, `anchor` as Pillow's."""
    draw.text(at, text, font=_font(size), fill=colour, anchor=anchor)


def fitted_text(text: str, size: int, room: int) -> str:
    """The text, shortened with an ellipsis where it is wider than `room` pixels."""
    if _font(size).getlength(text) <= room:
        return text
    while text and _font(size).getlength(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."


def text_width(text: str, size: int) -> int:
    """Width of a line in pixels."""
    return round(_font(size).getlength(text))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
