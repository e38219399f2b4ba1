"""The process around a command: its threads, what a user is told of an error, and progress on standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import typer

# Whatever typer builds on, a wrong option or value is a BadParameter or its base.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def restart_with_passive_threads() -> None:
    """Start this process again with threads that sleep while they wait, unless the user has decided already.

    OpenMP reads the variable when torch is loaded, which has happened. Spinning threads beside another busy process
    slowed code of many small operations down tenfold, so that timings said more about the machine than about the code.
    """
    if os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, "-m", "vision_attn.cli", *sys.argv[1:]])


def mistake(error: Exception) -> str | None:
    """What to tell the user; None for a bug, whose traceback is worth more.

    A mistake is one of the kinds that this package raises for what it was given (a bug may raise them as well), or more
    than the memory holds. VISION_ATTN_TRACEBACK=1 in the environment shows where it came from.
    """
    import vision_attn as va

    if _is_out_of_memory(error):
        return "out of memory: what was asked for needs more memory than there is: ask for a smaller size"
    kinds = (_UsageError, va.PatchError, ValueError, TypeError, ImportError, OSError, NotImplementedError)
    if not isinstance(error, kinds):
        return None
    return error.format_message() if hasattr(error, "format_message") else str(error)


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch has a class of its own for GPUs; on the CPU the text must tell. An error made of such a one counts too."""
    import torch

    here = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
    return here or (error.__cause__ is not None and _is_out_of_memory(error.__cause__))


@contextlib.contextmanager
def progress(total: int | None, unit: str) -> Iterator[Callable[[str], None]]:
    """A bar on standard error; gives the function that moves it on and names what was done."""
    from tqdm import tqdm

    pause = 0.1 if sys.stderr.isatty() else 10  # seconds: a log file needs no line per image
    with tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True, mininterval=pause) as bar:

        def on_run(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        yield on_run
