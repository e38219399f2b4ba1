"""Judging pictures by their objects: counts of a matching, and the detector on rendered scenes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vision_attn.benchmark.composition import Composition, compare_objects, judge_composition
from vision_attn.shapes.scenes import CaptionSpec, ObjectSpec, render, sample_scene

RED_CIRCLE, BLUE_CIRCLE, BLUE_SQUARE = ("red", "circle"), ("blue", "circle"), ("blue", "square")


@pytest.mark.parametrize(
    ("asked", "found", "missing", "wrong", "extra"),
    [
        ([RED_CIRCLE, BLUE_SQUARE], [BLUE_SQUARE, RED_CIRCLE], 0, 0, 0),
        ([RED_CIRCLE, BLUE_SQUARE], [RED_CIRCLE], 1, 0, 0),
        ([RED_CIRCLE, BLUE_SQUARE], [], 2, 0, 0),
        ([RED_CIRCLE, BLUE_SQUARE], [("blue", "circle"), ("red", "square")], 0, 2, 0),  # colors in the wrong place
        ([RED_CIRCLE, BLUE_SQUARE], [RED_CIRCLE, ("blue", None)], 0, 1, 0),  # a shape that is none
        ([RED_CIRCLE, BLUE_SQUARE], [RED_CIRCLE, RED_CIRCLE], 1, 0, 1),  # the second shares nothing
        ([RED_CIRCLE], [RED_CIRCLE, BLUE_SQUARE], 0, 0, 1),
        ([RED_CIRCLE, RED_CIRCLE], [RED_CIRCLE], 1, 0, 0),
        # The blue circle stands for the red one, by its shape, not for the blue square, by its color.
        ([BLUE_SQUARE, RED_CIRCLE], [BLUE_CIRCLE], 1, 1, 0),
        ([BLUE_SQUARE, RED_CIRCLE], [BLUE_CIRCLE, ("green", "square")], 0, 2, 0),
    ],
)
def test_objects_are_matched(asked: list, found: list, missing: int, wrong: int, extra: int) -> None:
    result = compare_objects(Counter(asked), Counter(found))
    assert result == Composition(len(asked), missing, wrong, extra)
    assert result.right == (sorted(asked) == sorted(found, key=str))


def test_a_rendered_scene_is_right_and_another_caption_is_not() -> None:
    scene = sample_scene(11, 64, 64, "two")
    image = render(scene) / 255
    assert judge_composition(image, scene.caption).right
    one = CaptionSpec(scene.spec.objects[:1])
    assert judge_composition(image, str(one)) == Composition(1, 0, 0, 1)
    first = scene.spec.objects[0]
    color = next(name for name in ("red", "green", "blue") if name not in {item.color for item in scene.spec.objects})
    recolored = CaptionSpec((ObjectSpec(color, first.shape), *scene.spec.objects[1:]))
    assert judge_composition(image, str(recolored)) == Composition(2, 0, 1, 0)


def test_another_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="caption must list 1 to 4 objects or relate two, got 'a dog'"):
        judge_composition(np.ones((48, 48, 3)), "a dog")
