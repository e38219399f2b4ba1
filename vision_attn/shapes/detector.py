"""Finds the shapes of a picture by color and geometry alone, and scores a picture against its caption.

No network and no randomness: pixels are assigned to the color they are mixed from with the background, connected
pixels of one color are an object, and its shape is the template of equal area and centre that overlaps it best.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .scenes import BACKGROUNDS, COLORS, SHAPES, CaptionSpec, Scene, coverage, parse_caption, shape_area

if TYPE_CHECKING:
    from PIL.Image import Image

# Objects smaller than this share of the squared shorter side are specks; the smallest drawn object has 0.024.
_SMALLEST_AREA = 0.008
# Least overlap (intersection over union) with a template for a shape to count as that shape. Perfect scenes that went
# through the embedded model's autoencoder at 48 pixels have at least 0.82, larger ones more; an ellipse reaches 0.80
# up to 1.5 times as wide as high.
_LEAST_OVERLAP = 0.80
# Radius over the shorter side that parts small | usual | large, for one object and for two.
_SIZE_LIMITS = {1: (0.185, 0.27), 2: (0.16, 0.20)}


@dataclass(frozen=True)
class DetectedObject:
    """One object: `shape` is None where no template fits; centre (row, column) and radius in pixels."""

    color: str
    shape: str | None
    center: tuple[float, float]
    radius: float
    area: float
    overlap: float


@dataclass(frozen=True)
class Score:
    """What a picture got right; `right` is all of it."""

    objects: bool
    colors: bool
    relation: bool
    sizes: bool
    background: bool
    detected: tuple[DetectedObject, ...]

    @property
    def right(self) -> bool:
        """Objects, relation, sizes and background."""
        return self.objects and self.relation and self.sizes and self.background


def as_pixels(picture: np.ndarray | Image) -> np.ndarray:
    """A picture as `[height, width, 3]` float64 in 0..255.

    Raises:
        TypeError: neither an array nor a PIL picture.
        ValueError: an array that is not `[height, width, 3]` uint8.
    """
    if not isinstance(picture, np.ndarray):
        if not hasattr(picture, "convert"):
            kind = type(picture).__name__
            raise TypeError(f"detect: picture must be a PIL picture or a uint8 array, got {kind}: convert it first")
        picture = np.asarray(picture.convert("RGB"))
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(
            f"detect: picture must be [height, width, 3] uint8, got {list(picture.shape)} {picture.dtype}: "
            "pass RGB values from 0 to 255"
        )
    return picture.astype(np.float64)


def detect(picture: np.ndarray | Image) -> tuple[DetectedObject, ...]:
    """Lists the objects of a picture, largest first.

    Args:
        picture: PIL picture or `[height, width, 3]` uint8 array.

    Returns:
        The objects; touching pixels of different colors are different objects.
    """
    pixels = as_pixels(picture)
    side = min(pixels.shape[:2])
    colors, alphas = _unmix(pixels, background_color(pixels))
    found = []
    for index, color in enumerate(COLORS):
        labels = _connected(colors == index)
        for label in range(1, labels.max() + 1):
            if np.count_nonzero(labels == label) < _SMALLEST_AREA * side * side:
                continue
            found.append(_measure(color, labels == label, np.where(colors == index, alphas, 0), alphas))
    return tuple(sorted(found, key=lambda item: -item.area))


def background_color(pixels: np.ndarray) -> np.ndarray:
    """The commonest color along the picture's edge and elsewhere: the median over the light, pale pixels, `[3]`."""
    light = (pixels.min(axis=2) > 140) & (np.ptp(pixels, axis=2) < 70)
    return np.median(pixels[light], axis=0) if light.any() else np.median(pixels.reshape(-1, 3), axis=0)


def _unmix(pixels: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explains each pixel as `ground + alpha * (color - ground)`.

    Returns:
        The index of the color that explains it best (-1 below half coverage) and alpha in [0, 1], `[height, width]`.
    """
    directions = np.array(list(COLORS.values()), dtype=np.float64) - ground
    offsets = pixels - ground
    alphas = np.clip(offsets @ directions.T / (directions**2).sum(axis=1), 0, 1)
    residuals = np.linalg.norm(offsets[..., None, :] - alphas[..., None] * directions, axis=-1)
    best = residuals.argmin(axis=-1)
    alpha = np.take_along_axis(alphas, best[..., None], axis=-1)[..., 0]
    return np.where(alpha >= 0.5, best, -1), alpha


def _connected(mask: np.ndarray) -> np.ndarray:
    """Labels 4-connected regions from 1 on: runs of each row, joined by union-find with the overlapping runs above."""
    labels = np.zeros(mask.shape, dtype=np.int64)
    parent = [0]

    def root(label: int) -> int:
        while parent[label] != label:
            label = parent[label]
        return label

    for row in range(mask.shape[0]):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], mask[row].astype(np.int8), [0]))))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            above = {root(label) for label in np.unique(labels[row - 1, start:stop])} - {0} if row else set()
            label = min(above) if above else len(parent)
            if not above:
                parent.append(label)
            for other in above:
                parent[other] = label
            labels[row, start:stop] = label
    names = np.array([root(label) for label in range(len(parent))])
    return np.unique(names[labels], return_inverse=True)[1].reshape(mask.shape) if mask.any() else labels


def _measure(color: str, region: np.ndarray, core: np.ndarray, alphas: np.ndarray) -> DetectedObject:
    """Area, centre and shape of one region; pixels beside it count with their share of its color."""
    grown = region.copy()
    for axis in (0, 1):
        for shift in (-1, 1):
            grown |= np.roll(region, shift, axis)
    weights = _sharpened(np.where(region, core, np.where(grown, np.minimum(alphas, 0.5), 0)))
    rows, columns = np.nonzero(grown)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    weights = weights[top:bottom, left:right]
    height, width = weights.shape
    area = float(weights.sum())
    row = float((weights.sum(axis=1) * (np.arange(height) + 0.5)).sum() / area)
    column = float((weights.sum(axis=0) * (np.arange(width) + 0.5)).sum() / area)
    overlaps = {}
    for shape in SHAPES:
        template = _sharpened(coverage(shape, (row, column), float(np.sqrt(area / shape_area(shape))), height, width))
        overlaps[shape] = float(np.minimum(template, weights).sum() / np.maximum(template, weights).sum())
    shape = max(overlaps, key=lambda name: overlaps[name])
    radius = float(np.sqrt(area / shape_area(shape)))
    fits = overlaps[shape] >= _LEAST_OVERLAP
    center = (row + float(top), column + float(left))
    return DetectedObject(color, shape if fits else None, center, radius, area, overlaps[shape])


def _sharpened(alphas: np.ndarray) -> np.ndarray:
    """Edges of twice the slope: a blur of half a pixel, as 2x2 means leave it, is no fault of the shape."""
    return np.clip(2 * alphas - 0.5, 0, 1)


def score(picture: np.ndarray | Image, expected: str | CaptionSpec | Scene) -> Score:
    """Compares a picture with what it should show.

    Args:
        picture: PIL picture or `[height, width, 3]` uint8 array.
        expected: a caption of the scene grammar, its parsed form, or a scene.

    Returns:
        `objects`: exactly these shapes in these colors, no more, no fewer. `colors`: the same of the colors alone.
        `relation`, `sizes`, `background`: as far as the caption names them; False where the objects are wrong.
    """
    if isinstance(expected, Scene):
        expected = expected.spec
    spec = parse_caption(expected) if isinstance(expected, str) else expected
    detected = detect(picture)
    objects = Counter((item.color, item.shape) for item in detected) == Counter(
        (item.color, item.shape) for item in spec.objects
    )
    colors = Counter(item.color for item in detected) == Counter(item.color for item in spec.objects)
    by_name = {(item.color, item.shape): item for item in detected}
    placed = [by_name[item.color, item.shape] for item in spec.objects] if objects else []
    return Score(
        objects=objects,
        colors=colors,
        relation=objects and _relation_holds(placed, spec.relation),
        sizes=objects and _sizes_hold(placed, spec, min(as_pixels(picture).shape[:2])),
        background=spec.background is None or _nearest_background(as_pixels(picture)) == spec.background,
        detected=detected,
    )


def _relation_holds(placed: list[DetectedObject], relation: str | None) -> bool:
    """Whether the first two objects lie as said, apart by more than a quarter of their mean radius."""
    if relation is None:
        return True
    first, second = placed[:2]
    axis = 1 if relation in ("left of", "right of") else 0
    distance = second.center[axis] - first.center[axis]
    margin = 0.125 * (first.radius + second.radius)
    return (distance if relation in ("left of", "above") else -distance) > margin


def _sizes_hold(placed: list[DetectedObject], spec: CaptionSpec, side: int) -> bool:
    """Whether each named size is met: small objects below the lower limit, large ones above the upper."""
    limits = _SIZE_LIMITS.get(len(placed))
    if limits is None:
        return all(item.size is None for item in spec.objects)
    small, large = (limit * side for limit in limits)
    return all(
        (wanted.size != "small" or item.radius < small) and (wanted.size != "large" or item.radius > large)
        for item, wanted in zip(placed, spec.objects, strict=True)
    )


def _nearest_background(pixels: np.ndarray) -> str:
    ground = background_color(pixels)
    return min(BACKGROUNDS, key=lambda name: float(np.abs(np.array(BACKGROUNDS[name]) - ground).sum()))
