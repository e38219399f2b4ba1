"""What `vision-attn bench` runs: the suites, checked before any work.

Heavy imports stand inside the functions, as in `cli`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vision_attn.command_input import parse_size

GRID = "64x64"
HEADS, HEAD_DIM = 8, 64


def attention_suite(
    ops: Sequence[str] | None, grid: str | None, heads: int, head_dim: int, options: Mapping[str, Any]
) -> Callable[..., Any]:
    """One attention call against its rivals, for given operators or the standard cases.

    Args:
        ops: Operators as text; None for the standard cases, which have grids of their own.
        grid: Rows x columns, for `ops` only.
        heads: Number of heads.
        head_dim: Channels per head.
        options: Of `bench_report`.

    Raises:
        ValueError: a grid without operators, an operator or a grid without rival.
    """
    import vision_attn as va
    from vision_attn.benchmark.attention_bench import STANDARD_CASES, Case, bench_report

    size = parse_size(GRID if grid is None else grid, "--grid")
    if grid is not None and not ops:
        raise ValueError(f"--grid must come with --ops, got {grid!r} alone: the standard cases have grids of their own")
    own = [Case(va.parse(text), size, heads, head_dim) for text in ops or ()]
    cases = own or [replace(case, heads=heads, head_dim=head_dim) for case in STANDARD_CASES]
    return functools.partial(bench_report, cases, scaling=not own, **options)


def backbone_suite(ops: Sequence[str] | None, given: Sequence[str], options: Mapping[str, Any]) -> Callable[..., Any]:
    """A ViT-S with its own attention and with operators in its place.

    Args:
        ops: Operators as text; None for the default ones.
        given: Options that the user set and that have no meaning here.
        options: Of `backbone_report`.

    Raises:
        ValueError: there are any such, or an unknown operator.
    """
    import vision_attn as va
    from vision_attn.benchmark.backbone_bench import OPERATORS, backbone_report

    if given:
        raise ValueError(
            f"{given[0]} must be left out with --suite backbones: the model has its own heads and grids, and its "
            "stock attention is the rival"
        )
    return functools.partial(backbone_report, [va.parse(text) for text in ops] if ops else OPERATORS, **options)
