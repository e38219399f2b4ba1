"""Neighborhood attention of the LTX-2.5 diffusion video decoder in linear memory.

The decoder is built on 3-D neighborhood attention. Upstream's default processor states the windows as a FlexAttention
block mask over all pairs of token blocks, which outgrows any memory at production sizes, and the other one needs NATTEN
on a GPU. The processor here gives the same windows to an operator, so that any backend of this package serves them.

The decoder builds the block mask ahead of its layers whenever their processor is an instance of the stock class. This
processor is none on purpose, so that the mask is never built.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vision_attn.errors import PatchError, UnsupportedError
from vision_attn.layout import TokenLayout
from vision_attn.operators import Neighborhood
from vision_attn.patching.call import check_output, is_dense
from vision_attn.patching.cell import Cell, Switch
from vision_attn.patching.diffusers import Plan, _original, attention_modules, call_module
from vision_attn.patching.installation import Installation
from vision_attn.patching.layer import Layer
from vision_attn.patching.report import Skipped
from vision_attn.patching.routing import Processor, Route
from vision_attn.patching.selection import Rule

CLASSES = ("LTX2VideoDiffusionDecoderModel", "LTX2VideoDiffusionDecoder3d")


@dataclasses.dataclass(frozen=True)
class OwnWindow:
    """Stands for `Neighborhood` with the kernel size of the layer it is planned for."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Never called: planning resolves it."""
        raise TypeError("OwnWindow: it must be resolved by plan_decoder before it is called")


def is_decoder(model: nn.Module) -> bool:
    """Whether the model is the LTX-2.5 diffusion video decoder."""
    return any(cls.__name__ in CLASSES for cls in type(call_module(model)).__mro__)


class WindowProcessor:
    """Attention processor that gives the window of a decoder layer to the layer's operator.

    A subclass per stock processor class carries that class as `stock_class`.
    """

    layer: DecoderLayer

    def __call__(self, attn: Any, hidden_states: torch.Tensor, block_mask: Any = None) -> torch.Tensor:
        """Attend on `hidden_states` `[B, T, Y, X, C]`.

        Args:
            attn: The attention module: projections, norms and rotary embeddings are its own.
            hidden_states: Channels-last video features.
            block_mask: Never read: the window comes from the operator.
        """
        layer = self.layer
        if not layer.installed or is_dense(layer.operator):
            layer.note("operator" if layer.installed else "dense", "", None)
            return layer.original(attn, hidden_states)
        query, key, value = (tensor.flatten(1, 3) for tensor in attn.project_qkv(hidden_states))
        layout = TokenLayout(tuple(hidden_states.shape[1:4]))
        output = _operate(layer, attn.kernel_size, query, key, value, layout)
        return attn.to_out[0](output.flatten(-2).view(hidden_states.shape))

    def __reduce__(self) -> Any:
        # A pickle holds the stock processor: it must load where this package is not installed.
        stock = self.layer.original
        return copyreg._reconstructor, (type(stock), object, None), stock.__dict__  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> WindowProcessor:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.layer = copy.deepcopy(self.layer, memo)
        return twin


def _operate(
    layer: Layer,
    kernel_size: Sequence[int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
) -> torch.Tensor:
    """The layer's operator on `[B, S, H, D]`; its own window where the operator cannot serve the call."""
    # The query is scaled already.
    try:
        output = layer.operator(query, key, value, layout, scale=1.0)
    except UnsupportedError as error:
        if layer.strict:
            raise PatchError(
                f"patch: {layer.operator} cannot honour the call of {layer.name!r}: {error}: leave the layer out with "
                "layers=, or pass strict=False to keep its own window"
            ) from error
        layer.note("dense", str(error), layout)
        return Neighborhood(tuple(kernel_size))(query, key, value, layout, scale=1.0)
    check_output(layer.operator, layer.name, output, query, value)
    layer.note("operator", "", layout)
    return output


class DecoderLayer(Layer):
    """A patched attention layer of the decoder."""

    def make_twin(self, original: Processor = None) -> Processor:
        """A processor that stands in for the layer's current original."""
        stock: Any = type(self.original)
        twin = processor_class(stock)()
        twin.layer = self
        return twin


@functools.cache
def processor_class(stock: Any) -> type[WindowProcessor]:
    """The stand-in for one stock processor class, which it names but does not extend."""
    return type(stock.__name__, (WindowProcessor,), {"stock_class": stock, "__doc__": WindowProcessor.__doc__})


def check_arguments(model: nn.Module, **given: Any) -> None:
    """Refuse arguments of `patch` that have no meaning for the decoder.

    Raises:
        PatchError: One of them is set.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise PatchError(
                f"patch: {name} must be left out for {type(call_module(model)).__name__}, got {value!r}: its layers "
                "know their grid, run in one step and have no learned windows"
            )


def plan_decoder(prefix: str, target: nn.Module, rules: Sequence[Rule], strict: bool) -> Plan:
    """Plan a patch of the decoder.

    Args:
        prefix: Put before the names of its layers.
        target: The decoder, or its `torch.compile` wrapper.
        rules: Which layers get which operator; `OwnWindow()` is the layer's own window.
        strict: Raise when a layer lost its processor or its operator cannot serve a call.

    Raises:
        PatchError: A layer that is patched already.
    """
    model = call_module(target)
    result = Plan(Installation(model, target, Switch(), strict, None))
    for name, module in attention_modules(model):
        shown = prefix + name
        rule = next((rule for rule in rules if rule.serves(prefix, name)), None)
        if rule is None:
            result.skipped.append(Skipped(shown, "not selected by layers"))
            continue
        window: Any = module.kernel_size
        operator = Neighborhood(tuple(window)) if isinstance(rule.operator, OwnWindow) else rule.operator
        original = _original(shown, module.processor)
        layer = DecoderLayer(shown, Route(operator), Cell(), result.installation.switch, original, strict)
        result.routed.append((module, layer))
    return result
