"""The layout of every model of the zoo is the truth: touching a token moves the row that the layout says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from zoo import ZOO
from zoo_case import UPSTREAM_WARNINGS, Case
from zoo_measure import AttentionCall, corners, encloses, flat, is_attention, moved_rows, recording, touch_feature_map

pytestmark = UPSTREAM_WARNINGS


def cases(condition: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Parametrise over the cases of the zoo that fulfil a condition."""
    return pytest.mark.parametrize("case", list(filter(condition, ZOO)), ids=lambda case: case.name)


def pairs(before: list[AttentionCall], after: list[AttentionCall]) -> list[tuple[AttentionCall, AttentionCall]]:
    """The calls of two runs of the model that hold the tokens of a layout."""
    assert [call.name for call in before] == [call.name for call in after]
    return [(old, new) for old, new in zip(before, after, strict=True) if old.matches]


def check_image_token(before: list[AttentionCall], after: list[AttentionCall], token: tuple[int, ...]) -> int:
    """Exactly the rows that the layouts predict have moved; returns in how many calls."""
    count = 0
    for old, new in pairs(before, after):
        assert old.layout is not None
        row = flat(token, old.layout.grid)
        first = old.layout.text_before
        assert moved_rows(old.key, new.key) == [first + row], f"keys of {old.name}"
        whole = old.query.shape[1] == old.layout.tokens
        assert moved_rows(old.query, new.query) == [first + row if whole else row], f"queries of {old.name}"
        count += 1
    return count


@cases(lambda case: case.touch_image is not None)
def test_layout_says_which_row_is_which_image_token(case: Case) -> None:
    with recording(case) as recorder:
        before = recorder.run(case.inputs(*case.grid))
        routed = {name for name, module in recorder.model.named_modules() if is_attention(module)}
        routed = {name for name in routed if recorder.family.skip_reason(name) is None}
        matched = {call.name for call in before if call.matches}
        assert matched == routed
        assert {call.layout.grid for call in before if call.matches} == {case.grid}
        for token in corners(case.grid):
            inputs = case.inputs(*case.grid)
            case.touch_image(inputs, token)
            assert check_image_token(before, recorder.run(inputs), token) >= len(routed)


@cases(lambda case: case.touch_text is not None)
def test_layout_says_which_rows_are_text(case: Case) -> None:
    with recording(case) as recorder:
        before = recorder.run(case.inputs(*case.grid))
        positions: dict[int, list[int]] = {}
        for row in range(case.text_tokens):
            inputs = case.inputs(*case.grid)
            case.touch_text(inputs, row)
            for index, (old, new) in enumerate(pairs(before, recorder.run(inputs))):
                moved = moved_rows(old.key, new.key)
                image = range(old.layout.image_slice.start, old.layout.image_slice.stop)
                assert not set(moved) & set(image), f"keys of {old.name}"
                if old.layout.text_tokens and not case.text_mixes and moved:
                    assert len(moved) == 1, f"keys of {old.name}"
                    positions.setdefault(index, []).append(moved[0])
        for found in positions.values():
            assert found == list(range(found[0], found[0] + case.text_tokens))
        assert positions or case.text_mixes


@cases(lambda case: case.touch_image is None)
def test_layout_says_which_row_is_which_pixel_of_a_feature_map(case: Case) -> None:
    with recording(case) as recorder:
        before = recorder.run(case.inputs(*case.grid))
        checked = set()
        for scope, layout in recorder.layouts.items():
            if layout is None:
                continue
            inside = {call.name for call in before if call.matches and encloses(scope, call.name)}
            for token in corners(layout.grid):
                after = recorder.run(case.inputs(*case.grid), touch_feature_map(token, scope))
                old = [call for call in before if call.name in inside]
                check_image_token(old, [call for call in after if call.name in inside], token)
            checked |= inside
        routed = {name for name, module in recorder.model.named_modules() if is_attention(module)}
        assert checked == {name for name in routed if recorder.family.skip_reason(name) is None}
