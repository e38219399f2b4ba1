"""Long-short distance attention: the masks of CrossFormer's two reshapes."""

import pytest
import torch

import vision_attn as va


def same_group(axis_groups):
    """Bool `[N, N]`: tokens with the same group number on both axes."""
    rows, columns = axis_groups
    number = (rows[:, None] * 1000 + columns).flatten()
    return number[:, None] == number


def test_short_groups_are_blocks():
    """`reshape(Y / G, G, X / G, G)`."""
    mask = va.LSDA(7).mask(va.TokenLayout((28, 21)))
    assert torch.equal(mask, same_group((torch.arange(28) // 7, torch.arange(21) // 7)))


def test_long_groups_are_residues():
    """`reshape(G, Y / G, G, X / G)`: the interval is the number of groups."""
    mask = va.LSDA(7, interval=(4, 3)).mask(va.TokenLayout((28, 21)))
    assert torch.equal(mask, same_group((torch.arange(28) % 4, torch.arange(21) % 3)))


def test_the_two_kinds_reach_the_whole_image():
    layout = va.TokenLayout((28, 28))
    short, long = (va.LSDA(7, interval=i).mask(layout).float() for i in (1, 4))
    assert ((short @ long) > 0).all()
    assert not ((short @ short) > 0).all()


def test_small_maps_are_one_group():
    layout = va.TokenLayout((5, 7), text_before=2)
    assert va.LSDA(7).mask(layout).all()
    assert va.LSDA(7, interval=4).mask(layout).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "LSDA: group must be at least 1, got 0"),
        ((7, 0), "LSDA: interval must be at least 1, got 0"),
        (((7, 7, 7, 7),), "LSDA: group must be one value or 1 to 3 of them"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        va.LSDA(*arguments)


def test_another_number_of_axes_is_named():
    with pytest.raises(ValueError, match=r"LSDA: interval must be one value or 2 of them .* got \(1, 2, 3\)"):
        va.LSDA(2, (1, 2, 3)).mask(va.TokenLayout((4, 5)))
