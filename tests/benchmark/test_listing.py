from dataclasses import dataclass

import pytest

import vision_attn as va
from vision_attn.benchmark.listing import backend_rows, operator_rows
from vision_attn.operators.registry import unregister_operator


@pytest.fixture
def mean():
    @va.register_operator("mean")
    @dataclass(frozen=True)
    class Mean:
        """Averages values,
        whatever the query.

        More about it.
        """

        scale: float
        weight: float = 0.5

        def __call__(self, query, key, value, layout, scale=None):
            return self.weight * value.mean(1, keepdim=True).expand_as(value)

    yield Mean
    unregister_operator("mean")


def test_registered_operators_are_listed(mean):
    rows = {row["name"]: row for row in operator_rows()}
    assert rows["mean"] == {
        "name": "mean",
        "form": "mean(scale, weight=0.5)",
        "fields": ["scale", "weight"],
        "summary": "Averages values, whatever the query.",
    }
    assert rows["dense"]["form"] == "dense"
    assert {"clear", "neighborhood"} <= rows.keys()


def test_backends_are_listed_with_the_reason_why_not(monkeypatch):
    monkeypatch.setattr(va, "backends", lambda: {"tiled": "yes", "triton": "no GPU"})
    assert backend_rows() == [
        {"name": "tiled", "available": True, "reason": ""},
        {"name": "triton", "available": False, "reason": "no GPU"},
    ]
