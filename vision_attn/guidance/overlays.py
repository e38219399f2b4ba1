"""Pictures of where the concepts of a prompt are: each one's attention map as heat over the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vision_attn.drawing.palette import CARD, INK, MUTED, PAGE
from vision_attn.drawing.palette import heat as colours
from vision_attn.drawing.text import draw_text, fitted_text, text_width

_LEAST = 256  # pixels: smaller images are enlarged, so that words fit below them
_COLUMNS = 4
_DIMMED = 0.55
_OPACITY = 0.85


def concept_overlays(image: Image.Image, maps: Mapping[str, Tensor]) -> list[Image.Image]:
    """One picture per concept: heat over the dimmed image, and below it the word and the largest value of its map.

    Args:
        image: What was drawn, such as `output.images[0]`.
        maps: Concepts and their maps `[Y, X]`, at least 0, such as `output.maps[0]`. Colours of each run from 0 to its
            own largest value.

    Returns:
        RGB pictures in the order of the concepts, at least 256 pixels wide.

    Raises:
        TypeError: no such image, no tensors.
        ValueError: no concepts, or maps that are negative, not finite or of another shape.

    Example:
        >>> from PIL import Image
        >>> maps = {"a circle": torch.rand(16, 24), "a square": torch.rand(16, 24)}
        >>> [picture.size for picture in concept_overlays(Image.new("RGB", (384, 256)), maps)]
        [(384, 292), (384, 292)]
    """
    _check(image, maps)
    picture = _enlarged(image)
    return [_overlay(picture, word, values.detach().float().cpu().numpy()) for word, values in maps.items()]


def concept_sheet(image: Image.Image, maps: Mapping[str, Tensor]) -> Image.Image:
    """The image and its overlays side by side, four to a row.

    Args:
        image: As of `concept_overlays`.
        maps: As of `concept_overlays`.

    Raises:
        TypeError, ValueError: as of `concept_overlays`.
    """
    overlays = concept_overlays(image, maps)
    cards = [_captioned(_enlarged(image), "the image", ""), *overlays]
    width, height = cards[0].size
    gap = width // 16
    columns, rows = min(len(cards), _COLUMNS), -(-len(cards) // _COLUMNS)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), PAGE)
    for number, card in enumerate(cards):
        row, column = divmod(number, _COLUMNS)
        sheet.paste(card, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def _overlay(picture: Image.Image, word: str, values: Any) -> Image.Image:
    peak = float(values.max())
    shares = Image.fromarray(values / peak if peak > 0 else values).resize(picture.size, Image.Resampling.BICUBIC)
    heat = np.asarray(shares).clip(0, 1)
    dimmed = _DIMMED * np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    mixed = dimmed + (colours(heat) - dimmed) * _OPACITY * heat[..., None]
    return _captioned(Image.fromarray(mixed.round().astype(np.uint8)), word, f"peak {peak:.2g}")


def _captioned(picture: Image.Image, word: str, note: str) -> Image.Image:
    size = max(18, picture.width // 28)
    card = Image.new("RGB", (picture.width, picture.height + 2 * size), CARD)
    card.paste(picture)
    draw, middle, edge = ImageDraw.Draw(card), picture.height + size, size // 2
    room = picture.width - text_width(note, size) - 3 * edge
    draw_text(draw, (edge, middle), fitted_text(word, size, room), size, INK, anchor="lm")
    draw_text(draw, (picture.width - edge, middle), note, size, MUTED, anchor="rm")
    return card


def _enlarged(image: Image.Image) -> Image.Image:
    factor = -(-_LEAST // image.width)
    size = image.width * factor, image.height * factor
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _check(image: Any, maps: Any) -> None:
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"concept_overlays: image must be a PIL image, got {type(image).__name__}: draw with output_type='pil'"
        )
    if not isinstance(maps, Mapping) or not all(isinstance(values, Tensor) for values in maps.values()):
        raise TypeError(f"concept_overlays: maps must be a mapping of words to tensors, got {type(maps).__name__}")
    if not maps:
        raise ValueError("concept_overlays: maps must hold at least one concept, got none")
    for word, values in maps.items():
        if values.ndim != 2 or values.numel() == 0:
            raise ValueError(f"concept_overlays: maps must have shape [Y, X], got {tuple(values.shape)} of {word!r}")
        if not torch.isfinite(values).all() or values.min() < 0:
            raise ValueError(
                f"concept_overlays: maps must be finite and at least 0, got {values.min():g} to {values.max():g} of "
                f"{word!r}"
            )
