"""The patched layers of one model, and the hooks that keep them informed."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vision_attn.errors import PatchError
from vision_attn.layout import TokenLayout
from vision_attn.patching.cell import Cell, Switch
from vision_attn.patching.layer import Layer
from vision_attn.patching.report import Skipped
from vision_attn.patching.routing import Processor, attention_call, is_routed, stock_class, stock_of
from vision_attn.patching.steps import StepTracker

LayoutFunction = Callable[[nn.Module, Mapping[str, Any]], "TokenLayout | None"]


@dataclass(eq=False)
class Entry:
    """A patched attention module and the processor put into it."""

    module: nn.Module
    layer: Layer
    twin: Processor


class _Hook:
    """A hook on a module.

    A pickle stores it as one that does nothing: a saved model must load without this package.

    torch.compile calls the hooks of the module it is given outside of the graph, where reading tensor values (position
    ids, timesteps) and Python lists is free. There the hook's frame is kept from being compiled, and its work with it.
    Hooks of submodules, and those of `module.compile()`, are traced into the graph: `traced` is what they do there.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """Called by torch, with the keyword arguments or the output as the last argument."""
        if torch.compiler.is_compiling():
            self.traced(module, args, last)
        else:
            self.untraced(module, args, last)

    def run(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """The work of the hook."""
        raise NotImplementedError

    def traced(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """The work of the hook inside a graph."""

    @torch.compiler.disable
    def untraced(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """The work of the hook outside of graphs."""
        self.run(module, args, last)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


with contextlib.suppress(ImportError):  # not public: without it, models with position ids compile by their blocks only
    from torch._dynamo.eval_frame import skip_code

    skip_code(_Hook.__call__.__code__)


class ScopeHook(_Hook):
    """Forward pre-hook that writes the token layout of a scope's call into its cell.

    Args:
        module: The scope: the model, or one of its levels.
        layout: `layout(module, arguments by name)` gives the layout or `None`.
        cell: Where to write it.
    """

    def __init__(self, module: nn.Module, layout: LayoutFunction, cell: Cell) -> None:
        self.layout = layout
        self.cell = cell
        self.names, self.defaults = forward_arguments(module)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Write the layout of this call."""
        module = getattr(module, "_orig_mod", module)
        layout = self.layout(module, bind(self.names, self.defaults, args, kwargs))
        if module.training and getattr(module, "gradient_checkpointing", False) and not torch.compiler.is_compiling():
            self.cell.begin(layout)
        else:
            self.cell.layout = layout
        if self.cell.layout is None:
            self.cell.reason = "the token layout of this call is not known"

    def traced(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """Write the layout inside a graph: possible where it comes from shapes."""
        self.run(module, args, last)


class BeforeForward(_Hook):
    """Forward pre-hook on the model: see that the patch is still there, follow the denoising steps.

    Args:
        module: The model, for the names of its forward arguments.
        installation: Its patched layers.
    """

    def __init__(self, module: nn.Module, installation: Installation) -> None:
        self.installation = installation
        self.names, self.defaults = forward_arguments(module)

    def traced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what a graph cannot do."""
        if self.installation.tracker is not None:
            raise PatchError(
                "patch: steps= must be followed outside of compiled code, got a model inside a graph: "
                "compile the model itself or its blocks, or leave steps out"
            )

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward."""
        self.installation.check()
        self.installation.begin(bind(self.names, self.defaults, args, kwargs))


class AfterForward(_Hook):
    """Forward hook on the model: operator calls that should have been and were not are an error when strict.

    Args:
        installation: The patched layers of the model.
    """

    def __init__(self, installation: Installation) -> None:
        self.installation = installation

    def run(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End a forward."""
        self.installation.require_operator_calls()


def forward_arguments(module: nn.Module) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of a module's forward arguments in order, and the defaults. Read once: binding is then traceable."""
    module = getattr(module, "_orig_mod", module)
    parameters = [
        parameter
        for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    names = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return tuple(names), defaults


def bind(
    names: Sequence[str], defaults: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name, defaults applied."""
    call = dict(defaults)
    for name, value in zip(names, args):  # noqa: B905 - fewer positional arguments than names are the normal case
        call[name] = value
    call.update(kwargs)
    return call


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
        self._hooks: list[tuple[nn.Module, _Hook]] = []

    @property
    def layers(self) -> list[Layer]:
        """The patched layers."""
        return [entry.layer for entry in self.entries]

    def add(self, module: nn.Module, layer: Layer) -> None:
        """Put a routed processor into an attention module."""
        twin = layer.make_twin()
        place(module, twin)
        self.entries.append(Entry(module, layer, twin))

    def watch(self, scopes: Sequence[tuple[nn.Module, LayoutFunction, Cell]]) -> None:
        """Register the hooks: one on the model, one on each scope."""
        self._register(self.hooked, BeforeForward(self.hooked, self), before=True)
        for module, layout, cell in scopes:
            self._register(module, ScopeHook(module, layout, cell), before=True)
        self._register(self.hooked, AfterForward(self), before=False)

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Start a forward: forget the calls of the last one, or of the last run when steps are followed."""
        fresh = True
        if self.tracker is not None:
            fresh = self.tracker.advance(arguments)
            self.switch.active = self.tracker.active
            self.switch.reason = "" if self.switch.active else f"denoising step {self.tracker.step} is not in steps"
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
                entry.twin, layer.original = current, getattr(current, "original", layer.original)
            elif current.layer is not None and current.layer.installed:
                self._lose(layer, f"another patch holds it ({current.layer.operator})")
            else:  # made again by its class without arguments, as IP-Adapter loading does
                self._route_again(entry, stock_of(current))
            return
        if type(current) is stock_class(entry.twin):
            self._lose(layer, f"its processor was set back to a stock {type(current).__name__}")
        elif attention_call(type(current)) is None:
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

    def _register(self, module: nn.Module, hook: _Hook, before: bool) -> None:
        if before:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            module.register_forward_hook(hook)
        self._hooks.append((module, hook))


def place(module: nn.Module, processor: Processor) -> None:
    """Set the processor of an attention module, with no regard to what `set_processor` would check or log."""
    if not isinstance(processor, nn.Module):
        module._modules.pop("processor", None)
    module.processor = processor


def installations(model: nn.Module) -> list[Installation]:
    """The installations that are active on a model, the oldest first."""
    return [hook.installation for hook in model._forward_pre_hooks.values() if isinstance(hook, BeforeForward)]


def _unregister(module: nn.Module, hook: _Hook) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, value in hooks.items() if value is hook]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
