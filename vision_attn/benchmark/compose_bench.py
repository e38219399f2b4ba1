"""`vision-attn compose-bench`: do guided pictures hold the objects of their captions more often than plain ones?

Every method draws the same captions from the same noise, in turns, and the detector of the shapes data judges.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import vision_attn as va
from vision_attn.benchmark.bootstrap import Interval, mean_interval
from vision_attn.benchmark.composition import Composition, judge_composition
from vision_attn.benchmark.output import table

PLAIN = "plain"
Method = Callable[..., Any]
"""Called like the stock pipeline."""


@dataclass(frozen=True)
class Task:
    """What every method draws.

    Args:
        captions: Of the scene grammar.
        seeds: Pictures per caption; the noise of one is the same for every method.
        options: Further arguments of the pipeline's call.
        batch: Captions drawn at once.
    """

    captions: tuple[str, ...]
    seeds: int
    options: Mapping[str, Any]
    batch: int = 25

    @property
    def calls(self) -> int:
        """Of each method."""
        return self.seeds * -(-len(self.captions) // self.batch)

    def chunks(self) -> Iterator[tuple[int, int, list[str]]]:
        """(seed, place of the first caption, captions) of each call."""
        for seed in range(self.seeds):
            for start in range(0, len(self.captions), self.batch):
                yield seed, start, list(self.captions[start : start + self.batch])


@dataclass(frozen=True)
class Row:
    """One method. Shares are of pictures, `missing` and `wrong` of asked objects, `extra` objects per picture.

    Args:
        method: Name.
        captions: Which: `"all"`, or a number of objects.
        pictures: Drawn.
        right: Share with exactly the asked objects.
        right_interval: 95 % bootstrap over captions.
        gain: `right` less the plain pipeline's.
        gain_interval: The same of the paired difference.
        missing: Share of asked objects without counterpart.
        wrong: Share of asked objects with a wrong color or shape.
        extra: Objects that nobody asked for, per picture.
        seconds: Per picture, median over calls.
    """

    method: str
    captions: str
    pictures: int
    right: float
    right_interval: Interval
    gain: float
    gain_interval: Interval
    missing: float
    wrong: float
    extra: float
    seconds: float


@dataclass(frozen=True)
class ComposeReport:
    """All that the benchmark found.

    Args:
        environment: What the numbers hold for.
        rows: All captions first, then by the number of objects.
        pictures: Per method `[captions, Y, X, 3]` of the first seed.
        verdicts: Per method, of the same.
        captions: Drawn.
    """

    environment: dict[str, Any]
    rows: tuple[Row, ...]
    pictures: dict[str, NDArray[np.uint8]]
    verdicts: dict[str, tuple[Composition, ...]]
    captions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, without the pictures."""
        return {
            "environment": self.environment,
            "rows": [asdict(row) for row in self.rows],
            "captions": self.captions,
        }

    def __str__(self) -> str:
        header = ["captions", "method", "right", "95 %", "gain", "95 %", "missing", "wrong", "extra", "s/image"]
        return "\n".join(
            [
                ", ".join(f"{name} {value}" for name, value in self.environment.items()),
                "",
                table(header, [_cells(row) for row in self.rows]),
                "",
                "right: exactly the asked objects, % of pictures; gain: points over plain, paired; extra: per picture;",
                "missing, wrong: % of asked objects. Intervals: bootstrap over captions.",
            ]
        )


def compose_bench(
    methods: Mapping[str, Method],
    task: Task,
    *,
    about: Mapping[str, Any],
    on_run: Callable[[str], None] = lambda name: None,
) -> ComposeReport:
    """Draw and judge.

    Args:
        methods: By name; `"plain"`, the stock pipeline, must be one.
        task: What to draw.
        about: Named in the report.
        on_run: Told a method's name after each call, for a progress bar.

    Raises:
        ValueError: no plain method.
    """
    if PLAIN not in methods:
        raise ValueError(f"compose_bench: methods must hold {PLAIN!r}, to compare with, got {', '.join(methods)}")
    judged = {name: np.empty((len(task.captions), task.seeds), dtype=object) for name in methods}
    kept: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for seed, start, captions in task.chunks():
        for name, method in methods.items():
            images, elapsed = _draw(method, captions, [(start + place, seed) for place in range(len(captions))], task)
            seconds[name].append(elapsed / len(captions))
            for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
                judged[name][start + place, seed] = judge_composition(image, caption)
            if seed == 0:
                kept[name].append((np.clip(images, 0, 1) * 255).round().astype(np.uint8))
            on_run(name)
    rows = [
        _row(name, label, judged[name][chosen], judged[PLAIN][chosen], float(np.median(seconds[name])))
        for label, chosen in _groups(judged[PLAIN])
        for name in methods
    ]
    environment = {
        **about,
        "captions": len(task.captions),
        "seeds": task.seeds,
        **task.options,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "vision-attn": va.__version__,
    }
    pictures = {name: np.concatenate(chunks) for name, chunks in kept.items()}
    verdicts = {name: tuple(judged[name][:, 0]) for name in methods}
    return ComposeReport(environment, tuple(rows), pictures, verdicts, task.captions)


def _draw(
    method: Method, captions: list[str], noise: Sequence[tuple[int, int]], task: Task
) -> tuple[NDArray[np.floating], float]:
    generators = [torch.Generator("cpu").manual_seed(1_000_003 * seed + place) for place, seed in noise]
    begun = time.perf_counter()
    images = method(captions, generator=generators, output_type="np", **task.options).images
    return np.asarray(images), time.perf_counter() - begun


def _groups(judged: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """All captions, and those of each number of objects where there are several."""
    asked = np.array([row[0].asked for row in judged])
    yield "all", np.ones(len(asked), dtype=bool)
    if len(set(asked)) > 1:
        for number in sorted(set(asked)):
            yield f"{number} objects", asked == number


def _row(name: str, label: str, judged: NDArray[Any], plain: NDArray[Any], seconds: float) -> Row:
    def values(of: NDArray[Any], what: str) -> NDArray[np.float64]:
        return np.array([[float(getattr(each, what)) for each in row] for row in of])

    right = values(judged, "right")
    gain = right - values(plain, "right")
    asked = values(judged, "asked").sum()
    return Row(
        method=name,
        captions=label,
        pictures=right.size,
        right=float(right.mean()),
        right_interval=mean_interval(right),
        gain=float(gain.mean()),
        gain_interval=mean_interval(gain),
        missing=float(values(judged, "missing").sum() / asked),
        wrong=float(values(judged, "wrong").sum() / asked),
        extra=float(values(judged, "extra").mean()),
        seconds=seconds,
    )


def _cells(row: Row) -> list[str]:
    def points(value: float) -> str:
        return f"{100 * value:+.1f}"

    plain = row.method == PLAIN
    low, high = row.right_interval
    return [
        row.captions,
        row.method,
        f"{100 * row.right:.1f}",
        f"{100 * low:.0f} to {100 * high:.0f}",
        "-" if plain else points(row.gain),
        "-" if plain else f"{points(row.gain_interval[0])} to {points(row.gain_interval[1])}",
        f"{100 * row.missing:.1f}",
        f"{100 * row.wrong:.1f}",
        f"{row.extra:.2f}",
        f"{row.seconds:.2f}",
    ]
