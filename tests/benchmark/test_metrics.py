import math

import numpy as np
import pytest

from vision_attn.benchmark.metrics import psnr, ssim


def test_psnr_by_hand():
    # Half of the values differ by 0.2, so the mean squared error is 0.02.
    reference = np.zeros((2, 4, 3))
    image = reference.copy()
    image[0] = 0.2
    assert psnr(image, reference) == pytest.approx(10 * math.log10(1 / 0.02))


def test_psnr_of_identical_images_is_infinite():
    image = np.random.default_rng(0).random((5, 7, 3))
    assert psnr(image, image.copy()) == math.inf


def ssim_by_definition(x, y):
    """Wang et al. 2004, window by window, weight by weight."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for channel in range(x.shape[2]):
        for row in range(x.shape[0] - 10):
            for column in range(x.shape[1] - 10):
                a = x[row : row + 11, column : column + 11, channel]
                b = y[row : row + 11, column : column + 11, channel]
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                variance_a = (weights * (a - mean_a) ** 2).sum()
                variance_b = (weights * (b - mean_b) ** 2).sum()
                covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
                values.append(luminance * (2 * covariance + 9e-4) / (variance_a + variance_b + 9e-4))
    return np.mean(values)


def test_ssim_agrees_with_its_definition():
    generator = np.random.default_rng(1)
    reference = generator.random((13, 17, 3))
    image = np.clip(reference + 0.2 * generator.standard_normal(reference.shape), 0, 1).astype(np.float32)
    value = ssim(image, reference)
    assert value == pytest.approx(ssim_by_definition(image.astype(np.float64), reference), abs=1e-12)
    assert value < 0.95


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = np.full((12, 15, 3), 0.3), np.full((12, 15, 3), 0.6)
    assert ssim(a, b) == pytest.approx((2 * 0.3 * 0.6 + 1e-4) / (0.3**2 + 0.6**2 + 1e-4))


def test_ssim_of_identical_images_is_one_and_of_a_negative_is_below_zero():
    image = np.random.default_rng(2).random((14, 11, 3))
    assert ssim(image, image.copy()) == pytest.approx(1)
    assert ssim(1 - image, image) < 0


def test_ssim_of_a_video_is_the_mean_of_its_frames():
    generator = np.random.default_rng(3)
    video, reference = generator.random((3, 12, 16, 3)), generator.random((3, 12, 16, 3))
    frames = [ssim(video[index], reference[index]) for index in range(3)]
    assert ssim(video, reference) == pytest.approx(sum(frames) / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: psnr(np.zeros((2, 3, 3)), np.zeros((3, 2, 3))),
            r"psnr: image must have .*\(3, 2, 3\), got \(2, 3, 3\)",
        ),
        (lambda: ssim(np.zeros((20, 30, 3)), np.zeros((20, 31, 3))), r"ssim: image must have .*, got \(20, 30, 3\)"),
        (
            lambda: ssim(np.zeros((20, 10, 3)), np.zeros((20, 10, 3))),
            r"ssim: image must be at least 11 .*got \(20, 10\)",
        ),
        (
            lambda: ssim(np.zeros((20, 30)), np.zeros((20, 30))),
            r"ssim: image must be \[Y, X, C\].*got shape \(20, 30\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
