"""Two small image-classification tasks: drawn shapes, and scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vision_attn.shapes.scenes import COLORS, SHAPES, render, sample_scene

SIDE_PX = 64


@dataclass(frozen=True)
class Task:
    """Images to learn from and to be tested on.

    Args:
        train: Images `[n, 3, 64, 64]`, from -1 to 1.
        train_labels: `[n]`.
        test: Other images.
        test_labels: Theirs.
        classes: Their number.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int


def shapes(seed: int = 0, train: int = 3000, test: int = 1000) -> Task:
    """One drawn object anywhere, small or large, on one of three grounds: its colour and shape, 24 classes."""
    rng = np.random.default_rng(seed)
    seeds = rng.choice(2**31, size=train + test, replace=False)  # no picture is in both parts
    scenes = [sample_scene(int(number), SIDE_PX, SIDE_PX, "one") for number in seeds]
    classes = [(color, shape) for color in COLORS for shape in SHAPES]
    labels = [classes.index((scene.objects[0].spec.color, scene.objects[0].spec.shape)) for scene in scenes]
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
    return _split(images, torch.tensor(labels), test, len(classes))


def digits(seed: int = 0, test: int = 400) -> Task:
    """The 1797 handwritten digits of scikit-learn, 8x8 pixels enlarged to 64x64, 10 classes.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('quick_train: digits need scikit-learn: pip install "vision-attn[train]"') from error
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    images = torch.from_numpy(data.images[order]).float()[:, None] / 8 - 1
    large = images.repeat_interleave(SIDE_PX // 8, 2).repeat_interleave(SIDE_PX // 8, 3)
    return _split(large.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data.target[order]), test, 10)


TASKS: dict[str, Callable[[int], Task]] = {"shapes": shapes, "digits": digits}


def _split(images: Tensor, labels: Tensor, test: int, classes: int) -> Task:
    return Task(images[test:].float(), labels[test:], images[:test].float(), labels[:test], classes)
