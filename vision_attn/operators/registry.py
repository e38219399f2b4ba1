"""Operators by name: registration, listing and the text form `name(field=value)`."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

_OPERATORS: dict[str, type] = {}

T = TypeVar("T", bound=type)


def register_operator(name: str) -> Callable[[T], T]:
    """Register a frozen dataclass as the attention operator `name`.

    The class needs `__call__(query, key, value, layout, scale=None)` on `[B, S, H, D]`. `mask(layout)` and
    `cost(layout, heads, head_dim)` are optional: without them the operator counts as "no masked softmax" and as of
    unknown cost. One with a mask promises to be the softmax of scaled scores over what its mask shows: `patch` computes
    it so, densely, in calls with a bias that `__call__` refuses. `str(operator)` becomes the text that `parse` reads.

    Args:
        name: Lower-case identifier, used in `parse` and on the command line.

    Raises:
        TypeError: the class is not a frozen dataclass or cannot be called.
        ValueError: the name is no identifier or is taken by another class.

    Example:
        >>> import dataclasses, vision_attn as va
        >>> from vision_attn.operators.registry import unregister_operator
        >>> @va.register_operator("mean")
        ... @dataclasses.dataclass(frozen=True)
        ... class Mean:
        ...     weight: float = 1.0
        ...     def __call__(self, query, key, value, layout, scale=None):
        ...         return self.weight * value.mean(1, keepdim=True).expand_as(value)
        >>> str(va.parse("mean(weight=0.5)"))
        'mean(weight=0.5)'
        >>> unregister_operator("mean")
    """
    if not (isinstance(name, str) and name.isidentifier() and name == name.lower()):
        raise ValueError(f"register_operator: name must be a lower-case identifier, got {name!r}")

    def register(cls: T) -> T:
        _check_class(name, cls)
        cls.operator_name = name  # type: ignore[attr-defined]
        cls.__str__ = _text_form  # type: ignore[method-assign, assignment]
        for method in ("mask", "cost"):
            if not hasattr(cls, method):
                setattr(cls, method, _unknown)
        _OPERATORS[name] = cls
        return cls

    return register


def unregister_operator(name: str) -> None:
    """Forget the operator `name`; unknown names are ignored."""
    _OPERATORS.pop(name, None)


def operators() -> dict[str, type]:
    """All registered operators: name to class, in order of registration."""
    return dict(_OPERATORS)


def parse(text: str) -> Any:
    """Make an operator from its text form, such as `"clear(radius=16, down_factor=4)"` or `"dense"`.

    Args:
        text: `name` or `name(field=value, ...)`; values are Python literals, positional values are taken in order.

    Raises:
        TypeError: `text` is not a string.
        ValueError: bad syntax, unknown operator or field, a value that the operator refuses.
    """
    if not isinstance(text, str):
        raise TypeError(f"parse: text must be a string such as 'clear(radius=8)', got {text!r}")
    name, args, kwargs = _split(text)
    if name not in _OPERATORS:
        raise ValueError(f"parse: text must name one of {', '.join(sorted(_OPERATORS))}, got {text!r}")
    cls = _OPERATORS[name]
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    unknown = [key for key in kwargs if key not in fields]
    if unknown or len(args) > len(fields):
        what = f"{unknown[0]!r}" if unknown else f"{len(args)} positional values"
        raise ValueError(f"parse: {name} takes the fields {', '.join(fields) or '(none)'}, got {what} in {text!r}")
    try:
        return cls(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"parse: {text!r} does not make a {name} operator: {error}") from error


def _split(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    problem = f"parse: text must read name(field=value, ...) with literal values, got {text!r}"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(problem) from error
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(problem)
    try:
        args = [ast.literal_eval(arg) for arg in node.args]
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(problem) from error
    if len(kwargs) < len(node.keywords):
        raise ValueError(f"parse: text must give each field once, got {text!r}")
    return node.func.id, args, kwargs


def _check_class(name: str, cls: type) -> None:
    if not (dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise TypeError(
            f"register_operator: {name!r} must be a frozen dataclass, got {cls!r}: add @dataclass(frozen=True)"
        )
    if "__call__" not in dir(cls) or not any("__call__" in vars(base) for base in cls.__mro__[:-1]):
        raise TypeError(f"register_operator: {name!r} must define __call__(query, key, value, layout, scale=None)")
    taken = _OPERATORS.get(name)
    # The same class defined again (a reloaded module, a notebook cell) replaces itself.
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"register_operator: name must be free, got {name!r}, which is {taken.__module__}.{taken.__qualname__}"
        )


def _text_form(self: Any) -> str:
    fields = [field for field in dataclasses.fields(self) if field.init]
    shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields if _differs_from_default(self, f)]
    return f"{self.operator_name}({', '.join(shown)})"


def _differs_from_default(self: Any, field: dataclasses.Field[Any]) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(getattr(self, field.name) != field.default_factory())
    return field.default is dataclasses.MISSING or getattr(self, field.name) != field.default


def _unknown(self: Any, *args: Any, **kwargs: Any) -> None:
    """Not known for this operator."""
    return None
