"""The detector: right pictures are right, wrong ones are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vision_attn.shapes.detector import detect, score
from vision_attn.shapes.scenes import (
    CaptionSpec,
    ObjectSpec,
    PlacedObject,
    Scene,
    coverage,
    parse_caption,
    render,
    sample_scene,
)

COUNTS = {(24, 24): 40, (48, 48): 200, (48, 64): 80, (64, 48): 80, (64, 64): 60, (96, 64): 40, (128, 128): 20}
COUNTS |= {(192, 192): 8, (256, 256): 6}


def draw(*objects: tuple[str, str, float, float], height: int = 48, width: int = 60, radius: float = 8.0) -> np.ndarray:
    placed = tuple(PlacedObject(ObjectSpec(c, s), (row, column), radius) for c, s, row, column in objects)
    spec = CaptionSpec(tuple(item.spec for item in placed))
    return render(Scene(height, width, spec, "white", placed))


@pytest.mark.slow
def test_rendered_scenes_are_read_back() -> None:
    wrong = [
        (size, index)
        for size, count in COUNTS.items()
        for index in range(count)
        if not score(render(scene := sample_scene([11, index], *size)), scene).right
    ]
    assert sum(COUNTS.values()) >= 500
    assert len(wrong) <= 0.005 * sum(COUNTS.values()), wrong


def test_detected_objects_have_the_position_and_size_that_was_drawn() -> None:
    objects = detect(draw(("red", "circle", 14.2, 15.5), ("blue", "star", 31.0, 44.7)))
    assert [(item.color, item.shape) for item in objects] == [("red", "circle"), ("blue", "star")]
    for item, (row, column) in zip(objects, [(14.2, 15.5), (31.0, 44.7)], strict=True):
        assert item.center == pytest.approx((row, column), abs=0.4)
        assert item.radius == pytest.approx(8.0, rel=0.06)


def test_a_pil_picture_and_a_caption_serve_as_well() -> None:
    picture = Image.fromarray(draw(("green", "square", 20, 20))).convert("RGBA")
    assert score(picture, "a green square").right
    assert score(picture, parse_caption("a green square on a white background")).right


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a red circle left of a blue square", (True, True, True)),
        ("a red circle and a blue square", (True, True, True)),
        ("a blue square right of a red circle", (True, True, True)),
        ("a red circle right of a blue square", (True, True, False)),
        ("a red circle above a blue square", (True, True, False)),
        ("a blue circle left of a red square", (False, True, False)),  # bound the other way round
        ("a red circle and a blue star", (False, True, False)),
        ("a red circle and a green square", (False, False, False)),
        ("a red circle", (False, False, False)),
        ("a red circle, a blue square and a blue star", (False, False, False)),
    ],
)
def test_wrong_captions_are_wrong(caption: str, expected: tuple[bool, bool, bool]) -> None:
    result = score(draw(("red", "circle", 24.5, 15), ("blue", "square", 24, 42)), caption)
    assert (result.objects, result.colors, result.relation) == expected
    assert result.right == all(expected)


def test_mirrored_and_recolored_scenes_are_wrong() -> None:
    for index in range(40):
        scene = sample_scene([12, index], 48, 60, "relation")
        picture = render(scene)
        flipped = picture[:, ::-1] if scene.spec.relation in ("left of", "right of") else picture[::-1]
        assert not score(np.ascontiguousarray(flipped), scene).relation
        assert not score(np.ascontiguousarray(picture[..., ::-1]), "a red circle left of a blue circle").right


def test_sizes_and_backgrounds_count_where_the_caption_names_them() -> None:
    small, large = (draw(("red", "circle", 24, 30), radius=radius) for radius in (7.0, 15.0))
    assert score(small, "a small red circle").right
    assert score(large, "a large red circle").right
    assert not score(small, "a large red circle").sizes
    assert not score(large, "a small red circle").sizes
    assert not score(small, "a red circle on a gray background").background


def test_empty_noisy_and_broken_pictures() -> None:
    assert detect(np.full((48, 48, 3), 250, dtype=np.uint8)) == ()
    rng = np.random.default_rng(0)
    noisy = draw(("red", "triangle", 20, 20), ("black", "square", 28, 44)) + rng.normal(0, 12, (48, 60, 3))
    assert score(np.clip(noisy, 0, 255).astype(np.uint8), "a red triangle and a black square").right
    bar = draw()
    bar[22:26, 6:54] = (214, 40, 40)  # red, but no shape of the grammar
    assert [item.shape for item in detect(bar)] == [None]


@pytest.mark.parametrize("stretch, shape", [(1.0, "circle"), (1.3, "circle"), (1.7, None), (2.5, None)])
def test_a_stretched_circle_is_no_circle(stretch: float, shape: str | None) -> None:
    rows, columns = np.mgrid[:64, :80] + 0.5
    distance = np.hypot((rows - 30) * stretch**0.5, (columns - 41) / stretch**0.5)
    alpha = np.clip(12.5 - distance, 0, 1)[..., None]
    picture = 250 + alpha * (np.array([214, 40, 40]) - 250)
    assert [item.shape for item in detect(picture.astype(np.uint8))] == [shape]


def test_touching_objects_of_different_colors_are_told_apart() -> None:
    picture = np.full((48, 60, 3), 250.0)
    for color, column in (((214, 40, 40), 22.0), ((40, 84, 204), 38.0)):
        alpha = coverage("square", (24.0, column), 9.0, 48, 60)[..., None]
        picture += alpha * (np.array(color) - picture)
    assert score(picture.astype(np.uint8), "a red square left of a blue square").right


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match="detect: picture must be a PIL picture or a uint8 array, got str"):
        detect("picture.png")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"detect: picture must be \[height, width, 3\] uint8, got \[4, 5\] uint8"):
        detect(np.zeros((4, 5), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"got \[4, 5, 3\] float32: pass RGB values from 0 to 255"):
        score(np.zeros((4, 5, 3), dtype=np.float32), "a red circle")
    with pytest.raises(ValueError, match="caption must list 1 to 4 objects"):
        score(np.zeros((4, 5, 3), dtype=np.uint8), "a cat")
