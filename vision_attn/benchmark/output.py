"""Writing results: files that are whole or absent, and text tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Let `write` fill a file that appears at `path` only when it is complete.

    Args:
        path: Where the file goes; its folder is made.
        write: Called with an open binary file.

    Returns:
        `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except BaseException:  # Ctrl-C included
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write `content` as indented JSON; see `write_whole`."""
    return write_whole(path, lambda file: file.write(to_json(content).encode()))


def to_json(content: Any) -> str:
    """Standard JSON: infinities become strings and NaN null, which strict readers would refuse as numbers."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text table: first column to the left, the others to the right unless they hold words.

    Args:
        header: Column titles.
        rows: Cells, one sequence per row, as long as the header.

    Returns:
        Lines without a trailing newline.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    numeric = [index > 0 and all(_is_number_like(cell) for cell in column[1:]) for index, column in enumerate(columns)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number_like(cell: str) -> bool:
    return cell in ("-", "inf", "") or cell[0].isdigit() or (cell[0] in "+-." and cell[1:2].isdigit())


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else str(content)
    return content
