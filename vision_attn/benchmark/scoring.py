"""Judging a picture against its prompt, where the prompt says exactly what must be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vision_attn.shapes.detector import score
from vision_attn.shapes.scenes import parse_caption


@dataclass(frozen=True)
class Verdict:
    """What the detector of `vision_attn.shapes` says.

    Args:
        faults: What the picture got wrong of: count, colors, shapes, relation, sizes, background. Empty: all is right.
    """

    faults: tuple[str, ...]

    def __str__(self) -> str:
        return "wrong " + ", ".join(self.faults) if self.faults else "right"


def judge_of(prompt: str) -> Callable[[NDArray[np.float32]], Verdict] | None:
    """A function that judges images of the prompt; None for a prompt that is no caption of the shapes data.

    Args:
        prompt: Text, such as `"a red circle left of a blue square"`.

    Returns:
        Image `[Y, X, C]` in `[0, 1]` to a Verdict; or None.
    """
    try:
        spec = parse_caption(prompt)
    except ValueError:
        return None

    def judge(image: NDArray[np.float32]) -> Verdict:
        found = score((np.clip(image, 0, 1) * 255).round().astype(np.uint8), spec)
        if len(found.detected) != len(spec.objects):
            return Verdict(("count",))
        if not found.objects:
            return Verdict(("shapes",) if found.colors else ("colors",))
        parts = {"relation": found.relation, "sizes": found.sizes, "background": found.background}
        return Verdict(tuple(name for name, right in parts.items() if not right))

    return judge
