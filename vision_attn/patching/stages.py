"""Operators that take turns over the denoising steps: `steps={range(20): one, range(20, 50): other}` of `patch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vision_attn.patching.parameters import initial_parameters
from vision_attn.patching.selection import check_operator
from vision_attn.patching.steps import check_steps


@dataclass(frozen=True)
class Stages:
    """Which operator serves which steps; the first stage that holds a step counts.

    It stands where an operator does in the plan of a patch; `Switch.stage` tells the layers which one is due.

    A layer whose maps are too coarse for one of the operators is dense in its steps.

    Args:
        steps: Steps of each stage.
        operators: Operator of each stage.
    """

    steps: tuple[range | frozenset[int], ...]
    operators: tuple[Any, ...]

    def __contains__(self, step: int) -> bool:
        return any(step in steps for steps in self.steps)

    def __str__(self) -> str:
        pairs = zip(self.operators, self.steps, strict=True)
        return ", ".join(f"{operator} in {_shown(steps)}" for operator, steps in pairs)

    def index(self, step: int) -> int:
        """Number of the stage that holds a step; 0 where none does."""
        return next((number for number, steps in enumerate(self.steps) if step in steps), 0)

    @property
    def wants_block_input(self) -> bool:
        """Whether any of the operators does."""
        return any(getattr(operator, "wants_block_input", False) for operator in self.operators)


def check_stages(op: Any, layers: Any, steps: Mapping[Any, Any]) -> Stages:
    """Validate a dict of operators by steps.

    Args:
        op: Left out, as the dict has the operators.
        layers: No dict of operators.
        steps: Operators by a range or frozenset of step numbers.

    Raises:
        TypeError: A key that holds no step numbers, a value that is no operator.
        ValueError: An empty dict, `op` or operators in `layers` as well, an operator with learned parameters.
    """
    if op is not None or isinstance(layers, Mapping):
        given = f"op={op}" if op is not None else "a dict as layers"
        raise ValueError(f"patch: op and operators in layers must be left out when steps is a dict, got {given}")
    if not steps:
        raise ValueError("patch: steps must hold at least one stage, got {}: write {range(20): va.AgentSD()}")
    stages = Stages(
        tuple(map(check_steps, steps)),
        tuple(check_operator(operator, "each operator in steps") for operator in steps.values()),
    )
    learned = next((operator for operator in stages.operators if initial_parameters(operator)), None)
    if learned is not None:
        raise ValueError(
            f"patch: steps must map to operators without learned parameters, got {learned}: patch it by itself"
        )
    return stages


def due(operator: Any, stage: int) -> Any:
    """The operator itself, or that of the stage."""
    return operator.operators[stage] if isinstance(operator, Stages) else operator


def too_coarse(operator: Any, size: int) -> str:
    """Why an operator, or all that take turns, leave out maps `size` times coarser than the finest; else empty.

    Operators tell their limit as `max_downsample`.
    """
    limits = _limits(operator)
    largest = max((limit for limit in limits if limit is not None), default=size)
    if None in limits or size <= largest:
        return ""
    return f"its maps are {size} times coarser, max_downsample is {largest}"


def any_limit(operator: Any) -> bool:
    """Whether an operator, or one of those that take turns, leaves out coarse maps."""
    return any(limit is not None for limit in _limits(operator))


def _limits(operator: Any) -> list[int | None]:
    operators = operator.operators if isinstance(operator, Stages) else (operator,)
    return [getattr(each, "max_downsample", None) for each in operators]


def _shown(steps: range | frozenset[int]) -> str:
    return str(steps if isinstance(steps, range) else set(steps))
