"""Run a stock attention processor with only its attention call replaced.

A processor class is subclassed; the subclass runs upstream's own code object over a copy of its globals in which
`dispatch_attention_fn` (or `F.scaled_dot_product_attention`) is ours, whatever name it goes by there. Projections,
norms, rotary embeddings and outputs stay upstream's, so nothing is copied that an upgrade could outdate, and a class
that reaches those functions in another way (a local import, a closure) is reported instead of silently missed.

There is one subclass per (stock class, operator), never one per layer: torch.compile then needs one graph per kind of
block. What differs between layers is in two slots of the instance: `layer`, and `original`, the stock processor.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import dis
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vision_attn.patching.call import Attention, attend

Processor = Any
"""An instance of a diffusers attention processor class."""


class Overlay:
    """A namespace that differs from `base` in a few names only."""

    def __init__(self, base: Any, **names: Any) -> None:
        self.__dict__.update(names, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def with_globals(function: Any, **names: Any) -> Any:
    """The same code object, signature and closure over other globals: a snapshot of today's, with `names` changed."""
    twin = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__ = function.__annotations__
    twin.__doc__ = function.__doc__
    return twin


DISPATCH, SDPA = "dispatch_attention_fn", "scaled_dot_product_attention"

# Opcodes that stand between a name and its attribute without meaning anything.
_SILENT = ("EXTENDED_ARG", "CACHE", "NOP", "PUSH_NULL")


def attention_calls(stock: type, method: str = "__call__") -> list[tuple[str, ...]]:
    """How a method of `stock` spells the attention functions that can be replaced: a global's name, then attributes.

    `import torch.nn.functional as F` gives `("F", "scaled_dot_product_attention")`. Empty when there is none.
    """
    call = getattr(stock, method, None)
    code, namespace = getattr(call, "__code__", None), getattr(call, "__globals__", {})
    found: list[tuple[str, ...]] = []
    path: tuple[str, ...] = ()
    reached: Any = None
    for step in dis.get_instructions(code) if code is not None else ():
        if step.opname in _SILENT:
            continue
        if step.opname == "LOAD_GLOBAL":
            path, reached = (step.argval,), namespace.get(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(reached, types.ModuleType):
            path, reached = (*path, step.argval), getattr(reached, step.argval, None)
        else:
            path, reached = (), None
        if _attention_function(path, reached) and path not in found:
            found.append(path)
    return found


def _attention_function(path: tuple[str, ...], reached: Any) -> str | None:
    """Which of the two attention functions a name has led to."""
    if not callable(reached):
        return None
    if path[-1] == DISPATCH or reached is getattr(sys.modules.get("diffusers.models.attention_dispatch"), DISPATCH, 0):
        return DISPATCH
    return SDPA if path[-1] == SDPA or reached is nn.functional.scaled_dot_product_attention else None


def stock_class(processor: Processor) -> type:
    """The diffusers class of a processor, routed or not."""
    return getattr(type(processor), "stock_class", type(processor))


def is_routed(processor: Processor) -> bool:
    """Whether the processor is one of ours (its patch may have been removed since)."""
    return "stock_class" in vars(type(processor))


def stock_of(processor: Processor, fallback: Processor = None) -> Processor:
    """The stock processor behind a routed one; `fallback`, if of the same class, for one that was made by its class."""
    if getattr(processor, "original", None) is not None:
        return processor.original
    if type(fallback) is stock_class(processor):
        return fallback
    stock: Any = object.__new__(stock_class(processor))
    object.__setattr__(stock, "__dict__", processor.__dict__)
    return stock


class Running(threading.local):
    """The layer whose processor is running in this thread: the replaced function has no other way to know it."""

    def __init__(self) -> None:
        # An instance attribute from the start: torch.compile guards on where it is found.
        self.layer: Any = None


class Route:
    """The routed processor classes of one operator in one model.

    Args:
        operator: The operator object that takes the attention calls.
    """

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self._classes: dict[tuple[type, bool], type] = {}
        # diffusers looks processors up by exact class; the entries end with the last user of this route.
        weakref.finalize(self, _forget_metadata, self._classes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Route:
        return Route(self.operator)

    def routed(self, stock: type, learned: bool = False) -> type:
        """The subclass of processor class `stock`; with `learned`, one that can hold parameters (an `nn.Module`)."""
        key = (stock, learned and not issubclass(stock, nn.Module))
        if key not in self._classes:
            self._classes[key] = _routed_class(stock, self.operator, key[1])
            _copy_metadata(stock, self._classes[key])
        return self._classes[key]

    def twin(self, processor: Processor, layer: Any, learned: bool = False) -> Processor:
        """A routed stand-in for `processor`.

        It shares the attributes of the original (`_attention_backend`, IP-Adapter scales and weights), so that a change
        to either is seen by both. Only where a plain original gets a stand-in with parameters, which is a module and
        has state of its own, does a change to the original stay there.
        """
        twin: Any = object.__new__(self.routed(type(processor), learned))
        if isinstance(twin, nn.Module) and not isinstance(processor, nn.Module):
            nn.Module.__init__(twin)
            twin.__dict__.update(processor.__dict__)
        else:
            object.__setattr__(twin, "__dict__", processor.__dict__)
        object.__setattr__(twin, "layer", layer)
        object.__setattr__(twin, "original", processor)
        return twin


def _routed_class(stock: Any, operator: Any, learned: bool) -> type:
    running = Running()
    stock_call = stock.__call__
    routed_call = with_globals(stock_call, **replaced_names(stock, operator, running))

    # diffusers passes the arguments that the signature names and drops all others.
    @functools.wraps(stock_call)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if layer is None or not layer.installed:
            return stock_call(self, *args, **kwargs)
        outer, running.layer = running.layer, layer
        try:
            return routed_call(self, *args, **kwargs)
        finally:
            running.layer = outer

    body = {
        "__call__": call,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__slots__": ("layer", "original"),
        "__new__": _new,
        "__reduce__": _reduce,
        "__reduce_ex__": _reduce,
        "__copy__": _copy,
        "__deepcopy__": _deepcopy,
        "stock_class": stock,
    }
    if learned:
        body |= {"__setattr__": _setattr, "__delattr__": _delattr}
    bases = (stock, nn.Module) if learned else (stock,)
    return types.new_class(stock.__name__, bases, {}, lambda namespace: namespace.update(body))


def replaced_names(stock: Any, operator: Any, running: Any, method: str = "__call__") -> dict[str, Any]:
    """Globals of a method that lead to an attention function, changed to lead to ours."""
    namespace = getattr(stock, method).__globals__
    names: dict[str, Any] = {}
    for path in attention_calls(stock, method):
        modules = [namespace[path[0]]]
        for name in path[1:]:
            modules.append(getattr(modules[-1], name))
        genuine = modules.pop()
        dispatched = _attention_function(path, genuine) == DISPATCH
        replaced = _dispatch(genuine, operator, running) if dispatched else _sdpa(operator, running)
        _overlay(names, path, modules, replaced)
    if not names:
        raise TypeError(f"{stock.__qualname__} makes no attention call that can be replaced")
    return names


def _overlay(names: dict[str, Any], path: tuple[str, ...], modules: list[Any], function: Any) -> None:
    """Set `path` in `names` to `function`, over overlays of the `modules` that it leads through."""
    for name, module in zip(path, modules):  # noqa: B905 - the last name is the function's
        names = vars(names.setdefault(name, Overlay(module)))
    names[path[-1]] = function


def _dispatch(stock: Callable[..., torch.Tensor], operator: Any, running: Any) -> Callable[..., torch.Tensor]:
    """A stand-in for `dispatch_attention_fn`: tensors `[B, S, H, D]`."""

    def dispatch_attention_fn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: Any = None,
        **others: Any,
    ) -> torch.Tensor:
        def dense() -> torch.Tensor:
            return stock(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, **others
            )

        mask = attn_mask
        if isinstance(mask, torch.Tensor) and mask.shape == (query.shape[0], key.shape[1]):
            mask = mask[:, None, None, :]  # per sample in dispatch_attention_fn, while SDPA takes it for [S_q, S_k]
        unknown = [name for name in others if name not in ("backend", "parallel_config")]
        if attention_kwargs:
            unknown.append("attention_kwargs")
        parallel = others.get("parallel_config")
        call = Attention(query, key, value, mask, dropout_p, is_causal, scale, unknown, parallel)
        return attend(operator, running.layer, call, dense)

    return dispatch_attention_fn


def _sdpa(operator: Any, running: Any) -> Callable[..., torch.Tensor]:
    """A stand-in for `torch.nn.functional.scaled_dot_product_attention`: tensors `[B, H, S, D]`."""

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        def stock() -> torch.Tensor:
            grouped = {"enable_gqa": True} if enable_gqa else {}
            return nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **grouped
            )

        order = running.layer.order
        if query.ndim not in order.ranks:
            running.layer.note("dense", f"query has {query.ndim} dimensions, not {order.ranks[0]}", None)
            return stock()
        unknown = [] if attn_mask is None or order.takes_mask else ["attn_mask"]
        q, k, v = (order.heads_last(tensor) for tensor in (query, key, value))
        call = Attention(q, k, v, attn_mask, dropout_p, is_causal, scale, unknown)
        return order.heads_first(attend(operator, running.layer, call, lambda: order.heads_last(stock())), query)

    return scaled_dot_product_attention


def _new(cls: type, *args: Any, **kwargs: Any) -> Any:
    # diffusers makes processors again with `value.__class__()`: such an instance has no layer until the next forward.
    instance: Any = object.__new__(cls)
    if issubclass(cls, nn.Module):
        nn.Module.__init__(instance)  # the stock class does not, when it is no module itself
    object.__setattr__(instance, "layer", None)
    object.__setattr__(instance, "original", None)
    return instance


_MODULE_STATE = frozenset(vars(nn.Module()))


def _setattr(self: Any, name: str, value: Any) -> None:
    # A stand-in with parameters has attributes of its own: changes to them must outlive it, as in one without.
    nn.Module.__setattr__(self, name, value)
    if self.original is not None and name in self.__dict__.keys() - _MODULE_STATE:
        setattr(self.original, name, value)


def _delattr(self: Any, name: str) -> None:
    plain = name in self.__dict__
    nn.Module.__delattr__(self, name)
    if self.original is not None and plain and hasattr(self.original, name):
        delattr(self.original, name)


def _reduce(self: Any, protocol: int = 2) -> Any:
    # A pickle holds the stock processor and must load where this package is not installed: only the standard library's
    # own reconstructor may be named in it. Parameters registered in the model need a class that can hold them.
    stock = stock_class(self)
    if isinstance(self, nn.Module) and not issubclass(stock, nn.Module):
        return _stock_with_parameters, (stock, self.__dict__)
    return copyreg._reconstructor, (stock, object, None), self.__dict__  # type: ignore[attr-defined]


def _stock_with_parameters(stock: type, state: dict[str, Any]) -> Any:
    """A processor that computes as `stock` does and holds parameters: what a trainable one is saved as."""
    processor = _new(_stock_class_with_parameters(stock))
    processor.__dict__.update(state)
    return processor


@functools.cache
def _stock_class_with_parameters(stock: type) -> type:
    return _routed_class(stock, None, learned=True)  # without a layer it runs the stock code


def _copy(self: Any) -> Any:
    twin = object.__new__(type(self))
    object.__setattr__(twin, "__dict__", dict(self.__dict__))
    object.__setattr__(twin, "layer", self.layer)
    object.__setattr__(twin, "original", self.original)
    return twin


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    if self.layer is None:
        twin = _new(type(self))
        object.__setattr__(twin, "__dict__", copy.deepcopy(self.__dict__, memo))
        return twin
    return copy.deepcopy(self.layer, memo).make_twin(copy.deepcopy(self.original, memo))


def _copy_metadata(stock: type, routed: type) -> None:
    """Guiders that skip layers look processors up by exact class."""
    with contextlib.suppress(ImportError, ValueError):  # another diffusers; stock is not registered either
        from diffusers.hooks._helpers import AttentionProcessorRegistry as Registry

        Registry.register(routed, Registry.get(stock))


def _forget_metadata(classes: dict[tuple[type, bool], type]) -> None:
    helpers = sys.modules.get("diffusers.hooks._helpers")
    for routed in classes.values():
        if helpers is not None:
            helpers.AttentionProcessorRegistry._registry.pop(routed, None)
