"""Draws `key_tiles.svg`: which key boxes a query box visits and which of them it masks.

    python assets/pictures/draw_key_tiles.py

The boxes are those of the simulator, which counts as the kernels walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vision_attn.kernels.reach import Ball, Box, Reach
from vision_attn.simulator import key_boxes

GRID, Q_TILE, KV_TILE, FIRST = (48, 48), (8, 8), (4, 8), (21, 19)
SIDE, GAP, TOP = 7, 40, 34  # pixels: of a token, between panels, above them
COLOURS = {"page": "#faf9f6", "grid": "#e2ded6", "interior": "#b9d8c8", "boundary": "#f3c9b3", "query": "#57166e"}
PANELS: tuple[tuple[str, Reach], ...] = (
    ("CLEAR's circle, radius 16", Ball.of_radius(GRID, 16.0)),
    ("neighbourhood of 25x25, stride 1", Box(GRID, (25, 25), (1, 1), (1, 1), (False, False))),
    ("neighbourhood of 24x24, stride 8", Box(GRID, (24, 24), (8, 8), (1, 1), (False, False))),
)
LEGEND = (
    ("query", "box of 8x8 queries, one program"),
    ("interior", "key box that all its queries see whole: no mask"),
    ("boundary", "key box at the window's boundary: masked"),
)


def rectangle(y: float, x: float, height: float, width: float, style: str) -> str:
    """A rectangle in pixels."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" {style}/>'


def panel(name: str, reach: Reach, left: int) -> Iterator[str]:
    """One window."""
    first = tuple(f // t * t for f, t in zip(FIRST, Q_TILE, strict=True)) if "stride 8" in name else FIRST
    last = tuple(f + t - 1 for f, t in zip(first, Q_TILE, strict=True))
    yield f'<text x="{left}" y="{TOP - 12}">{name}</text>'
    yield rectangle(TOP, left, GRID[0] * SIDE, GRID[1] * SIDE, 'fill="white" stroke="#787680"')
    for begin, interior in key_boxes(reach, first, last, KV_TILE, dynamic_kv=True):
        height, width = (min(b + t, n) - b for b, t, n in zip(begin, KV_TILE, GRID, strict=True))
        style = f'fill="{COLOURS["interior" if interior else "boundary"]}" stroke="white" stroke-width="2"'
        yield rectangle(TOP + begin[0] * SIDE, left + begin[1] * SIDE, height * SIDE, width * SIDE, style)
    for step in range(1, GRID[0]):
        y, x = TOP + step * SIDE, left + step * SIDE
        path = f"M{left} {y}H{left + GRID[1] * SIDE}M{x} {TOP}V{TOP + GRID[0] * SIDE}"
        yield f'<path d="{path}" stroke="{COLOURS["grid"]}" stroke-width="0.6"/>'
    style = f'fill="none" stroke="{COLOURS["query"]}" stroke-width="3"'
    corner = TOP + first[0] * SIDE, left + first[1] * SIDE
    yield rectangle(*corner, Q_TILE[0] * SIDE, Q_TILE[1] * SIDE, style)


def picture() -> str:
    """The whole picture."""
    width = len(PANELS) * (GRID[1] * SIDE + GAP) + GAP
    height = TOP + GRID[0] * SIDE + 46
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="15">',
        rectangle(0, 0, height, width, f'fill="{COLOURS["page"]}"'),
    ]
    for number, (name, reach) in enumerate(PANELS):
        lines += panel(name, reach, GAP + number * (GRID[1] * SIDE + GAP))
    for number, (kind, text) in enumerate(LEGEND):
        x, y = GAP + number * (GRID[1] * SIDE + GAP), height - 28
        fill, line = ("none", COLOURS[kind]) if kind == "query" else (COLOURS[kind], "none")
        lines.append(rectangle(y, x, 16, 16, f'fill="{fill}" stroke="{line}" stroke-width="3"'))
        lines.append(f'<text x="{x + 24}" y="{y + 13}">{text}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("key_tiles.svg").write_text(picture(), encoding="utf-8")
