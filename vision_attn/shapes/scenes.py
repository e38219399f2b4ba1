"""Endless captioned scenes of coloured shapes: the data set of the embedded model.

A scene is drawn from an integer seed alone, so the data set needs no files and any picture can be drawn again. Lengths
are in pixels, positions are (row, column), and object radii are shares of the picture's shorter side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (38, 156, 66),
    "blue": (40, 84, 204),
    "yellow": (240, 196, 0),
    "purple": (136, 48, 168),
    "black": (30, 30, 34),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (214, 216, 220),
    "beige": (240, 228, 204),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")
SIZES: tuple[str, ...] = ("small", "large")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
KINDS: tuple[str, ...] = ("one", "two", "relation", "many")

# Radius over the shorter side, per number of objects; the unnamed size is the one a caption leaves out.
_RADII: dict[int, dict[str | None, float]] = {
    1: {"small": 0.15, None: 0.22, "large": 0.32},
    2: {"small": 0.14, None: 0.18, "large": 0.22},
    3: {None: 0.155},
    4: {None: 0.145},
}
_OBJECT = re.compile(rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")
_BACKGROUND = re.compile(rf" on a ({'|'.join(BACKGROUNDS)}) background$")


@dataclass(frozen=True)
class ObjectSpec:
    """What a caption says about one object; `size` is None where the caption names none."""

    color: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        return f"a {self.size + ' ' if self.size else ''}{self.color} {self.shape}"


@dataclass(frozen=True)
class CaptionSpec:
    """The meaning of a caption: its objects in order, the relation of the first to the second, and the background."""

    objects: tuple[ObjectSpec, ...]
    relation: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        phrases = [str(spec) for spec in self.objects]
        if self.relation is not None:
            text = f"{phrases[0]} {self.relation} {phrases[1]}"
        else:
            text = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
        return text if self.background is None else f"{text} on a {self.background} background"


@dataclass(frozen=True)
class PlacedObject:
    """One object of a scene: its centre (row, column) and radius in pixels."""

    spec: ObjectSpec
    center: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Scene:
    """A captioned scene of `height` x `width` pixels; `background` is what is drawn, named in the caption or not."""

    height: int
    width: int
    spec: CaptionSpec
    background: str
    objects: tuple[PlacedObject, ...]

    @property
    def caption(self) -> str:
        """The caption as text."""
        return str(self.spec)


def parse_caption(caption: str) -> CaptionSpec:
    """Reads a caption of the scene grammar.

    Args:
        caption: for example `"a red circle left of a blue square on a gray background"`; 1 to 4 objects.

    Returns:
        What it says. `str(parse_caption(caption))` is the caption itself.

    Raises:
        TypeError: `caption` is not a string.
        ValueError: `caption` is not of the grammar.

    Example:
        >>> parse_caption("a red circle above a small blue star").relation
        'above'
    """
    if not isinstance(caption, str):
        raise TypeError(f"parse_caption: caption must be a string, got {type(caption).__name__}: pass one sentence")
    text = " ".join(caption.lower().split()).rstrip(".")
    background = _BACKGROUND.search(text)
    body = text[: background.start()] if background else text
    objects = tuple(ObjectSpec(m[2], m[3], m[1]) for m in _OBJECT.finditer(body))
    joints = [joint.strip() for joint in _OBJECT.sub("|", body).split("|")]
    relation = joints[1] if len(objects) == 2 and joints[1] in RELATIONS else None
    listed = [""] + [","] * (len(objects) - 2) + ["and"] * (len(objects) > 1) + [""]
    if not 1 <= len(objects) <= 4 or (relation is None and joints != listed) or joints[0] or joints[-1]:
        raise ValueError(
            f"parse_caption: caption must list 1 to 4 objects or relate two, got {caption!r}: write it like "
            f"'a red circle left of a small blue square on a gray background' (colors {', '.join(COLORS)}; shapes "
            f"{', '.join(SHAPES)}; relations {', '.join(RELATIONS)}; backgrounds {', '.join(BACKGROUNDS)})"
        )
    return CaptionSpec(objects, relation, background[1] if background else None)


def sample_scene(seed: int | Sequence[int], height: int = 48, width: int = 48, kind: str | None = None) -> Scene:
    """Draws one scene from a seed.

    Args:
        seed: a non-negative integer or a sequence of them; the same seed gives the same scene on every machine.
        height: pixels, at least 24 and a multiple of 4.
        width: as `height`.
        kind: `"one"` object, `"two"` without a relation, `"relation"` between two, `"many"` (3 or 4); None draws it.

    Returns:
        The scene; its objects lie inside the picture and do not touch.

    Raises:
        ValueError: an impossible size or an unknown kind.
    """
    for name, value in (("height", height), ("width", width)):
        if value < 24 or value % 4:
            raise ValueError(
                f"sample_scene: {name} must be a multiple of 4 and at least 24 pixels, got {value}: use 48"
            )
    if kind is not None and kind not in KINDS:
        raise ValueError(f"sample_scene: kind must be one of {KINDS} or None, got {kind!r}: choose one of them")
    rng = np.random.default_rng(seed)
    kind = KINDS[rng.integers(len(KINDS))] if kind is None else kind
    while True:
        spec = _sample_spec(rng, kind)
        objects = _place(rng, spec, height, width)
        if objects is not None:
            drawn = spec.background or list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
            return Scene(height, width, spec, drawn, objects)


def _sample_spec(rng: np.random.Generator, kind: str) -> CaptionSpec:
    count = {"one": 1, "two": 2, "relation": 2}.get(kind) or int(rng.integers(3, 5))
    # Distinct (color, shape) pairs; colors and shapes alone may repeat, else binding could be guessed.
    pairs = rng.choice(len(COLORS) * len(SHAPES), size=count, replace=False)
    sized = count <= 2 and rng.random() < 0.25
    objects = []
    for pair in pairs:
        size = [*SIZES, None][rng.integers(3)] if sized else None
        objects.append(ObjectSpec(list(COLORS)[pair // len(SHAPES)], SHAPES[pair % len(SHAPES)], size))
    relation = RELATIONS[rng.integers(len(RELATIONS))] if kind == "relation" else None
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))] if rng.random() < 0.25 else None
    return CaptionSpec(tuple(objects), relation, background)


def _place(rng: np.random.Generator, spec: CaptionSpec, height: int, width: int) -> tuple[PlacedObject, ...] | None:
    """Rejection sampling of centres; None when 400 trials did not fit the objects."""
    side = min(height, width)
    shares = np.array([_RADII[len(spec.objects)][item.size] for item in spec.objects])
    radii = shares * rng.uniform(0.95, 1.05, len(shares)) * side
    margins = 1.16 * radii  # the star reaches 1.15 radii
    extent = np.array([height, width]) - 2 * margins[:, None]
    for _ in range(400):
        centers = margins[:, None] + rng.random((len(radii), 2)) * extent
        offsets = centers[:, None] - centers[None]
        gaps = np.hypot(offsets[..., 0], offsets[..., 1]) - 1.1 * (radii[:, None] + radii[None])
        apart = gaps[np.triu_indices(len(radii), 1)].min(initial=side) > 0.02 * side
        if apart and (spec.relation is None or _related(centers[0], centers[1], spec.relation)):
            rows = zip(spec.objects, centers, radii, strict=True)
            return tuple(PlacedObject(item, (float(c[0]), float(c[1])), float(r)) for item, c, r in rows)
    return None


def _related(first: np.ndarray, second: np.ndarray, relation: str) -> bool:
    """Whether the named axis separates the centres most, in the named direction."""
    down, right = second - first
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    return bool((along if relation in ("left of", "above") else -along) > abs(across))


@cache
def shape_outline(shape: str) -> np.ndarray | None:
    """Corners (row, column) of a polygon around its centroid for radius 1, `[corners, 2]`; None for the circle."""
    if shape == "circle":
        return None
    if shape == "square":
        return 0.9 * np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]], dtype=np.float64)
    corners, reach = (3, np.array([1.15])) if shape == "triangle" else (10, np.array([1.15, 0.5]))
    angles = 2 * np.pi * np.arange(corners) / corners
    reach = np.resize(reach, corners)
    return np.stack([-reach * np.cos(angles), reach * np.sin(angles)], axis=1)


def shape_area(shape: str) -> float:
    """Area of a shape of radius 1."""
    outline = shape_outline(shape)
    if outline is None:
        return float(np.pi)
    following = np.roll(outline, -1, axis=0)
    return float(abs((outline[:, 0] * following[:, 1] - outline[:, 1] * following[:, 0]).sum()) / 2)


def coverage(shape: str, center: tuple[float, float], radius: float, height: int, width: int) -> np.ndarray:
    """Share of each pixel that a shape covers, from the signed distance of the pixel's centre to the outline.

    Args:
        shape: one of `SHAPES`.
        center: (row, column) in pixels; (0, 0) is the picture's corner, not the first pixel's centre.
        radius: in pixels.
        height: rows of the result.
        width: columns of the result.

    Returns:
        `[height, width]` float64 in [0, 1]: anti-aliased over one pixel.
    """
    rows = np.arange(height)[:, None] + 0.5 - center[0]
    columns = np.arange(width)[None] + 0.5 - center[1]
    outline = shape_outline(shape)
    if outline is None:
        return np.clip(radius - np.hypot(rows, columns) + 0.5, 0, 1)
    inside = np.zeros((height, width), dtype=bool)
    distance = np.full((height, width), np.inf)
    for (y0, x0), (y1, x1) in zip(radius * outline, radius * np.roll(outline, -1, axis=0), strict=True):
        dy, dx = y1 - y0, x1 - x0
        along = np.clip(((rows - y0) * dy + (columns - x0) * dx) / (dy * dy + dx * dx), 0, 1)
        np.minimum(distance, (rows - y0 - along * dy) ** 2 + (columns - x0 - along * dx) ** 2, out=distance)
        if dy != 0:  # even-odd rule: count the edges that a ray to the right crosses
            inside ^= ((rows < y0) != (rows < y1)) & (columns < x0 + (rows - y0) * dx / dy)
    return np.clip(np.where(inside, 1, -1) * np.sqrt(distance) + 0.5, 0, 1)


def render(scene: Scene) -> np.ndarray:
    """Draws a scene: `[height, width, 3]` uint8 RGB, anti-aliased."""
    picture = np.empty((scene.height, scene.width, 3))
    picture[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        top, left = (max(int(c - 1.2 * item.radius) - 2, 0) for c in item.center)
        reach = int(2.4 * item.radius) + 6
        window = picture[top : top + reach, left : left + reach]
        center = (item.center[0] - top, item.center[1] - left)
        alpha = coverage(item.spec.shape, center, item.radius, window.shape[0], window.shape[1])[..., None]
        window += alpha * (np.array(COLORS[item.spec.color]) - window)
    return np.rint(picture).astype(np.uint8)
