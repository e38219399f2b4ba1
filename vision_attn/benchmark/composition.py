"""What a picture got wrong of the objects that its caption names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vision_attn.shapes.detector import detect
from vision_attn.shapes.scenes import parse_caption

_Object = tuple[str, str | None]


@dataclass(frozen=True)
class Composition:
    """Counts of objects.

    Args:
        asked: Named by the caption.
        missing: Of these without any counterpart in the picture.
        wrong: Of these with a counterpart that has the shape but not the color, or the color but not the shape.
        extra: In the picture, but counterparts of none.
    """

    asked: int
    missing: int
    wrong: int
    extra: int

    @property
    def right(self) -> bool:
        """Exactly the objects of the caption."""
        return not (self.missing or self.wrong or self.extra)


def judge_composition(image: NDArray[np.floating], caption: str) -> Composition:
    """Compare a picture with its caption by the detector of `vision_attn.shapes`.

    Args:
        image: `[Y, X, 3]` in `[0, 1]`.
        caption: Of the scene grammar; relations, sizes and backgrounds are not judged.

    Raises:
        ValueError: another caption.
    """
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    found = Counter((item.color, item.shape) for item in detect(pixels))
    return compare_objects(Counter((item.color, item.shape) for item in parse_caption(caption).objects), found)


def compare_objects(asked: Counter[_Object], found: Counter[_Object]) -> Composition:
    """Match (color, shape) pairs: equal ones first, then those that share the shape, then the color."""
    left, spare = list((asked - found).elements()), list((found - asked).elements())
    open_objects = len(left)
    for part in (1, 0):
        for wanted in list(left):
            counterpart = next((other for other in spare if other[part] == wanted[part]), None)
            if counterpart is not None:
                left.remove(wanted)
                spare.remove(counterpart)
    return Composition(asked.total(), len(left), open_objects - len(left), len(spare))
