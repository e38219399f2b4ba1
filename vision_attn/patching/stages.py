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
    def max_downsample(self) -> int | None:
        """That of all operators."""
        return getattr(self.operators[0], "max_downsample", None)

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
        ValueError: An empty dict, `op` or operators in `layers` as well, operators that cannot take turns.
    """
    if op is not None or isinstance(layers, Mapping):
        given = f"op={op}" if op is not None else "a dict as layers"
        raise ValueError(f"patch: op and operators in layers must be left out when steps is a dict, got {given}")
    if not steps:
        raise ValueError("patch: steps must hold at least one stage, got {}: write {range(20): va.AgentSD()}")
    stages = Stages(tuple(map(check_steps, steps)), tuple(map(check_operator, steps.values())))
    learned = next((operator for operator in stages.operators if initial_parameters(operator)), None)
    if learned is not None:
        raise ValueError(
            f"patch: steps must map to operators without learned parameters, got {learned}: patch it by itself"
        )
    limits = [getattr(operator, "max_downsample", None) for operator in stages.operators]
    if any(limit != limits[0] for limit in limits):
        raise ValueError(
            f"patch: steps must map to operators of one max_downsample, got {limits}: choose the layers with layers="
        )
    return stages


def _shown(steps: range | frozenset[int]) -> str:
    return str(steps if isinstance(steps, range) else set(steps))
