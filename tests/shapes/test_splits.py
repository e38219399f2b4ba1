"""The captions that shapes-sd learns from, and those it is asked."""

from __future__ import annotations

import pytest

from vision_attn.shapes.scenes import COLORS, SHAPES, parse_caption
from vision_attn.shapes.splits import (
    HELD_OUT_PAIRS,
    SPLITS,
    caption_count,
    has_held_out_pair,
    split_captions,
)


def pairs(caption: str) -> set[tuple[str, str]]:
    return {(item.color, item.shape) for item in parse_caption(caption).objects}


def test_every_color_and_shape_is_seen_in_other_pairs() -> None:
    seen = {(color, shape) for color in COLORS for shape in SHAPES} - HELD_OUT_PAIRS
    assert {color for color, _ in seen} == set(COLORS)
    assert {shape for _, shape in seen} == set(SHAPES)
    assert all(color in COLORS and shape in SHAPES for color, shape in HELD_OUT_PAIRS)


def test_splits_hold_what_they_say() -> None:
    for caption in split_captions("one", 19):
        assert len(pairs(caption)) == 1
        assert not pairs(caption) & HELD_OUT_PAIRS
    for caption in split_captions("two", 30):
        assert len(pairs(caption)) == 2
        assert not pairs(caption) & HELD_OUT_PAIRS
    for caption in split_captions("new pair", 30):
        assert len(pairs(caption)) == 2
        assert pairs(caption) & HELD_OUT_PAIRS
    assert all(len(pairs(caption)) == 3 for caption in split_captions("three", 30))
    hard = split_captions("hard", 31)
    assert [len(pairs(caption)) for caption in hard] == [2, 3] * 15 + [2]
    assert set(hard[::2]) <= set(split_captions("new pair", 16))


@pytest.mark.parametrize("split", SPLITS)
def test_captions_differ_and_stay_the_same(split: str) -> None:
    captions = split_captions(split, 15)
    assert len(set(captions)) == 15
    assert split_captions(split, 19)[:15] == captions
    for caption in captions:
        spec = parse_caption(caption)
        assert spec.background is None
        assert spec.relation is None
        assert all(item.size is None for item in spec.objects)


def test_captions_for_tuning_are_others() -> None:
    for split in ("two", "new pair", "three"):
        assert not set(split_captions(split, 100)) & set(split_captions(split, 40, tuning=True))


def test_held_out_pairs_are_found() -> None:
    color, shape = sorted(HELD_OUT_PAIRS)[0]
    assert has_held_out_pair(parse_caption(f"a black circle and a {color} {shape}"))
    assert not has_held_out_pair(parse_caption("a black circle and a red square"))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of one, two, new pair, three, hard, got 'easy'"):
        split_captions("easy", 3)
    for split, count, most in (("one", 20, 19), ("hard", 0, 200), ("two", 101, 100)):
        with pytest.raises(ValueError, match=f"count must be from 1 to {most} of split '{split}', got {count}"):
            split_captions(split, count)
    with pytest.raises(ValueError, match="split must have captions for tuning, got 'one'"):
        split_captions("one", 1, tuning=True)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_has_as_many_captions_as_it_says(split: str) -> None:
    for tuning in (False, True) if split != "one" else (False,):
        count = caption_count(split, tuning=tuning)
        assert len(set(split_captions(split, count, tuning=tuning))) == count
        with pytest.raises(ValueError, match=f"count must be from 1 to {count} "):
            split_captions(split, count + 1, tuning=tuning)
