"""`vision-attn bench --suite guidance`: what one gradient of attention maps costs a UNet of the size of SD 1.5's."""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import vision_attn as va
from vision_attn.benchmark.memory import PeakMemory
from vision_attn.benchmark.output import table
from vision_attn.benchmark.summary import flops, mebibytes
from vision_attn.benchmark.timing import interleaved
from vision_attn.guidance import AttentionCapture, concept_maps, segregation_loss

GUIDED, WHOLE, EVERY = "maps of a quarter, stopped", "maps of a quarter", "maps of every layer"
_TOKENS = 77
_CONCEPTS = [[2], [5, 6]]


@dataclass(frozen=True)
class Row:
    """One way to take the gradient.

    Args:
        way: `GUIDED` takes the maps that guidance takes and ends the forward after them, `WHOLE` goes on to its end,
            `EVERY` takes those of all resolutions.
        layers: Whose maps were taken.
        flops: Of the forward and of the backward pass.
        seconds: Median time of both.
        peak_memory_bytes: Above what weights and inputs need; None where the system does not tell.
    """

    way: str
    layers: int
    flops: int
    seconds: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class GuidanceReport:
    """All that the suite found.

    Args:
        environment: What the numbers hold for.
        rows: By the way, the one of guidance first.
    """

    environment: dict[str, Any]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"environment": self.environment, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        header = ["one gradient", "layers", "FLOPs", "share", "ms", "peak memory"]
        most = max((row.flops for row in self.rows), default=1)
        cells = [
            [row.way, str(row.layers), flops(row.flops), f"{row.flops / most:.1%}", f"{row.seconds * 1e3:.0f}",
             mebibytes(row.peak_memory_bytes)]
            for row in self.rows
        ]  # fmt: skip
        return "\n".join(
            [", ".join(f"{name} {value}" for name, value in self.environment.items()), "", table(header, cells)]
        )


def guidance_report(
    unet: nn.Module | None = None,
    *,
    repeats: int = 7,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_run: Callable[[str], None] = lambda name: None,
) -> GuidanceReport:
    """Measure the gradient that moves the latents of one image, three ways.

    Args:
        unet: None for that of SD 1.5 at 512 px with random weights.
        repeats: Timed rounds.
        warmup: Rounds before.
        device: Where it runs.
        dtype: Of weights and latents.
        on_run: Told a name after each gradient, for a progress bar.

    Raises:
        ImportError: diffusers is missing.
    """
    from vision_attn.pipelines.stand_in import sd15_unet  # here: the other suites need no diffusers

    model: Any = sd15_unet() if unet is None else unet
    nn.Module.to(model, device, dtype).requires_grad_(False)  # diffusers' own warns of layers that it does not have
    config, generator = model.config, torch.Generator().manual_seed(0)
    size = config.sample_size
    sample = torch.randn(1, config.in_channels, size, size, generator=generator).to(device, dtype)
    text = torch.randn(1, _TOKENS, config.cross_attention_dim, generator=generator).to(device, dtype)
    every = [size // 2**level for level in range(len(config.block_out_channels))]
    ways: dict[str, Callable[[], int]] = {
        GUIDED: functools.partial(_gradient, model, sample, text, [size // 4], stop=True),
        WHOLE: functools.partial(_gradient, model, sample, text, [size // 4]),
        EVERY: functools.partial(_gradient, model, sample, text, every),
    }
    timings = interleaved(ways, repeats=repeats, warmup=warmup, device=device, on_run=on_run)
    measured = {name: _measured(way, device) for name, way in ways.items()}
    rows = tuple(
        Row(name, layers, count, timings[name].median, peak) for name, (layers, count, peak) in measured.items()
    )
    environment = {
        "model": type(model).__name__,
        "latents": f"{size}x{size}",
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "vision-attn": va.__version__,
    }
    return GuidanceReport(environment, rows)


def _gradient(model: nn.Module, sample: Tensor, text: Tensor, sides: list[int], stop: bool = False) -> int:
    """Take the gradient, from the maps of these sides in tokens; returns the number of layers."""
    leaf = sample.detach().requires_grad_()
    with contextlib.ExitStack() as stack:
        captures = [stack.enter_context(AttentionCapture(model, resolution=(side, side), stop=stop)) for side in sides]
        model(leaf * 1, 500, text)  # not the leaf itself, of which a FLOP counter cannot see the gradient
        maps = [concept_maps(capture.probabilities[0], _CONCEPTS) for capture in captures]
        torch.autograd.grad(torch.stack([segregation_loss(each) for each in maps]).sum(), leaf)
    return sum(len(capture.names) for capture in captures)


def _measured(way: Callable[[], int], device: torch.device | str) -> tuple[int, int, int | None]:
    """Layers, FLOPs and bytes."""
    with PeakMemory(device) as peak:
        layers = way()
    with _flop_counter() as counter:
        way()
    return layers, counter.get_total_flops(), peak.bytes


def _flop_counter() -> FlopCounterMode:
    """Torch's own, which knows the attention kernels of GPUs and takes those of CPUs for nothing."""
    aten = torch.ops.aten
    of_cpus = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=of_cpus)
