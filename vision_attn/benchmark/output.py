"""Writing results: files that are whole or absent, pictures, and text tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FRAMES_PER_SECOND = 8

# Formats that hold any picture drawn here, by ending. PIL writes more, some of which take only black and white or need
# a plug-in, which shows when the picture is saved.
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}

Write = Callable[[IO[bytes]], object]
OnReady = Callable[[Sequence[Path]], object]


def write_all(writes: Mapping[Path, Write], *, on_ready: OnReady = lambda paths: None) -> None:
    """Fill several files that appear only when all of them are complete.

    Args:
        writes: Where a file goes (its folder is made), and a function that fills it, called with an open binary file.
        on_ready: Told the paths just before the first file appears; until then nothing is changed.

    Raises:
        IsADirectoryError: a folder stands where a file should go.
    """
    for path in writes:
        if path.is_dir():
            raise IsADirectoryError(
                f"write_all: writes must name files, got {str(path)!r}: a folder of that name exists"
            )
    # Short names of their own: the longest file name that a system takes has no room for an addition.
    parts = {path: path.with_name(f".{os.getpid()}-{number}.part") for number, path in enumerate(writes)}
    try:
        for path, write in writes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with parts[path].open("wb") as file:
                write(file)
        on_ready(tuple(writes))
        for path, part in parts.items():
            part.replace(path)
    except BaseException:  # Ctrl-C included
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise


def to_json(content: Any) -> str:
    """Standard JSON: infinities become strings and NaN null, which strict readers would refuse as numbers."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def picture_format(path: Path, *, video: bool = False) -> str:
    """PIL's name of the format that the ending of `path` stands for.

    Args:
        path: Where a picture will be written.
        video: Whether it has frames, which only some formats hold.

    Raises:
        ValueError: another ending, or a format without animation for a video.
    """
    Image.init()
    form = _FORMATS.get(path.suffix.lower(), "")
    if form not in Image.SAVE:  # some builds of PIL lack WebP
        raise ValueError(f"picture_format: out must end in .png, .jpg, .webp or .gif, got {str(path)!r}")
    if video and form not in Image.SAVE_ALL:
        raise ValueError(f"picture_format: out must end in .gif, .webp or .png for a video, got {str(path)!r}")
    return form


def write_picture(path: Path, image: NDArray[np.float32], *, on_ready: OnReady = lambda paths: None) -> Path:
    """Write an image, or the frames of a video as an animation.

    Args:
        path: Its ending tells the format.
        image: `[Y, X, C]` or `[T, Y, X, C]` in `[0, 1]`.
        on_ready: See `write_all`.

    Raises:
        ValueError: an ending that stands for no format, or a video for a format without animation.
    """
    video = image.ndim == 4
    form = picture_format(path, video=video)
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    first, *others = (Image.fromarray(frame) for frame in (pixels if video else pixels[None]))
    animated = {"save_all": True, "append_images": others, "duration": 1000 // _FRAMES_PER_SECOND, "loop": 0}
    options: dict[str, Any] = animated if video else {}
    write_all({path: lambda file: first.save(file, format=form, **options)}, on_ready=on_ready)
    return path


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
