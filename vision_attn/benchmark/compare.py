"""The main job: one prompt, several attention operators, the same latents; what each costs and what it changes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import vision_attn as va
from vision_attn.benchmark.attention_clock import AttentionClock
from vision_attn.benchmark.generation import Request, generate
from vision_attn.benchmark.memory import PeakMemory
from vision_attn.benchmark.metrics import SSIM_WINDOW, psnr, ssim
from vision_attn.benchmark.timing import Timing, interleaved
from vision_attn.patching.diffusers import denoisers

DENSE = "dense"

# A mask of more tokens squared would take more memory than the run.
_MASK_TOKENS = 8192


@dataclass(frozen=True)
class Row:
    """One operator's result.

    Args:
        operator: Text form; `"dense"` is the stock pipeline, untouched.
        seconds: Per image, median of the repeats.
        seconds_of_each_repeat: What the median is of.
        attention_seconds: Inside attention calls during one image; on a GPU from a run of its own, whose every call is
            waited for.
        attention_share: `attention_seconds` over the time of the same run.
        attention_calls: Attention calls during one image.
        attention_flops: Of those calls; None if the operator does not know.
        peak_memory_bytes: Above what the loaded pipeline held, during one image; None if the system cannot tell.
        psnr: Decibels against dense; `inf` for identical images.
        ssim: Against dense.
        caption: What a detector says of the picture: `"right"` or what is wrong; None unless the prompt is a caption
            of the shapes data.
        routed_layers: Attention layers that the operator took over.
        dense_layers: Routed layers whose calls were computed densely all the same, with the reason.
    """

    operator: str
    seconds: float
    seconds_of_each_repeat: tuple[float, ...]
    attention_seconds: float
    attention_share: float
    attention_calls: int
    attention_flops: int | None
    peak_memory_bytes: int | None
    psnr: float
    ssim: float
    caption: str | None
    routed_layers: int
    dense_layers: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Results of one prompt under several operators.

    Args:
        model: As the user named it.
        request: What was drawn, with the model's defaults filled in.
        grid: Token grid of the patched layers, if a patch has seen one.
        environment: Versions, device and threads that the numbers hold for.
        rows: One per operator, dense first.
        images: One per row, `[Y, X, C]` or `[T, Y, X, C]` in `[0, 1]`.
        windows: One per row: which tokens of the grid (of its middle frame) the token in the middle sees, bool
            `[Y, X]`; None for dense and where the operator has no mask.
    """

    model: str
    request: Request
    grid: tuple[int, ...] | None
    environment: dict[str, Any]
    rows: tuple[Row, ...]
    images: tuple[NDArray[np.float32], ...]
    windows: tuple[NDArray[np.bool_] | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON."""
        return {
            "model": self.model,
            "request": asdict(self.request),
            "grid": self.grid,
            "environment": self.environment,
            "rows": [asdict(row) for row in self.rows],
        }


@dataclass(frozen=True)
class _Measured:
    image: NDArray[np.float32]
    clock: AttentionClock
    seconds: float
    memory: int | None
    routed: int
    dense_layers: tuple[str, ...]
    layout: va.TokenLayout | None


def compare(
    pipe: Any,
    operators: Sequence[Any],
    request: Request,
    *,
    model: str = "",
    repeats: int = 3,
    warmup: int = 1,
    judge: Callable[[NDArray[np.float32]], object] | None = None,
    on_run: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Draw the request with the stock pipeline and with each operator, and measure.

    Args:
        pipe: A loaded diffusers pipeline.
        operators: Operator objects. Dense is always measured first, as the stock pipeline, whether listed or not.
        request: What to draw; the same starting latents for all.
        model: Name for the report.
        repeats: Timed images per operator, taken in turns.
        warmup: Short runs of two denoising steps per operator before, not timed.
        judge: Says of an image whether it shows what the prompt asks for; its text goes into the rows.
        on_run: Told the operator's text after each image, `runs_of(...)` times in all.

    Returns:
        A Comparison.

    Raises:
        ValueError: the pipeline cannot do what the request asks for, or the picture is too small for SSIM.
        PatchError: the pipeline cannot be patched, or an operator fits none of its layers.
    """
    if min(request.height_px or SSIM_WINDOW, request.width_px or SSIM_WINDOW) < SSIM_WINDOW:
        raise ValueError(
            f"compare: height and width must be at least {SSIM_WINDOW} pixels, got {request.height_px}x"
            f"{request.width_px}: SSIM needs them"
        )
    contenders = {DENSE: None, **{str(operator): operator for operator in _distinct(operators)}}
    weights = next(_models(pipe)[0].parameters())
    device = weights.device
    short = replace(request, steps=min(2, request.steps or 2))
    for name, operator in list(contenders.items()) * warmup:
        _drawing(pipe, operator, short)()
        on_run(name)
    # Reading a clock costs nothing on the CPU; a GPU must be waited for at each call, so its latency is timed apart.
    apart = device.type != "cpu"
    measured: dict[str, list[_Measured]] = {name: [] for name in contenders}
    for name, operator in list(contenders.items()) * (1 if apart else repeats):
        measured[name].append(_measure(pipe, operator, request))
        on_run(name)
    if apart:
        drawings = {name: _drawing(pipe, operator, request) for name, operator in contenders.items()}
        timings = interleaved(drawings, repeats=repeats, warmup=0, device=device, on_run=on_run)
    else:
        timings = {name: Timing(tuple(run.seconds for run in runs)) for name, runs in measured.items()}
    dense = measured[DENSE][0].image
    rows = tuple(_row(name, measured[name], timings[name], dense, judge) for name in contenders)
    return Comparison(
        model=model or type(pipe).__name__,
        request=request,
        grid=next((runs[0].layout.grid for runs in measured.values() if runs[0].layout), None),
        environment=_environment(device, weights.dtype),
        rows=rows,
        images=tuple(runs[0].image for runs in measured.values()),
        windows=tuple(_window(contenders[name], runs[0].layout) for name, runs in measured.items()),
    )


def runs_of(operators: Sequence[Any], *, repeats: int, warmup: int, device: torch.device | str = "cpu") -> int:
    """How many runs `compare` makes: the total of its progress bar."""
    apart = torch.device(device).type != "cpu"
    return (1 + len(_distinct(operators))) * (warmup + repeats + apart)


def _distinct(operators: Sequence[Any]) -> list[Any]:
    """Each operator but dense once; not a set, since an operator need not be hashable."""
    distinct: list[Any] = []
    for operator in operators:
        if operator != va.Dense() and operator not in distinct:
            distinct.append(operator)
    return distinct


def _models(pipe: Any) -> list[nn.Module]:
    """All that denoise: some pipelines hand over from one model to another in the middle of a run."""
    return [model for _, model in denoisers(pipe)]


@contextlib.contextmanager
def _patched(pipe: Any, operator: Any) -> Iterator[Any]:
    """The stock pipeline for None, else the pipeline with its attention swapped."""
    if operator is None:
        yield None
    else:
        # Not strict: what an operator cannot honour is computed densely, and the comparison says so.
        with va.patch(pipe, operator, strict=False) as patch:
            yield patch


def _drawing(pipe: Any, operator: Any, request: Request) -> Callable[[], object]:
    def draw() -> object:
        with _patched(pipe, operator):
            return generate(pipe, request)

    return draw


def _measure(pipe: Any, operator: Any, request: Request) -> _Measured:
    """One image with the clock and the memory gauge on."""
    models = _models(pipe)
    device = next(models[0].parameters()).device
    clock = AttentionClock(models, device)
    with _patched(pipe, operator) as patch:
        with clock.watch(operator), PeakMemory(device) as memory:
            start = time.perf_counter()
            image = generate(pipe, request)
            seconds = time.perf_counter() - start
        routed = 0 if patch is None else len(patch.routed)
        seen = [] if patch is None else [(layer, call) for layer, calls in patch.calls.items() for call in calls]
    layouts = [call.layout for _, call in seen if call.kind == "operator"]
    if operator is not None and not layouts:
        reasons = sorted({call.reason for _, call in seen})
        raise va.PatchError(
            f"compare: {operator} took no attention call of {type(pipe).__name__}: {'; '.join(reasons)}"
        )
    return _Measured(
        image=image,
        clock=clock,
        seconds=seconds,
        memory=memory.bytes,
        routed=routed,
        dense_layers=tuple(f"{layer}: {call.reason}" for layer, call in seen if call.kind == "dense"),
        layout=layouts[0] if layouts else None,
    )


def _row(
    name: str,
    runs: Sequence[_Measured],
    timing: Timing,
    dense: NDArray[np.float32],
    judge: Callable[[NDArray[np.float32]], object] | None,
) -> Row:
    first = runs[0]
    return Row(
        operator=name,
        seconds=timing.median,
        seconds_of_each_repeat=timing.samples,
        attention_seconds=statistics.median(run.clock.seconds for run in runs),
        attention_share=statistics.median(run.clock.seconds / run.seconds for run in runs),
        attention_calls=first.clock.calls,
        attention_flops=first.clock.flops,
        # The first run may allocate what later ones find: the last tells what an image needs.
        peak_memory_bytes=runs[-1].memory,
        psnr=psnr(first.image, dense),
        ssim=ssim(first.image, dense),
        caption=None if judge is None else str(judge(first.image)),
        routed_layers=first.routed,
        dense_layers=first.dense_layers,
    )


def _window(operator: Any, layout: va.TokenLayout | None) -> NDArray[np.bool_] | None:
    """What the middle token sees; of a video in its own frame."""
    if operator is None or layout is None or layout.tokens > _MASK_TOKENS:
        return None
    mask_of = getattr(operator, "mask", None)  # optional, as cost is
    mask = None if mask_of is None else mask_of(layout)
    if mask is None:
        return None
    *frame, rows, columns = (size // 2 for size in layout.grid)
    image = mask[layout.image_slice, layout.image_slice].cpu().numpy().reshape(*layout.grid, *layout.grid)
    query = (*frame, rows, columns)
    return np.asarray(image[query + tuple(frame)], dtype=np.bool_)


def _environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    packages = ("vision-attn", "torch", "diffusers", "transformers")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
