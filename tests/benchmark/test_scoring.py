import numpy as np
import pytest

from vision_attn.benchmark.scoring import judge_of
from vision_attn.shapes.scenes import render, sample_scene


@pytest.fixture(scope="module")
def scene():
    return next(
        scene
        for scene in (sample_scene(seed, 96, 128) for seed in range(200))
        if len(scene.spec.objects) == 2 and scene.spec.relation == "left of"
    )


@pytest.fixture(scope="module")
def image(scene):
    return np.asarray(render(scene)).astype(np.float32) / 255


def test_a_true_picture_is_right(scene, image):
    assert str(judge_of(str(scene.spec))(image)) == "right"


def test_a_mirrored_picture_has_the_relation_wrong(scene, image):
    assert str(judge_of(str(scene.spec))(image[:, ::-1])) == "wrong relation"


def test_an_empty_picture_and_one_with_everything_twice_have_the_count_wrong(scene, image):
    judge = judge_of(str(scene.spec))
    assert str(judge(np.full((96, 128, 3), 0.9, dtype=np.float32))) == "wrong count"
    assert str(judge(np.concatenate([image, image]))) == "wrong count"


def test_swapped_channels_have_the_colors_wrong():
    scene = next(
        s for s in (sample_scene(seed, 96, 96, "one") for seed in range(200)) if s.spec.objects[0].color == "red"
    )
    image = np.asarray(render(scene)).astype(np.float32) / 255
    assert str(judge_of(str(scene.spec))(image)) == "right"
    assert str(judge_of(str(scene.spec))(image[..., ::-1])) == "wrong colors"


@pytest.mark.parametrize("prompt", ["a photo of an astronaut", "", "a red circle on the moon"])
def test_other_prompts_are_not_judged(prompt):
    assert judge_of(prompt) is None
