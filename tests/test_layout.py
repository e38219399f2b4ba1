"""TokenLayout: where the grid stands, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import vision_attn as va


def test_counts_and_slice():
    layout = va.TokenLayout((2, 3, 5), text_before=4, text_after=1)
    assert (layout.image_tokens, layout.text_tokens, layout.tokens) == (30, 5, 35)
    assert list(range(35))[layout.image_slice] == list(range(4, 34))
    assert layout == va.TokenLayout([2, 3, 5], 4, 1)
    assert hash(layout) == hash(va.TokenLayout((2, 3, 5), 4, 1))


def test_sizes_of_other_libraries_become_plain_integers():
    layout = va.TokenLayout((np.int64(2), torch.tensor(3)), text_before=np.int32(4))
    assert [type(size) for size in (*layout.grid, layout.text_before)] == [int] * 3
    assert layout == va.TokenLayout((2, 3), 4)
    json.dumps(dataclasses.asdict(va.Clear(2).cost(layout, 1, 8)))


def test_symbolic_sizes_compile():
    torch._dynamo.reset()

    def image_tokens(x):
        return x * va.TokenLayout((x.shape[0], x.shape[1])).image_tokens

    compiled = torch.compile(image_tokens, fullgraph=True, dynamic=True, backend="eager")
    for rows, columns in ((2, 3), (4, 7)):
        assert compiled(torch.ones(rows, columns))[0, 0] == rows * columns


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((),), ValueError, r"TokenLayout: grid must have 1 to 3 axes, got \(\)"),
        (((1, 2, 3, 4),), ValueError, r"TokenLayout: grid must have 1 to 3 axes, got \(1, 2, 3, 4\)"),
        (((0, 3),), ValueError, r"TokenLayout: grid must have axes of at least 1 token, got \(0, 3\)"),
        (((2.5, 3),), TypeError, r"TokenLayout: grid must be made of integers, got \(2.5, 3\)"),
        (((True, 3),), TypeError, r"TokenLayout: grid must be made of integers, got \(True, 3\)"),
        (((torch.tensor(2.0), 3),), TypeError, "TokenLayout: grid must be made of integers, got"),
        ((12,), TypeError, r"TokenLayout: grid must be a tuple \(Y, X\), got 12"),
        ((None,), TypeError, r"TokenLayout: grid must be a tuple \(Y, X\), got None"),
        (((2, 3), -1), ValueError, "TokenLayout: text_before must be at least 0, got -1"),
        (((2, 3), 0, 1.0), TypeError, "TokenLayout: text_after must be made of integers, got 1.0"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        va.TokenLayout(*arguments)


def test_check_names_the_argument_and_both_lengths():
    with pytest.raises(ValueError, match=r"key must have 10 tokens \(1 before, grid \(3, 3\), 0 after\), got 9"):
        va.TokenLayout((3, 3), text_before=1).check(9, "key")
