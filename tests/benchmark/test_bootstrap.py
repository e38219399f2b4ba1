"""Bootstrap intervals against theory."""

from __future__ import annotations

import numpy as np
import pytest

from vision_attn.benchmark.bootstrap import mean_interval


def test_a_large_sample_has_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=(400, 1))
    half = 1.96 * values.std() / 20
    low, high = mean_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_rows_count_once_however_often_they_are_repeated() -> None:
    values = (np.random.default_rng(2).random((60, 1)) < 0.4).astype(float)
    assert mean_interval(np.repeat(values, 5, axis=1)) == pytest.approx(mean_interval(values))


def test_a_constant_has_no_width_and_a_wider_level_is_wider() -> None:
    assert mean_interval(np.ones((7, 2))) == (1, 1)
    values = np.random.default_rng(3).random((50, 2))
    low, high = mean_interval(values, level=0.8)
    wide_low, wide_high = mean_interval(values, level=0.99)
    assert wide_low < low < values.mean() < high < wide_high
