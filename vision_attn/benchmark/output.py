"""Writing results: files that are whole or absent, pictures, and text tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FRAMES_PER_SECOND = 8


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


def picture_format(path: Path) -> str:
    """PIL's name of the format that the ending of `path` stands for.

    Raises:
        ValueError: an ending that PIL cannot write.
    """
    Image.init()
    name = Image.EXTENSION.get(path.suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(f"picture_format: out must end in .png, .jpg, .webp or .gif, got {str(path)!r}")
    return str(name)


def write_picture(path: Path, image: NDArray[np.float32]) -> Path:
    """Write an image, or the frames of a video as an animation.

    Args:
        path: Its ending tells the format.
        image: `[Y, X, C]` or `[T, Y, X, C]` in `[0, 1]`.

    Raises:
        ValueError: an ending that PIL cannot write, or a video for a format without animation.
    """
    form = picture_format(path)
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    if image.ndim == 3:
        return write_whole(path, lambda file: Image.fromarray(pixels).save(file, format=form))
    if form not in Image.SAVE_ALL:
        raise ValueError(f"write_picture: out must end in .gif, .webp or .png for a video, got {str(path)!r}")
    first, *others = (Image.fromarray(frame) for frame in pixels)
    options = {"save_all": True, "append_images": others, "duration": 1000 // _FRAMES_PER_SECOND, "loop": 0}
    return write_whole(path, lambda file: first.save(file, format=form, **options))


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
