"""Which denoising step a forward belongs to."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from vision_attn.errors import PatchError


class Steps(Protocol):
    """What holds step numbers: a range, a frozenset, or `Stages`."""

    def __contains__(self, step: int, /) -> bool: ...


OUTSIDE = "denoising step "  # how the reason of a call begins whose step is not one of `steps`
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
    ends = (*numbers[:1], *numbers[-1:]) if isinstance(numbers, range) else numbers  # a range may be endless
    if any(isinstance(number, bool) or not isinstance(number, int) for number in ends):
        raise TypeError(f"patch: steps must hold integers, got {steps!r}: write range(2, 20) or {{0, 3}}")
    if not ends:
        raise ValueError(f"patch: steps must hold at least one step, got {steps!r}: leave it out to patch every step")
    if min(ends) < 0:
        raise ValueError(f"patch: steps must hold step numbers of at least 0, got {steps!r}: the first step is 0")
    return numbers


class StepTracker:
    """Counts denoising steps over all denoisers of a patch.

    In a pipeline a run begins with a new `scheduler.timesteps` tensor, and every timestep not seen in the run is a new
    step: the passes of classifier-free guidance and the second evaluation of a Heun step belong to one step. Timesteps
    that the model's dtype rounds to the same number are told apart by the scheduler's `step_index`.

    A model without its pipeline is followed by its timesteps alone: they move in one direction through a run, from
    noisy to clean, and a run begins when they turn back. So it is when another pipeline, with a scheduler of its own,
    runs the model: that is noticed when the known scheduler has no step left, or when timesteps turn back to the first
    one of the run or to one that it never had.

    Args:
        steps: The steps in which operators are active: what holds their numbers.
        pipeline: The pipeline whose scheduler tells the runs; held weakly.
        direction: Where timesteps go in a run without scheduler: -1 falling, 1 rising, 0 to learn it from the first
            change, which is wrong after a run of one step at the clean end.

    Attributes:
        step: The current step, -1 before the first.
        run: How many runs have begun.
    """

    def __init__(self, steps: Steps, pipeline: Any = None, direction: int = 0) -> None:
        self.steps = steps
        self.step = -1
        self.run = 0
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._known_direction = self._direction = direction
        self._schedule: Any = None
        self._timesteps: list[float] = []
        self._foreign = pipeline is None
        self._seen: list[tuple[float, float]] = []
        self._values: list[float] = []
        self._turned_back = False

    def __deepcopy__(self, memo: dict[int, Any]) -> StepTracker:
        # Copied together with its pipeline it follows the copy; a model copied alone has no scheduler any more.
        pipeline = None if self._pipeline is None else self._pipeline()
        twin = StepTracker(copy.deepcopy(self.steps, memo), memo.get(id(pipeline)), self._known_direction)
        memo[id(self)] = twin
        return twin

    @property
    def active(self) -> bool:
        """Whether the current step is one of `steps`."""
        return self.step in self.steps

    def advance(self, arguments: Mapping[str, Any]) -> None:
        """Note the timestep of a forward.

        Args:
            arguments: The model's forward arguments by name.

        Raises:
            PatchError: The model is called without a timestep, or without scheduler from clean to noisy.
        """
        value = _timestep(arguments)
        scheduler = getattr(None if self._pipeline is None else self._pipeline(), "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        if schedule is not None and schedule is not self._schedule:
            self._begin(value, 0)
            self._schedule, self._foreign = schedule, False
            self._timesteps = torch.as_tensor(schedule).tolist()  # one synchronisation per run
        elif not self._foreign and (schedule is None or self._is_of_another(value, scheduler)):
            self._begin(value, self._known_direction)
            self._foreign = True
        if self._foreign:
            self._follow(value)
        else:
            self._count(value, scheduler)

    def _begin(self, value: float, direction: int) -> None:
        self.run += 1
        self.step, self._seen, self._values = 0, [], [value]
        self._direction, self._turned_back = direction, False

    def _count(self, value: float, scheduler: Any) -> None:
        """The step of a run of the pipeline: how many others were seen before it."""
        key = self._scheduled(scheduler), value
        if key not in self._seen:
            self._seen.append(key)
        self.step = self._seen.index(key)
        self._move(value)

    def _scheduled(self, scheduler: Any) -> float:
        """The scheduler's own timestep, which no model dtype has rounded; 0 when it does not tell where it is."""
        if not self._timesteps or not hasattr(scheduler, "step_index"):
            return 0.0
        index = scheduler.step_index
        if index is None:  # before the first step
            index = getattr(scheduler, "begin_index", None) or 0
        return self._timesteps[min(index, len(self._timesteps) - 1)]

    def _is_of_another(self, value: float, scheduler: Any) -> bool:
        """Whether a forward cannot belong to the run of the known scheduler."""
        index = getattr(scheduler, "step_index", None)
        if index is not None and index >= len(self._timesteps):
            return True
        new = value not in self._values
        if new and len(set(self._values)) >= len(set(self._timesteps)):
            return True
        turns_back = (value - self._values[-1]) * self._direction < 0
        return turns_back and (new or value == self._values[0])

    def _follow(self, value: float) -> None:
        """The step of a run that only its timesteps tell."""
        if not self._values:
            self._begin(value, self._known_direction)
        elif (value - self._values[-1]) * self._direction < 0:
            if self._known_direction and self._turned_back and len(self._values) == 1:
                raise PatchError(
                    f"patch: steps= needs timesteps that go from noisy to clean, got {self._values[-1]:g} and then "
                    f"{value:g} in the other direction: patch the pipeline, whose scheduler tells the steps"
                )
            self._begin(value, self._known_direction)
            self._turned_back = True
        elif value != self._values[-1]:
            self._turned_back = False
            self.step += 1
            self._move(value)

    def _move(self, value: float) -> None:
        change = value - self._values[-1]
        if change:
            self._direction = self._direction or (1 if change > 0 else -1)
            self._values.append(value)


def _timestep(arguments: Mapping[str, Any]) -> float:
    for name in TIMESTEP_NAMES:
        value = arguments.get(name)
        if value is not None:
            # Per-token timesteps: conditioning tokens stand at 0, so the largest value is the step's.
            return float(value.max()) if hasattr(value, "max") else float(value)
    raise PatchError("patch: steps= needs a model that is called with a timestep, got a call without: leave steps out")
