"""A comparison in words: the table that `vision-attn compare` prints."""

from __future__ import annotations

import math

from vision_attn.benchmark.compare import Comparison
from vision_attn.benchmark.output import table


def comparison_table(comparison: Comparison) -> str:
    """The results as a text table, and below it what was computed densely although an operator was asked for."""
    header = ["operator", "s/image", "attention s", "share", "FLOPs", "peak memory", "PSNR", "SSIM"]
    rows = []
    scored = any(row.caption is not None for row in comparison.rows)
    for row in comparison.rows:
        cells = [
            row.operator,
            f"{row.seconds:.2f}",
            f"{row.attention_seconds:.2f}",
            f"{row.attention_share:.0%}",
            flops(row.attention_flops),
            mebibytes(row.peak_memory_bytes),
            decibels(row.psnr),
            f"{row.ssim:.3f}",
        ]
        if scored:
            cells.append(row.caption or "-")
        rows.append(cells)
    lines = [table([*header, "picture is"] if scored else header, rows)]
    for row in comparison.rows:
        lines += [f"{row.operator}: computed densely in {layer}" for layer in row.dense_layers]
    return "\n".join(lines)


def decibels(value: float) -> str:
    """`"31.4 dB"`, or `"identical"`."""
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def mebibytes(count: int | None) -> str:
    """`"512 MiB"`, or `"not measured"`."""
    return "not measured" if count is None else f"{count / 2**20:.0f} MiB"


def flops(count: int | None) -> str:
    """`"1.23 TFLOP"` with a fitting prefix, or `"unknown"`."""
    if count is None:
        return "unknown"
    prefixes = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    scale, prefix = next((pair for pair in prefixes if count >= pair[0]), (1e6, "M"))
    return f"{count / scale:.3g} {prefix}FLOP"
