"""The patched layers of one model, and the hooks that keep them informed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vision_attn.errors import PatchError
from vision_attn.patching.cell import Cell, Switch
from vision_attn.patching.hooks import (
    AfterForward,
    BeforeForward,
    BlockInputHook,
    CloseForward,
    Hook,
    LayoutFunction,
    ScopeHook,
)
from vision_attn.patching.layer import Layer
from vision_attn.patching.report import Skipped
from vision_attn.patching.routing import Processor, attention_calls, is_routed, stock_class, stock_of
from vision_attn.patching.stages import Stages
from vision_attn.patching.steps import OUTSIDE, StepTracker


@dataclass(eq=False)
class Entry:
    """A patched attention module and the processor put into it."""

    module: nn.Module
    layer: Layer
    twin: Processor


class _Running(dict[str, int]):
    """The thread that is in a forward, if one is; never copied with a model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Running:
        return _Running()


class Installation:
    """The patched layers of one model.

    Args:
        model: The model that holds the attention modules.
        hooked: The module that is called: `model`, or its `torch.compile` wrapper.
        switch: Shared by the layers.
        strict: Whether a lost layer or a forward without operator calls is an error.
        tracker: Follows the denoising steps, `None` when the operators are active in all of them.
    """

    def __init__(
        self, model: nn.Module, hooked: nn.Module, switch: Switch, strict: bool, tracker: StepTracker | None
    ) -> None:
        self.model = model
        self.hooked = hooked
        self.switch = switch
        self.strict = strict
        self.tracker = tracker
        self.entries: list[Entry] = []
        self.skipped: list[Skipped] = []
        self.lost: dict[str, str] = {}
        self._run = -1
        self._cells: list[Cell] = []
        self._thread = _Running()
        self._hooks: list[tuple[nn.Module, Hook]] = []

    @property
    def layers(self) -> list[Layer]:
        """The patched layers."""
        return [entry.layer for entry in self.entries]

    @property
    def current(self) -> bool:
        """Whether the listed calls are of the run that is followed; another denoiser may have begun a new one."""
        return self.tracker is None or self.tracker.run == self._run

    def add(self, module: nn.Module, layer: Layer) -> None:
        """Put a routed processor into an attention module."""
        twin = layer.make_twin()
        place(module, twin)
        self.entries.append(Entry(module, layer, twin))

    def watch(
        self,
        scopes: Sequence[tuple[nn.Module, LayoutFunction, Cell]],
        blocks: Sequence[tuple[nn.Module, Layer]] = (),
    ) -> None:
        """Register the hooks: one on the model, one on each scope, one on each block whose input a layer wants."""
        self._register(self.hooked, BeforeForward(self.hooked, self), before=True)
        for module, layout, cell in scopes:
            self._register(module, self.scope_hook(module, layout, cell), before=True)
            self._cells.append(cell)
        for block, layer in blocks:
            self._register(block, BlockInputHook(block, layer), before=True)
        self._register(self.hooked, AfterForward(self), before=False)
        self._register(self.hooked, CloseForward(self), before=False)

    def scope_hook(self, module: nn.Module, layout: LayoutFunction, cell: Cell) -> ScopeHook:
        """The hook of a scope."""
        return ScopeHook(module, layout, cell, self.switch)

    def enter(self) -> None:
        """Open a forward.

        Raises:
            PatchError: Another thread is in one; layers of both would read the same layout.
        """
        if self._cells and self._thread.setdefault("ident", threading.get_ident()) != threading.get_ident():
            raise PatchError(
                f"patch: a patched {type(self.model).__name__} must run in one thread at a time, got a forward in a "
                "second one: hold a lock around calls, or give each thread a copy.deepcopy of the model"
            )
        self.switch.open = True

    def leave(self) -> None:
        """Close the forward of this thread, if it has one."""
        if not self._cells or self._thread.get("ident") == threading.get_ident():
            self.end()
            self._thread.clear()

    def end(self) -> None:
        """Forget the layouts of a forward."""
        self.switch.open = False
        for cell in self._cells:
            cell.end()
        for layer in self.layers:
            layer.block_input = None

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Start a forward: forget the calls of the last one, or of the last run when steps are followed."""
        fresh = True
        if self.tracker is not None:
            self.tracker.advance(arguments)
            fresh, self._run = not self.current, self.tracker.run
            self.switch.active = self.tracker.active
            if isinstance(self.tracker.steps, Stages):
                self.switch.stage = self.tracker.steps.index(self.tracker.step)
            self.switch.reason = "" if self.switch.active else f"{OUTSIDE}{self.tracker.step} is not in steps"
        for layer in self.layers:
            layer.served, layer.unmatched = False, ""
            if fresh:
                layer.calls.clear()

    def check(self) -> None:
        """See that every layer still has its routed processor; route it again where diffusers replaced it.

        Raises:
            PatchError: With `strict`, a layer whose processor was set back or cannot be routed.
        """
        for entry in self.entries:
            current = entry.module.processor
            if current is entry.twin:
                self.lost.pop(entry.layer.name, None)
            else:
                self._replaced(entry, current)

    def _replaced(self, entry: Entry, current: Processor) -> None:
        layer = entry.layer
        if is_routed(current):
            if current.layer is layer:  # an earlier twin that was put back, as unfusing does
                layer.register_parameters(current)
                entry.twin, layer.original = current, getattr(current, "original", layer.original)
            elif current.layer is not None and current.layer.installed:
                self._lose(layer, f"another patch holds it ({current.layer.operator})")
            else:  # made again by its class without arguments, as IP-Adapter loading does
                self._route_again(entry, stock_of(current))
            return
        if type(current) is stock_class(entry.twin):
            self._lose(layer, f"its processor was set back to a stock {type(current).__name__}")
        elif not attention_calls(type(current)):
            self._lose(layer, f"its new processor {type(current).__name__} makes no attention call that can be routed")
        else:
            self._route_again(entry, current)

    def _route_again(self, entry: Entry, stock: Processor) -> None:
        # The processor that comes back on removal stays the same object as long as its class does.
        if type(stock) is not type(entry.layer.original):
            entry.layer.original = stock
        entry.twin = entry.layer.make_twin()
        place(entry.module, entry.twin)

    def _lose(self, layer: Layer, reason: str) -> None:
        message = (
            f"patch: {layer.name!r} must keep its routed processor, but {reason}: remove the patch and patch again"
        )
        if self.strict:
            raise PatchError(message)
        if self.lost.get(layer.name) != reason:
            self.lost[layer.name] = reason
            warnings.warn(message, stacklevel=6)

    def require_operator_calls(self) -> None:
        """Check after a forward that the operators took what they should have taken.

        Raises:
            PatchError: With `strict`: a layer whose self-attention never had the tokens of its layout, or a forward in
                which attention was computed and no operator took any.
        """
        if not self.strict or not self.switch.active:
            return
        called = [layer for layer in self.layers if layer.calls]
        idle = next((layer for layer in called if layer.unmatched and not layer.served), None)
        if idle is not None:
            raise PatchError(
                f"patch: {idle.name!r} must be called with the tokens of its layout, {idle.unmatched}: check grid=, "
                "leave the layer out with layers=, or pass strict=False"
            )
        if called and not any(layer.served for layer in called):
            raise PatchError(
                f"patch: a forward must have at least one operator call, got none in {len(called)} layers; "
                f"{called[0].name!r}: {called[0].calls[0].reason}: check grid=, or pass strict=False"
            )

    def remove(self) -> None:
        """Put the original processors back and take the hooks away. May be called again."""
        for entry in self.entries:
            entry.layer.installed = False
            current: Any = getattr(entry.module, "processor", None)
            if current is entry.twin:
                place(entry.module, entry.layer.original)
            elif is_routed(current) and (current.layer is None or not current.layer.installed):
                place(entry.module, stock_of(current, entry.layer.original))
            entry.layer.release_parameters()
        self._restore_remembered()
        self.unwatch()

    def unwatch(self) -> None:
        """Take the hooks away."""
        for module, hook in self._hooks:
            _unregister(module, hook)
        self._hooks = []

    def _restore_remembered(self) -> None:
        # Old-style fuse_qkv_projections() remembers processors and puts them back when unfused.
        remembered = getattr(self.model, "original_attn_processors", None)
        if not isinstance(remembered, dict):
            return
        for name, processor in remembered.items():
            if is_routed(processor) and processor.layer is not None and not processor.layer.installed:
                remembered[name] = stock_of(processor)

    def _register(self, module: nn.Module, hook: Hook, before: bool) -> None:
        if before:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            module.register_forward_hook(hook, always_call=isinstance(hook, CloseForward))
        self._hooks.append((module, hook))


def place(module: nn.Module, processor: Processor) -> None:
    """Set the processor of an attention module, with no regard to what `set_processor` would check or log."""
    if not isinstance(processor, nn.Module):
        module._modules.pop("processor", None)
    module.processor = processor


def installations(model: nn.Module) -> list[Installation]:
    """The installations that are active on a model, the oldest first."""
    return [hook.installation for hook in model._forward_pre_hooks.values() if isinstance(hook, BeforeForward)]


def _unregister(module: nn.Module, hook: Hook) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, value in hooks.items() if value is hook]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
