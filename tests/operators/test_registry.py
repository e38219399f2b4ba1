"""Operators by name, their text form, and what registration refuses."""

import dataclasses

import numpy as np
import pytest
import torch

import vision_attn as va
from vision_attn.operators.registry import unregister_operator


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of all values: the least operator that makes sense."""

    weight: float = 1.0
    tags: tuple = ()

    def __call__(self, query, key, value, layout, scale=None):
        return self.weight * value.mean(1, keepdim=True).expand_as(value)


@pytest.fixture
def mean():
    cls = va.register_operator("mean_test")(Mean)
    yield cls
    unregister_operator("mean_test")


@pytest.mark.parametrize(
    "operator",
    [
        va.Dense(),
        va.Clear(16, down_factor=4),
        va.Clear(2.5, proportional=True),
        va.Neighborhood(13),
        va.Neighborhood((3, 5), stride=(1, 2), dilation=2),
        va.Neighborhood([3, 5]),
        va.Neighborhood(torch.Size([3, 5])),
        va.Clear(np.float64(2.5)),
    ],
)
def test_text_form_round_trips(operator):
    assert va.parse(str(operator)) == operator
    assert hash(va.parse(str(operator))) == hash(operator)


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        ("dense", va.Dense()),
        ("dense()", va.Dense()),
        (" clear(8) ", va.Clear(8)),
        ("clear(radius=16, down_factor=4)", va.Clear(radius=16, down_factor=4)),
        ("neighborhood((3, 5), stride=(1, 2))", va.Neighborhood((3, 5), stride=(1, 2))),
    ],
)
def test_parse_reads_what_a_user_types(text, operator):
    assert va.parse(text) == operator


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (3, TypeError, "parse: text must be a string .* got 3"),
        ("", ValueError, "parse: text must read name.*got ''"),
        ("clear(radius=", ValueError, "parse: text must read name"),
        ("clear(radius=n)", ValueError, "parse: text must read name.* with literal values"),
        ("__import__('os').system('true')", ValueError, "parse: text must read name"),
        ("clear(radius=8)(1)", ValueError, "parse: text must read name"),
        ("clear(**{'radius': 8})", ValueError, "parse: clear takes the fields radius, down_factor, proportional"),
        (
            "cleer(radius=8)",
            ValueError,
            "parse: text must name one of agent, agent_sd, bilevel_routing, clear, dense, halo, .*, neighborhood, got 'cleer",
        ),
        (
            "clear(raduis=8)",
            ValueError,
            "parse: clear takes the fields radius, down_factor, proportional, got 'raduis'",
        ),
        ("clear(1, 2, True, 4)", ValueError, "parse: clear takes the fields .* got 4 positional values"),
        ("clear(radius=8, radius=9)", ValueError, r"parse: text must give each field once, got 'clear\(radius=8"),
        ("clear()", ValueError, r"parse: 'clear\(\)' does not make a clear operator: .*radius"),
        ("clear(8, radius=9)", ValueError, "parse: .* does not make a clear operator: .*multiple values"),
        ("clear(radius=-3)", ValueError, "Clear: radius must be above 0 and finite, got -3"),
        ("clear(radius='8')", ValueError, "parse: .* does not make a clear operator: Clear: radius must be a number"),
        ("(" * 500 + ")" * 500, ValueError, "parse: text must read name"),
    ],
)
def test_parse_names_what_is_wrong(text, error, message):
    with pytest.raises(error, match=message):
        va.parse(text)


def test_third_party_operator_needs_no_base_class(mean):
    assert va.operators()["mean_test"] is Mean
    operator = va.parse("mean_test(weight=0.5, tags=('a', 'b'))")
    assert operator == Mean(0.5, ("a", "b"))
    assert str(operator) == "mean_test(weight=0.5, tags=('a', 'b'))"
    layout, value = va.TokenLayout((2, 3)), torch.randn(2, 6, 1, 4)
    torch.testing.assert_close(operator(value, value, value, layout)[:, 3], 0.5 * value.mean(1))
    assert operator.mask(layout) is None
    assert operator.cost(layout, 1, 4) is None


def test_registering_the_same_class_again_is_allowed(mean):
    assert va.register_operator("mean_test")(Mean) is Mean


@pytest.mark.parametrize("name", ["Mean", "two words", "", 3])
def test_register_refuses_names(name):
    with pytest.raises(ValueError, match="register_operator: name must be a lower-case identifier, got"):
        va.register_operator(name)


def test_register_refuses_classes_that_cannot_work():
    @dataclasses.dataclass
    class Mutable:
        def __call__(self, query, key, value, layout, scale=None): ...

    @dataclasses.dataclass(frozen=True)
    class Silent:
        size: int = 1

    @dataclasses.dataclass(frozen=True)
    class Clear:
        def __call__(self, query, key, value, layout, scale=None): ...

    with pytest.raises(TypeError, match=r"register_operator: 'a' must be a frozen dataclass, got .*Mutable"):
        va.register_operator("a")(Mutable)
    with pytest.raises(TypeError, match="register_operator: 'a' must be a frozen dataclass, got"):
        va.register_operator("a")(int)
    with pytest.raises(TypeError, match="register_operator: 'a' must define __call__"):
        va.register_operator("a")(Silent)
    with pytest.raises(ValueError, match="register_operator: name must be free, got 'clear', which is vision_attn"):
        va.register_operator("clear")(Clear)
    assert "a" not in va.operators()
