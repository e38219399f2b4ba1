"""What a patch did: layers routed and skipped, and the calls of the last forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vision_attn.layout import TokenLayout


@dataclass(frozen=True)
class Routed:
    """An attention module whose calls go to `operator`."""

    name: str
    operator: Any


@dataclass(frozen=True)
class Skipped:
    """An attention module that keeps its own attention, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Call:
    """One kind of attention call seen during a forward.

    Attributes:
        kind: `"operator"` or `"dense"`.
        reason: Why the call was dense, or why the operator was computed as a mask on dense attention; else empty.
        layout: The token layout of the call, `None` when none applied.
    """

    kind: str
    reason: str
    layout: TokenLayout | None


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Rows as aligned text columns under a header."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
