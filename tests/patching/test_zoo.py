"""Swapping attention in every model of the zoo: exact, local where it should be, and taken back without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO
from zoo_case import UPSTREAM_WARNINGS, Case, Inputs, change
from zoo_measure import flat, is_attention, moved_rows

import vision_attn as va
from vision_attn.patching.layouts import family_of

pytestmark = UPSTREAM_WARNINGS
every_case = pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)

HUGE = (va.Neighborhood(kernel_size=99), va.Clear(radius=1000))
SMALL = (va.Neighborhood(kernel_size=3), va.Clear(radius=2))


@functools.lru_cache(maxsize=2)
def stock(case: Case) -> tuple[nn.Module, list[torch.Tensor]]:
    """The unpatched model and what it gives; tests of one case follow each other and share it."""
    model = case.build()
    return model, run(model, case.inputs(*case.grid))


def run(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """All tensors that the model returns."""
    with torch.no_grad():
        return list(tensors(model(**inputs)))


def tensors(output: Any) -> list[torch.Tensor]:
    """Tensors in nested outputs, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output if part is not None for tensor in tensors(part)]


def assert_identical(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert other.isfinite().all()
        assert torch.equal(one, other)


def processors(model: nn.Module) -> dict[str, Any]:
    return {name: module.processor for name, module in model.named_modules() if is_attention(module)}


@dataclass(frozen=True)
class Spy:
    """An operator that keeps what passes through it."""

    inner: Any
    calls: list[dict[str, Any]] = field(default_factory=list, compare=False)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: va.TokenLayout,
        scale: float | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        options = {"scale": scale} if attn_mask is None else {"scale": scale, "attn_mask": attn_mask}
        output = self.inner(query, key, value, layout, **options)
        self.calls.append({"q": query, "k": key, "v": value, "layout": layout, "options": options, "output": output})
        return output


def touched(tensor: torch.Tensor, row: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[:, row] += change(tensor.shape[-1])
    return tensor


def spied(case: Case, operator: Any, inputs: Inputs) -> list[dict[str, Any]]:
    """The operator's calls in one forward."""
    spy = Spy(operator)
    with va.patch(stock(case)[0], spy):
        run(stock(case)[0], inputs)
    return spy.calls


def oracle(call: dict[str, Any], visible: torch.Tensor | None) -> torch.Tensor:
    """Masked softmax attention in float64; a row that sees nothing is zero, as everywhere in torch."""
    query, key, value = (call[name].double().transpose(1, 2) for name in "qkv")
    scale, mask = call["options"]["scale"], call["options"].get("attn_mask")
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2)


@every_case
def test_dense_is_bit_identical_and_everything_is_restored(case: Case) -> None:
    model, expected = stock(case)
    before = processors(model)
    state = list(model.state_dict())
    patch = va.patch(model, va.Dense())
    skip = family_of(model).skip_reason
    assert {layer.name for layer in patch.routed} == {name for name in before if skip(name) is None}
    assert {layer.name for layer in patch.skipped} == {name for name in before if skip(name) is not None}
    assert_identical(run(model, case.inputs(*case.grid)), expected)
    for layer in patch.routed:
        kinds = [call.kind for call in patch.calls[layer.name]]
        assert "operator" in kinds, f"{layer.name}: {patch.calls[layer.name]}"
        assert set(kinds) == {"operator"} or family_of(model).in_parts, f"{layer.name}: {patch.calls[layer.name]}"
    assert list(model.state_dict()) == state
    patch.remove()
    after = processors(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert_identical(run(model, case.inputs(*case.grid)), expected)


@every_case
@pytest.mark.parametrize("operator", HUGE, ids=str)
def test_a_window_as_large_as_the_grid_equals_dense(case: Case, operator: Any) -> None:
    model, expected = stock(case)
    with va.patch(model, operator):
        actual = run(model, case.inputs(*case.grid))
    for one, other in zip(actual, expected, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * scale)


@every_case
@pytest.mark.parametrize("operator", SMALL, ids=str)
def test_a_small_window_equals_the_oracle_in_every_layer(case: Case, operator: Any) -> None:
    calls = spied(case, operator, case.inputs(*case.grid))
    assert calls
    for call in calls:
        layout = call["layout"]
        image = layout.image_slice
        expected = oracle(call, operator.mask(layout))
        error = (call["output"].double() - expected).abs().max()
        assert error <= 1e-5 * call["v"].abs().max()
        if min(layout.grid[-2:]) > 4:  # on coarser levels of a UNet the window is the grid
            dense = oracle(call, None)
            assert (dense - expected)[:, image].abs().max() > 100 * error


def seen_by_clear(query: tuple[int, ...], key: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Nearer than radius 2."""
    return sum((i - j) ** 2 for i, j in zip(query, key, strict=True)) < 2**2


def seen_by_neighborhood(query: tuple[int, ...], key: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """In the 3 tokens around the query on each axis; at the border the window moves inwards."""
    for i, j, size in zip(query, key, grid, strict=True):
        window = min(3, size)
        start = min(max(i - window // 2, 0), size - window)
        if not start <= j < start + window:
            return False
    return True


@every_case
@pytest.mark.parametrize(
    ("operator", "seen"),
    [(va.Neighborhood(3), seen_by_neighborhood), (va.Clear(2), seen_by_clear)],
    ids=["neighborhood", "clear"],
)
def test_only_queries_near_a_touched_token_change(case: Case, operator: Any, seen: Callable[..., bool]) -> None:
    before = spied(case, operator, case.inputs(*case.grid))[0]
    layout = before["layout"]
    grid, image = layout.grid, layout.image_slice
    every = [tuple(int(i) for i in index) for index in torch.ones(grid).nonzero()]
    for token in (every[0], every[-2], tuple(size // 2 for size in grid)):
        if case.touch_image is not None:
            inputs = case.inputs(*case.grid)
            case.touch_image(inputs, token)
            output = spied(case, operator, inputs)[0]["output"]
        else:  # pixels mix before the first attention: touch its keys and values instead
            row = image.start + flat(token, grid)
            key, value = touched(before["k"], row), touched(before["v"], row)
            output = operator(before["q"], key, value, layout, **before["options"])
        moved = moved_rows(before["output"][:, image], output[:, image])
        assert moved == [flat(query, grid) for query in every if seen(query, token, grid)]
