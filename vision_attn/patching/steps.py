"""Which denoising step a forward belongs to."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from vision_attn.errors import PatchError

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


def check_steps(steps: Any) -> range | frozenset[int]:
    """Validate `steps` of `patch`.

    Args:
        steps: A range or a collection of step numbers, each at least 0.

    Raises:
        TypeError: Not a collection of integers.
        ValueError: Empty, or a negative step.
    """
    if isinstance(steps, (str, bytes, Mapping)) or not isinstance(steps, Iterable):
        raise TypeError(
            f"patch: steps must be a range or a set of step numbers, got {steps!r}: write range(2, 20) or {{0, 3}}"
        )
    numbers = steps if isinstance(steps, range) else frozenset(steps)
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise TypeError(f"patch: steps must hold integers, got {steps!r}: write range(2, 20) or {{0, 3}}")
    if len(numbers) == 0:
        raise ValueError(f"patch: steps must hold at least one step, got {steps!r}: leave it out to patch every step")
    if min(numbers) < 0:
        raise ValueError(f"patch: steps must hold step numbers of at least 0, got {steps!r}: the first step is 0")
    return numbers


class StepTracker:
    """Counts denoising steps over all denoisers of a patch.

    In a pipeline a run begins with a new `scheduler.timesteps` tensor, and every timestep value not seen in the run is
    a new step: the passes of classifier-free guidance and the second evaluation of a Heun step belong to one step. A
    model without its pipeline is followed by its timesteps alone: they move in one direction through a run.

    Args:
        steps: The steps in which operators are active.
        pipeline: The pipeline whose scheduler tells the runs; held weakly.
    """

    def __init__(self, steps: range | frozenset[int], pipeline: Any = None) -> None:
        self.steps = steps
        self.step = -1
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._timesteps: Any = None
        self._seen: list[float] = []
        self._direction = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> StepTracker:
        # Copied together with its pipeline it follows the copy; a model copied alone has no scheduler any more.
        pipeline = None if self._pipeline is None else self._pipeline()
        twin = StepTracker(copy.deepcopy(self.steps, memo), memo.get(id(pipeline)))
        memo[id(self)] = twin
        return twin

    @property
    def active(self) -> bool:
        """Whether the current step is one of `steps`."""
        return self.step in self.steps

    def advance(self, arguments: Mapping[str, Any]) -> bool:
        """Note the timestep of a forward; tells whether a new run has begun.

        Args:
            arguments: The model's forward arguments by name.

        Raises:
            PatchError: The model is called without a timestep.
        """
        value = _timestep(arguments)
        timesteps = self._scheduled()
        if timesteps is None:
            return self._follow(value)
        begins = timesteps is not self._timesteps
        if begins:
            self._timesteps, self._seen = timesteps, []
        if value not in self._seen:
            self._seen.append(value)
        self.step = self._seen.index(value)
        return begins

    def _scheduled(self) -> Any:
        pipeline = None if self._pipeline is None else self._pipeline()
        return getattr(getattr(pipeline, "scheduler", None), "timesteps", None)

    def _follow(self, value: float) -> bool:
        if not self._seen:
            self._seen, self.step = [value], 0
            return True
        change = value - self._seen[-1]
        if change == 0:
            return False
        direction = 1 if change > 0 else -1
        if self._direction in (0, direction):
            self._direction, self.step = direction, self.step + 1
            self._seen = [value]
            return False
        self._direction, self.step, self._seen = 0, 0, [value]
        return True


def _timestep(arguments: Mapping[str, Any]) -> float:
    for name in TIMESTEP_NAMES:
        value = arguments.get(name)
        if value is not None:
            # Per-token timesteps: conditioning tokens stand at 0, so the largest value is the step's.
            return float(value.max()) if hasattr(value, "max") else float(value)
    raise PatchError("patch: steps= needs a model that is called with a timestep, got a call without: leave steps out")
