"""The whole-number bounds of a window against a search through every window, and the queries that reach a key."""

import math

import oracle
import pytest
import torch

from vision_attn.kernels import bounds
from vision_attn.kernels.reach import Ball, Box, from_arguments, to_arguments

WINDOWS = [
    (n, k, s, causal)
    for n in range(1, 15)
    for k in range(1, n + 1)
    for s in range(1, k + 1)
    for causal in (False, True)
]


def windows(n, k, s, causal):
    return [oracle.axis_window(query, n, k, s, causal=causal) for query in range(n)]


@pytest.mark.parametrize("n", range(1, 15))
def test_start_and_stop_are_those_of_the_window(n):
    for length, k, s, causal in WINDOWS:
        if length == n:
            starts = [bounds.box_start(query, n, k, s, causal) for query in range(n)]
            stops = [bounds.box_stop(query, start, k, causal) for query, start in enumerate(starts)]
            assert [list(range(*pair)) for pair in zip(starts, stops, strict=True)] == windows(n, k, s, causal)


@pytest.mark.parametrize("n", range(1, 15))
def test_the_queries_that_see_a_key_are_the_range_between_first_and_last(n):
    for length, k, s, causal in WINDOWS:
        if length == n:
            seen = windows(n, k, s, causal)
            for key in range(n):
                first, last = (f(key, n, k, s, causal) for f in (bounds.box_first_query, bounds.box_last_query))
                # Starts and stops never fall, so this range holds all that see the key; strided causal windows leave
                # some of it out.
                assert first == min(query for query in range(n) if seen[query][-1] >= key)
                assert last == max(query for query in range(n) if seen[query][0] <= key)
                between = range(first, last + 1)
                assert [q for q in between if key in seen[q]] == [q for q in range(n) if key in seen[q]]


def test_group_lengths_count_the_tokens_of_a_residue():
    for n in range(1, 20):
        for dilation in range(1, n + 1):
            for residue in range(dilation):
                assert bounds.group_length(n, dilation, residue) == len(range(residue, n, dilation))


def test_nearest_and_farthest_steps_between_ranges():
    for first, last, other_first, other_last in ((0, 3, 2, 5), (0, 3, 6, 7), (6, 7, 0, 3), (2, 2, 2, 2), (4, 9, 5, 6)):
        steps = [abs(a - b) for a in range(first, last + 1) for b in range(other_first, other_last + 1)]
        assert bounds.nearest(first, last, other_first, other_last) == min(steps)
        assert bounds.farthest(first, last, other_first, other_last) == max(steps)


@pytest.mark.parametrize("radius", [(1, 2), (2.5, 4), (3, 3), (0.5, 3.3), (1000, 2)], ids=str)
def test_an_ellipse_sees_what_lies_strictly_within_its_radii(radius):
    grid = (7, 10)
    ball = Ball.of_radius(grid, radius)
    tokens = [(y, x) for y in range(grid[0]) for x in range(grid[1])]

    def seen(query, key):
        # In hundredths of a token, so that whole numbers decide: 3.3 is no binary fraction.
        wide, high = (round(100 * max(r, 1)) for r in radius)
        y, x = (100 * (a - b) for a, b in zip(query, key, strict=True))
        return (y * high) ** 2 + (x * wide) ** 2 < (wide * high) ** 2

    truth = torch.tensor([[seen(query, key) for key in tokens] for query in tokens])
    assert torch.equal(ball.mask(), truth)
    assert ball.count() == int(truth.sum())
    for axis in (0, 1):
        assert ball.extent(axis) == min(math.ceil(max(radius[axis], 1)) - 1, grid[axis] - 1)


def test_equal_radii_are_the_circle():
    assert torch.equal(Ball.of_radius((6, 9), (3, 3)).mask(), Ball.of_radius((6, 9), 3).mask())


def test_radii_without_a_common_measure_are_refused():
    with pytest.raises(
        ValueError, match=r"radius must be whole numbers or simple fractions .* got \(3.14159, 2.71828\)"
    ):
        Ball.of_radius((6, 9), (3.14159, 2.71828))


@pytest.mark.parametrize(
    "reach", [Box((5, 8), (3, 4), (2, 1), (1, 2), (True, False)), Ball.of_radius((4, 5, 6), (1, 2, 3))], ids=str
)
def test_a_window_survives_as_lists_of_numbers(reach):
    assert from_arguments(*to_arguments(reach)) == reach
