"""Which attention modules get which operator: the arguments `op` and `layers` of `patch`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from vision_attn.errors import PatchError


@dataclasses.dataclass(frozen=True)
class Rule:
    """One operator and the modules it is for.

    Attributes:
        matches: Tells whether the rule is for the module of that name.
        operator: The operator object.
        pattern: The glob behind `matches`, `None` for a predicate or a rule for every module.
    """

    matches: Callable[[str], bool]
    operator: Any
    pattern: str | None = None

    def serves(self, prefix: str, name: str) -> bool:
        """Whether the rule is for a module, named with or without the prefix of its model."""
        return self.matches(prefix + name) or self.matches(name)


def make_rules(op: Any, layers: Any) -> list[Rule]:
    """Turn `op` and `layers` into rules; the first that matches a name wins.

    Args:
        op: An operator object, `None` when `layers` is a dict.
        layers: `None`, a glob, a collection of globs, a predicate on module names, or `{glob: operator}`.

    Raises:
        TypeError: `op` is no operator object, or `layers` none of the forms above.
        ValueError: `op` with a dict, neither of the two, or empty `layers`.
    """
    if isinstance(layers, Mapping):
        if op is not None:
            raise ValueError(f"patch: op must be left out when layers is a dict of operators, got {op}")
        _require_entries(layers)
        return [_glob(pattern, check_operator(operator)) for pattern, operator in layers.items()]
    if op is None:
        raise ValueError(
            "patch: op must be an operator such as va.Clear(radius=8), got None: only layers={glob: op} replaces it"
        )
    return rules_for(check_operator(op), layers)


def rules_for(op: Any, layers: Any) -> list[Rule]:
    """Rules for one operator.

    Args:
        op: What the rules hold.
        layers: `None`, a glob, a collection of globs, a predicate on module names.

    Raises:
        TypeError: `layers` is none of these.
        ValueError: Empty `layers`.
    """
    if layers is None:
        return [Rule(lambda name: True, op)]
    if isinstance(layers, str):
        return [_glob(layers, op)]
    if callable(layers):
        return [Rule(layers, op)]
    if isinstance(layers, Iterable):
        patterns = list(layers)
        _require_entries(patterns)
        return [_glob(pattern, op) for pattern in patterns]
    raise TypeError(f"patch: layers must be a glob, a list of globs, a predicate or {{glob: op}}, got {layers!r}")


def check_operator(op: Any, name: str = "op") -> Any:
    """Return `op` if it is an operator object.

    Args:
        op: What the user gave.
        name: The argument in which it stands.

    Raises:
        TypeError: A text, a class, something that is no operator, or one that cannot be called as operators are.
    """
    if isinstance(op, str):
        raise TypeError(f"patch: {name} must be an operator object, got the text {op!r}: write va.parse({op!r})")
    if isinstance(op, type):
        given = op.__name__
        raise TypeError(f"patch: {name} must be an operator object, got the class {given}: write {given}(...)")
    if not (callable(op) and dataclasses.is_dataclass(op)):
        raise TypeError(
            f"patch: {name} must be an operator object such as va.Clear(radius=8), got {op!r}: va.operators() lists "
            "them, @va.register_operator adds one"
        )
    operator: Any = op
    signature = inspect.signature(operator)
    try:
        signature.bind_partial("query", "key", "value", "layout", scale=None)
    except TypeError as error:
        raise TypeError(
            f"patch: {name} must be called as op(query, key, value, layout, scale=None), got {op} with {signature} "
            f"({error}): mend its __call__"
        ) from error
    return op


def require_matches(rules: Sequence[Rule], names: Iterable[tuple[str, str]]) -> None:
    """Check that every glob names at least one attention module, given by prefix and name.

    Raises:
        PatchError: A glob that matches nothing.
    """
    names = list(names)
    for rule in rules:
        if rule.pattern is not None and not any(rule.serves(*name) for name in names):
            shown = ", ".join(repr(prefix + name) for prefix, name in names[:3])
            raise PatchError(
                f"patch: layers must match attention modules, got {rule.pattern!r}: names look like {shown}"
            )


def _glob(pattern: Any, op: Any) -> Rule:
    if not isinstance(pattern, str):
        raise TypeError(f"patch: layers must hold globs on module names, got {pattern!r}: write '*.attn1'")
    return Rule(lambda name: fnmatchcase(name, pattern), op, pattern)


def _require_entries(layers: Any) -> None:
    if len(layers) == 0:
        raise ValueError(f"patch: layers must name at least one layer, got {layers!r}: leave it out to patch all")
