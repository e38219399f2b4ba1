"""`vision-attn bench --suite backbones`: a ViT-S with its own attention and with operators in its place."""

from __future__ import annotations

import functools
import inspect
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vision_attn as va
from vision_attn.benchmark.attention_clock import AttentionClock
from vision_attn.benchmark.output import table
from vision_attn.benchmark.timing import interleaved

MODEL = "vit_small_patch16_224"
SIZES_PX = (224, 448, 896)
OPERATORS = (va.Agent(agents=49), va.Neighborhood(kernel_size=7))
DENSE = "dense SDPA"


@dataclass(frozen=True)
class Row:
    """One image size with one attention.

    Args:
        size_px: Side of the image.
        tokens: Of the model, its class token included.
        attention: Text form of the operator, or `DENSE`.
        model_seconds: Median time of a forward of one image.
        attention_seconds: Median over forwards of the time inside the attention calls, projections left out.
        model_speedup: Time of the dense model over that of this one.
        attention_speedup: The same of the attention alone.
        max_error: Largest difference of the model's first attention call to the same in float64 with an explicit mask;
            None for `DENSE`, which is what the model has, and for an operator without backends.
    """

    size_px: int
    tokens: int
    attention: str
    model_seconds: float
    attention_seconds: float
    model_speedup: float
    attention_speedup: float
    max_error: float | None


@dataclass(frozen=True)
class BackboneReport:
    """All that the suite found.

    Args:
        environment: What the numbers hold for.
        rows: By image size, dense attention first.
    """

    environment: dict[str, Any]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"environment": self.environment, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        header = ["image", "tokens", "attention", "model ms", "faster", "attention ms", "faster", "max error"]
        return "\n".join(
            [
                ", ".join(f"{name} {value}" for name, value in self.environment.items()),
                "",
                table(header, [_cells(row) for row in self.rows]),
            ]
        )


def backbone_report(
    operators: Sequence[Any] = OPERATORS,
    *,
    sizes_px: Sequence[int] = SIZES_PX,
    repeats: int = 7,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    model: str = MODEL,
    on_run: Callable[[str], None] = lambda name: None,
    **arguments: Any,
) -> BackboneReport:
    """Time a timm model as it is and patched with each operator, in turns.

    Weights are random: time does not depend on them. Whole forwards and attention calls are timed in rounds of their
    own, as the clock of the latter costs time.

    Args:
        operators: What to put in the place of attention.
        sizes_px: Sides of the square images.
        repeats: Timed rounds.
        warmup: Rounds before.
        device: Where it runs.
        dtype: Of weights and images.
        model: Name for `timm.create_model` of a model that takes `img_size`.
        on_run: Told a name after each forward, for a progress bar.
        arguments: For `timm.create_model`.

    Raises:
        ImportError: timm is missing.
        PatchError: The model or a call of it cannot be served.
        RuntimeError: An operator's result is wrong.
    """
    rows: list[Row] = []
    for size in sizes_px:
        models = _models(operators, size, model, device, dtype, arguments)
        image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        rows += _rows(models, image, repeats, warmup, on_run)
    environment = {
        "model": model,
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "vision-attn": va.__version__,
    }
    return BackboneReport(environment, tuple(rows))


def _models(
    operators: Sequence[Any], size: int, name: str, device: torch.device | str, dtype: torch.dtype, arguments: Any
) -> dict[str, tuple[Any, nn.Module]]:
    """By the text of its attention: the operator, None for the model's own, and the model."""
    from vision_attn.backbones import create_model  # here: the other suite needs no timm

    models: dict[str, tuple[Any, nn.Module]] = {}
    for operator in (None, *operators):
        model = create_model(name, img_size=size, **arguments).to(device, dtype).eval()
        if operator is not None:
            va.patch(model, operator)
        models[DENSE if operator is None else str(operator)] = operator, model
    return models


@torch.no_grad()
def _rows(
    models: dict[str, tuple[Any, nn.Module]],
    image: Tensor,
    repeats: int,
    warmup: int,
    on_run: Callable[[str], None],
) -> list[Row]:
    attention: dict[str, list[float]] = {name: [] for name in models}

    def whole(name: str) -> None:
        models[name][1](image)

    def inside_attention(name: str) -> None:
        operator, model = models[name]
        clock = AttentionClock(model, image.device)
        with clock.watch(operator):
            model(image)
        attention[name].append(clock.seconds)

    def calls(run: Callable[[str], None]) -> dict[str, Callable[[], object]]:
        return {name: functools.partial(run, name) for name in models}

    call = _first_call(models[DENSE][1], image)
    errors = {name: _max_error(operator, call) for name, (operator, _) in models.items() if operator is not None}
    timings = interleaved(calls(whole), repeats=repeats, warmup=warmup, device=image.device, on_run=on_run)
    interleaved(calls(inside_attention), repeats=repeats, warmup=0, device=image.device, on_run=on_run)
    inside = {name: statistics.median(seconds) for name, seconds in attention.items()}
    return [
        Row(
            size_px=image.shape[-1],
            tokens=call[0].shape[1],
            attention=name,
            model_seconds=timings[name].median,
            attention_seconds=inside[name],
            model_speedup=timings[DENSE].median / timings[name].median,
            attention_speedup=inside[DENSE] / inside[name],
            max_error=errors.get(name),
        )
        for name in models
    ]


_Call = tuple[Tensor, Tensor, Tensor, Any]


def _first_call(model: nn.Module, image: Tensor) -> _Call:
    """Query, key, value and layout of the first attention call of a model, as operators get them."""
    seen: list[_Call] = []

    @dataclass(frozen=True)
    class Recorder:
        def __call__(
            self, query: Tensor, key: Tensor, value: Tensor, layout: Any, scale: float | None = None
        ) -> Tensor:
            seen.append((query, key, value, layout))
            return va.Dense()(query, key, value, layout, scale)

    with va.patch(model, Recorder()):
        model(image)
    return seen[0]


def _max_error(operator: Any, call: _Call) -> float | None:
    """Largest difference of a call of the model to the same in float64, by the backend with an explicit mask.

    Raises:
        RuntimeError: More than twice what that backend loses in the model's own dtype.
    """
    if "backend" not in inspect.signature(type(operator).__call__).parameters:
        return None
    *tensors, layout = call
    truth = operator(*(x.double() for x in tensors), layout, backend="dense")
    error = float((operator(*tensors, layout) - truth).abs().max())
    eager = float((operator(*tensors, layout, backend="dense") - truth).abs().max())
    rounding = torch.finfo(tensors[0].dtype).eps * float(truth.abs().max())
    if error > 2 * eager + rounding:
        raise RuntimeError(
            f"bench: {operator} is off by {error:.2e} on {layout.grid}, its dense backend by {eager:.2e}: this is a "
            "bug, please report it"
        )
    return error


def _cells(row: Row) -> list[str]:
    return [
        f"{row.size_px} px",
        str(row.tokens),
        row.attention,
        f"{row.model_seconds * 1e3:.0f}",
        f"{row.model_speedup:.2f}x",
        f"{row.attention_seconds * 1e3:.0f}",
        f"{row.attention_speedup:.2f}x",
        "-" if row.max_error is None else f"{row.max_error:.1e}",
    ]
