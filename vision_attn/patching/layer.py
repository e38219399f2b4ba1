"""One patched attention layer: what its routed processor needs to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vision_attn.errors import PatchError
from vision_attn.layout import TokenLayout
from vision_attn.patching.cell import Cell, Switch
from vision_attn.patching.report import Call
from vision_attn.patching.routing import Processor, Route
from vision_attn.patching.stages import due
from vision_attn.patching.token_order import ROWS, Rows


@dataclass(eq=False)
class Layer:
    """A patched layer. It refers to no module, so that copying a processor does not copy the model.

    Attributes:
        name: Name of the attention module in the report.
        route: Routed classes of the layer's operator.
        cell: The token layout of the current forward, shared by all layers of the scope.
        switch: Whether operators are active in the current forward, shared by all layers of the model.
        original: The processor that comes back on removal.
        strict: Whether a call that the operator cannot honour is an error.
        image_only: Whether the layer's sequence is the image tokens alone.
        in_parts: Whether calls without the image are part of the layer's work (`Family.in_parts`).
        size: How many times coarser its map is than the finest of the model that is attended, on each axis.
        order: In what order its SDPA calls have their tokens.
        initial: Learned operator parameters of this layer, as they were made.
        trainable: Whether they are registered in the model, by the processor.
        calls: The calls since the forward (with `steps=`: the run) began.
        observers: Called as `observer(call, layout)` before attention is computed.
        block_input: What entered the transformer block around the layer, for an operator that wants it.
        served: Whether the operator has taken a call in this forward.
        unmatched: Why the layout did not describe a self-attention call of this forward; empty when it did.
        installed: False after removal: the routed processor then behaves as the stock one.
    """

    name: str
    route: Route
    cell: Cell
    switch: Switch
    original: Processor
    strict: bool = True
    image_only: bool = False
    in_parts: bool = False
    size: int = 1
    order: Rows = ROWS
    initial: dict[str, nn.Parameter] = field(default_factory=dict)
    trainable: bool = False
    calls: list[Call] = field(default_factory=list)
    observers: list[Callable[[Any, TokenLayout], None]] = field(default_factory=list)
    block_input: torch.Tensor | None = None
    served: bool = False
    unmatched: str = ""
    installed: bool = True

    def __post_init__(self) -> None:
        self._holder = self.initial  # where the parameters are: with `trainable`, among those of the processor

    @property
    def operator(self) -> Any:
        """The operator of this layer."""
        return self.route.operator

    @property
    def due_operator(self) -> Any:
        """The operator of this step, where several take turns."""
        return due(self.route.operator, self.switch.stage)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Learned operator parameters; with `trainable`, those that are registered now: loading may replace them."""
        return {name: self._holder[name] for name in self.initial}

    def make_twin(self, original: Processor = None) -> Processor:
        """A routed stand-in for a stock processor, by default the layer's current original."""
        learned = self.trainable and bool(self.initial)
        twin = self.route.twin(self.original if original is None else original, self, learned)
        self.register_parameters(twin)
        return twin

    def register_parameters(self, twin: Processor) -> None:
        """With `trainable`, register the parameters in a routed processor, and read them there from now on."""
        if self.trainable and self.initial:
            for name, parameter in self.parameters.items():
                twin.register_parameter(name, parameter)
            self._holder = twin._parameters

    def release_parameters(self) -> None:
        """Take registered parameters out of an original that holds parameters itself (IP-Adapter) and shares them."""
        held = self.original._parameters if isinstance(self.original, nn.Module) else {}
        self._holder = self.parameters
        for name, parameter in self.parameters.items():
            if held.get(name) is parameter:
                del held[name]

    def learned(self, query: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The learned parameters, on the device of the call."""
        return {name: parameter.to(query.device) for name, parameter in self.parameters.items()}

    def options(self, operator: Any, query: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """What an operator is called with beyond the tensors: learned parameters, and the input of the block."""
        options: dict[str, torch.Tensor | None] = dict(self.learned(query))
        if getattr(operator, "wants_block_input", False):
            options["block_input"], self.block_input = self.block_input, None
        return options

    def note(self, kind: str, reason: str, layout: TokenLayout | None) -> None:
        """List a call. Compiled graphs keep no list: a Python side effect per layer would cost a graph per layer."""
        if torch.compiler.is_compiling():
            return
        self.served = self.served or kind == "operator"
        call = Call(kind, reason, layout)
        if call not in self.calls:
            self.calls.append(call)

    def note_unmatched(self, reason: str, self_attention: bool) -> None:
        """List a call that the layout does not describe.

        Raises:
            PatchError: Inside a compiled graph, with `strict`: there is no list to look at after the forward.
        """
        if self_attention and not self.in_parts:
            if torch.compiler.is_compiling():
                if self.strict:
                    raise PatchError(
                        f"patch: {self.name!r} must be called with the tokens of its layout, {reason}: check grid= "
                        "(with reference images: a TokenLayout), or pass strict=False"
                    )
                return
            self.unmatched = reason
        self.note("dense", reason, None)
