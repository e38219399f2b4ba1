"""What `vision-attn simulate` prints and draws: one window's counts, and its speed-up for other strides and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vision_attn.drawing.palette import ATTENTION, CARD, EDGE, GOOD, INK, MUTED, PAGE, Colour
from vision_attn.drawing.text import draw_text
from vision_attn.kernels.launch import tile_shape
from vision_attn.kernels.reach import Box
from vision_attn.simulator import simulate_reach

# Queries and keys per tile: small tiles waste less, large ones keep tensor cores busy.
TILE_TOKENS = ((64, 64), (128, 64), (256, 128))
_COLOURS: tuple[Colour, ...] = ((87, 22, 110), ATTENTION, GOOD)

# All in pixels of the picture.
_SIZE = (920, 560)
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 250, 110, 80


def default_tiles(grid: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query and key tile of the Triton kernels' half-precision forward pass: boxes of 128 and 64 tokens."""
    return tile_on(grid, 128), tile_on(grid, 64)


def tile_on(grid: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """The box of so many tokens that the kernels choose on this grid."""
    lengths = (1, 1, *grid)[-3:]
    return tile_shape(tokens, (lengths[0], lengths[1], lengths[2]))[-len(grid) :]


@dataclass(frozen=True)
class Curve:
    """Speed-up against stride for one pair of tiles."""

    label: str
    points: tuple[tuple[tuple[int, ...], float], ...]  # stride per axis, speed-up of the busiest query tile


def stride_curves(reach: Box) -> list[Curve]:
    """Speed-ups of a window for strides of 1, 2, 4, ... up to the kernel, on tiles of three sizes."""
    powers = [2**power for power in range(max(reach.kernel_size).bit_length())]
    strides = sorted({tuple(min(s, k) for k in reach.kernel_size) for s in (*powers, max(reach.kernel_size))})
    curves = []
    for q_tokens, kv_tokens in TILE_TOKENS:
        q_tile, kv_tile = tile_on(reach.grid, q_tokens), tile_on(reach.grid, kv_tokens)
        points = []
        for stride in strides:
            strided = Box(reach.grid, reach.kernel_size, stride, reach.dilation, reach.is_causal)
            points.append((stride, simulate_reach(strided, q_tile, kv_tile, False).speedup))
        curves.append(Curve(f"{by(q_tile)} / {by(kv_tile)}", tuple(points)))
    return curves


def draw_curves(reach: Box) -> NDArray[np.float32]:
    """Speed-up of a window against its stride, one line per pair of tiles, with the bound that its FLOPs set.

    Returns:
        An RGB picture `[Y, X, 3]` in `[0, 1]`.
    """
    curves, bound = stride_curves(reach), simulate_reach(reach, *default_tiles(reach.grid), False).flop_speedup
    top = 1.08 * max(bound, *(speedup for curve in curves for _, speedup in curve.points))
    picture = Image.new("RGB", _SIZE, PAGE)
    draw = ImageDraw.Draw(picture)
    draw_text(draw, (_LEFT, 26), f"window {by(reach.kernel_size)} on {by(reach.grid)} tokens", 26, INK)
    draw_text(draw, (_LEFT, 64), "speed-up over dense attention by key tiles of the busiest query tile", 17, MUTED)
    draw.rectangle((_LEFT, _TOP, _SIZE[0] - _RIGHT, _SIZE[1] - _BOTTOM), fill=CARD, outline=EDGE)
    _draw_scale(draw, top)
    _draw_strides(draw, [by(stride) for stride, _ in curves[0].points])
    _draw_bound(draw, bound, top)
    draw_text(draw, (_SIZE[0] - _RIGHT + 20, _TOP + 8), "query tile / key tile", 16, MUTED)
    for index, (curve, colour) in enumerate(zip(curves, _COLOURS, strict=True)):
        _draw_curve(draw, curve, colour, top)
        _draw_entry(draw, index, curve.label, colour)
    _draw_entry(draw, len(curves), f"FLOPs alone: {bound:.2f}x", MUTED, dashed=True)
    return np.asarray(picture).astype(np.float32) / np.float32(255)


def by(sizes: Sequence[int]) -> str:
    """Sizes as they are typed: 16x8."""
    return "x".join(map(str, sizes))


def _x(index: int, count: int) -> int:
    width = _SIZE[0] - _LEFT - _RIGHT - 60
    return _LEFT + 30 + (width * index // (count - 1) if count > 1 else width // 2)


def _y(speedup: float, top: float) -> int:
    return round(_SIZE[1] - _BOTTOM - (_SIZE[1] - _TOP - _BOTTOM) * speedup / top)


def _draw_scale(draw: ImageDraw.ImageDraw, top: float) -> None:
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50, 100, 1000, 10**4, 10**6) if top / step <= 8)
    for tick in range(int(top / step) + 1):
        y = _y(tick * step, top)
        draw.line((_LEFT, y, _SIZE[0] - _RIGHT, y), fill=EDGE)
        draw_text(draw, (_LEFT - 12, y), f"{tick * step:g}x", 16, MUTED, anchor="rm")


def _draw_strides(draw: ImageDraw.ImageDraw, labels: list[str]) -> None:
    for index, label in enumerate(labels):
        draw_text(draw, (_x(index, len(labels)), _SIZE[1] - _BOTTOM + 14), label, 14, MUTED, anchor="ma")
    draw_text(draw, ((_LEFT + _SIZE[0] - _RIGHT) // 2, _SIZE[1] - 36), "stride", 16, MUTED, anchor="ma")


def _draw_bound(draw: ImageDraw.ImageDraw, bound: float, top: float) -> None:
    _draw_dashes(draw, _LEFT, _SIZE[0] - _RIGHT, _y(bound, top), MUTED)


def _draw_dashes(draw: ImageDraw.ImageDraw, left: int, right: int, y: int, colour: Colour) -> None:
    for x in range(left, right, 12):
        draw.line((x, y, min(x + 6, right), y), fill=colour, width=2)


def _draw_entry(draw: ImageDraw.ImageDraw, index: int, label: str, colour: Colour, dashed: bool = False) -> None:
    """A line of the legend."""
    left, y = _SIZE[0] - _RIGHT + 20, _TOP + 40 + 30 * index
    if dashed:
        _draw_dashes(draw, left, left + 30, y + 9, colour)
    else:
        draw.line((left, y + 9, left + 28, y + 9), fill=colour, width=4)
    draw_text(draw, (left + 38, y), label, 16, INK)


def _draw_curve(draw: ImageDraw.ImageDraw, curve: Curve, colour: Colour, top: float) -> None:
    places = [(_x(index, len(curve.points)), _y(speedup, top)) for index, (_, speedup) in enumerate(curve.points)]
    draw.line(places, fill=colour, width=4, joint="curve")
    for x, y in places:
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
