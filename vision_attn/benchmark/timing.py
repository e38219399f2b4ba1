"""Fair timing in one process: calls take turns, and the median of the turns counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs of one call.

    Args:
        samples: Seconds of each run, in the order they were made.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle run."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median: how much to trust the median."""
        return (max(self.samples) - min(self.samples)) / self.median


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has finished what was queued; nothing to do on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    on_run: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Time several calls in turns: a, b, c, a, b, c, ... so that a slow phase of the machine hits all alike.

    Args:
        calls: Name to call.
        repeats: Timed rounds, at least 1.
        warmup: Rounds before, not timed, at least 0.
        device: Waited for after each call.
        on_run: Told the name after each run, for a progress bar.

    Returns:
        Name to Timing, in the order of `calls`.

    Raises:
        ValueError: `repeats` below 1 or `warmup` below 0.
    """
    if repeats < 1:
        raise ValueError(f"interleaved: repeats must be at least 1, got {repeats}")
    if warmup < 0:
        raise ValueError(f"interleaved: warmup must be at least 0, got {warmup}")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if turn >= warmup:
                samples[name].append(time.perf_counter() - start)
            on_run(name)
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}
