"""`vision-attn bench`: one attention call, ours against the best of PyTorch and NATTEN, in one process and in turns."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import vision_attn as va
from vision_attn.benchmark.memory_probe import probe
from vision_attn.benchmark.output import table
from vision_attn.benchmark.stock import (
    DenseAttention,
    FlexRows,
    FlexTiles,
    NattenAttention,
    Window,
    check_tiles,
    kernel_of,
    token_places,
    window_of,
)
from vision_attn.benchmark.timing import interleaved

OURS = "vision-attn"
DENSE = "dense SDPA"
# PyTorch's fused implementations for GPUs, by name because which one it chooses depends on its version.
DENSE_KERNELS = {f"{DENSE}, cuDNN": SDPBackend.CUDNN_ATTENTION, f"{DENSE}, flash": SDPBackend.FLASH_ATTENTION}
NATTEN = "NATTEN"
FLEX_ROWS = "flex, row-major blocks"
FLEX_TILES = "flex, 8x8 tiles, permutation timed"
FLEX_PERMUTED = "flex, 8x8 tiles, tokens permuted before"

# float32 rounding over one softmax row: results that differ by more are wrong, and wrong results are not timed.
_TOLERANCE = 2e-5
_CHECKED_QUERIES = 256


@dataclass(frozen=True)
class Case:
    """One attention call.

    Args:
        operator: `Clear` without pooled keys or `Neighborhood` without stride and dilation.
        grid: Rows and columns of tokens, multiples of 8.
        heads: Number of heads.
        head_dim: Channels per head.

    Raises:
        ValueError: an operator or a grid for which there is no stock rival.
    """

    operator: Any
    grid: tuple[int, int]
    heads: int = 8
    head_dim: int = 64

    def __post_init__(self) -> None:
        window_of(self.operator, self.grid)
        check_tiles("bench", self.grid)

    def __str__(self) -> str:
        return f"{self.operator}, {self.grid[0]}x{self.grid[1]} tokens, {self.heads} heads of {self.head_dim}"


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Args:
        name: Of the way.
        seconds: Median of the repeats; None if it could not run.
        seconds_of_each_repeat: What the median is of.
        ratio: `seconds` over ours: above 1 means that ours is faster.
        max_error: Largest difference to a float64 computation from the window's definition; None where the result is
            another one on purpose (dense) or the way did not run.
        problem: Why it could not run, else empty.
    """

    name: str
    seconds: float | None
    seconds_of_each_repeat: tuple[float, ...] = ()
    ratio: float | None = None
    max_error: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class CaseResult:
    """A case with all its contenders, ours first."""

    case: Case
    contenders: tuple[Contender, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        case = {**asdict(self.case), "operator": str(self.case.operator)}
        return {"case": case, "contenders": [asdict(contender) for contender in self.contenders]}


STANDARD_CASES = (
    Case(va.Clear(radius=8), (64, 64)),
    Case(va.Clear(radius=8), (96, 96)),
    Case(va.Neighborhood(kernel_size=13), (64, 64)),
)


@torch.no_grad()
def bench_case(
    case: Case,
    *,
    repeats: int = 7,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    flex: bool = True,
    backend: str = "auto",
    on_run: Callable[[str], None] = lambda name: None,
) -> CaseResult:
    """Check every way's result, then time all of them in turns.

    Args:
        case: What to compute.
        repeats: Timed rounds.
        warmup: Rounds before; compilation happens earlier, during the check.
        device: Where it runs.
        dtype: Of query, key and value.
        flex: False leaves FlexAttention out, which needs a C++ compiler on the CPU.
        backend: Ours, as for `va.na2d`.
        on_run: Told the way's name after each timed run.

    Returns:
        A CaseResult.

    Raises:
        RuntimeError: our own result is wrong.
    """
    device = torch.device(device)
    window = window_of(case.operator, case.grid)
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, case.heads, case.grid[0] * case.grid[1], case.head_dim)
    inputs = tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    ways, problems = _ways(case, window, inputs, flex=flex, backend=backend)
    errors = {}
    for name, (run, restore) in list(ways.items()):
        try:
            output = restore(run())
            if name.startswith(DENSE):
                continue
            errors[name] = _max_error(case, window, inputs, output)
        except Exception as error:  # the compiler's own errors have no common base
            if name == OURS:
                raise
            problems[name] = _first_line(error)
            del ways[name]
            continue
        if errors[name] > _tolerance(dtype):
            if name == OURS:
                raise RuntimeError(f"bench: {case} is off by {errors[name]:.2e}: this is a bug, please report it")
            problems[name] = f"wrong result, off by {errors[name]:.2e}"
            del ways[name]
    timings = interleaved(
        {name: run for name, (run, _) in ways.items()}, repeats=repeats, warmup=warmup, device=device, on_run=on_run
    )
    ours = timings[OURS].median
    measured = [
        Contender(name, timing.median, timing.samples, timing.median / ours, errors.get(name))
        for name, timing in timings.items()
    ]
    return CaseResult(case, (*measured, *(Contender(name, None, problem=text) for name, text in problems.items())))


_Way = tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]


def _ways(
    case: Case, window: Window, inputs: tuple[Tensor, ...], *, flex: bool, backend: str
) -> tuple[dict[str, _Way], dict[str, str]]:
    """Name to (timed call, result to row-major `[B, H, S, D]`), and name to why a way is missing."""
    query, key, value = inputs
    device = query.device
    heads_last = [tensor.transpose(1, 2).contiguous() for tensor in inputs]
    layout = va.TokenLayout(case.grid)
    dense = DenseAttention()
    ways: dict[str, _Way] = {
        OURS: (lambda: case.operator(*heads_last, layout, backend=backend), _heads_first),
        DENSE: (lambda: dense(query, key, value), _unchanged),
    }
    if device.type == "cuda":
        for name, kernel in DENSE_KERNELS.items():
            ways[name] = (functools.partial(DenseAttention(kernel), *inputs), _unchanged)
    problems = {}
    if isinstance(case.operator, va.Neighborhood):
        try:
            natten = NattenAttention(kernel_of(case.operator, case.grid), case.grid)
            ways[NATTEN] = (functools.partial(natten, *heads_last), _heads_first)
        except ImportError:
            problems[NATTEN] = "not installed"
    if not flex:
        return ways, problems
    rows, tiles = FlexRows(window, case.grid, device), FlexTiles(window, case.grid, device)
    permuted = [tiles.permute(tensor) for tensor in inputs]
    ways[FLEX_ROWS] = (lambda: rows(query, key, value), _unchanged)
    ways[FLEX_TILES] = (lambda: tiles(query, key, value), _unchanged)
    ways[FLEX_PERMUTED] = (lambda: tiles.attend_tiles(*permuted), tiles.restore)
    return ways, problems


def _heads_first(output: Tensor) -> Tensor:
    return output.transpose(1, 2)


def _unchanged(output: Tensor) -> Tensor:
    return output


def _max_error(case: Case, window: Window, inputs: tuple[Tensor, ...], output: Tensor) -> float:
    """Largest difference to float64 attention, over queries spread evenly, corners included."""
    query, key, value = (tensor.double() for tensor in inputs)
    rows, columns = token_places(case.grid, query.device)
    chosen = torch.linspace(0, len(rows) - 1, _CHECKED_QUERIES, device=query.device).round().long().unique()
    seen = window(rows[chosen, None], columns[chosen, None], rows, columns)
    scores = query[:, :, chosen] @ key.transpose(-1, -2) * case.head_dim**-0.5
    expected = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
    return float((output[:, :, chosen].double() - expected).abs().max())


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps


@torch.no_grad()
def growth(
    *,
    radius: float = 8,
    heads: int = 8,
    head_dim: int = 64,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    on_run: Callable[[str], None] = lambda name: None,
) -> float:
    """Time of `clear_attention` at 128x128 tokens over its time at 64x64: 4 is linear, 16 quadratic.

    Args:
        radius: Of the window, in tokens.
        heads: Number of heads.
        head_dim: Channels per head.
        repeats: Timed rounds.
        device: Where it runs.
        backend: Ours.
        on_run: Told the size's name after each run.
    """
    calls = {}
    for side in (64, 128):
        inputs = [torch.randn(1, side * side, heads, head_dim, device=device) for _ in range(3)]
        calls[f"{side}x{side}"] = lambda inputs=inputs, side=side: va.clear_attention(
            *inputs, grid=(side, side), radius=radius, backend=backend
        )
    timings = interleaved(calls, repeats=repeats, warmup=1, device=device, on_run=on_run)
    return timings["128x128"].median / timings["64x64"].median


@dataclass(frozen=True)
class BenchReport:
    """All that `vision-attn bench` found.

    Args:
        environment: What the numbers hold for.
        results: One per case.
        growth: Time at 128x128 over time at 64x64 tokens, radius 8; None if not asked for.
        memory: What `memory_probe.probe` found at 192x192 tokens, 4 heads of 64; None if not asked for.
    """

    environment: dict[str, Any]
    results: tuple[CaseResult, ...]
    growth: float | None
    memory: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        results = [result.to_dict() for result in self.results]
        return {"environment": self.environment, "cases": results, "growth": self.growth, "memory": self.memory}

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {value}" for name, value in self.environment.items())]
        for result in self.results:
            rows = [_cells(contender) for contender in result.contenders]
            lines += ["", str(result.case), table(["attention", "ms", "times ours", "max error"], rows)]
        if self.growth is not None:
            lines += ["", f"clear(radius=8): 128x128 tokens take {self.growth:.2f} times as long as 64x64 (linear: 4)"]
        if self.memory is not None:
            peak, inputs = (self.memory[name] / 2**20 for name in ("peak_bytes", "inputs_bytes"))
            lines.append(
                f"clear(radius=8): 192x192 tokens, 4 heads of 64, need {peak:.0f} MiB at the peak of a whole process, "
                f"of which query, key and value are {inputs:.0f}"
            )
        return "\n".join(lines)


def bench_report(
    cases: Sequence[Case],
    *,
    repeats: int,
    warmup: int,
    device: torch.device,
    dtype: torch.dtype,
    flex: bool,
    backend: str,
    scaling: bool,
    on_run: Callable[[str], None] = lambda name: None,
) -> BenchReport:
    """Run the cases, then, with `scaling`, growth and memory of `clear_attention`; see `bench_case` for the rest."""
    results = tuple(
        bench_case(
            case, repeats=repeats, warmup=warmup, device=device, dtype=dtype, flex=flex, backend=backend, on_run=on_run
        )
        for case in cases
    )
    environment = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "vision-attn": va.__version__,
    }
    return BenchReport(
        environment,
        results,
        growth(device=device, backend=backend, on_run=on_run) if scaling else None,
        probe((192, 192), heads=4, head_dim=64, radius=8, device=str(device)) if scaling else None,
    )


def _cells(contender: Contender) -> list[str]:
    return [
        contender.name,
        "-" if contender.seconds is None else f"{contender.seconds * 1e3:.1f}",
        contender.problem if contender.ratio is None else f"{contender.ratio:.2f}",
        "-" if contender.max_error is None else f"{contender.max_error:.1e}",
    ]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
