"""Wrong arguments of `patch`, `unpatch` and `verify` are refused before any work, by name and value."""

import dataclasses

import pytest
import torch
from tiny_models import FLUX, UNET, WAN

import vision_attn as va


@pytest.fixture(scope="module")
def flux() -> torch.nn.Module:
    return FLUX.model()


CLEAR = va.Clear(radius=2)
BAD = {
    "no operator": ({"op": None}, ValueError, "op must be an operator such as .*, got None"),
    "text": (
        {"op": "clear(radius=8)"},
        TypeError,
        r"op must be an operator object, got the text 'clear\(radius=8\)': write va.parse",
    ),
    "class": ({"op": va.Dense}, TypeError, "op must be an operator object, got the class Dense"),
    "number": ({"op": 3}, TypeError, "op must be an operator object such as .*, got 3"),
    "op and dict": (
        {"op": CLEAR, "layers": {"*": CLEAR}},
        ValueError,
        r"op must be left out when layers is a dict of operators, got clear\(radius=2\)",
    ),
    "dict of text": ({"layers": {"*": "dense"}}, TypeError, "op must be an operator object, got the text 'dense'"),
    "empty dict": ({"layers": {}}, ValueError, r"layers must name at least one layer, got \{\}"),
    "empty list": ({"op": CLEAR, "layers": []}, ValueError, r"layers must name at least one layer, got \[\]"),
    "number as layers": (
        {"op": CLEAR, "layers": 3},
        TypeError,
        "layers must be a glob, a list of globs, a predicate or .*, got 3",
    ),
    "number in layers": ({"op": CLEAR, "layers": ["*", 3]}, TypeError, "layers must hold globs on module names, got 3"),
    "no such layer": (
        {"op": CLEAR, "layers": "*.attn9"},
        va.PatchError,
        r"layers must match attention modules, got '\*.attn9': names look like 'transformer_blocks.0.attn'",
    ),
    "dead glob": (
        {"op": CLEAR, "layers": ["*", "blocks.7"]},
        va.PatchError,
        "layers must match attention modules, got 'blocks.7'",
    ),
    "predicate of nothing": (
        {"op": CLEAR, "layers": lambda name: False},
        va.PatchError,
        "layers must leave at least one attention to route, got none: transformer_blocks.0.attn: not selected",
    ),
    "step number": ({"op": CLEAR, "steps": 3}, TypeError, "steps must be a range or a set of step numbers, got 3"),
    "steps text": (
        {"op": CLEAR, "steps": "0-3"},
        TypeError,
        "steps must be a range or a set of step numbers, got '0-3'",
    ),
    "step of text": ({"op": CLEAR, "steps": {"a"}}, TypeError, r"steps must hold integers, got \{'a'\}"),
    "step of bool": ({"op": CLEAR, "steps": [True]}, TypeError, r"steps must hold integers, got \[True\]"),
    "negative step": (
        {"op": CLEAR, "steps": {-1}},
        ValueError,
        r"steps must hold step numbers of at least 0, got \{-1\}",
    ),
    "no steps": (
        {"op": CLEAR, "steps": range(3, 3)},
        ValueError,
        r"steps must hold at least one step, got range\(3, 3\)",
    ),
    "grid number": ({"op": CLEAR, "grid": 4}, TypeError, r"grid must be \(Y, X\), \(T, Y, X\) or a TokenLayout, got 4"),
    "grid of floats": ({"op": CLEAR, "grid": (4.0, 6)}, TypeError, r"grid must be \(Y, X\), .*, got \(4.0, 6\)"),
    "1-D grid": ({"op": CLEAR, "grid": (4,)}, ValueError, r"grid must be \(Y, X\) or \(T, Y, X\) .*, got \(4,\)"),
    "empty axis": (
        {"op": CLEAR, "grid": (0, 6)},
        ValueError,
        r"grid must be .* at least 1 token per axis, got \(0, 6\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(flux: torch.nn.Module, case: str):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=f"^patch: {message}"):
        va.patch(flux, **arguments)
    assert not flux._forward_pre_hooks
    assert all(type(module.processor).__mro__[1] is object for module in flux.modules() if hasattr(module, "processor"))


@pytest.mark.parametrize("target", [3, None, "flux", torch.zeros(2)], ids=str)
def test_bad_targets(target):
    for function in (lambda: va.patch(target, CLEAR), lambda: va.unpatch(target), lambda: va.verify(target)):
        with pytest.raises(
            TypeError, match=f"target must be a diffusers pipeline or model, got {type(target).__name__}"
        ):
            function()


def test_a_model_without_attention():
    with pytest.raises(va.PatchError, match="target must be a model whose token layout is known, got Linear"):
        va.patch(torch.nn.Linear(2, 2), CLEAR)
    with pytest.raises(
        va.PatchError, match="layers must leave at least one attention to route, got none: no attention"
    ):
        va.patch(torch.nn.Linear(2, 2), CLEAR, grid=(2, 3))


def test_refused_models_say_why():
    import diffusers

    with torch.device("meta"):
        model = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=8)
    with pytest.raises(va.PatchError, match="got PriorTransformer: it predicts one image embedding"):
        va.patch(model, CLEAR)


def test_cross_attention_alone_is_nothing_to_route():
    with pytest.raises(
        va.PatchError, match=r"got none: blocks\.0\.attn2: cross-attention.*blocks\.0\.attn1: not selected"
    ):
        va.patch(WAN.model(), CLEAR, layers="*.attn2")


def test_one_grid_does_not_fit_a_unet():
    with pytest.raises(va.PatchError, match=r"grid must be None for UNet2DConditionModel, .*, got \(6, 10\)"):
        va.patch(UNET.model(), CLEAR, grid=(6, 10))


def test_steps_need_a_timestep():
    class Timeless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = FLUX.model().single_transformer_blocks[0].attn

        def forward(self, tokens):
            return self.attn(tokens)

    with pytest.raises(va.PatchError, match="steps must be None for Timeless, whose forward takes no timestep"):
        va.patch(Timeless(), CLEAR, grid=(4, 6), steps={0})


def test_context_parallelism_is_refused(flux: torch.nn.Module):
    processor = flux.transformer_blocks[0].attn.processor
    processor._parallel_config = object()
    with pytest.raises(
        va.PatchError, match=r"context parallelism must be off, got _parallel_config on 'transformer_blocks\.0\.attn'"
    ):
        va.patch(flux, CLEAR)
    del processor._parallel_config
    patch = va.patch(flux, CLEAR)
    processor._parallel_config = object()  # switched on after the patch
    try:
        with pytest.raises(va.PatchError, match=r"got parallel_config on 'transformer_blocks\.0\.attn'"):
            FLUX.run(flux)
    finally:
        del processor._parallel_config
        patch.remove()


def test_verify_refuses_a_patched_model(flux: torch.nn.Module):
    with (
        va.patch(flux, CLEAR),
        pytest.raises(va.PatchError, match="target must be unpatched, got a patched FluxTransformer2DModel"),
    ):
        va.verify(flux)


def test_verify_wants_inputs_for_what_it_does_not_know(flux: torch.nn.Module):
    class Unheard(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="inputs must be given for Unheard, got None"):
        va.verify(Unheard())


def test_load_state_dict_wants_the_keys_and_shapes_of_the_patch(flux: torch.nn.Module):
    with va.patch(flux, va.Clear(radius=2, down_factor=2)) as patch:
        key, *_ = state = patch.state_dict()
        with pytest.raises(KeyError, match=r"unexpected \['nothing'\]"):
            patch.load_state_dict({**state, "nothing": torch.zeros(1)})
        with pytest.raises(KeyError, match=rf"missing \['{key}'\]"):
            patch.load_state_dict({name: value for name, value in state.items() if name != key})
        with pytest.raises(ValueError, match=rf"{key} must have shape \(1, 1, 1, 2, 1, 2, 1\), got \(2, 2\)"):
            patch.load_state_dict({**state, key: torch.zeros(2, 2)})
        with pytest.raises(TypeError, match=f"load_state_dict: {key} must be a tensor, got a list"):
            patch.load_state_dict({**state, key: [1]})


def test_operator_must_be_a_dataclass(flux: torch.nn.Module):
    with pytest.raises(TypeError, match="op must be an operator object such as"):
        va.patch(flux, lambda *args, **kwargs: None)
    assert dataclasses.is_dataclass(CLEAR)


@dataclasses.dataclass(frozen=True)
class NoScale:
    def __call__(self, query, key, value, layout):
        return value


@dataclasses.dataclass(frozen=True)
class NoLayout:
    def __call__(self, query, key, value, *, scale=None):
        return value


@pytest.mark.parametrize("op", [NoScale(), NoLayout()], ids=lambda op: type(op).__name__)
def test_operator_must_take_the_arguments_of_operators(flux: torch.nn.Module, op):
    message = (
        r"op must be called as op\(query, key, value, layout, scale=None\), got "
        rf"{type(op).__name__}\(\) with \(query, key, value, .*\) \(.*\): mend its __call__"
    )
    with pytest.raises(TypeError, match=message):
        va.patch(flux, op)


@pytest.mark.parametrize("steps", [range(2, 10**12), range(10**12, 1, -1)], ids=str)
def test_a_long_range_of_steps_is_not_walked_through(flux: torch.nn.Module, steps: range):
    with va.patch(flux, CLEAR, steps=steps) as patch:
        assert patch.routed


@pytest.mark.parametrize("steps", [range(-1, 10**12), range(10**12, -2, -1)], ids=str)
def test_a_long_range_with_negative_steps(flux: torch.nn.Module, steps: range):
    with pytest.raises(ValueError, match=rf"steps must hold step numbers of at least 0, got range\({steps.start}"):
        va.patch(flux, CLEAR, steps=steps)
