"""Swapping attention in timm's models: a module's class is changed to one whose attention call is ours.

timm has no processors: attention is a module whose `forward` calls `scaled_dot_product_attention`. Its class is swapped
for a subclass that runs the same code over other globals, and swapped back on removal; parameters, names and hooks of
the module stay what they are.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from vision_attn.errors import PatchError
from vision_attn.patching.cell import Cell, Switch
from vision_attn.patching.diffusers import Plan, call_module
from vision_attn.patching.hooks import LayoutFunction, ScopeHook
from vision_attn.patching.installation import Entry, Installation
from vision_attn.patching.layer import Layer
from vision_attn.patching.parameters import initial_parameters
from vision_attn.patching.report import Skipped
from vision_attn.patching.routing import Running, attention_calls, replaced_names, with_globals
from vision_attn.patching.selection import Rule
from vision_attn.patching.stages import any_limit
from vision_attn.patching.timm_layouts import FAMILIES, WHOLE_MAPS, Served, family_of

_POOLING = "it pools the tokens into a few of its own: cross-attention stays dense"
_UNFUSED = (
    "fused_attn is False, so that it makes no attention call: call "
    "timm.layers.set_fused_attn(True, experimental=True) before the model is created"
)


def is_timm(target: Any) -> bool:
    """Whether the target is a timm model, one of ours for timm, or a feature extractor around one."""
    return isinstance(target, nn.Module) and any(
        cls.__module__.startswith(("timm.", "vision_attn.backbones.")) for cls in type(call_module(target)).__mro__
    )


def timm_attention(target: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of a model that compute attention, with their names: those that call it, and those that say so."""
    for name, module in call_module(target).named_modules():
        named = "Attention" in _stock_class(module).__name__
        if _calls_attention(module) or (named and not any(map(_calls_attention, module.modules()))):
            yield name.replace("_orig_mod.", ""), module


def plan_timm(target: nn.Module, rules: Sequence[Rule], strict: bool) -> Plan:
    """Plan a patch of a timm model.

    Args:
        target: The model, its `torch.compile` wrapper, or the wrapper of `features_only=True`.
        rules: Which layers get which operator.
        strict: Raise when a self-attention call cannot go to its operator.

    Raises:
        PatchError: A family that is not served, a layer that is patched already.
    """
    model = call_module(target)
    _, whole_map = _whole_map(model)
    if whole_map is None and not any(family_of(_stock_class(module)) for _, module in timm_attention(target)):
        raise PatchError(_refusal(model))
    limited = next((rule.operator for rule in rules if any_limit(rule.operator)), None)
    if limited is not None and whole_map is None:
        raise PatchError(
            f"patch: max_downsample of {limited} must be None for {type(model).__name__}, it is for UNets: choose the "
            "layers with layers="
        )
    result = Plan(TimmInstallation(model, target, Switch(open=True), strict, None))
    cells: dict[nn.Module, Cell] = {}
    routes: dict[int, Any] = {}
    for name, module in timm_attention(target):
        rule = next((rule for rule in rules if rule.serves("", name)), None)
        served = "not selected by layers" if rule is None else _served(model, module, whole_map)
        if rule is None or isinstance(served, str):
            result.skipped.append(Skipped(name, str(served)))
            continue
        if _is_routed(module):
            holder = module.__dict__[_LAYER].operator
            raise PatchError(
                f"patch: each layer must be patched once, got {name!r}, which has {holder}: remove that patch or leave "
                "the layer out with layers="
            )
        scope = module if served.scope is None else served.scope
        if scope not in cells:
            cells[scope] = Cell()
            result.scopes.append((scope, served.layout, cells[scope]))
        route = routes.setdefault(id(rule.operator), ModuleRoute(rule.operator))
        stock, initial, order = type(module), initial_parameters(rule.operator), served.order
        layer = Layer(
            name, route, cells[scope], result.installation.switch, stock, strict, initial=initial, order=order
        )
        result.routed.append((module, layer))
    return result


def check_timm_arguments(target: nn.Module, **given: Any) -> None:
    """Refuse arguments of `patch` that have no meaning for a backbone.

    Raises:
        PatchError: One of them is set.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise PatchError(
                f"patch: {name} must be left out for the timm model {type(call_module(target)).__name__}, got "
                f"{value!r}: it runs in one step, tells its grid itself and registers no operator parameters"
            )


def _whole_map(model: nn.Module) -> tuple[nn.Module, Served] | tuple[None, None]:
    """The vision transformer in a model, if there is one, and the map that all of its attention sees."""
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in WHOLE_MAPS and cls.__module__.startswith("timm."):
                embed, layout = WHOLE_MAPS[cls.__name__]
                prefix = int(getattr(module, "num_prefix_tokens", 1))
                return module, Served(functools.partial(layout, prefix=prefix), scope=getattr(module, embed))
    return None, None


def _served(model: nn.Module, module: nn.Module, whole_map: Served | None) -> Served | str:
    """How an attention module gets its layout, or why it has none."""
    if "Pool" in type(module).__name__:
        return _POOLING
    family = family_of(_stock_class(module))
    served = whole_map if family is None else family(model, module)
    if isinstance(served, str):
        return served
    if not _calls_attention(module):
        return f"{type(module).__name__} makes no attention call that can be routed"
    if getattr(module, "fused_attn", True) is False:
        return _UNFUSED
    return "its tokens are on no map that is known here" if served is None else served


def _calls_attention(module: nn.Module) -> bool:
    return bool(attention_calls(_stock_class(module), "forward"))


def _refusal(model: nn.Module) -> str:
    families = sorted({name.rpartition(".")[0] for name in FAMILIES})
    return (
        f"patch: target must be a timm model of the classes {', '.join(WHOLE_MAPS)} (DeiT, DINOv2, DINOv3, SigLIP, "
        f"...) or of {', '.join(families)}, got {type(model).__name__}, whose attention tells no map of tokens or is "
        "no softmax call"
    )


class TimmInstallation(Installation):
    """The patched layers of a timm model.

    The patch embedding tells the grid, and every way into the model runs it first, or each attention module does:
    `forward_features` and `forward_intermediates`, which no hook of the model sees, are served too. So layouts outlive
    a forward.
    """

    def add(self, module: nn.Module, layer: Layer) -> None:
        """Swap the class of an attention module."""
        object.__setattr__(module, _LAYER, layer)
        route: Any = layer.route
        module.__class__ = route.routed(type(module))
        self.entries.append(Entry(module, layer, module))

    def scope_hook(self, module: nn.Module, layout: LayoutFunction, cell: Cell) -> ScopeHook:
        """The hook of the patch embedding, or of an attention module that tells its own grid."""
        hook = GridHook(module, layout, cell, self.switch)
        hook.backbone, _ = _whole_map(self.model)
        return hook

    def check(self) -> None:
        """Nothing replaces a module's class but ourselves."""

    def end(self) -> None:
        """Keep the layouts."""

    def remove(self) -> None:
        """Swap the classes back and take the hooks away. May be called again."""
        for entry in self.entries:
            entry.layer.installed = False
            if _is_routed(entry.module) and entry.module.__dict__.get(_LAYER) is entry.layer:
                entry.module.__class__ = _stock_class(entry.module)
                del entry.module.__dict__[_LAYER]
        self.unwatch()


class GridHook(ScopeHook):
    """The hook of what tells a grid.

    Whether blocks run again in the backward pass, without their patch embedding, is known to the model. An attention
    module that tells its own grid does so again.
    """

    backbone: nn.Module | None

    def checkpointing(self, module: nn.Module) -> bool:
        """Whether the model runs its blocks again in the backward pass."""
        return bool(getattr(self.backbone, "grad_checkpointing", False))


_LAYER = "_vision_attn_layer"


class ModuleRoute:
    """The routed module classes of one operator in one model.

    Args:
        operator: The operator object that takes the attention calls.
    """

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self._classes: dict[type, type] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleRoute:
        return self

    def routed(self, stock: type) -> type:
        """The subclass of module class `stock`."""
        if stock not in self._classes:
            self._classes[stock] = _routed_class(stock, self.operator)
        return self._classes[stock]


def _routed_class(stock: Any, operator: Any) -> type:
    running = Running()
    routed_forward = with_globals(stock.forward, **replaced_names(stock, operator, running, "forward"))

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer, running.layer = running.layer, self.__dict__[_LAYER]
        try:
            return routed_forward(self, *args, **kwargs)
        finally:
            running.layer = outer

    body = {
        "forward": forward,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__reduce_ex__": _reduce,
        "__deepcopy__": _deepcopy,
        "stock_class": stock,
    }
    return types.new_class(stock.__name__, (stock,), {}, lambda namespace: namespace.update(body))


def _is_routed(module: nn.Module) -> bool:
    return "stock_class" in vars(type(module))


def _stock_class(module: nn.Module) -> type:
    return vars(type(module)).get("stock_class", type(module))


def _reduce(self: Any, protocol: Any) -> Any:
    # A pickle holds the stock module and must load where this package is not installed.
    state = {name: value for name, value in self.__dict__.items() if name != _LAYER}
    return copyreg._reconstructor, (_stock_class(self), object, None), state  # type: ignore[attr-defined]


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    twin = object.__new__(type(self))
    memo[id(self)] = twin
    twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return twin
