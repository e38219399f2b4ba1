import pytest

from vision_attn.kernels.control_flow import Jump, natural_loops

CASES = {
    "straight code": (4, {}, []),
    "one loop": (5, {3: Jump(1, always=False)}, [[1, 2, 3]]),
    "a loop to itself": (3, {1: Jump(1, always=True)}, [[1]]),
    "two loops, one after the other": (6, {1: Jump(0, always=False), 4: Jump(3, always=False)}, [[0, 1], [3, 4]]),
    "a loop in a loop": (6, {3: Jump(2, always=False), 4: Jump(1, always=False)}, [[1, 2, 3, 4], [2, 3]]),
    # 1 skips to a rare block at 5, which jumps back to 2: nothing repeats.
    "a rare block out of the way": (
        7,
        {1: Jump(5, always=False), 4: Jump(None, always=True), 6: Jump(2, always=True)},
        [],
    ),
    "a loop with a branch in it": (6, {1: Jump(3, always=False), 4: Jump(0, always=False)}, [[0, 1, 2, 3, 4]]),
    # The body is left for 5 and 6, which come back: they belong to the loop.
    "a loop that continues out of the way": (
        7,
        {1: Jump(5, always=False), 3: Jump(1, always=False), 4: Jump(None, always=True), 6: Jump(2, always=True)},
        [[1, 2, 3, 5, 6]],
    ),
    "a loop that nothing reaches": (4, {0: Jump(None, always=True), 2: Jump(1, always=False)}, []),
}


@pytest.mark.parametrize("name", CASES)
def test_natural_loops(name):
    length, jumps, expected = CASES[name]
    assert natural_loops(length, jumps) == expected
