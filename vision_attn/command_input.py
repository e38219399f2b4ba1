"""What a user typed, checked before any work: sizes, devices, folders to write to, modules to import.

Heavy imports stand inside the functions, as in `cli`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vision_attn.benchmark.generation import Request

DTYPES = ("float32", "float16", "bfloat16")
_LONGEST_SIDE = 16384  # four times the largest picture that a model here was made for


def spread(arguments: list[str]) -> list[str]:
    """`--ops a b` as `--ops a --ops b`: the parser knows options with one value only."""
    spread: list[str] = []
    option, waiting = "", False
    for argument in arguments:
        if argument.startswith("-"):
            if waiting:
                break
            waiting = argument in ("--ops", "--layers", "--kernels", "--head-dims", "--dtypes", "--methods")
            option = argument if waiting else ""
            spread += [] if waiting else [argument]
        else:
            spread += [option, argument] if option else [argument]
            waiting = False
    # An option that no value followed ends the line here, for the parser to complain about: it would take the next
    # option for the value.
    return [*spread, option] if waiting else spread


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """`"256x384"` as (rows, columns).

    Args:
        text: Height x width.
        option: Named in the error.

    Raises:
        ValueError: other text, a zero, or a side beyond 16384.
    """
    match = re.fullmatch(r"([1-9]\d*)[xX×]([1-9]\d*)", text.strip())
    if match is None:
        raise ValueError(f"{option} must be HEIGHTxWIDTH such as 256x384, got {text!r}")
    rows, columns = int(match[1]), int(match[2])
    if max(rows, columns) > _LONGEST_SIDE:
        raise ValueError(f"{option} must be at most {_LONGEST_SIDE} pixels on each side, got {text!r}")
    return rows, columns


def parse_axes(text: str, option: str) -> int | tuple[int, ...]:
    """`"16x8"` as (16, 8), `"16"` as 16; one to three numbers from 1.

    Raises:
        ValueError: other text.
    """
    numbers = re.split("[xX×]", text.strip())
    if not 1 <= len(numbers) <= 3 or not all(re.fullmatch(r"[1-9]\d{0,8}", number) for number in numbers):
        raise ValueError(f"{option} must be one to three whole numbers such as 8, 16x8 or 4x16x8, got {text!r}")
    return int(numbers[0]) if len(numbers) == 1 else tuple(map(int, numbers))


def parse_radius(text: str, option: str = "--radius") -> float | tuple[float, ...]:
    """`"8"` as 8.0, `"2x8x8"` as one radius per axis.

    Raises:
        ValueError: other text.
    """
    try:
        numbers = tuple(float(number) for number in re.split("[xX×]", text.strip()))
    except ValueError:
        raise ValueError(f"{option} must be numbers such as 8, 7.5 or 2x8x8, got {text!r}") from None
    return numbers[0] if len(numbers) == 1 else numbers


def require_writable(out: Path, *files: Path) -> None:
    """What cannot be written is found before the work, not after it; nothing is made yet.

    Args:
        out: As typed.
        files: What will be written, `out` itself or in it.
    """
    for path in files:
        try:
            taken = path.is_dir()
            _require_room(path.absolute())
        except OSError as error:
            raise ValueError(
                f"--out must be in a folder that can be written, got {str(out)!r}: no file can be made there "
                f"({error.strerror})"
            ) from error
        if taken:
            raise ValueError(f"--out must leave {path} free for a file, got {str(out)!r}: a folder has that name")


def _require_room(path: Path) -> None:
    """Raise OSError where no file `path` can be made; permissions alone do not tell (root, /proc, long names)."""
    folder = next(parent for parent in path.parents if parent.exists())
    for name in path.relative_to(folder).parts:
        with contextlib.suppress(FileNotFoundError):
            (folder / name).lstat()
    with tempfile.TemporaryFile(dir=folder):
        pass


def read_request(
    prompt: str | None, seed: int, size: str | None, steps: int | None, guidance: float | None, frames: int | None
) -> Request:
    """The request of these options; what was left out stays None.

    Raises:
        ValueError: a value out of range.
    """
    from vision_attn.benchmark.generation import Request

    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be 0 to 2**63 - 1, got {seed}")
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"--guidance must be a finite number, got {guidance}")
    height, width = (None, None) if size is None else parse_size(size)
    return Request(prompt, seed, height, width, steps, guidance, frames)


def load(model: str, request: Request, device: str, dtype: str) -> tuple[Any, Request]:
    """The pipeline, and the request with the model's own defaults in it.

    Raises:
        ValueError: no prompt, a size that the pipeline cannot draw, a device or dtype that is none.
        FileNotFoundError: no such model.
    """
    from vision_attn.benchmark.generation import check_size
    from vision_attn.pipelines.loading import load_pipeline, run_defaults

    request = request.filled_from(run_defaults(model))
    if request.prompt is None:
        raise ValueError(f"--prompt must be given, since {model!r} brings no example of its own")
    place = read_device(device)
    pipe = load_pipeline(model, device=place, dtype=read_dtype(dtype, place))
    check_size(pipe, request)
    return pipe, request


def read_device(name: str) -> torch.device:
    """The device of this name, tried; the first GPU, or the CPU, for an empty one.

    Raises:
        ValueError: no such device, or one that torch cannot compute on.
    """
    import torch

    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    without_gpu = device.type == "cuda" and not torch.cuda.is_available()
    if without_gpu or not _can_compute(device):
        reason = "torch sees no GPU" if without_gpu else "torch cannot compute on it"
        raise ValueError(f"--device must be one that this machine has, got {name!r}: {reason}, use cpu")
    return device


def _can_compute(device: torch.device) -> bool:
    import torch

    try:
        return bool(torch.zeros(1, device=device).cpu().eq(0).all())
    except (RuntimeError, AssertionError, ImportError):  # torch has no common error for a missing device
        return False


def read_backend(name: str) -> str:
    """A backend that can be used here, or `auto`.

    Raises:
        ValueError: an unknown one, or one that this machine cannot run.
    """
    import vision_attn as va

    table = va.backends()
    if name != "auto" and table.get(name) != "yes":
        why = f": {table[name]}" if name in table else ""
        usable = ["auto", *(known for known, state in table.items() if state == "yes")]
        raise ValueError(f"--backend must be one of {', '.join(usable)}, got {name!r}{why}")
    return name


def read_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; for an empty one float32 on the CPU and bfloat16 elsewhere.

    Raises:
        ValueError: not one of `DTYPES`.
    """
    import torch

    name = name or ("float32" if device.type == "cpu" else "bfloat16")
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, name)


def import_modules(modules: Sequence[str] | None) -> None:
    """Import what registers a user's operators: dotted names, also of the current folder, or .py files.

    Raises:
        ValueError: a module that is not there or fails.
    """
    for name in modules or ():
        try:
            _import_module(name)
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"--import must name a module or .py file that can be imported, got {name!r}: {problem}"
            ) from error


def _import_module(name: str) -> None:
    if not name.endswith(".py"):
        _make_importable(Path.cwd())
        importlib.import_module(name)
        return
    path = Path(name).expanduser().resolve(strict=True)
    _make_importable(path.parent)  # as `python path` does, for the file's own imports
    if path.stem in sys.modules:
        if getattr(sys.modules[path.stem], "__file__", None) != str(path):
            raise ImportError(f"the name {path.stem} is taken by a module that is imported already, rename the file")
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the ending tells it
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
